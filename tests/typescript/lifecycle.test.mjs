// Sessions through the official SDK: made, looked at, changed, ended.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import {
  InvalidResourceConfigError, SandboxError, SessionNotFoundError, SessionTerminatedError, isReady, isTerminal,
} from "@tenkicloud/sandbox";
import { call } from "./lib/connect.mjs";
import { useClient } from "./lib/fixtures.mjs";
import { SMALL, eventually, rejection, shell, unique } from "./lib/helpers.mjs";

let server;
let tenki;
useClient((made) => ({ server, tenki } = made));

const activeSessions = async () => (await tenki.getUsage()).find(({ key }) => key === "active_sessions").current;

/** What every session tells of its driver, which the contract has no fields for. */
const DRIVER = { nagaya_driver: "namespace", nagaya_isolation: "shared kernel" };

describe("identity", () => {
  test("whoAmI names an owner and the workspace of the key", async () => {
    const identity = await tenki.whoAmI();
    // The key of a person.
    assert.equal(identity.ownerType, "USER");
    assert.ok(identity.ownerId);
    assert.equal(identity.workspaces.length, 1);
    assert.match(identity.workspaces[0].id, /^[0-9a-f-]{36}$/);
    assert.ok(identity.workspaces[0].name);
  });
});

describe("create", () => {
  test("without options gives a running sandbox of the default size", async () => {
    const session = await tenki.create();
    try {
      assert.match(session.id, /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}$/);
      assert.equal(session.state, "RUNNING");
      assert.ok(isReady(session.state) && !isTerminal(session.state));
      assert.deepEqual([session.cpuCores, session.memoryMb, session.diskSizeGb], [2, 4096, 5]);
      assert.equal(session.inboundEnabled, true);
      assert.equal(session.outboundEnabled, true);
      assert.equal(session.sticky, false);
      assert.deepEqual(session.tags, []);
      assert.deepEqual({ ...session.metadata }, DRIVER);
      assert.deepEqual(session.volumeMounts, []);
      assert.equal(session.terminalError, undefined);
      assert.equal(session.workspaceId, (await tenki.whoAmI()).workspaces[0].id);
      assert.equal(await shell(session, "echo ready"), "ready");
    } finally {
      await session.close();
    }
  });

  test("keeps every option, and get shows the same", async () => {
    const name = unique("options");
    const started = Date.now();
    const session = await tenki.create({
      workspaceId: (await tenki.whoAmI()).workspaces[0].id,
      name,
      allowInbound: false,
      allowOutbound: false,
      maxDurationMs: 600_000,
      idleTimeoutMinutes: 7,
      pauseRetentionMs: 86_400_500,
      cpuCores: 1,
      memoryMb: 514,
      diskSizeGb: 6,
      metadata: { purpose: "conformance", "Key With Spaces": "値 = \"x\"\n", empty: "" },
      tags: [" Team:Blue ", "v1.2", ""],
      env: { GREETING: "hello world", EMPTY: "" },
      sshAuthorizedKeys: ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE7pTLM3GLPNmOW3XHcFpYCQHbdVJ4FzNJBqFm5ZUPYe me"],
      setupEnv: {},
      openCodeProvider: { apiKey: "oc-key", baseUrl: "http://model", npm: "@x/y" },
      githubToken: " gh-token ",
      sticky: true,
    });
    try {
      for (const seen of [session, await tenki.get(session.id)]) {
        assert.equal(seen.name, name);
        assert.equal(seen.state, "RUNNING");
        assert.equal(seen.inboundEnabled, false);
        assert.equal(seen.outboundEnabled, false);
        assert.equal(seen.idleTimeoutMinutes, 7);
        assert.equal(seen.pauseRetentionMs, 86_400_500);
        assert.deepEqual([seen.cpuCores, seen.memoryMb, seen.diskSizeGb], [1, 514, 6]);
        assert.deepEqual({ ...seen.metadata }, { purpose: "conformance", "Key With Spaces": "値 = \"x\"\n", empty: "", ...DRIVER });
        assert.deepEqual(seen.tags, ["team:blue", "v1.2"]);
        assert.equal(seen.sticky, true);
        assert.ok(seen.lastActivityAt.getTime() >= started - 1_000);
        const life = seen.timeoutAt.getTime() - started;
        assert.ok(life > 595_000 && life < 660_000, `ends ${life} ms after the call`);
      }
      assert.equal(
        await shell(session, 'echo "$GREETING|${EMPTY-unset}|$GH_TOKEN|$GIT_TOKEN|$OPENCODE_API_KEY|$OPENCODE_PROVIDER_NPM"'),
        "hello world||gh-token|gh-token|oc-key|@x/y",
      );
    } finally {
      await session.close();
    }
  });

  test("idle timeout 0 stays a present value", async () => {
    const session = await tenki.create({ ...SMALL, idleTimeoutMinutes: 0, waitReady: false });
    try {
      assert.equal((await tenki.get(session.id)).idleTimeoutMinutes, 0);
    } finally {
      await session.close();
    }
  });

  test("the default image may be named, and then the server chooses the size", async () => {
    const session = await tenki.create({ image: "sandbox" });
    try {
      assert.deepEqual([session.cpuCores, session.memoryMb, session.diskSizeGb], [2, 4096, 5]);
      assert.equal(session.state, "RUNNING");
    } finally {
      await session.close();
    }
  });

  test("createAndWait and waitForRuntime answer with a running sandbox", async () => {
    for (const session of [
      await tenki.createAndWait({ ...SMALL, timeoutMs: 60_000 }),
      await tenki.create({ ...SMALL, waitForRuntime: true }),
    ]) {
      assert.equal(session.state, "RUNNING");
      await session.close();
    }
  });

  test("without waiting, waitReady gives a usable sandbox afterwards", async () => {
    const session = await tenki.create({ ...SMALL, waitReady: false });
    try {
      assert.match(session.state, /^(CREATING|RUNNING)$/);
      await session.waitReady();
      assert.equal(session.state, "RUNNING");
      // Twice is no different.
      await session.waitReady(10_000);
      assert.equal(await shell(session, "echo usable"), "usable");
    } finally {
      await session.close();
    }
  });

  test("without waiting, the first command waits by itself", async () => {
    const session = await tenki.create({ ...SMALL, waitReady: false });
    try {
      assert.equal(await shell(session, "echo at once"), "at once");
    } finally {
      await session.close();
    }
  });

  test("ten at once are ten different running sandboxes", async () => {
    const sessions = await Promise.all(Array.from({ length: 10 }, () => tenki.create({ ...SMALL, memoryMb: 128 })));
    try {
      assert.equal(new Set(sessions.map(({ id }) => id)).size, 10);
      const answers = await Promise.all(sessions.map((session) => shell(session, `echo ${session.id}`)));
      assert.deepEqual(answers, sessions.map(({ id }) => id));
    } finally {
      await Promise.all(sessions.map((session) => session.close()));
    }
  });

  test("what is not built yet is refused by name and creates nothing", async () => {
    const before = await activeSessions();
    const id = "01890000-0000-7000-8000-000000000000";
    for (const [word, options] of [
      ["template_spec_id", { fromTemplateSpec: id }],
      ["clone_repo_url", { cloneRepoUrl: "https://example.com/repository.git" }],
      ["enable_opencode", { enableOpenCode: true }],
    ]) {
      const error = await rejection(tenki.create(options), SandboxError);
      assert.ok([3, 12].includes(error.cause.code), `${word}: ${error.message}`);
      assert.match(error.message, new RegExp(word));
    }
    assert.equal(await activeSessions(), before);
  });

  test("a machine out of range is refused by the SDK itself", async () => {
    await rejection(tenki.create({ cpuCores: 17 }), InvalidResourceConfigError);
  });
});

