// Sessions that pause, resume, power themselves off, and are forked.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import {
  InvalidStateError, QuotaExceededError, ResumeFailedError, SandboxError, SessionNotFoundError, SessionTerminatedError,
} from "@tenkicloud/sandbox";
import { bearer, call, post, stream } from "./lib/connect.mjs";
import { useClient } from "./lib/fixtures.mjs";
import { SMALL, client, eventually, rejection, shell, text, unique } from "./lib/helpers.mjs";
import { OWN } from "./lib/rpcs.mjs";
import { Server } from "./lib/server.mjs";

const UNKNOWN = "01890000-0000-7000-8000-00000000dead";

let server;
let tenki;
useClient((made) => ({ server, tenki } = made));

const activeSessions = async (of = tenki) => (await of.getUsage()).find(({ key }) => key === "active_sessions").current;

/** Counts in a file, once a turn, for as long as it runs; answers with its process id. */
const startCounting = (session) =>
  shell(session, "nohup sh -c 'n=0; while :; do n=$((n+1)); echo $n > count; sleep 0.01; done' >/dev/null 2>&1 </dev/null & echo $!");
const count = async (session) => Number(await shell(session, "cat count"));
const isCounting = async (session) => (await shell(session, 'a=$(cat count); sleep 0.3; [ "$a" = "$(cat count)" ] || echo yes')) === "yes";

async function shutDown(session, command = "poweroff") {
  // The command ends with the sandbox, so that it may have no outcome.
  await session.run(["/bin/sh", "-c", command], { privileged: true }).then(() => {}, () => {});
  await eventually("the session is shut down", async () => {
    await session.refresh();
    return session.state === "USER_SHUTDOWN";
  });
}

describe("pause and resume", () => {
  test("processes and memory are as they were, and the session tells what happened", async () => {
    const session = await tenki.create({ ...SMALL, pauseRetentionMs: 3_600_000, maxDurationMs: 3_600_000 });
    try {
      const active = await activeSessions();
      const timeoutAt = session.timeoutAt.getTime();
      const pid = await startCounting(session);
      await eventually("it counts", async () => (await count(session).catch(() => 0)) > 3);
      await session.pause();
      assert.equal(session.state, "PAUSED");
      assert.ok(session.pausedAt instanceof Date);
      assert.equal(session.pauseExpiresAt.getTime() - session.pausedAt.getTime(), 3_600_000);
      assert.equal(session.pauseSnapshot.id, session.pauseSnapshotId);
      assert.deepEqual([session.pauseSnapshot.type, session.pauseSnapshot.state], ["PAUSE", "READY"]);
      assert.deepEqual(await tenki.getSnapshot(session.pauseSnapshotId), session.pauseSnapshot);
      assert.equal(await activeSessions(), active - 1, "paused sessions do not count");
      await session.pause();
      assert.equal(session.state, "PAUSED");

      await session.resume();
      await session.waitResumed();
      assert.equal(session.state, "RUNNING");
      assert.deepEqual([session.pausedAt, session.pauseSnapshotId, session.pauseSnapshot, session.pauseExpiresAt], [undefined, undefined, undefined, undefined]);
      assert.deepEqual([session.metadata.restore_mode, session.metadata.restore_degraded], ["memory", "false"]);
      assert.equal(session.metadata.restore_reason, undefined);
      assert.ok(session.timeoutAt.getTime() > timeoutAt, "the time of the pause is added to its life");
      await shell(session, `kill -0 ${pid}`);
      const before = await count(session);
      await eventually("it goes on counting", async () => (await count(session)) > before);
      await session.resume();
      assert.equal(session.state, "RUNNING", "resuming one that runs is no error");
    } finally {
      await session.close();
    }
  });

  test("while paused, work is refused as a wrong state at once, and ending it works", async () => {
    const session = await tenki.create(SMALL);
    await session.pause();
    const started = Date.now();
    const error = await rejection(session.exec("true"), InvalidStateError);
    assert.match(error.message, /state=PAUSED/);
    await rejection(session.readFile("x"), InvalidStateError);
    assert.ok(Date.now() - started < 10_000, "nobody waited for it to come back");
    assert.deepEqual((await call(server, "ListWorkspaceSandboxes", { state: "SESSION_STATE_PAUSED", pageSize: 100 })).sessions
      .filter(({ id }) => id === session.id).length, 1);
    await session.update({ name: "renamed while paused" });
    assert.deepEqual([session.name, session.state], ["renamed while paused", "PAUSED"]);
    await session.close();
    assert.equal(session.state, "TERMINATED");
    await rejection(session.pause(), SessionTerminatedError);
    await rejection(session.resume(), SessionTerminatedError);
  });

  test("many times in a row, and from several callers at once", async () => {
    const session = await tenki.create(SMALL);
    const other = await tenki.get(session.id);
    try {
      await shell(session, "echo kept > kept");
      for (let round = 0; round < 10; round++) {
        await Promise.all([session.pause(), other.pause()]);
        await Promise.all([session.resume(), other.resume()]);
        assert.deepEqual([session.state, other.state], ["RUNNING", "RUNNING"]);
      }
      // Whoever comes second, a wish that was accepted is fulfilled.
      await Promise.all([session.pause(), other.resume()].map((wish) => wish.catch(() => {})));
      await session.resume();
      assert.equal(await shell(session, "cat kept"), "kept");
    } finally {
      await session.close();
    }
  });

  test("a running command with a timeout has all of it after a pause", async () => {
    const session = await tenki.create(SMALL);
    try {
      const { execution } = await call(server, "ExecuteCommand", {
        sessionId: session.id, command: "/bin/sh", args: ["-c", "touch begun; until [ -e go ]; do sleep 0.02; done; exit 7"],
        timeout: "3s", streamOutput: true,
      });
      await eventually("it runs", async () => (await session.fs.stat("begun").catch(() => undefined)) !== undefined);
      await session.pause();
      // Longer than the command's timeout.
      await new Promise((resume) => setTimeout(resume, 3_500));
      await session.resume();
      await session.writeFile("go", "");
      const { messages } = await stream(server, "StreamCommandOutput", { sessionId: session.id, executionId: execution.id });
      assert.deepEqual([messages.at(-1).exitCode, messages.at(-1).timedOut], [7, undefined]);
    } finally {
      await session.close();
    }
  });

  test("an unknown session is not found", async () => {
    const session = await tenki.create({ ...SMALL, waitReady: false });
    await session.close();
    const ghost = Object.assign(Object.create(Object.getPrototypeOf(session)), session, { id: UNKNOWN });
    await rejection(ghost.pause(), SessionNotFoundError);
    await rejection(ghost.resume(), SessionNotFoundError);
  });
});

