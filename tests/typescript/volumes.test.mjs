// Volumes: made, mounted, written, grown, detached, deleted.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, describe, test } from "node:test";
import {
  GiB, InvalidStateError, MiB, SandboxError, SessionNotFoundError, SessionTerminatedError, VolumeInUseError,
  VolumeLimitExceededError, VolumeNotFoundError, volumeIsDeletable,
} from "@tenkicloud/sandbox";
import { call, refused } from "./lib/connect.mjs";
import { useClient } from "./lib/fixtures.mjs";
import { SMALL, client, eventually, rejection, shell, unique } from "./lib/helpers.mjs";
import { Server } from "./lib/server.mjs";

const UNKNOWN = "01890000-0000-7000-8000-00000000dead";

let server;
let tenki;
useClient((made) => ({ server, tenki } = made));

const make = (sizeBytes = 16 * MiB, name = unique("volume")) => tenki.createVolume({ name, sizeBytes });
const invalid = async (promise) => {
  const error = await rejection(promise, SandboxError);
  assert.equal(error.cause.code, 3, error.message);
};
const sizeInside = async (session, path) => Number(await shell(session, `df -B1 --output=size ${path} | tail -n 1`));
/** The kernel grows a mounted file system only for holders of this capability, which some hosts keep from root. */
const mayGrowMounted = () => {
  const [, effective] = /CapEff:\s*([0-9a-f]+)/.exec(readFileSync("/proc/self/status", "utf8"));
  return (BigInt(`0x${effective}`) >> 24n) % 2n === 1n;
};
const device = (session, path) => shell(session, `stat -c %d ${path}`);

describe("a volume", () => {
  test("is made, found, listed, renamed, tagged and deleted", async () => {
    const name = unique("life");
    const volume = await make(1 * MiB, name);
    assert.deepEqual([volume.name, volume.sizeBytes, volume.tags], [name, MiB, []]);
    assert.ok(volume.state === "AVAILABLE" && volumeIsDeletable(volume));
    assert.ok(Math.abs(volume.createdAt.getTime() - Date.now()) < 60_000, `${volume.createdAt}`);
    assert.equal(volume.workspaceId, (await tenki.whoAmI()).workspaces[0].id);
    assert.deepEqual(await tenki.getVolume(volume.id), volume);
    assert.deepEqual(await tenki.waitVolumeReady(volume.id), volume);
    assert.ok((await tenki.listVolumes()).some(({ id }) => id === volume.id));
    let seen = await tenki.updateVolume(volume.id, { name: "after" });
    assert.deepEqual([seen.name, seen.tags], ["after", []]);
    assert.ok(seen.updatedAt >= volume.updatedAt);
    seen = await tenki.updateVolume(volume.id, { tags: [" A ", "b:1"] });
    assert.deepEqual([seen.name, seen.tags], ["after", ["a", "b:1"]]);
    seen = await tenki.updateVolume(volume.id, { tags: [] });
    assert.deepEqual([seen.name, seen.tags], ["after", []]);
    await tenki.deleteVolume(volume.id);
    await rejection(tenki.getVolume(volume.id), VolumeNotFoundError);
    await rejection(tenki.deleteVolume(volume.id), VolumeNotFoundError);
  });

  test("lists page under both names", async () => {
    const made = [];
    for (let count = 0; count < 3; count++) made.push((await make(MiB)).id);
    const projectId = (await tenki.whoAmI()).workspaces[0].id;
    for (const [method, scope] of [["ListVolumes", {}], ["ListProjectVolumes", { projectId }]]) {
      const seen = [];
      let pageToken = "";
      do {
        const page = await call(server, method, { ...scope, pageSize: 2, pageToken });
        seen.push(...(page.volumes ?? []).map(({ id }) => id));
        pageToken = page.nextPageToken ?? "";
      } while (pageToken);
      assert.deepEqual(seen.filter((id) => made.includes(id)), made.toReversed(), `${method}: newest first`);
      await refused(server, method, { ...scope, pageSize: 101 }, "invalid_argument");
      await refused(server, method, { ...scope, pageToken: "nonsense" }, "invalid_argument");
    }
    await Promise.all(made.map((id) => tenki.deleteVolume(id)));
  });
});