describe("get and refresh", () => {
  test("an unknown session is not found, a malformed id is an invalid argument", async () => {
    await rejection(tenki.get("01890000-0000-7000-8000-00000000dead"), SessionNotFoundError);
    const error = await rejection(tenki.get("no-uuid"), SandboxError);
    assert.equal(error.cause.code, 3);
  });

  test("a handle from get runs commands, and refresh sees what others did", async () => {
    const session = await tenki.create(SMALL);
    const other = await tenki.get(session.id);
    assert.equal(await shell(other, "echo from another handle"), "from another handle");
    const name = unique("renamed");
    await other.update({ name });
    await session.refresh();
    assert.equal(session.name, name);
    await other.close();
    await session.refresh();
    assert.equal(session.state, "TERMINATED");
  });
});

describe("update, tags and extend", () => {
  test("each field changes alone, and clearing tags clears them", async () => {
    const session = await tenki.create({ ...SMALL, name: "before", tags: ["a"], waitReady: false });
    try {
      await session.update({ name: "after" });
      assert.deepEqual([session.name, session.tags, session.sticky], ["after", ["a"], false]);
      await session.update({ sticky: true });
      assert.deepEqual([session.name, session.tags, session.sticky], ["after", ["a"], true]);
      await session.updateTags([" B ", "c:1"]);
      assert.deepEqual([session.name, session.tags, session.sticky], ["after", ["b", "c:1"], true]);
      await session.update({ sticky: false, name: "" });
      assert.deepEqual([session.name, session.tags, session.sticky], ["", ["b", "c:1"], false]);
      await session.updateTags([]);
      assert.deepEqual((await tenki.get(session.id)).tags, []);
    } finally {
      await session.close();
    }
  });

  test("a maximum duration set later counts from the creation", async () => {
    const session = await tenki.create({ ...SMALL, waitReady: false });
    try {
      const updated = await tenki.updateSession(session.id, { maxDurationMs: 3_600_000 });
      const { session: record } = await call(server, "GetSession", { sessionId: session.id });
      assert.equal(updated.timeoutAt.getTime() - Date.parse(record.createdAt), 3_600_000);
    } finally {
      await session.close();
    }
  });

  test("extend moves the end by exactly what was asked, and gives none to a session without", async () => {
    const session = await tenki.create({ ...SMALL, maxDurationMs: 600_000, waitReady: false });
    const endless = await tenki.create({ ...SMALL, waitReady: false });
    try {
      const end = session.timeoutAt.getTime();
      await session.extend(90_000);
      assert.equal(session.timeoutAt.getTime(), end + 90_000);
      await endless.extend(120_000);
      // The SDK takes an end that is not there for the beginning of time.
      assert.equal(endless.timeoutAt?.getTime() ?? 0, 0);
    } finally {
      await session.close();
      await endless.close();
    }
  });
});