describe("poweroff", () => {
  for (const command of ["poweroff", "halt", "shutdown -h now", "shutdown now"]) {
    test(`${command} ends in USER_SHUTDOWN, and resume boots the same disk`, async () => {
      const session = await tenki.create(SMALL);
      try {
        await shell(session, "echo kept > kept");
        await shutDown(session, command);
        await rejection(session.exec("true"), InvalidStateError);
        await session.resume();
        await session.waitResumed();
        assert.equal(await shell(session, "cat kept"), "kept");
        const { restore_mode: mode, restore_degraded: degraded, restore_reason: reason } = session.metadata;
        assert.deepEqual([mode, degraded, reason], ["cold_boot", "false", "powered_off"]);
      } finally {
        await session.close();
      }
    });
  }
});

describe("time", () => {
  test("a paused session ends when its retention is over", async () => {
    const session = await tenki.create({ ...SMALL, pauseRetentionMs: 700 });
    await session.pause();
    await eventually("it has ended", async () => {
      await session.refresh();
      return session.state === "TERMINATED";
    });
    assert.match(session.terminalError, /retention/);
    await rejection(session.resume(), SessionTerminatedError);
  });

  test("the maximum duration stands still while it is paused", async () => {
    const session = await tenki.create({ ...SMALL, maxDurationMs: 2_500 });
    try {
      await session.pause();
      await new Promise((resume) => setTimeout(resume, 3_000));
      await session.refresh();
      assert.equal(session.state, "PAUSED");
      await session.resume();
      assert.equal(session.state, "RUNNING");
      await eventually("it has ended", async () => {
        await session.refresh();
        return session.state === "TERMINATED";
      });
      assert.match(session.terminalError, /maximum duration/);
    } finally {
      await session.close();
    }
  });
});

