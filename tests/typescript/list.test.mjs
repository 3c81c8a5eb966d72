// Lists: every filter, and pages that lose and repeat nothing.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { call, refused } from "./lib/connect.mjs";
import { client, unique } from "./lib/helpers.mjs";
import { sharedServer } from "./lib/server.mjs";

const TINY = { cpuCores: 1, memoryMb: 128, waitReady: false };

let server;
let tenki;
// Nothing else carries this tag, so the lists of this file are exact.
const ours = unique("list");
const sessions = {};

before(async () => {
  server = await sharedServer();
  tenki = client(server);
  // One after the other, so that their order is known.
  sessions.first = await tenki.create({ ...TINY, tags: [ours, "red"], waitReady: true });
  sessions.second = await tenki.create({ ...TINY, tags: [ours, "red", "blue"], sticky: true, waitReady: true });
  sessions.third = await tenki.create({ ...TINY, tags: [ours, "blue"], waitReady: true });
  sessions.ended = await tenki.create({ ...TINY, tags: [ours, "blue"] });
  await sessions.ended.close();
});
after(async () => {
  await Promise.all(Object.values(sessions).map((session) => session.closeIfOpen()));
  await tenki[Symbol.asyncDispose]();
  await server.remove();
});

const names = (list) =>
  list.map(({ id }) => Object.keys(sessions).find((name) => sessions[name].id === id) ?? id);

test("list shows living sessions, newest first", async () => {
  assert.deepEqual(names(await tenki.list({ tags: [ours] })), ["third", "second", "first"]);
});

test("all given tags must be on a session", async () => {
  assert.deepEqual(names(await tenki.list({ tags: [ours, " RED "] })), ["second", "first"]);
  assert.deepEqual(names(await tenki.list({ tags: ["blue", ours, "red"] })), ["second"]);
  assert.deepEqual(names(await tenki.list({ tags: [ours, unique("nobody")] })), []);
});

test("sticky filters both ways", async () => {
  assert.deepEqual(names(await tenki.list({ tags: [ours], sticky: true })), ["second"]);
  assert.deepEqual(names(await tenki.list({ tags: [ours], sticky: false })), ["third", "first"]);
});

test("terminated sessions are listed when asked for", async () => {
  assert.deepEqual(names(await tenki.list({ tags: [ours], includeTerminated: true })), [
    "ended", "third", "second", "first",
  ]);
});

test("the workspace may be named; another one is empty or not found", async () => {
  const [workspace] = (await tenki.whoAmI()).workspaces;
  assert.equal((await tenki.list({ tags: [ours], workspaceId: workspace.id })).length, 3);
  const foreign = tenki.list({ workspaceId: "01890000-0000-7000-8000-00000000dead" });
  assert.deepEqual(await foreign.catch((error) => (error.cause.code === 5 ? [] : assert.fail(error.message))), []);
});

test("the state filter and the owner filter narrow raw lists", async () => {
  const list = async (method, body) => names((await call(server, method, { tags: [ours], ...body })).sessions ?? []);
  assert.deepEqual(await list("ListWorkspaceSandboxes", { state: "SESSION_STATE_RUNNING" }), ["third", "second", "first"]);
  assert.deepEqual(
    await list("ListWorkspaceSandboxes", { state: "SESSION_STATE_TERMINATED", includeTerminated: true }), ["ended"],
  );
  assert.deepEqual(await list("ListWorkspaceSandboxes", { state: "SESSION_STATE_PAUSED" }), []);
  const ownerId = sessions.first.ownerId;
  assert.deepEqual(await list("ListSessions", { ownerId }), ["third", "second", "first"]);
  assert.deepEqual(await list("ListSessions", { ownerId, sticky: true }), ["second"]);
  assert.deepEqual(await list("ListSessions", { ownerId, includeTerminated: true }), ["ended", "third", "second", "first"]);
  assert.deepEqual(await list("ListSessions", { ownerId: "nobody" }), []);
});

test("small pages walk through everything exactly once", async () => {
  for (const method of ["ListSessions", "ListWorkspaceSandboxes"]) {
    for (const pageSize of [1, 2, 3, 4, 100]) {
      const seen = [];
      let pageToken = "";
      do {
        const page = await call(server, method, { tags: [ours], includeTerminated: true, pageSize, pageToken });
        assert.ok((page.sessions ?? []).length <= pageSize);
        seen.push(...(page.sessions ?? []));
        assert.notEqual(page.nextPageToken, pageToken || "the empty token");
        pageToken = page.nextPageToken ?? "";
      } while (pageToken);
      assert.deepEqual(names(seen), ["ended", "third", "second", "first"], `${method} by ${pageSize}`);
    }
  }
});

test("sessions made meanwhile do not shift the pages", async () => {
  const filter = { tags: [ours], pageSize: 2 };
  const page = await call(server, "ListWorkspaceSandboxes", filter);
  const newcomer = await tenki.create({ ...TINY, tags: [ours] });
  try {
    const rest = await call(server, "ListWorkspaceSandboxes", { ...filter, pageToken: page.nextPageToken });
    assert.deepEqual(names([...page.sessions, ...rest.sessions]), ["third", "second", "first"]);
  } finally {
    await newcomer.close();
    sessions.newcomer = newcomer;
  }
});

test("bad page sizes and tokens are invalid arguments", async () => {
  for (const method of ["ListSessions", "ListWorkspaceSandboxes"]) {
    for (const bad of [{ pageSize: -1 }, { pageSize: 101 }, { pageToken: "no token of ours" }, { pageToken: "AAAA" }]) {
      await refused(server, method, bad, "invalid_argument");
    }
  }
});

test("the SDK collects more than one of its pages of 100", async () => {
  const crowd = unique("crowd");
  const ids = [];
  for (let batch = 0; batch < 13; batch++) {
    const made = await Promise.all(Array.from({ length: 8 }, () => tenki.create({ ...TINY, tags: [crowd] })));
    ids.push(...made.map(({ id }) => id));
    await Promise.all(made.map((session) => session.close()));
  }
  const listed = await tenki.list({ tags: [crowd], includeTerminated: true });
  assert.deepEqual(listed.map(({ id }) => id).sort(), ids.sort());
  assert.deepEqual(await tenki.list({ tags: [crowd] }), []);
});