describe("attaching", () => {
  test("the smallest volume, to a running sandbox: written by tenki there, read elsewhere", async () => {
    const volume = await make(1 * MiB);
    const [writer, reader] = [await tenki.create(SMALL), await tenki.create(SMALL)];
    await writer.attachVolume(volume.id, "/mnt/data");
    assert.deepEqual(writer.volumeMounts, [{ volumeId: volume.id, mountPath: "/mnt/data", readOnly: false }]);
    assert.notEqual(await device(writer, "/mnt/data"), await device(writer, "/"));
    await shell(writer, "id -un | grep -x tenki && echo content > /mnt/data/file && mkdir /mnt/data/directory");
    const found = await tenki.getVolume(volume.id);
    assert.equal(found.state, "IN_USE");
    assert.ok(!volumeIsDeletable(found));
    assert.deepEqual(found.activeAttachments.map(({ sessionId, mountPath, readOnly, state }) => [sessionId, mountPath, readOnly, state]), [
      [writer.id, "/mnt/data", false, "ATTACHED"],
    ]);
    await writer.detachVolume(volume.id);
    assert.deepEqual(writer.volumeMounts, []);
    assert.equal(await device(writer, "/mnt/data"), await device(writer, "/"), "it is not mounted any more");
    await reader.attachVolume(volume.id, "/mnt/data", { readOnly: true });
    assert.equal(await shell(reader, "cat /mnt/data/file"), "content");
    assert.notEqual((await reader.run(["touch", "/mnt/data/new"])).exitCode, 0, "it is read-only");
    assert.notEqual((await reader.run(["touch", "/mnt/data/new"], { privileged: true })).exitCode, 0, "for root too");
    await Promise.all([writer.close(), reader.close()]);
    await tenki.deleteVolume(volume.id);
  });

  test("at creation, several at once; their sizes are real limits", async () => {
    const [small, large] = [await make(4 * MiB), await make(64 * MiB)];
    const session = await tenki.create({
      ...SMALL,
      volumes: [{ volumeId: small.id, mountPath: "/home/tenki/small" }, { volumeId: large.id, mountPath: "/large/below" }],
    });
    try {
      assert.deepEqual(session.volumeMounts.map(({ mountPath }) => mountPath).sort(), ["/home/tenki/small", "/large/below"]);
      await shell(session, "echo 1 > small/file; echo 2 > /large/below/file");
      assert.ok((await sizeInside(session, "small")) <= 4 * MiB);
      assert.ok((await sizeInside(session, "/large/below")) > 48 * MiB);
      const full = await session.run(["/bin/sh", "-c", "head -c 8000000 /dev/zero > small/too-much"]);
      assert.notEqual(full.exitCode, 0);
      await shell(session, "rm small/too-much; echo 3 > /large/below/file");
    } finally {
      await session.close();
    }
    await Promise.all([tenki.deleteVolume(small.id), tenki.deleteVolume(large.id)]);
  });

  test("one writer or many readers, never both", async () => {
    const volume = await make();
    const mount = (readOnly) => ({ ...SMALL, volumes: [{ volumeId: volume.id, mountPath: "/data", readOnly }] });
    const writer = await tenki.create(mount(false));
    await shell(writer, "echo content > /data/file");
    await rejection(tenki.create(mount(false)), VolumeInUseError);
    await rejection(tenki.create(mount(true)), VolumeInUseError);
    const other = await tenki.create(SMALL);
    for (const readOnly of [false, true]) await rejection(other.attachVolume(volume.id, "/data", { readOnly }), VolumeInUseError);
    await rejection(tenki.deleteVolume(volume.id), VolumeInUseError);
    await writer.detachVolume(volume.id);
    const readers = [await tenki.create(mount(true)), await tenki.create(mount(true))];
    await other.attachVolume(volume.id, "/data", { readOnly: true });
    for (const reader of [...readers, other]) assert.equal(await shell(reader, "cat /data/file"), "content");
    assert.equal((await tenki.getVolume(volume.id)).activeAttachments.length, 3);
    await rejection(writer.attachVolume(volume.id, "/data"), VolumeInUseError);
    await Promise.all([writer, other, ...readers].map((each) => each.close()));
    await tenki.deleteVolume(volume.id);
  });

  test("through a pause, the volume stays where it is", async () => {
    const volume = await make();
    const session = await tenki.create({ ...SMALL, volumes: [{ volumeId: volume.id, mountPath: "/data" }] });
    await shell(session, "echo content > /data/file");
    await session.pause();
    const other = await tenki.create(SMALL);
    await rejection(other.attachVolume(volume.id, "/data"), VolumeInUseError);
    await rejection(session.detachVolume(volume.id), InvalidStateError);
    await session.resume();
    assert.equal(await shell(session, "cat /data/file"), "content");
    await Promise.all([session.close(), other.close()]);
    await tenki.deleteVolume(volume.id);
  });

  test("after a power-off, resume mounts it again", async () => {
    const volume = await make();
    const session = await tenki.create({ ...SMALL, volumes: [{ volumeId: volume.id, mountPath: "/data" }] });
    await shell(session, "echo content > /data/file");
    await session.run(["poweroff"], { privileged: true }).then(() => {}, () => {});
    await eventually("it is shut down", async () => {
      await session.refresh();
      return session.state === "USER_SHUTDOWN";
    });
    await session.resume();
    assert.equal(await shell(session, "cat /data/file"), "content");
    assert.notEqual(await device(session, "/data"), await device(session, "/"));
    await session.close();
    await tenki.deleteVolume(volume.id);
  });
});

