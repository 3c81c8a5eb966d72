// Commands through the official SDK.

import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { after, before, describe, test } from "node:test";
import { FileNotFoundError, SandboxError, isSuccess, stderrText, stdoutText } from "@tenkicloud/sandbox";
import { SMALL, bytes, client, eventually, readAll, rejection, shell, streamOf, text, unique } from "./lib/helpers.mjs";
import { sharedServer } from "./lib/server.mjs";

let server;
let tenki;
let session;
before(async () => {
  server = await sharedServer();
  tenki = client(server);
  session = await tenki.create({ ...SMALL, env: { FROM_SESSION: "session", BOTH: "session" } });
});
after(async () => {
  await session?.close();
  await tenki[Symbol.asyncDispose]();
  await server.remove();
});

const sha256 = (content) => createHash("sha256").update(content).digest("hex");
const alive = async (pid) => (await session.exec("/bin/sh", { args: ["-c", `kill -0 ${pid}`] })).exitCode === 0;

describe("exec", () => {
  test("gives both outputs, the exit code and what was run", async () => {
    const result = await session.exec("/bin/sh", { args: ["-c", "echo out; echo err >&2; exit 7"] });
    assert.equal(result.sessionId, session.id);
    assert.equal(result.command, "/bin/sh");
    assert.deepEqual(result.args, ["-c", "echo out; echo err >&2; exit 7"]);
    assert.equal(text(result.stdout), "out\n");
    assert.equal(text(result.stderr), "err\n");
    assert.equal(result.exitCode, 7);
    assert.equal(result.status, "FAILED");
    assert.ok(result.durationMs >= 0 && result.durationMs < 60_000);
  });

  test("success is success", async () => {
    const result = await session.exec("true");
    assert.ok(isSuccess(result.status));
    assert.deepEqual([result.exitCode, stdoutText(result), stderrText(result)], [0, "", ""]);
  });

  test("arguments arrive as they are, without a shell", async () => {
    const awkward = [" ", "a b", "$HOME", "*", "'\"\\", "new\nline", "長屋", "-n", "`id`"];
    const result = await session.exec("printf", { args: ["%s\\0", ...awkward] });
    assert.deepEqual(text(result.stdout).split("\0").slice(0, -1), awkward);
  });

  test("a long argument and many arguments pass", async () => {
    const long = "x".repeat(100_000);
    assert.equal(await shell(session, `printf %s '${long}' | wc -c`), "100000");
    const many = Array.from({ length: 5_000 }, (_, index) => String(index));
    const result = await session.exec("/bin/sh", { args: ["-c", "echo $#", "sh", ...many] });
    assert.equal(stdoutText(result), "5000");
  });

  test("the working directory is home; relative ones are under it, absolute ones taken as they are", async () => {
    await shell(session, "mkdir -p /home/tenki/project/deep");
    const where = async (cwd) => stdoutText(await session.exec("pwd", { cwd }));
    assert.equal(await where(undefined), "/home/tenki");
    assert.equal(await where("project/deep"), "/home/tenki/project/deep");
    assert.equal(await where("./project/../project"), "/home/tenki/project");
    assert.equal(await where("/tmp"), "/tmp");
    assert.equal(await where("/"), "/");
  });

  test("the command's environment lies over the session's, over the defaults", async () => {
    const line = 'echo "$FROM_SESSION|$BOTH|$OWN|$HOME|$USER|$PATH"';
    const result = await session.exec("/bin/sh", { args: ["-c", line], env: { BOTH: "command", OWN: "a=b c" } });
    const [fromSession, both, own, home, user, path] = stdoutText(result).split("|");
    assert.deepEqual([fromSession, both, own, home, user], ["session", "command", "a=b c", "/home/tenki", "tenki"]);
    assert.ok(path.split(":").includes("/usr/bin"));
    const moved = await session.exec("/bin/sh", { args: ["-c", 'echo "$HOME"'], env: { HOME: "/tmp" } });
    assert.equal(stdoutText(moved), "/tmp");
  });

  test("output is reported while it comes", async () => {
    const outputs = [];
    await session.exec("/bin/sh", {
      args: ["-c", "echo one; echo two >&2"],
      onOutput: ({ data, isStderr }) => outputs.push([isStderr, text(data)]),
    });
    assert.deepEqual(outputs.filter(([isStderr]) => !isStderr).map(([, data]) => data).join(""), "one\n");
    assert.deepEqual(outputs.filter(([isStderr]) => isStderr).map(([, data]) => data).join(""), "two\n");
  });

  test("stdin is empty", async () => {
    assert.equal((await session.exec("cat")).stdout.length, 0);
  });

  test("ten megabytes come back whole, on both outputs at once", async () => {
    const line = "head -c 10000000 /dev/zero | tr '\\0' a & head -c 10000000 /dev/zero | tr '\\0' b >&2; wait";
    const result = await session.exec("/bin/sh", { args: ["-c", line] });
    assert.equal(result.exitCode, 0);
    assert.equal(result.stdout.length, 10_000_000);
    assert.equal(result.stderr.length, 10_000_000);
    assert.ok(result.stdout.every((byte) => byte === 97) && result.stderr.every((byte) => byte === 98));
  });

  test("output is bytes, not text", async () => {
    const content = randomBytes(300_000);
    await session.writeFile("/tmp/bytes", content);
    const result = await session.exec("cat", { args: ["/tmp/bytes"] });
    assert.equal(sha256(result.stdout), sha256(content));
  });

  test("twenty at once do not mix", async () => {
    const results = await Promise.all(
      Array.from({ length: 20 }, (_, index) =>
        session.exec("/bin/sh", { args: ["-c", `for i in 1 2 3; do echo ${index}; done; exit ${index}`] })),
    );
    results.forEach((result, index) => {
      assert.equal(text(result.stdout), `${index}\n`.repeat(3));
      assert.equal(result.exitCode, index);
    });
  });

  test("a background child that keeps the output open keeps the command open", async () => {
    const result = await session.exec("/bin/sh", { args: ["-c", "(sleep 0.3; echo late) & echo early"] });
    assert.equal(text(result.stdout), "early\nlate\n");
  });

  test("a background child with its own output lives on", async () => {
    const pid = await shell(session, "sleep 600 >/dev/null 2>&1 </dev/null & echo $!");
    assert.ok(await alive(pid));
    await shell(session, `kill ${pid}`);
  });
});