describe("fork", () => {
  const fork = (body, headers = bearer(server)) => post(server, OWN, "ForkSession", body, headers);

  test("forks have the disk, a fresh memory and an identity of their own", async () => {
    const session = await tenki.create({
      ...SMALL, name: "tree", env: { FROM: "source" }, metadata: { team: "red" }, tags: ["forked"], sticky: true,
    });
    const forks = [];
    try {
      await startCounting(session);
      await shell(session, "echo of the disk > kept && sync");
      for (const state of ["RUNNING", "PAUSED"]) {
        if (state === "PAUSED") await session.pause();
        const { status, body } = await fork({ sessionId: session.id, count: 2 });
        assert.equal(status, 200, JSON.stringify(body));
        assert.equal(body.memoryCarried, false);
        assert.deepEqual(body.sessions.map(({ name }) => name).sort(), ["tree-fork-1", "tree-fork-2"]);
        for (const { id } of body.sessions) {
          const made = await tenki.get(id);
          forks.push(made);
          await made.waitReady();
          assert.notEqual(made.id, session.id);
          assert.deepEqual([made.cpuCores, made.memoryMb, made.tags, made.metadata.team, made.sticky], [1, 512, ["forked"], "red", false]);
          assert.equal(await shell(made, 'cat kept; echo "$FROM"'), "of the disk\nsource");
          assert.ok(!(await isCounting(made)), "no process came along");
          await shell(made, "echo changed > kept");
        }
      }
      await session.resume();
      assert.equal(await shell(session, "cat kept"), "of the disk");
      assert.equal(new Set(forks.map(({ id }) => id)).size, 4);
    } finally {
      await Promise.all([session, ...forks].map((each) => each.close()));
    }
  });

  test("bad input is refused and makes nothing", async () => {
    const before = (await tenki.list()).length;
    for (const [status, body] of [
      [400, { sessionId: "x" }],
      [404, { sessionId: UNKNOWN }],
      [400, { sessionId: UNKNOWN, count: -1 }],
      [400, { sessionId: UNKNOWN, count: "many" }],
    ]) {
      assert.equal((await fork(body)).status, status, JSON.stringify(body));
    }
    assert.equal((await fork({ sessionId: UNKNOWN }, {})).status, 401);
    const session = await tenki.create(SMALL);
    assert.equal((await fork({ sessionId: session.id, count: 101 })).status, 400);
    assert.equal((await fork({ sessionId: session.id, name: "x".repeat(257) })).status, 400);
    await session.close();
    const ended = await fork({ sessionId: session.id });
    assert.deepEqual([ended.status, ended.body.code], [400, "failed_precondition"]);
    assert.match(ended.body.message, /terminated/);
    assert.equal((await tenki.list()).length, before);
  });
});

describe("settings of the workspace", () => {
  test("they are read, changed one by one, and cleared", async () => {
    const workspaceId = (await tenki.whoAmI()).workspaces[0].id;
    const { settings: before } = await call(server, "GetWorkspaceSandboxSettings", { workspaceId });
    assert.equal(before.workspaceId, workspaceId);
    const update = async (change) => (await call(server, "UpdateWorkspaceSandboxSettings", { workspaceId, ...change })).settings;
    try {
      const changed = await update({ pauseRetention: "3600s", snapshotRetention: "7200s", maxVolumes: 7, maxTotalBytes: "1099511627776" });
      assert.deepEqual([changed.pauseRetention, changed.snapshotRetention], ["3600s", "7200s"]);
      assert.deepEqual([changed.maxVolumes, changed.maxTotalBytes], [7, "1099511627776"]);
      const { settings: retention } = await call(server, "GetWorkspaceSnapshotRetentionSettings", { workspaceId });
      assert.deepEqual(retention, { workspaceId, pauseRetention: "3600s", snapshotRetention: "7200s" });
      const session = await tenki.create(SMALL);
      await session.pause();
      assert.equal(session.pauseExpiresAt.getTime() - session.pausedAt.getTime(), 3_600_000);
      await session.close();
      const less = await call(server, "UpdateWorkspaceSnapshotRetentionSettings", { workspaceId, clearPauseRetention: true });
      assert.deepEqual(less.settings, { workspaceId, snapshotRetention: "7200s" });
    } finally {
      const cleared = await update({
        clearPauseRetention: true, clearSnapshotRetention: true, clearMaxVolumes: true, clearMaxTotalBytes: true,
      });
      assert.deepEqual(cleared, { workspaceId });
    }
  });

  test("sticky sessions have a limit of their own", async () => {
    const workspaceId = (await tenki.whoAmI()).workspaces[0].id;
    await call(server, "UpdateWorkspaceSandboxSettings", { workspaceId, maxStickySessions: 1 });
    const sessions = [];
    try {
      sessions.push(await tenki.create({ ...SMALL, sticky: true }));
      await rejection(tenki.create({ ...SMALL, sticky: true }), QuotaExceededError);
      sessions.push(await tenki.create(SMALL));
      await rejection(sessions[1].update({ sticky: true }), QuotaExceededError);
    } finally {
      await call(server, "UpdateWorkspaceSandboxSettings", { workspaceId, clearMaxStickySessions: true });
      await Promise.all(sessions.map((each) => each.close()));
    }
  });

  test("bad input is refused", async () => {
    const workspaceId = (await tenki.whoAmI()).workspaces[0].id;
    for (const body of [
      { workspaceId: "x" }, { workspaceId, maxVolumes: 0 }, { workspaceId, maxSnapshots: -1 }, { workspaceId, pauseRetention: "0s" },
      { workspaceId, pauseRetention: "-1s" }, { workspaceId, maxVolumes: 1, clearMaxVolumes: true }, { workspaceId, maxTotalBytes: "0" },
    ]) {
      const answer = await post(server, "tenki.sandbox.v1.SandboxService", "UpdateWorkspaceSandboxSettings", body, bearer(server));
      assert.equal(answer.status, 400, JSON.stringify(body));
    }
    for (const method of ["GetWorkspaceSandboxSettings", "GetWorkspaceSnapshotRetentionSettings"]) {
      const answer = await post(server, "tenki.sandbox.v1.SandboxService", method, { workspaceId: UNKNOWN }, bearer(server));
      assert.equal(answer.status, 404);
    }
  });
});

