// Unix sockets of a sandbox through the SDK's dial().

import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { test } from "node:test";
import { useSandbox } from "./lib/fixtures.mjs";
import { eventually, readAll, rejection, shell } from "./lib/helpers.mjs";

let server;
let tenki;
let session;
useSandbox((made) => ({ server, tenki, session } = made));

const sha256 = (data) => createHash("sha256").update(data).digest("hex");

/** Runs a Python program in the background that serves a unix socket, and waits until it listens. */
async function serve(path, program) {
  const source = `
import hashlib, socket, threading
listener = socket.socket(socket.AF_UNIX)
listener.bind("${path}")
listener.listen()
def serve(peer):
${program.replace(/^/gm, "    ")}
    peer.close()
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
`;
  await session.writeFile("serve.py", source);
  await shell(session, "python3 serve.py >/dev/null 2>serve.err </dev/null &");
  await eventually(`${path} is there`, async () => (await shell(session, `test -S ${path} && echo yes || true`)) === "yes");
}

async function send(stream, ...chunks) {
  const writer = stream.writable.getWriter();
  for (const chunk of chunks) await writer.write(chunk);
  await writer.close();
}

test("a program that listens on a unix socket is reached, both ways and with half closes", async () => {
  await serve("/home/tenki/digest.sock", `
digest, count = hashlib.sha256(), 0
while data := peer.recv(1 << 16):
    digest.update(data)
    count += len(data)
peer.sendall(f"{count} {digest.hexdigest()}".encode())`);
  const data = randomBytes(20_000_000);
  const stream = await session.dial("/home/tenki/digest.sock");
  const chunks = Array.from({ length: 200 }, (_, index) => data.subarray(index * 100_000, (index + 1) * 100_000));
  const [answer] = await Promise.all([readAll(stream.readable), send(stream, ...chunks)]);
  assert.equal(answer.toString(), `20000000 ${sha256(data)}`);
});

test("large answers arrive unchanged, and the peer's end is the end", async () => {
  await serve("/home/tenki/echo.sock", `
while data := peer.recv(1 << 16):
    peer.sendall(data)`);
  const data = randomBytes(8_000_000);
  const streams = await Promise.all([1, 2, 3].map(() => session.dial("/home/tenki/echo.sock")));
  for (const echoed of await Promise.all(
    streams.map(async (stream) => {
      const sending = send(stream, ...Array.from({ length: 80 }, (_, index) => data.subarray(index * 100_000, (index + 1) * 100_000)));
      const [echoed] = await Promise.all([readAll(stream.readable), sending]);
      return echoed;
    }),
  )) {
    assert.equal(sha256(echoed), sha256(data));
  }
});

test("what may not be dialled is denied, what does not listen refuses", async () => {
  await serve("/tmp/outside.sock", "peer.sendall(b'outside')");
  await shell(session, "ln -sf /tmp/outside.sock escape.sock; ln -sfn /tmp escape; touch file.sock");
  const dial = (path) => rejection(session.dial(path), Error);
  for (const path of ["/etc/passwd", "/tmp/outside.sock", "/home/tenki/escape.sock", "/home/tenki/escape/outside.sock", "/home/tenki/../../tmp/outside.sock"]) {
    assert.match((await dial(path)).message, /denied/, path);
  }
  for (const path of ["/home/tenki/nothing.sock", "/home/tenki/file.sock", "/var/run/docker.sock"]) {
    assert.match((await dial(path)).message, /refused/, path);
  }
  await shell(session, "python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('/home/tenki/deaf.sock')\"");
  assert.match((await dial("/home/tenki/deaf.sock")).message, /refused/);
});
