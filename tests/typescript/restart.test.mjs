// Sandboxes outlive the server.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { call, stream } from "./lib/connect.mjs";
import { SMALL, client, shell, text } from "./lib/helpers.mjs";
import { Server } from "./lib/server.mjs";

let server;
before(async () => {
  server = await Server.start();
});
after(() => server?.remove());

for (const [accident, end] of [["SIGTERM", () => server.stop()], ["kill -9", () => server.kill()]]) {
  describe(`after ${accident}`, () => {
    test("a restarted server finds its sandboxes, their files and their running commands", async () => {
      let tenki = client(server);
      const session = await tenki.create({ ...SMALL, name: accident, tags: ["restart"], env: { KEPT: "yes" }, maxDurationMs: 3_600_000 });
      await session.writeFile("kept.txt", "still here");
      const pid = await shell(session, "sleep 600 >/dev/null 2>&1 </dev/null & echo $!");
      const { execution } = await call(server, "ExecuteCommand", {
        sessionId: session.id,
        command: "/bin/sh",
        args: ["-c", "echo before; until [ -e /home/tenki/go ]; do sleep 0.02; done; echo after; exit 6"],
        streamOutput: true,
      });
      const closed = await tenki.create(SMALL);
      await closed.close();
      const { apiKey } = server;
      await tenki[Symbol.asyncDispose]();

      await end();
      await server.restart();

      assert.equal(server.apiKey, apiKey, "the key is made once");
      tenki = client(server);
      const again = await tenki.get(session.id);
      assert.deepEqual([again.state, again.name, again.tags], ["RUNNING", accident, ["restart"]]);
      assert.equal(again.timeoutAt.getTime(), session.timeoutAt.getTime());
      assert.equal(text(await again.readFile("kept.txt")), "still here");
      assert.equal(await shell(again, `kill -0 ${pid} && echo "$KEPT"`), "yes");

      await again.writeFile("go", "");
      const { messages, error } = await stream(server, "StreamCommandOutput", { sessionId: again.id, executionId: execution.id });
      assert.equal(error, undefined);
      assert.equal(messages.map(({ data = "" }) => Buffer.from(data, "base64").toString()).join(""), "before\nafter\n");
      assert.equal(messages.at(-1).exitCode, 6);

      assert.equal((await tenki.get(closed.id)).state, "TERMINATED");
      assert.deepEqual((await tenki.list({ tags: ["restart"] })).map(({ id }) => id), [again.id]);
      await again.close();
      await tenki[Symbol.asyncDispose]();
    });
  });
}

test("a second server on the same data directory is refused and harms nothing", async () => {
  const second = new Server(server.dataDir);
  await assert.rejects(second.launch(), /in use by process/);
  await call(server, "WhoAmI");
});
