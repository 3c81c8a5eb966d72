// Git through the official SDK, on a repository that lies in the sandbox itself.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { GitOperationFailedError, SandboxError } from "@tenkicloud/sandbox";
import { SMALL, client, rejection, shell } from "./lib/helpers.mjs";
import { bearer, call, post, refused } from "./lib/connect.mjs";
import { GrpcConnection } from "./lib/grpc.mjs";
import { message } from "./lib/protobuf.mjs";
import { CONTROL, OWN } from "./lib/rpcs.mjs";
import { sharedServer } from "./lib/server.mjs";

let server;
let tenki;
let session;
before(async () => {
  server = await sharedServer();
  tenki = client(server);
  session = await tenki.create({ ...SMALL, allowOutbound: false });
  await shell(session, "git config --global user.name t && git config --global user.email t@example.com && git config --global init.defaultBranch main");
  // An upstream with two commits, a branch, and a pull request, as hosts of repositories keep them.
  await shell(
    session,
    `git init -q --bare /tmp/upstream.git && git init -q /tmp/work && cd /tmp/work &&
     echo one > file && git add file && git commit -qm first &&
     echo two >> file && git commit -qam second &&
     git push -q /tmp/upstream.git HEAD:main HEAD~1:refs/heads/old &&
     echo three >> file && git commit -qam 'from a stranger' && git push -q /tmp/upstream.git HEAD:refs/pull/7/head &&
     git -C /tmp/upstream.git symbolic-ref HEAD refs/heads/main`,
  );
});
after(async () => {
  await session?.close();
  await tenki[Symbol.asyncDispose]();
  await server.remove();
});

const REPOSITORY = "file:///tmp/upstream.git";

describe("git", () => {
  test("clones into a directory of its own name, as the sandbox's user", async () => {
    await session.git.clone(REPOSITORY);
    assert.equal(await shell(session, "stat -c %U upstream/file && cat upstream/file"), "tenki\none\ntwo");
  });

  test("clones a branch, a directory and a depth", async () => {
    await session.git.clone(REPOSITORY, { branch: "old", depth: 1, directory: "clones/old" });
    assert.equal(await shell(session, "cat clones/old/file && git -C clones/old rev-list --count HEAD"), "one\n1");
  });

  test("a repository that is not there is a typed failure with git's words", async () => {
    const error = await rejection(session.git.clone("file:///tmp/nowhere.git"), GitOperationFailedError);
    assert.equal(error.exitCode, 128);
    assert.match(error.stderr, /does not appear to be a git repository|does not exist/);
    assert.equal(error.retryable, false);
  });

  test("a host that cannot be resolved is worth another try", async () => {
    const error = await rejection(session.git.clone("https://nowhere.invalid/x.git"), GitOperationFailedError);
    assert.match(error.stderr, /Could not resolve host/);
    assert.equal(error.retryable, true);
  });

  // Git prints its whole manual of options, 5 KB of it: three times that in the header fields of gRPC.
  test("a failure that is told at length fits into gRPC's header fields, and the session remembers all of it", async () => {
    const connection = new GrpcConnection(server.endpoint, bearer(server));
    const asked = connection.open(CONTROL, "GitOperation");
    let bytes = 0;
    const count = (fields) => {
      for (const [name, value] of Object.entries(fields)) bytes += name.length + String(value).length;
    };
    asked.stream.on("response", count).on("trailers", count);
    asked.send(message([1, session.id], [2, "diff"]));
    asked.end();
    const { status, message: text } = await asked.finished();
    connection.close();
    assert.equal(status, 9);
    assert.match(text, /^git diff failed \(exit_code=129\).*… \(cut here: the whole is too long for an answer\) \[git_failed\]$/s);
    assert.ok(bytes < 7 * 1024, `${bytes} bytes of header fields`);
    // The SDK reads the exit code out of it.
    assert.equal((await rejection(session.git.diff(), GitOperationFailedError)).exitCode, 129);
    const told = await post(server, OWN, "ListSessionEvents", { sessionId: session.id }, bearer(server));
    const event = told.body.events.findLast(({ kind }) => kind === "git_failed");
    assert.ok(event.details.said.length > 4_000 && event.summary.includes(event.details.said.slice(-60)), event.summary);
  });

  test("options in the place of values are refused before git runs", async () => {
    for (const repo of ["--upload-pack=touch /tmp/owned", "-u"]) {
      await rejection(session.git.clone(repo), SandboxError);
    }
    await rejection(session.git.clone(REPOSITORY, { directory: "--template=/tmp" }), SandboxError);
    await rejection(session.git.checkout("--orphan"), SandboxError);
    await rejection(session.git.log({ range: "--output=/tmp/owned" }), SandboxError);
    assert.equal(await shell(session, "test -e /tmp/owned || echo safe"), "safe");
  });

  test("shell characters are only characters", async () => {
    const error = await rejection(session.git.clone("/tmp/$(touch /tmp/owned);`touch /tmp/owned`"), GitOperationFailedError);
    assert.match(error.stderr, /does not exist/);
    assert.equal(await shell(session, "test -e /tmp/owned || echo safe"), "safe");
  });

  test("an operation or an argument that is not known is refused", async () => {
    const id = session.id;
    for (const body of [
      { operation: "push", args: {} },
      { operation: "clone", args: {} },
      { operation: "clone", args: { repo: REPOSITORY, force: "true" } },
      { operation: "log", args: { max_count: "many" } },
    ]) {
      await refused(server, "GitOperation", { sessionId: id, ...body }, "invalid_argument");
    }
  });
});