describe("with a server of its own", () => {
  let own;
  before(async () => {
    own = await Server.start({
      configuration: "[engine]\nsessions_max = 2\npause_in_memory_max_ms = 300\n[pools]\nslots_ready = 2\nisolated_slots_ready = 1\n",
    });
  });
  after(() => own?.remove());

  test("a paused session gives its place away, and is refused until there is one again", async () => {
    const tenki = client(own);
    const [first, second] = [await tenki.create(SMALL), await tenki.create(SMALL)];
    await first.pause();
    const third = await tenki.create(SMALL);
    const error = await first.resume().then(() => assert.fail("resumed"), (reason) => reason);
    assert.ok(error instanceof SandboxError);
    assert.match(error.message, /sessions_max/);
    await first.refresh();
    assert.equal(first.state, "PAUSED");
    await third.close();
    await first.resume();
    assert.equal(first.state, "RUNNING");
    await Promise.all([first.close(), second.close()]);
    await tenki[Symbol.asyncDispose]();
  });

  test("after the time for memory only the disk is kept, and resume is a cold boot that says so", async () => {
    const tenki = client(own);
    const session = await tenki.create(SMALL);
    await startCounting(session);
    await eventually("it counts", async () => (await count(session).catch(() => 0)) > 3);
    await shell(session, "echo kept > kept");
    await session.pause();
    // The limit is 300 ms; the memory is given up soon after it.
    await new Promise((resume) => setTimeout(resume, 2_000));
    await session.resume();
    await session.waitResumed();
    const { restore_mode: mode, restore_degraded: degraded, restore_reason: reason } = session.metadata;
    assert.deepEqual([mode, degraded, reason], ["cold_boot", "true", "memory_time_limit"]);
    assert.equal(await shell(session, "cat kept"), "kept");
    assert.ok(!(await isCounting(session)), "its processes are gone");
    await session.close();
    await tenki[Symbol.asyncDispose]();
  });

  for (const [accident, end] of [["SIGTERM", () => own.stop()], ["kill -9", () => own.kill()]]) {
    test(`a paused session is there after ${accident}`, async () => {
      let tenki = client(own);
      const session = await tenki.create({ ...SMALL, name: unique("paused") });
      await shell(session, "echo kept > kept");
      await session.pause();
      await tenki[Symbol.asyncDispose]();
      await end();
      await own.restart();
      tenki = client(own);
      const again = await tenki.get(session.id);
      assert.deepEqual([again.state, again.name], ["PAUSED", session.name]);
      assert.equal(again.pauseSnapshotId, session.pauseSnapshotId);
      await again.resume();
      await again.waitResumed();
      assert.equal(text(await again.readFile("kept")), "kept\n");
      await again.close();
      await tenki[Symbol.asyncDispose]();
    });
  }

  test("a resume that cannot succeed is ResumeFailed with the reason, and the session is not lost", async () => {
    const tenki = client(own);
    const session = await tenki.create({ ...SMALL, cpuCores: 1 });
    await shell(session, "echo kept > kept");
    await shutDown(session);
    // Nothing can be booted while the disk is somewhere else.
    const { renameSync } = await import("node:fs");
    const disk = `${own.dataDir}/sandboxes/${session.id}/disk.ext4`;
    renameSync(disk, `${disk}.away`);
    try {
      await session.resume();
      const error = await rejection(session.waitResumed(20_000), ResumeFailedError);
      assert.ok(session.lastResumeError);
      assert.match(error.message, /reverted to PAUSED/);
    } finally {
      renameSync(`${disk}.away`, disk);
    }
    await session.resume();
    await session.waitResumed();
    assert.equal(session.lastResumeError, undefined);
    assert.equal(await shell(session, "cat kept"), "kept");
    await session.close();
    await tenki[Symbol.asyncDispose]();
  });
});