describe("what cannot start", () => {
  test("a command that does not exist is not found, and nothing hangs", async () => {
    await rejection(session.exec("no-such-program"), FileNotFoundError);
    await rejection(session.exec("/no/such/program"), FileNotFoundError);
    const handle = session.run(["no-such-program"]);
    await rejection(handle.pid, FileNotFoundError);
    await rejection(Promise.resolve(handle), FileNotFoundError);
    await rejection(session.stream("no-such-program"), FileNotFoundError);
  });

  test("a missing working directory is not found; a file as one is an invalid argument", async () => {
    await rejection(session.exec("true", { cwd: "/templates/snapshots/missing volume" }), FileNotFoundError);
    await session.writeFile("/tmp/not-a-directory", "x");
    const error = await rejection(session.exec("true", { cwd: "/tmp/not-a-directory" }), SandboxError);
    assert.equal(error.cause.code, 3);
  });

  test("a file without permission to run is refused", async () => {
    await session.writeFile("/tmp/plain-text", "no program");
    const error = await session.exec("/tmp/plain-text").then(() => assert.fail("it ran"), (reason) => reason);
    assert.equal(error.cause.code, 7, error.message);
  });

  test("NUL bytes in arguments, environment or directory are invalid arguments", async () => {
    for (const attempt of [
      () => session.exec("echo", { args: ["a\0b"] }),
      () => session.exec("e\0cho"),
      () => session.exec("echo", { env: { A: "x\0y" } }),
      () => session.exec("echo", { env: { "A\0": "x" } }),
      () => session.exec("echo", { cwd: "/tmp\0" }),
    ]) {
      const error = await rejection(attempt(), SandboxError);
      assert.equal(error.cause.code, 3, error.message);
    }
  });
});

