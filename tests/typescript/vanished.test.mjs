// A client whose machine goes away says no farewell. Its connection must not keep a session in use for ever.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { after, before, test } from "node:test";
import { client, eventually, shell } from "./lib/helpers.mjs";
import { Server } from "./lib/server.mjs";

const PORT = 8000;

let server;
let tenki;
let session;
before(async () => {
  server = await Server.start({
    configuration: "[pools]\nslots_ready = 1\nisolated_slots_ready = 1\n[limits]\nkeep_alive_interval_ms = 1000\nkeep_alive_timeout_ms = 1000\n",
  });
  tenki = client(server);
  session = await tenki.create({ cpuCores: 1, memoryMb: 128 });
});
after(async () => {
  await session?.close();
  await tenki?.[Symbol.asyncDispose]();
  await server?.remove();
});

/** A service that takes every connection out of HTTP, and then waits. */
const SERVICE = `
import socket
listener, taken = socket.create_server(("127.0.0.1", ${PORT})), []
while True:
    peer, _ = listener.accept()
    peer.recv(65536)
    peer.sendall(b"HTTP/1.1 101 Switching Protocols\\r\\nConnection: upgrade\\r\\nUpgrade: waiting\\r\\n\\r\\n")
    taken.append(peer)
`;

/** A client of that service. What is closed while it is repaired (TCP_REPAIR, 19) is closed without a packet. */
const VANISH = `
import socket, sys
peer = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
peer.sendall(b"GET / HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nConnection: upgrade\\r\\nUpgrade: waiting\\r\\n\\r\\n")
assert b" 101 " in peer.recv(1000)
peer.setsockopt(socket.IPPROTO_TCP, 19, 1)
`;

async function metric(name) {
  const text = await (await fetch(`${server.endpoint}/metrics`)).text();
  const line = text.split("\n").find((line) => line.startsWith(`${name} `));
  assert.ok(line, `${name} is missing in\n${text}`);
  return Number(line.split(" ")[1]);
}

test("a WebSocket to a preview ends when its viewer is gone", async () => {
  await session.writeFile("service.py", new TextEncoder().encode(SERVICE));
  await shell(session, "setsid python3 service.py >/dev/null 2>&1 </dev/null &");
  const { previewUrl } = await session.exposePort(PORT);
  const { port } = new URL(previewUrl);
  const knock = `import socket; socket.create_connection(("127.0.0.1", ${PORT}))`;
  await eventually("the service listens", async () => (await session.run(["python3", "-c", knock])).exitCode === 0);
  execFileSync("/usr/bin/python3", ["-c", VANISH, port]);
  assert.equal(await metric("nagaya_preview_connections_total"), 1);
  assert.equal(await metric("nagaya_preview_connections_open"), 1, "nobody knows yet");
  await eventually("the server has noticed", async () => (await metric("nagaya_preview_connections_open")) === 0);
});
