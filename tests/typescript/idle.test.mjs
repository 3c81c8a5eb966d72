// Idle sessions pause. In a file of its own: the shortest idle time there is takes a minute.

import assert from "node:assert/strict";
import { test } from "node:test";
import { useClient } from "./lib/fixtures.mjs";
import { SMALL, eventually, shell } from "./lib/helpers.mjs";

let server;
let tenki;
useClient((made) => ({ server, tenki } = made));

test("a session pauses when it was idle for as long as it said, and no earlier use is lost", async () => {
  const session = await tenki.create({ ...SMALL, idleTimeoutMinutes: 1 });
  const busy = await tenki.create({ ...SMALL, idleTimeoutMinutes: 1 });
  try {
    await shell(session, "echo kept > kept");
    const running = busy.run(["sleep", "600"]);
    await running.pid;
    await eventually("it is paused", async () => {
      await session.refresh();
      return session.state === "PAUSED";
    }, 110_000);
    assert.ok(Date.now() - session.lastActivityAt.getTime() >= 59_000);
    await busy.refresh();
    assert.equal(busy.state, "RUNNING", "a command that runs is use");
    const { previewUrl } = await session.exposePort(8000);
    await fetch(previewUrl);
    await session.refresh();
    assert.equal(session.state, "RUNNING", "it fell asleep by itself, so a visitor may wake it");
    await session.pause();
    assert.equal((await fetch(previewUrl)).status, 404, "this pause was asked for");
    await running.kill();
    await session.resume();
    assert.equal(await shell(session, "cat kept"), "kept");
  } finally {
    await session.close();
    await busy.close();
  }
});
