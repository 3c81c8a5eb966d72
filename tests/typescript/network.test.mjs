// What the network of a sandbox reaches, seen through the SDK. (Attempts to get around it are in
// the isolation suite.)

import assert from "node:assert/strict";
import { once } from "node:events";
import { connect, createServer } from "node:net";
import { networkInterfaces } from "node:os";
import { after, before, test } from "node:test";
import { SMALL, client, shell } from "./lib/helpers.mjs";
import { sharedServer } from "./lib/server.mjs";

let server;
let tenki;
let open;
let closed;
let listener;
let accepted = 0;
before(async () => {
  server = await sharedServer();
  tenki = client(server);
  [open, closed] = [await tenki.create(SMALL), await tenki.create({ ...SMALL, allowOutbound: false })];
  // A service of the host, on every one of its addresses, that greets whoever connects.
  listener = createServer((socket) => {
    accepted += 1;
    socket.on("error", () => {});
    socket.end("greetings");
  });
  listener.listen(0, "0.0.0.0");
  await once(listener, "listening");
});
after(async () => {
  listener?.close();
  await open?.close();
  await closed?.close();
  await tenki[Symbol.asyncDispose]();
  await server.remove();
});

/** What a sandbox reads from a TCP service; nothing when it cannot connect. */
async function read(session, host, port) {
  const line = `exec 3<>/dev/tcp/${host}/${port} && cat <&3`;
  const result = await session.run(["timeout", "1", "/bin/bash", "-c", line]);
  return new TextDecoder().decode(result.stdout);
}

test("the record says what was asked for", () => {
  assert.equal(open.outboundEnabled, true);
  assert.equal(closed.outboundEnabled, false);
});

test("inside the sandbox its own loopback works, with and without outbound", async () => {
  for (const session of [open, closed]) {
    const program = `
import socket, threading
listener = socket.create_server(("127.0.0.1", 0))
def serve():
    connection, _ = listener.accept()
    connection.sendall(b"inside")
    connection.close()
threading.Thread(target=serve).start()
print(socket.create_connection(listener.getsockname()).recv(100).decode())
`;
    assert.equal(await shell(session, `python3 -c '${program}'`), "inside");
  }
});

test("no service of the host answers, on none of its addresses", async () => {
  const { port } = listener.address();
  const addresses = Object.values(networkInterfaces()).flat().filter(({ family }) => family === "IPv4").map(({ address }) => address);
  const gateway = await shell(open, "ip route show default 2>/dev/null | awk '{print $3}'");
  // The listener itself works: the host reaches it.
  assert.ok(addresses.includes("127.0.0.1"));
  const [reply] = await once(connect(port, "127.0.0.1"), "data");
  assert.equal(String(reply), "greetings");
  accepted = 0;
  for (const session of [open, closed]) {
    for (const address of new Set([...addresses, gateway].filter(Boolean))) {
      assert.equal(await read(session, address, port), "", address);
    }
  }
  assert.equal(accepted, 0);
});

test("two sandboxes do not reach each other", async () => {
  const other = await tenki.create(SMALL);
  try {
    const address = await shell(other, "hostname -I 2>/dev/null | awk '{print $1}'");
    assert.match(address, /^\d+\.\d+\.\d+\.\d+$/);
    const program = `import socket
listener = socket.create_server(("0.0.0.0", 4444))
print("listening", flush=True)
while True:
    connection, _ = listener.accept()
    connection.sendall(b"neighbour")
    connection.close()`;
    const service = other.run(["python3", "-c", program]);
    await service.stdout.getReader().read();
    assert.equal(await read(other, address, 4444), "neighbour");
    for (const session of [open, closed]) assert.equal(await read(session, address, 4444), "");
    await service.kill();
  } finally {
    await other.close();
  }
});