describe("users", () => {
  test("commands run as tenki, privileged ones as root of the sandbox", async () => {
    assert.equal(await shell(session, "id -u; id -g; id -un"), "1000\n1000\ntenki");
    assert.equal(await shell(session, 'id -u; echo "$HOME"', { privileged: true }), "0\n/root");
  });

  test("tenki cannot write what belongs to root", async () => {
    assert.equal((await session.exec("touch", { args: ["/etc/file"] })).exitCode, 1);
    await shell(session, "touch /home/tenki/of-root && chmod 600 /home/tenki/of-root", { privileged: true });
    assert.equal((await session.exec("cat", { args: ["of-root"] })).exitCode, 1);
  });
});

describe("run", () => {
  test("the handle gives the pid, and the result says how it ended", async () => {
    const handle = session.run(["/bin/sh", "-c", "echo $$; exit 3"]);
    const pid = await handle.pid;
    const result = await handle;
    assert.equal(text(result.stdout), `${pid}\n`);
    assert.equal(result.exitCode, 3);
    assert.equal(result.signal, undefined);
    assert.equal(result.reason, "exit");
    assert.ok(result.durationMs >= 0);
  });

  test("stdin written in pieces comes back", async () => {
    const handle = session.run(["cat"]);
    const writer = handle.stdin.getWriter();
    const reader = handle.stdout.getReader();
    for (const piece of ["one", "two"]) {
      await writer.write(bytes(piece));
      // The echo of each piece, before the next one is sent: nothing waits for more.
      assert.equal(text((await reader.read()).value), piece);
    }
    await writer.close();
    assert.equal((await handle).exitCode, 0);
  });

  test("a megabyte through stdin is the same megabyte", async () => {
    const content = randomBytes(1 << 20);
    const result = await session.run(["sha256sum"], { stdin: streamOf(content.subarray(0, 700_000), content.subarray(700_000)) });
    assert.equal(text(result.stdout).split(" ")[0], sha256(content));
  });

  test("a program that does not read its stdin ends all the same", async () => {
    const handle = session.run(["true"]);
    const writer = handle.stdin.getWriter();
    for (let count = 0; count < 20; count++) writer.write(new Uint8Array(100_000)).catch(() => {});
    assert.equal((await handle).exitCode, 0);
  });

  test("every signal arrives under its name", async () => {
    for (const name of ["TERM", "INT", "HUP", "USR1", "USR2"]) {
      const script = `trap 'echo got-${name}; exit 40' ${name}; echo set; while :; do sleep 0.05; done`;
      const handle = session.run(["/bin/sh", "-c", script]);
      const reader = handle.stdout.getReader();
      assert.equal(text((await reader.read()).value), "set\n");
      await handle.signal(name === "HUP" ? "SIGHUP" : name);
      const result = await handle;
      assert.equal(text(result.stdout), `set\ngot-${name}\n`);
      assert.equal(result.exitCode, 40);
    }
  });

  test("a signal works after stdin was closed", async () => {
    const handle = session.run(["sleep", "600"]);
    await handle.stdin.close();
    await handle.pid;
    await handle.signal("TERM");
    const result = await handle;
    assert.deepEqual([result.exitCode, result.signal, result.reason], [-1, "SIGTERM", "signaled"]);
  });

  test("kill ends what ignores everything else, with its children", async () => {
    const handle = session.run(["/bin/sh", "-c", "trap '' TERM INT HUP; sleep 600 & echo $!; wait; wait"]);
    const child = text((await handle.stdout.getReader().read()).value).trim();
    await handle.kill();
    const result = await handle;
    assert.deepEqual([result.exitCode, result.signal], [-1, "SIGKILL"]);
    await eventually("the child is dead too", async () => !(await alive(child)));
  });

  test("a process that a signal ends by itself says which", async () => {
    const result = await session.run(["/bin/sh", "-c", "kill -SEGV $$"]);
    assert.deepEqual([result.exitCode, result.signal, result.reason], [-1, "SIGSEGV", "signaled"]);
    assert.equal((await session.exec("/bin/sh", { args: ["-c", "kill -9 $$"] })).status, "FAILED");
  });
});