describe("the end", () => {
  test("close ends the sandbox, and repeating it is fine", async () => {
    const session = await tenki.create(SMALL);
    await session.close();
    assert.equal(session.state, "TERMINATED");
    await session.close();
    await session.closeIfOpen();
    await (await tenki.get(session.id)).close();
    assert.equal((await tenki.get(session.id)).state, "TERMINATED");
  });

  test("a closed session refuses work as terminated", async () => {
    const session = await tenki.create({ ...SMALL, name: "ssh volume template snapshot" });
    await session.close();
    await rejection(session.exec("true"), SessionTerminatedError);
    await rejection(session.readFile("x"), SessionTerminatedError);
    await rejection(session.extend(1_000), SessionTerminatedError);
  });

  test("closing while it is being created works", async () => {
    const sessions = await Promise.all(
      Array.from({ length: 5 }, async () => {
        const session = await tenki.create({ ...SMALL, waitReady: false });
        await session.close();
        return session;
      }),
    );
    for (const session of sessions) assert.equal((await tenki.get(session.id)).state, "TERMINATED");
  });

  test("a handle that goes out of scope closes its session", async () => {
    const session = await tenki.create({ ...SMALL, waitReady: false });
    await session[Symbol.asyncDispose]();
    assert.equal((await tenki.get(session.id)).state, "TERMINATED");
  });

  test("a session ends by itself when its maximum duration is over", async () => {
    const session = await tenki.create({ ...SMALL, maxDurationMs: 1_500 });
    await eventually("the session has ended", async () => {
      await session.refresh();
      return session.state === "TERMINATED";
    });
    assert.match(session.terminalError, /maximum duration/);
    await rejection(session.exec("true"), SessionTerminatedError);
  });

  test("usage counts the sessions that are alive", async () => {
    const before = await activeSessions();
    const session = await tenki.create({ ...SMALL, waitReady: false });
    assert.equal(await activeSessions(), before + 1);
    const usage = (await tenki.getUsage()).find(({ key }) => key === "active_sessions");
    assert.equal(usage.unit, "count");
    assert.ok(usage.label);
    await session.close();
    assert.equal(await activeSessions(), before);
  });

  test("many are ended with one call that names what could not be", async () => {
    const sessions = await Promise.all([1, 2, 3].map(() => tenki.create({ ...SMALL, waitReady: false })));
    const unknown = "01890000-0000-7000-8000-00000000dead";
    const answer = await call(server, "TerminateSessions", { sessionIds: [...sessions.map(({ id }) => id), unknown] });
    assert.deepEqual(answer.sessions.map(({ id }) => id).sort(), sessions.map(({ id }) => id).sort());
    assert.ok(answer.sessions.every(({ state }) => state === "SESSION_STATE_TERMINATED"));
    assert.deepEqual(answer.failures.map(({ sessionId }) => sessionId), [unknown]);
    assert.match(answer.failures[0].message, /not found/);
  });
});