describe("detaching", () => {
  test("is refused while a process has a file open, and forced when asked", async () => {
    const volume = await make();
    const session = await tenki.create({ ...SMALL, volumes: [{ volumeId: volume.id, mountPath: "/data" }] });
    await shell(session, "echo safe > /data/file && sync /data/file; nohup sh -c 'exec 9>/data/open; sleep 600' >/dev/null 2>&1 </dev/null & "
      + "until [ -e /data/open ]; do sleep 0.01; done");
    await rejection(session.detachVolume(volume.id), VolumeInUseError);
    await session.refresh();
    assert.equal(session.volumeMounts.length, 1);
    assert.equal(await shell(session, "cat /data/file"), "safe", "it works on");
    await session.detachVolume(volume.id, { force: true });
    assert.deepEqual(session.volumeMounts, []);
    const other = await tenki.create({ ...SMALL, volumes: [{ volumeId: volume.id, mountPath: "/data" }] });
    assert.equal(await shell(other, "cat /data/file"), "safe");
    await Promise.all([session.close(), other.close()]);
    await tenki.deleteVolume(volume.id);
  });

  test("without waiting, and of what is not attached", async () => {
    const volume = await make();
    const session = await tenki.create({ ...SMALL, volumes: [{ volumeId: volume.id, mountPath: "/data" }] });
    await session.detachVolume(volume.id, { waitTimeoutMs: 0 });
    await eventually("it is gone", async () => {
      await session.refresh();
      return session.volumeMounts.length === 0;
    });
    await rejection(session.detachVolume(UNKNOWN), VolumeNotFoundError);
    await session.close();
    await tenki.deleteVolume(volume.id);
  });

  test("what was synced is there after the session's end, at once and elsewhere", async () => {
    const volume = await make(64 * MiB);
    for (let round = 0; round < 5; round++) {
      const session = await tenki.create(SMALL);
      // The last session's end may still be writing.
      await eventually("it can be attached", () => session.attachVolume(volume.id, "/data").then(() => true, (error) => {
        if (!["VolumeSyncPendingError", "VolumeInUseError"].includes(error.name)) throw error;
        return false;
      }));
      assert.equal(await shell(session, "cat /data/log 2>/dev/null | wc -l"), String(round));
      await shell(session, `echo round ${round} >> /data/log && sync /data/log`);
      await session.close();
    }
    await tenki.deleteVolume(volume.id);
  });
});

