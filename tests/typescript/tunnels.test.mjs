// Ports of a sandbox that lead to programs beside the SDK: exposeHostPort() and its resilient form.

import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { once } from "node:events";
import { createServer as createHttpServer } from "node:http";
import { createServer } from "node:net";
import { after, before, test } from "node:test";
import { SMALL, client, eventually, shell } from "./lib/helpers.mjs";
import { Server } from "./lib/server.mjs";

let server;
let tenki;
let session;
let host;
let address;
const data = randomBytes(10_000_000);
const sha256 = (data) => createHash("sha256").update(data).digest("hex");
before(async () => {
  server = await Server.start();
  server.stay();
  tenki = client(server);
  session = await tenki.create(SMALL);
  // A program of the client: gives a large file, and tells the digest of what it is sent.
  host = createHttpServer(async (request, response) => {
    const digest = createHash("sha256");
    for await (const chunk of request) digest.update(chunk);
    response.end(request.method === "POST" ? digest.digest("hex") : data);
  });
  host.listen(0, "127.0.0.1");
  await once(host, "listening");
  address = `127.0.0.1:${host.address().port}`;
});
after(async () => {
  host?.closeAllConnections();
  host?.close();
  await session?.close();
  await tenki[Symbol.asyncDispose]();
  await server.remove();
});

/** The digest of the large file as a program in the sandbox gets it. */
const fetched = (port) => shell(session, `
python3 - <<'END'
import hashlib, urllib.request
print(hashlib.sha256(urllib.request.urlopen("http://127.0.0.1:${port}/", timeout=60).read()).hexdigest())
END`);

test("a program in the sandbox reaches a program beside the SDK, with large bodies both ways", async () => {
  const tunnel = await session.exposeHostPort(address);
  assert.equal(tunnel.sandboxAddress, `127.0.0.1:${tunnel.sandboxPort}`);
  assert.equal(await fetched(tunnel.sandboxPort), sha256(data));
  const posted = await shell(session, `
python3 - <<'END'
import hashlib, os, urllib.request
data = os.urandom(10_000_000)
answer = urllib.request.urlopen("http://127.0.0.1:${tunnel.sandboxPort}/", data, timeout=60).read().decode()
print(answer == hashlib.sha256(data).hexdigest())
END`);
  assert.equal(posted, "True");
  const many = await Promise.all(Array.from({ length: 8 }, () => fetched(tunnel.sandboxPort)));
  assert.deepEqual(new Set(many), new Set([sha256(data)]));
  await tunnel.close();
  assert.deepEqual(await tunnel.terminated, { reason: "sdk_closed" });
  await eventually("nothing listens any more", async () => {
    const result = await session.run(["/bin/bash", "-c", `exec 3<>/dev/tcp/127.0.0.1/${tunnel.sandboxPort}`]);
    return result.exitCode !== 0;
  });
});

test("a port that is asked for is the one that is given, once", async () => {
  const tunnel = await session.hostPortTunnel("127.0.0.1", host.address().port, { sandboxPort: 80, sandboxBindAddress: "0.0.0.0" });
  assert.equal(tunnel.sandboxPort, 80);
  assert.equal(await fetched(80), sha256(data));
  await assert.rejects(session.exposeHostPort(address, { sandboxPort: 80 }), /in use/i);
  await tunnel.close();
});

test("the end of what one side sends is passed on", async () => {
  const shouter = createServer({ allowHalfOpen: true }, (socket) => {
    const chunks = [];
    socket.on("data", (chunk) => chunks.push(chunk));
    socket.on("end", () => socket.end(Buffer.concat(chunks).toString().toUpperCase()));
  });
  shouter.listen(0, "127.0.0.1");
  await once(shouter, "listening");
  const tunnel = await session.exposeHostPort(`127.0.0.1:${shouter.address().port}`);
  const heard = await shell(session, `
python3 - <<'END'
import socket
peer = socket.create_connection(("127.0.0.1", ${tunnel.sandboxPort}))
peer.sendall(b"hello")
peer.shutdown(socket.SHUT_WR)
print(peer.makefile().read())
END`);
  assert.equal(heard, "HELLO");
  await tunnel.close();
  shouter.close();
});

test("pausing terminates a tunnel", async () => {
  const tunnel = await session.exposeHostPort(address);
  await session.pause();
  assert.equal((await tunnel.terminated).reason, "engine_terminated");
  await session.resume();
  await session.waitResumed();
  const again = await session.exposeHostPort(address, { sandboxPort: tunnel.sandboxPort });
  assert.equal(await fetched(again.sandboxPort), sha256(data));
  await again.close();
});

for (const [accident, port, end, reason] of [
  ["SIGTERM", 8_080, () => server.stop(), "engine_draining"],
  ["kill -9", 8_081, () => server.kill(), "transport_error"],
]) {
  test(`a resilient tunnel is there again after ${accident} of the server`, async () => {
    const tunnel = await session.exposeHostPortResilient(address, { sandboxPort: port, initialBackoffMs: 50, maxBackoffMs: 500 });
    const events = [];
    tunnel.onStateChange((event) => events.push(event));
    assert.equal(await fetched(port), sha256(data));
    await end();
    await eventually("the tunnel noticed", () => events.some(({ state }) => state === "reconnecting"));
    assert.equal(events.find(({ state }) => state === "reconnecting").reason.reason, reason);
    await server.restart();
    await eventually("the tunnel is open again", () => tunnel.state === "open" && events.some(({ state }) => state === "open"));
    assert.equal(tunnel.sandboxPort, port);
    assert.equal(await fetched(port), sha256(data));
    await tunnel.close();
    assert.equal((await tunnel.terminated).reason, "sdk_closed");
  });
}
