// Snapshots: taken, listed, restored, fetched, deleted.

import assert from "node:assert/strict";
import { rmSync, statSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import {
  InvalidStateError, SandboxError, SessionNotFoundError, SessionTerminatedError, SnapshotNotFoundError,
} from "@tenkicloud/sandbox";
import { call, refused } from "./lib/connect.mjs";
import { SMALL, client, eventually, rejection, shell, unique } from "./lib/helpers.mjs";
import { Server, sharedServer } from "./lib/server.mjs";

const UNKNOWN = "01890000-0000-7000-8000-00000000dead";

let server;
let tenki;
let source;
before(async () => {
  server = await sharedServer();
  tenki = client(server);
  source = await tenki.create({ ...SMALL, diskSizeGb: 6, env: { KEPT: "yes", OVER: "source" } });
  await shell(source, "echo content > file; mkdir -p deep/er; head -c 3000000 /dev/urandom > deep/er/random; ln -s file link");
});
after(async () => {
  await source?.close();
  await tenki[Symbol.asyncDispose]();
  await server.remove();
});

const invalid = async (promise) => assert.equal((await rejection(promise, SandboxError)).cause.code, 3);
const sum = (session) => shell(session, "cat file deep/er/random link | sha256sum");

describe("taking one", () => {
  test("the answer is READY and durable, and tells what a session made from it inherits", async () => {
    const name = unique("ready");
    const expiresAt = new Date(Math.floor(Date.now() / 1000) * 1000 + 3_600_000);
    const snapshot = await tenki.createSnapshot(source.id, { name, expiresAt });
    assert.deepEqual([snapshot.state, snapshot.type, snapshot.name], ["READY", "USER", name]);
    assert.deepEqual([snapshot.sessionId, snapshot.workspaceId], [source.id, source.workspaceId]);
    assert.deepEqual([snapshot.cpuCores, snapshot.memoryMb, snapshot.diskSizeGb], [1, 512, 6]);
    assert.equal(snapshot.expiresAt.getTime(), expiresAt.getTime());
    assert.ok(snapshot.sizeBytes > 3_000_000 && snapshot.compressedBytes > 3_000_000, JSON.stringify(snapshot));
    assert.ok(Math.abs(snapshot.createdAt.getTime() - Date.now()) < 60_000);
    assert.equal(snapshot.rawImageAvailable, true);
    assert.deepEqual(await tenki.getSnapshot(snapshot.id), snapshot);
    const { snapshot: record } = await call(server, "GetSnapshot", { snapshotId: snapshot.id });
    assert.deepEqual([record.durabilityState, record.restoreMode, record.baseImageId], ["SNAPSHOT_DURABILITY_STATE_DURABLE", "COLD_BOOT", "sandbox"]);
    assert.equal((await tenki.deleteSnapshot(snapshot.id)).state, "DELETED");
  });

  test("asynchronously, and waited for", async () => {
    const snapshot = await tenki.createSnapshotAsync(source.id, { name: "async" });
    assert.match(snapshot.state, /^(CREATING|READY)$/);
    assert.equal((await tenki.waitSnapshotReady(snapshot.id, 30_000)).state, "READY");
    const second = await tenki.createSnapshotAndWait(source.id, { async: true, timeoutMs: 30_000 });
    assert.equal(second.state, "READY");
    await Promise.all([snapshot, second].map(({ id }) => tenki.deleteSnapshot(id)));
  });

  test("of a paused session it works, and the session stays paused", async () => {
    const session = await tenki.create(SMALL);
    await shell(session, "echo paused > state");
    await session.pause();
    const snapshot = await tenki.createSnapshot(session.id);
    assert.equal(snapshot.state, "READY");
    await session.refresh();
    assert.equal(session.state, "PAUSED");
    const copy = await tenki.create({ snapshotId: snapshot.id });
    assert.equal(await shell(copy, "cat state"), "paused");
    await Promise.all([session.close(), copy.close()]);
    await tenki.deleteSnapshot(snapshot.id);
  });

  test("while the source writes, the source goes on and the copy is one moment of it", async () => {
    const session = await tenki.create(SMALL);
    await shell(session, "nohup sh -c 'n=0; while :; do n=$((n+1)); echo $n >> log; done' >/dev/null 2>&1 </dev/null & sleep 0.2");
    const snapshot = await tenki.createSnapshot(session.id);
    const then = Number(await shell(session, "tail -n 1 log"));
    await eventually("it goes on", async () => Number(await shell(session, "tail -n 1 log")) > then);
    const copy = await tenki.create({ snapshotId: snapshot.id });
    // Every line from 1 to the last one, none missing, none twice.
    const [lines, last] = (await shell(copy, "wc -l < log; tail -n 1 log")).split("\n").map(Number);
    assert.ok(lines > 0 && last >= lines - 1, `${lines} lines, the last is ${last}`);
    assert.equal(await shell(copy, `head -n ${lines} log | awk '$1 != NR' | head -n 1`), "");
    await Promise.all([session.close(), copy.close()]);
    await tenki.deleteSnapshot(snapshot.id);
  });
});

describe("restoring", () => {
  test("a session made from it has the disk, and inherits what it does not say itself", async () => {
    const snapshot = await tenki.createSnapshot(source.id);
    const expected = await sum(source);
    const copy = await tenki.create({ snapshotId: snapshot.id });
    const other = await tenki.create({ snapshotId: snapshot.id, cpuCores: 2, memoryMb: 256, diskSizeGb: 7, env: { OVER: "own" } });
    try {
      assert.deepEqual([copy.cpuCores, copy.memoryMb, copy.diskSizeGb], [1, 512, 6]);
      assert.equal(copy.sourceSnapshotId, snapshot.id);
      assert.equal((await call(server, "GetSession", { sessionId: copy.id })).session.snapshotId, snapshot.id);
      assert.equal(await sum(copy), expected);
      assert.equal(await shell(copy, 'echo "$KEPT $OVER"'), "yes source");
      assert.deepEqual([other.cpuCores, other.memoryMb, other.diskSizeGb], [2, 256, 7]);
      assert.equal(await sum(other), expected);
      assert.equal(await shell(other, 'echo "$KEPT $OVER"'), "yes own");
      assert.equal(await shell(other, "nproc"), "2");
      const blocks = async (session) => Number(await shell(session, "df -k --output=size / | tail -n 1"));
      assert.ok((await blocks(other)) > (await blocks(copy)) + 900_000, "the larger disk can be used");
      await shell(copy, "echo changed > file");
      assert.equal(await sum(other), expected, "copies share nothing that is written");
      assert.equal(await sum(source), expected);
    } finally {
      await Promise.all([copy.close(), other.close()]);
      await tenki.deleteSnapshot(snapshot.id);
    }
  });

  test("from the snapshot of a pause, which goes with the pause", async () => {
    const session = await tenki.create(SMALL);
    await shell(session, "echo paused > state");
    await session.pause();
    const { pauseSnapshotId } = session;
    await rejection(tenki.deleteSnapshot(pauseSnapshotId), InvalidStateError);
    const copy = await tenki.create({ snapshotId: pauseSnapshotId });
    assert.equal(await shell(copy, "cat state"), "paused");
    await session.resume();
    await rejection(tenki.getSnapshot(pauseSnapshotId), SnapshotNotFoundError);
    await Promise.all([session.close(), copy.close()]);
  });

  test("a smaller disk, a second source, and snapshots that are gone are refused and make nothing", async () => {
    const snapshot = await tenki.createSnapshot(source.id);
    const before = (await tenki.list()).length;
    await invalid(tenki.create({ snapshotId: snapshot.id, diskSizeGb: 5 }));
    await assert.rejects(tenki.create({ snapshotId: snapshot.id, image: "sandbox" }), /Only one of/);
    await refused(server, "CreateSession", { ownerId: "self", ownerType: "SERVICE", snapshotId: snapshot.id, registryRef: "sandbox" }, "invalid_argument");
    await tenki.deleteSnapshot(snapshot.id);
    for (const snapshotId of [snapshot.id, UNKNOWN]) await rejection(tenki.create({ snapshotId }), SnapshotNotFoundError);
    await invalid(tenki.create({ snapshotId: "x" }));
    assert.equal((await tenki.list()).length, before);
  });

  test("an expired snapshot is gone", async () => {
    const snapshot = await tenki.createSnapshot(source.id, { expiresAt: new Date(Date.now() + 1_500) });
    await new Promise((resume) => setTimeout(resume, 1_600));
    await rejection(tenki.create({ snapshotId: snapshot.id }), SnapshotNotFoundError);
    await eventually("it is deleted", () => tenki.getSnapshot(snapshot.id).then(() => false, (error) => error instanceof SnapshotNotFoundError));
  });
});

describe("looking at them", () => {
  test("all five lists page, and each shows what it is for", async () => {
    const session = await tenki.create(SMALL);
    const mine = [];
    for (let count = 0; count < 3; count++) mine.push((await tenki.createSnapshot(session.id)).id);
    const other = await tenki.createSnapshot(source.id);
    const ids = (snapshots) => snapshots.map(({ id }) => id);
    assert.deepEqual(ids(await tenki.listSessionSnapshots(session.id)), mine.toReversed(), "newest first");
    const all = ids(await tenki.listSnapshots());
    assert.ok([...mine, other.id].every((id) => all.includes(id)));
    assert.deepEqual(ids(await tenki.listSnapshots({ workspaceId: session.workspaceId })), all);
    assert.ok(!ids(await tenki.listDanglingSnapshots()).some((id) => mine.includes(id)));
    await session.close();
    const dangling = ids(await tenki.listDanglingSnapshots());
    assert.ok(mine.every((id) => dangling.includes(id)) && !dangling.includes(other.id));

    for (const [method, scope] of [
      ["ListSnapshots", {}], ["ListWorkspaceSnapshots", {}], ["ListProjectSnapshots", { projectId: session.workspaceId }],
      ["ListSessionSnapshots", { sessionId: session.id }], ["ListDanglingSnapshots", {}],
    ]) {
      const seen = [];
      let pageToken = "";
      do {
        const page = await call(server, method, { ...scope, pageSize: 1, pageToken });
        assert.ok((page.snapshots ?? []).length <= 1);
        seen.push(...ids(page.snapshots ?? []));
        pageToken = page.nextPageToken ?? "";
      } while (pageToken);
      assert.ok(mine.every((id) => seen.includes(id)), method);
      await refused(server, method, { ...scope, pageSize: 101 }, "invalid_argument");
      await refused(server, method, { ...scope, pageSize: -1 }, "invalid_argument");
      await refused(server, method, { ...scope, pageToken: "nonsense" }, "invalid_argument");
    }
    await Promise.all([...mine, other.id].map((id) => tenki.deleteSnapshot(id)));
  });

  test("name, tags and expiry change one by one, and clear", async () => {
    const { id } = await tenki.createSnapshot(source.id, { name: "before" });
    let seen = await tenki.updateSnapshot(id, { name: "after" });
    assert.deepEqual([seen.name, seen.tags, seen.expiresAt], ["after", [], undefined]);
    seen = await tenki.updateSnapshot(id, { tags: [" A ", "b:1"] });
    assert.deepEqual([seen.name, seen.tags], ["after", ["a", "b:1"]]);
    const expiresAt = new Date(Math.floor(Date.now() / 1000) * 1000 + 60_000);
    seen = await tenki.updateSnapshot(id, { expiresAt });
    assert.deepEqual([seen.expiresAt.getTime(), seen.tags], [expiresAt.getTime(), ["a", "b:1"]]);
    seen = await tenki.updateSnapshot(id, { clearExpiresAt: true, tags: [] });
    assert.deepEqual([seen.name, seen.tags, seen.expiresAt], ["after", [], undefined]);
    await invalid(tenki.updateSnapshot(id, { name: "x".repeat(65) }));
    await invalid(tenki.updateSnapshot(id, { tags: ["not a tag"] }));
    await invalid(tenki.updateSnapshot(id, { expiresAt: new Date(Date.now() - 1_000) }));
    await invalid(tenki.updateSnapshot(id, { expiresAt: new Date(Date.now() + 60_000), clearExpiresAt: true }));
    assert.equal((await tenki.getSnapshot(id)).name, "after");
    await tenki.deleteSnapshot(id);
    await rejection(tenki.updateSnapshot(id, { name: "x" }), SnapshotNotFoundError);
  });
});

describe("deleting", () => {
  test("what is in use stays, what is not goes, once", async () => {
    const snapshot = await tenki.createSnapshot(source.id);
    const copy = await tenki.create({ snapshotId: snapshot.id });
    const error = await rejection(tenki.deleteSnapshot(snapshot.id), InvalidStateError);
    assert.match(error.message, /snapshot is in use/);
    await copy.close();
    const deleted = await tenki.deleteSnapshot(snapshot.id);
    assert.deepEqual([deleted.id, deleted.state], [snapshot.id, "DELETED"]);
    await rejection(tenki.deleteSnapshot(snapshot.id), SnapshotNotFoundError);
    await rejection(tenki.getSnapshot(snapshot.id), SnapshotNotFoundError);
  });
});

describe("fetching the disk", () => {
  test("the URL alone is enough, and gives all of it with its length told ahead", async () => {
    const snapshot = await tenki.createSnapshot(source.id);
    const { url, expiresAt } = await tenki.getSnapshotDownloadURL(snapshot.id);
    assert.ok(expiresAt.getTime() > Date.now() && expiresAt.getTime() < Date.now() + 3_600_000);
    const head = await fetch(url, { method: "HEAD" });
    const length = Number(head.headers.get("content-length"));
    assert.deepEqual([head.status, length], [200, 6 * 2 ** 30]);
    const response = await fetch(url);
    assert.equal(response.status, 200);
    const reader = response.body.getReader();
    let received = 0;
    let superblock;
    // Six GiB, nearly all of them holes; enough to see that it goes on, without a minute of zeros.
    while (received < 512 * 2 ** 20) {
      const { value, done } = await reader.read();
      assert.ok(!done);
      superblock ??= Buffer.from(value.subarray(0, 2048));
      received += value.length;
    }
    await reader.cancel();
    assert.equal(superblock.readUInt16LE(1024 + 0x38), 0xef53, "the magic number of an ext4 file system");
    for (const bad of [url.replace(/token=../, "token=__"), url.replace(/\?.*/, ""), url.replace(snapshot.id, UNKNOWN)]) {
      const answer = await fetch(bad);
      assert.equal(answer.status, 401);
      assert.equal((await answer.json()).code, "unauthenticated");
    }
    assert.equal((await fetch(url, { method: "DELETE" })).status, 405);
    await tenki.deleteSnapshot(snapshot.id);
    const gone = await fetch(url);
    assert.deepEqual([gone.status, (await gone.json()).code], [404, "snapshot_not_found"]);
    await rejection(tenki.getSnapshotDownloadURL(snapshot.id), SnapshotNotFoundError);
  });
});

describe("bad input", () => {
  test("is refused, and nothing is taken", async () => {
    const before = (await tenki.listSnapshots()).length;
    await invalid(tenki.createSnapshot(source.id, { name: "x".repeat(65) }));
    await invalid(tenki.createSnapshot(source.id, { expiresAt: new Date(Date.now() - 1_000) }));
    await invalid(tenki.createSnapshot("x"));
    await rejection(tenki.createSnapshot(UNKNOWN), SessionNotFoundError);
    const ended = await tenki.create({ ...SMALL, waitReady: false });
    await ended.close();
    await rejection(tenki.createSnapshot(ended.id), SessionTerminatedError);
    for (const attempt of [
      (id) => tenki.getSnapshot(id), (id) => tenki.deleteSnapshot(id), (id) => tenki.updateSnapshot(id, { name: "x" }),
      (id) => tenki.getSnapshotDownloadURL(id),
    ]) {
      await invalid(attempt("x"));
      await rejection(attempt(UNKNOWN), SnapshotNotFoundError);
    }
    assert.equal((await tenki.listSnapshots()).length, before);
  });

  test("limits of the workspace are named", async () => {
    const { workspaceId } = source;
    const count = (await tenki.listSnapshots()).filter(({ type }) => type === "USER").length;
    await call(server, "UpdateWorkspaceSandboxSettings", { workspaceId, maxSnapshots: count + 1 });
    try {
      const { id } = await tenki.createSnapshot(source.id);
      const error = await tenki.createSnapshot(source.id).then(() => assert.fail("taken"), (reason) => reason);
      assert.equal(error.cause.code, 8, error.message);
      await tenki.deleteSnapshot(id);
    } finally {
      await call(server, "UpdateWorkspaceSandboxSettings", { workspaceId, clearMaxSnapshots: true });
    }
  });
});

describe("with a server of its own", () => {
  let own;
  before(async () => {
    own = await Server.start();
  });
  after(() => own?.remove());

  const blobs = () => {
    const found = [];
    const walk = (directory) => {
      for (const entry of readdirSync(directory, { withFileTypes: true })) {
        const path = join(directory, entry.name);
        if (entry.isDirectory()) walk(path);
        else found.push(path);
      }
    };
    walk(join(own.dataDir, "blobs"));
    return found;
  };
  const stored = () => blobs().reduce((total, path) => total + statSync(path).blocks * 512, 0);

  test("deleting the last one frees its space", async () => {
    const tenki = client(own);
    const session = await tenki.create(SMALL);
    const empty = stored();
    await shell(session, "head -c 50000000 /dev/urandom > large");
    const first = await tenki.createSnapshot(session.id);
    const one = stored();
    assert.ok(one - empty > 50_000_000, `${one - empty} bytes`);
    const second = await tenki.createSnapshot(session.id);
    assert.ok(stored() - one < 20_000_000, "what two snapshots have in common is stored once");
    await tenki.deleteSnapshot(first.id);
    assert.ok(stored() - empty > 50_000_000, "what the other needs stays");
    await tenki.deleteSnapshot(second.id);
    assert.ok(stored() - empty < 1_000_000, `${stored() - empty} bytes are left`);
    await session.close();
    await tenki[Symbol.asyncDispose]();
  });

  for (const [what, damage] of [["missing", (path) => rmSync(path)], ["corrupt", (path) => writeFileSync(path, "not what it was")]]) {
    test(`a ${what} blob is found before anything starts, and named`, async () => {
      const tenki = client(own);
      const session = await tenki.create(SMALL);
      const known = new Set(blobs());
      await shell(session, "head -c 5000000 /dev/urandom > large");
      const snapshot = await tenki.createSnapshot(session.id);
      const largest = blobs().filter((path) => !known.has(path)).sort((a, b) => statSync(b).size - statSync(a).size)[0];
      damage(largest);
      const error = await tenki.create({ snapshotId: snapshot.id }).then(() => assert.fail("restored"), (reason) => reason);
      const digest = largest.split("/").slice(-2).join("").slice(-20);
      assert.ok(error.message.includes(digest), `${error.message} does not name ${largest}`);
      assert.match(error.message, new RegExp(what));
      // The source is none the worse for it.
      assert.equal(await shell(session, "echo fine"), "fine");
      await tenki.deleteSnapshot(snapshot.id);
      await session.close();
      await tenki[Symbol.asyncDispose]();
    });
  }

  test("snapshots outlive kill -9 of the server, and the session they were taken from", async () => {
    let tenki = client(own);
    const session = await tenki.create(SMALL);
    await shell(session, "head -c 2000000 /dev/urandom > random");
    const expected = await shell(session, "sha256sum < random");
    const snapshot = await tenki.createSnapshot(session.id, { name: "kept" });
    await session.close();
    await tenki[Symbol.asyncDispose]();
    await own.kill();
    await own.restart();
    tenki = client(own);
    assert.deepEqual(await tenki.getSnapshot(snapshot.id), snapshot);
    const copy = await tenki.create({ snapshotId: snapshot.id });
    assert.equal(await shell(copy, "sha256sum < random"), expected);
    await copy.close();
    await tenki.deleteSnapshot(snapshot.id);
    await tenki[Symbol.asyncDispose]();
  });

  test("one that kill -9 interrupts is finished or says that it failed", async () => {
    let tenki = client(own);
    const session = await tenki.create(SMALL);
    await shell(session, "head -c 60000000 /dev/urandom > large");
    const expected = await shell(session, "sha256sum < large");
    const snapshot = await tenki.createSnapshotAsync(session.id);
    await own.kill();
    await tenki[Symbol.asyncDispose]();
    await own.restart();
    tenki = client(own);
    const seen = await eventually("it is READY or FAILED", async () => {
      const now = await tenki.getSnapshot(snapshot.id);
      return now.state !== "CREATING" && now;
    });
    assert.match(seen.state, /^(READY|FAILED)$/);
    if (seen.state === "READY") {
      const copy = await tenki.create({ snapshotId: snapshot.id });
      assert.equal(await shell(copy, "sha256sum < large"), expected);
      await copy.close();
    }
    const again = await tenki.get(session.id);
    assert.equal(await shell(again, "sha256sum < large && echo written > after"), expected, "the source's disk is not frozen");
    await tenki.deleteSnapshot(snapshot.id);
    await again.close();
    await tenki[Symbol.asyncDispose]();
  });
});

test("with a bucket that cannot be reached a snapshot is READY here, not durable, and says why", async () => {
  Object.assign(process.env, { NAGAYA_S3_ACCESS_KEY_ID: "key", NAGAYA_S3_SECRET_ACCESS_KEY: "secret-of-the-bucket" });
  const own = await Server.start({
    configuration: "[pools]\nslots_ready = 1\nisolated_slots_ready = 1\n"
      // Nobody listens on the discard port of a test host.
      + '[blobs.s3]\nbucket = "b"\nendpoint = "http://127.0.0.1:9"\nallow_http = true\n',
  });
  const tenki = client(own);
  try {
    const session = await tenki.create(SMALL);
    await shell(session, "echo kept > kept");
    const snapshot = await tenki.createSnapshot(session.id);
    assert.equal(snapshot.state, "READY");
    const seen = await eventually("it says that it could not be brought there", async () => {
      const { snapshot: now } = await call(own, "GetSnapshot", { snapshotId: snapshot.id });
      return now.durabilityState === "SNAPSHOT_DURABILITY_STATE_PROPAGATION_FAILED" && now;
    }, 60_000);
    assert.ok(seen.propagationError);
    const copy = await tenki.create({ snapshotId: snapshot.id });
    assert.equal(await shell(copy, "cat kept"), "kept");
    await Promise.all([session.close(), copy.close()]);
    assert.ok(!own.log.includes("secret-of-the-bucket") && !seen.propagationError.includes("secret-of-the-bucket"));
  } finally {
    await tenki[Symbol.asyncDispose]();
    await own.remove();
  }
});