describe("growing", () => {
  test("while it is not attached, to the largest size there is, and the content stays", async () => {
    const volume = await make(4 * MiB);
    const session = await tenki.create({ ...SMALL, volumes: [{ volumeId: volume.id, mountPath: "/data" }] });
    await shell(session, "head -c 1000000 /dev/urandom > /data/file");
    const expected = await shell(session, "sha256sum < /data/file");
    for (const size of [64 * MiB, 1 * GiB, 100 * GiB]) {
      await session.detachVolume(volume.id);
      assert.equal((await tenki.resizeVolume(volume.id, size)).sizeBytes, size);
      await session.attachVolume(volume.id, "/data");
      assert.ok((await sizeInside(session, "/data")) > size * 0.7, `${size} bytes inside`);
      assert.equal(await shell(session, "sha256sum < /data/file"), expected);
    }
    await shell(session, "head -c 100000000 /dev/zero > /data/large && rm /data/large");
    await session.close();
    await tenki.deleteVolume(volume.id);
  });

  test("while it is attached, where the host lets the server do that; else a clear refusal", async (context) => {
    const volume = await make(4 * MiB);
    const session = await tenki.create({ ...SMALL, volumes: [{ volumeId: volume.id, mountPath: "/data" }] });
    await shell(session, "head -c 1000000 /dev/urandom > /data/file");
    const expected = await shell(session, "sha256sum < /data/file");
    if (mayGrowMounted()) {
      for (const size of [64 * MiB, 1 * GiB]) {
        assert.equal((await tenki.resizeVolume(volume.id, size)).sizeBytes, size);
        assert.ok((await sizeInside(session, "/data")) > size * 0.7, `${size} bytes inside`);
      }
    } else {
      const error = await rejection(tenki.resizeVolume(volume.id, 64 * MiB), InvalidStateError);
      assert.match(error.message, /CAP_SYS_RESOURCE.*detach/);
      assert.equal((await tenki.getVolume(volume.id)).sizeBytes, 4 * MiB);
    }
    assert.equal(await shell(session, "sha256sum < /data/file && echo more >> /data/other"), expected);
    await session.close();
    await tenki.deleteVolume(volume.id);
    if (!mayGrowMounted()) context.skip("growing a mounted file system was not run: this host gives root no CAP_SYS_RESOURCE");
  });

  test("shrinking and sizes out of range are refused", async () => {
    const volume = await make(16 * MiB);
    for (const size of [16 * MiB - 1, 0, MiB, 100 * GiB + 1]) await invalid(tenki.resizeVolume(volume.id, size));
    assert.equal((await tenki.resizeVolume(volume.id, 16 * MiB)).sizeBytes, 16 * MiB, "its own size is no change");
    assert.equal((await tenki.getVolume(volume.id)).sizeBytes, 16 * MiB);
    await tenki.deleteVolume(volume.id);
    await rejection(tenki.resizeVolume(volume.id, GiB), VolumeNotFoundError);
  });

  test("limits of the workspace are VolumeLimitExceeded, and nothing changes", async () => {
    const workspaceId = (await tenki.whoAmI()).workspaces[0].id;
    const volume = await make(16 * MiB);
    const count = (await tenki.listVolumes()).length;
    await call(server, "UpdateWorkspaceSandboxSettings", { workspaceId, maxVolumes: count, maxTotalBytes: String(200 * MiB) });
    try {
      await rejection(make(MiB), VolumeLimitExceededError);
      await rejection(tenki.resizeVolume(volume.id, GiB), VolumeLimitExceededError);
      assert.equal((await tenki.getVolume(volume.id)).sizeBytes, 16 * MiB);
      assert.equal((await tenki.listVolumes()).length, count);
    } finally {
      await call(server, "UpdateWorkspaceSandboxSettings", { workspaceId, clearMaxVolumes: true, clearMaxTotalBytes: true });
    }
    await tenki.deleteVolume(volume.id);
  });
});

