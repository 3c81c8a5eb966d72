// Every rpc of the contract exists, and what is not built yet says so in the protocol's own way.

import assert from "node:assert/strict";
import http2 from "node:http2";
import { once } from "node:events";
import { after, before, test } from "node:test";
import { bearer, call as rpc, post, stream } from "./lib/connect.mjs";
import { GrpcConnection } from "./lib/grpc.mjs";
import { BUILT, CONTROL, RPCS, STREAMS } from "./lib/rpcs.mjs";
import { sharedServer } from "./lib/server.mjs";

let server;
let sessionId;
// Good for both planes, so that the refusal is about the rpc and nothing else.
let credentials;
before(async () => {
  server = await sharedServer();
  const created = await rpc(server, "CreateSession", {
    ownerId: "self", ownerType: "SERVICE", cpuCores: 1, memoryMb: 128, waitReady: true,
  });
  sessionId = created.session.id;
  credentials = { ...bearer(server), "x-tenki-session-cert": created.credential.credential };
});
after(async () => {
  await rpc(server, "TerminateSession", { sessionId });
  await server.remove();
});

const every = Object.entries(RPCS).flatMap(([service, methods]) => methods.map((method) => [service, method]));

test("the contract has 91 rpcs", () => assert.equal(every.length, 91));

test("over gRPC every rpc answers with a status inside HTTP 200", async () => {
  const connection = new GrpcConnection(server.endpoint, credentials);
  try {
    for (const [service, method] of every) {
      const call = connection.open(service, method);
      // An empty message is a valid request of the wrong content for all of them.
      call.send(Buffer.alloc(0));
      call.end();
      const { httpStatus, status, message } = await call.finished();
      assert.equal(httpStatus, 200, method);
      if (BUILT.has(method)) assert.notEqual(status, 12, `${method}: ${message}`);
      else assert.equal(status, 12, `${method}: ${message}`);
      assert.doesNotMatch(message, /\b404\b/, method);
    }
  } finally {
    connection.close();
  }
});

test("over Connect JSON what is not built is HTTP 501 with the code unimplemented, never 404", async () => {
  for (const [service, method] of every) {
    if (BUILT.has(method)) continue;
    if (STREAMS.has(method)) {
      const { error } = await stream(server, method, {}, credentials, service);
      assert.equal(error.code, "unimplemented", method);
    } else {
      const answer = await post(server, service, method, {}, credentials);
      assert.deepEqual([answer.status, answer.body.code], [501, "unimplemented"], method);
    }
  }
});

test("an unknown method of a known service is unimplemented too", async () => {
  for (const service of Object.keys(RPCS)) {
    const connection = new GrpcConnection(server.endpoint, credentials);
    const call = connection.open(service, "NoSuchMethod");
    call.send(Buffer.alloc(0));
    call.end();
    const { httpStatus, status } = await call.finished();
    assert.deepEqual([httpStatus, status], [200, 12], service);
    connection.close();
    const answer = await post(server, service, "NoSuchMethod", {}, credentials);
    assert.equal(answer.body.code, "unimplemented", service);
    assert.notEqual(answer.status, 404);
  }
});

test("gRPC-Web is answered over HTTP/1.1", async () => {
  const response = await fetch(`${server.endpoint}/${CONTROL}/WhoAmI`, {
    method: "POST",
    headers: { "content-type": "application/grpc-web+proto", "x-grpc-web": "1", ...bearer(server) },
    body: Buffer.alloc(5),
  });
  assert.equal(response.status, 200);
  const content = Buffer.from(await response.arrayBuffer());
  assert.equal(content[0], 0);
  const trailers = content.subarray(5 + content.readUInt32BE(1));
  assert.equal(trailers[0] & 0x80, 0x80);
  assert.match(trailers.subarray(5).toString(), /grpc-status: ?0/i);
});

test("health, readiness and metrics are there without a credential", async () => {
  for (const path of ["/healthz", "/readyz"]) {
    const response = await fetch(server.endpoint + path);
    await response.arrayBuffer();
    assert.equal(response.status, 200, path);
  }
  const metrics = await fetch(`${server.endpoint}/metrics`);
  assert.match(await metrics.text(), /^# TYPE \w+/m);
});

test("a client that warms up with HEAD / is answered, on HTTP/1.1 and on HTTP/2", async () => {
  assert.ok((await fetch(`${server.endpoint}/`, { method: "HEAD" })).status < 500);
  const session = http2.connect(server.endpoint);
  const request = session.request({ ":method": "HEAD", ":path": "/" });
  const [headers] = await once(request, "response");
  assert.ok(headers[":status"] < 500);
  session.close();
});

test("a path that nobody knows is a plain 404 in JSON", async () => {
  const response = await fetch(`${server.endpoint}/no/such/path`);
  assert.equal(response.status, 404);
  assert.ok(await response.json());
});