describe("stream", () => {
  test("output comes chunk by chunk, then null, then the result", async () => {
    const stream = await session.stream("/bin/sh", { args: ["-c", "echo out; echo err >&2; exit 5"] });
    const seen = { out: "", err: "" };
    for (let output; (output = await stream.next()) !== null; ) {
      seen[output.isStderr ? "err" : "out"] += text(output.data);
    }
    assert.deepEqual(seen, { out: "out\n", err: "err\n" });
    const result = await stream.wait();
    assert.deepEqual([result.exitCode, result.status], [5, "FAILED"]);
  });

  test("the first chunk arrives while the command still runs", async () => {
    const marker = unique("/tmp/go");
    const stream = await session.stream("/bin/sh", {
      args: ["-c", `echo waiting; until [ -e ${marker} ]; do sleep 0.02; done; echo done`],
    });
    assert.equal(text((await stream.next()).data), "waiting\n");
    await session.writeFile(marker, "");
    assert.equal(text((await stream.wait()).stdout), "waiting\ndone\n");
  });

  test("cancel kills the command", async () => {
    const stream = await session.stream("sleep", { args: ["600"] });
    stream.cancel();
    const result = await stream.wait();
    assert.equal(result.exitCode, -1);
  });

  test("a reader that stops does not stop other commands", async () => {
    const handle = session.run(["/bin/sh", "-c", "yes | head -c 30000000"]);
    await handle.stdout.getReader().read();
    assert.equal(await shell(session, "echo quick"), "quick");
    assert.equal((await handle).stdout.length, 30_000_000);
  });
});

describe("the machine inside", () => {
  test("shows the limits that were asked for", async () => {
    const machine = await tenki.create({ cpuCores: 1, memoryMb: 512, diskSizeGb: 6 });
    try {
      assert.equal(await shell(machine, "nproc"), "1");
      assert.equal(await shell(machine, "free -m | awk '/^Mem:/{print $2}'"), "512");
      const gigabytes = Number(await shell(machine, "df -B1 --output=size /home/tenki | tail -1")) / 2 ** 30;
      assert.ok(gigabytes > 5 && gigabytes <= 6, `${gigabytes} GiB`);
    } finally {
      await machine.close();
    }
  });

  test("a python program runs and its output comes back", async () => {
    await session.writeFile("program.py", "import sys\nprint(sum(range(10)), file=sys.stderr)\nprint('fine')\n");
    const result = await session.exec("python3", { args: ["program.py"] });
    assert.deepEqual([stdoutText(result), stderrText(result), result.exitCode], ["fine", "45", 0]);
  });

  test("too much memory ends the process with a stated reason, and the sandbox goes on", async () => {
    const machine = await tenki.create({ cpuCores: 1, memoryMb: 128 });
    try {
      const result = await machine.run(["tail", "/dev/zero"]);
      assert.deepEqual([result.exitCode, result.signal, result.reason], [-1, "SIGKILL", "out_of_memory"]);
      assert.equal(await shell(machine, "echo still here"), "still here");
    } finally {
      await machine.close();
    }
  });

  test("too many processes are refused inside, and the sandbox goes on", async () => {
    const machine = await tenki.create(SMALL);
    try {
      const bomb = machine.run(["/bin/bash", "-c", "bomb() { bomb | bomb & }; bomb; sleep 600"]);
      // Seen through the file API, which needs no new process.
      const processes = async () => (await machine.list("/proc")).filter(({ path }) => /^\d+$/.test(path)).length;
      await eventually("there are very many processes", async () => (await processes()) > 200);
      await machine.writeFile("during.txt", "usable");
      assert.equal(text(await machine.readFile("during.txt")), "usable");
      assert.equal(await shell(session, "echo the neighbour too"), "the neighbour too");
      await bomb.kill();
      await eventually("all of them are gone", async () => (await processes()) < 10);
      assert.equal(await shell(machine, "echo usable"), "usable");
    } finally {
      await machine.close();
    }
  });
});

test("reading outputs of a run handle directly ends with the command", async () => {
  const handle = session.run(["/bin/sh", "-c", "echo a; echo b >&2"]);
  handle.stdin.close().catch(() => {});
  assert.deepEqual([await readAll(handle.stdout), await readAll(handle.stderr)].map(String), ["a\n", "b\n"]);
  assert.equal((await handle).exitCode, 0);
});