describe("bad input", () => {
  test("sizes, names and ids are refused, and nothing is made", async () => {
    const before = (await tenki.listVolumes()).length;
    for (const sizeBytes of [0, MiB - 1, 100 * GiB + 1, -1]) await invalid(tenki.createVolume({ name: "x", sizeBytes }));
    for (const name of ["", "x".repeat(65), "a\0b"]) await invalid(tenki.createVolume({ name, sizeBytes: MiB }));
    await invalid(tenki.createVolume({ name: "x", sizeBytes: MiB, workspaceId: "x" }));
    await refused(server, "CreateVolume", { name: "x", sizeBytes: String(MiB), workspaceId: UNKNOWN }, "not_found");
    assert.equal((await tenki.listVolumes()).length, before);
    for (const attempt of [
      (id) => tenki.getVolume(id), (id) => tenki.deleteVolume(id), (id) => tenki.resizeVolume(id, GiB), (id) => tenki.updateVolume(id, { name: "x" }),
    ]) {
      await invalid(attempt("x"));
      await rejection(attempt(UNKNOWN), VolumeNotFoundError);
    }
  });

  test("mounts that cannot be are refused, and the session is as it was", async () => {
    const [volume, second] = [await make(), await make()];
    const session = await tenki.create(SMALL);
    try {
      for (const path of [
        "", "/", "relative", "./x", "~", "/a/../b", "/..", "/a/./b", "//a", "/a//b", "/a/", "/a\0b", "/proc", "/proc/1/fd", "/sys/kernel",
        "/dev", "/dev/shm", "/run", "/run/x", `/${"x".repeat(4096)}`,
      ]) {
        await invalid(session.attachVolume(volume.id, path));
      }
      for (const path of ["/", "relative", "/a/../b"]) {
        await invalid(tenki.create({ ...SMALL, volumes: [{ volumeId: volume.id, mountPath: path }] }));
      }
      await refused(server, "AttachVolume", { sessionId: session.id }, "invalid_argument");
      await invalid(session.attachVolume("x", "/data"));
      await rejection(session.attachVolume(UNKNOWN, "/data"), VolumeNotFoundError);
      await rejection(tenki.create({ ...SMALL, volumes: [{ volumeId: UNKNOWN, mountPath: "/data" }] }), VolumeNotFoundError);
      await refused(server, "AttachVolume", { sessionId: UNKNOWN, volume: { volumeId: volume.id, mountPath: "/data" } }, "not_found");

      await session.attachVolume(volume.id, "/data");
      await rejection(session.attachVolume(volume.id, "/data"), VolumeInUseError);
      await rejection(session.attachVolume(volume.id, "/elsewhere"), VolumeInUseError);
      for (const path of ["/data", "/data/below"]) await invalid(session.attachVolume(second.id, path));
      await shell(session, "ln -s /tmp link; echo text > file");
      for (const path of ["/home/tenki/link", "/home/tenki/link/below", "/home/tenki/file", "/home/tenki/file/below"]) {
        const error = await session.attachVolume(second.id, path).then(() => assert.fail(path), (reason) => reason);
        assert.ok([3, 9].includes(error.cause.code), `${path}: ${error.message}`);
      }
      await session.refresh();
      assert.deepEqual(session.volumeMounts.map(({ mountPath }) => mountPath), ["/data"]);
      assert.equal((await tenki.getVolume(second.id)).state, "AVAILABLE");
      await invalid(tenki.create({ ...SMALL, volumes: [{ volumeId: second.id, mountPath: "/a" }, { volumeId: UNKNOWN, mountPath: "/a/b" }] }));
    } finally {
      await session.close();
    }
    await rejection(session.attachVolume(second.id, "/data"), SessionTerminatedError);
    await rejection(session.detachVolume(volume.id), SessionTerminatedError);
    await Promise.all([tenki.deleteVolume(volume.id), tenki.deleteVolume(second.id)]);
    const ghost = Object.assign(Object.create(Object.getPrototypeOf(session)), session, { id: UNKNOWN });
    await rejection(ghost.attachVolume(second.id, "/data"), SessionNotFoundError);
  });
});

describe("with a server of its own", () => {
  let own;
  before(async () => {
    own = await Server.start();
  });
  after(() => own?.remove());

  for (const [accident, end] of [["SIGTERM", () => own.stop()], ["kill -9", () => own.kill()]]) {
    test(`what was synced is there after ${accident}, in the sandbox that goes on and elsewhere`, async () => {
      let tenki = client(own);
      const volume = await tenki.createVolume({ name: accident, sizeBytes: 16 * MiB });
      const session = await tenki.create({ ...SMALL, volumes: [{ volumeId: volume.id, mountPath: "/data" }] });
      await shell(session, "echo before > /data/file && sync /data/file");
      await tenki[Symbol.asyncDispose]();
      await end();
      await own.restart();
      tenki = client(own);
      const again = await tenki.get(session.id);
      assert.deepEqual([again.state, again.volumeMounts.length], ["RUNNING", 1]);
      await shell(again, "cat /data/file | grep -x before && echo after >> /data/file");
      const other = await tenki.create(SMALL);
      await rejection(other.attachVolume(volume.id, "/data"), VolumeInUseError);
      await again.detachVolume(volume.id);
      assert.equal((await tenki.resizeVolume(volume.id, 64 * MiB)).sizeBytes, 64 * MiB);
      await other.attachVolume(volume.id, "/data");
      assert.equal(await shell(other, "cat /data/file"), "before\nafter");
      await Promise.all([again.close(), other.close()]);
      await tenki.deleteVolume(volume.id);
      await tenki[Symbol.asyncDispose]();
    });
  }
});