describe("git in the home directory", () => {
  before(async () => {
    // The operations without a directory work in the home directory.
    await shell(session, `cd && git init -q && git remote add origin ${REPOSITORY} && git pull -q origin main`);
  });

  test("log tells commits, limited and of a path", async () => {
    assert.match(await session.git.log(), /second[\s\S]*first/);
    const one = await session.git.log({ maxCount: 1 });
    assert.ok(one.includes("second") && !one.includes("first"), one);
    assert.match(await session.git.log({ range: "HEAD~1", path: "file" }), /first/);
    assert.equal(await session.git.log({ path: "nothing" }), "");
  });

  test("diff tells changes of the work tree and between commits, without colours", async () => {
    assert.equal(await session.git.diff(), "");
    await session.writeFile("file", "one\ntwo\nchanged\n");
    assert.match(await session.git.diff(), /^diff --git a\/file b\/file[\s\S]*\n\+changed\n$/);
    await shell(session, "git checkout -q file");
    assert.match(await session.git.diff({ base: "HEAD~1", head: "HEAD" }), /\n\+two\n/);
    assert.match(await session.git.diff({ range: "HEAD~1..HEAD", path: "file" }), /\n\+two\n/);
  });

  test("checkout makes a branch, and goes back", async () => {
    await session.git.checkout("topic", { create: true });
    assert.equal(await shell(session, "git branch --show-current"), "topic");
    await session.git.checkout("HEAD~1");
    assert.equal(await shell(session, "cat file"), "one");
    await session.git.checkout("topic");
    const error = await rejection(session.git.checkout("no-such-branch"), GitOperationFailedError);
    assert.equal(error.exitCode, 1);
    assert.match(error.stderr, /pathspec 'no-such-branch' did not match any/);
  });

  test("a pull request is fetched and checked out", async () => {
    await session.git.fetchPR(7);
    assert.equal(await shell(session, "git branch --show-current && tail -1 file"), "pr-7\nthree");
  });

  test("a large diff is cut, and says so", async () => {
    await shell(session, "yes 'a line of sixteen' | head -c 3000000 > large && git add large");
    const answer = await call(server, "GitOperation", { sessionId: session.id, operation: "diff", args: { base: "HEAD" } });
    assert.match(answer.output, /\[cut after \d+ bytes\]\n$/);
    assert.ok(answer.output.length < 2_200_000);
  });
});
