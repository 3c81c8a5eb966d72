// Every form of credential, on both planes, without any library.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { DataPlane, bearer, call, post } from "./lib/connect.mjs";
import { SMALL, client, eventually, shell } from "./lib/helpers.mjs";
import { CONTROL, DATA } from "./lib/rpcs.mjs";
import { Server, sharedServer } from "./lib/server.mjs";

let server;
let tenki;
let session;
let other;
before(async () => {
  server = await sharedServer();
  tenki = client(server);
  [session, other] = [await tenki.create(SMALL), await tenki.create(SMALL)];
});
after(async () => {
  await session?.close();
  await other?.close();
  await tenki[Symbol.asyncDispose]();
  await server.remove();
});

const whoAmI = (headers) => post(server, CONTROL, "WhoAmI", {}, headers);

describe("control plane", () => {
  test("the key is accepted as bearer, as session token and in both cookies", async () => {
    for (const headers of [
      { authorization: `Bearer ${server.apiKey}` },
      { authorization: `bearer ${server.apiKey}` },
      { "x-session-token": server.apiKey },
      { cookie: `tenki_session=${server.apiKey}` },
      { cookie: `ory_kratos_session=${server.apiKey}` },
      { cookie: `theme=dark; tenki_session=${server.apiKey}; other=1` },
    ]) {
      const answer = await whoAmI(headers);
      assert.equal(answer.status, 200, `${JSON.stringify(headers)}: ${JSON.stringify(answer.body)}`);
    }
  });

  test("anything else is unauthenticated, on every method", async () => {
    const wrong = server.apiKey.replace(/.$/, (digit) => (digit === "0" ? "1" : "0"));
    for (const headers of [
      {},
      { authorization: "" },
      { authorization: "Bearer " },
      { authorization: `Basic ${server.apiKey}` },
      { authorization: `Bearer ${wrong}` },
      { authorization: `Bearer ${server.apiKey}x` },
      { authorization: `Bearer ${"x".repeat(10_000)}` },
      { "x-session-token": wrong },
      { cookie: `session=${server.apiKey}` },
      { cookie: `tenki_session=${wrong}` },
    ]) {
      for (const method of ["WhoAmI", "CreateSession", "ListSessions"]) {
        const answer = await post(server, CONTROL, method, { ownerId: "self", ownerType: "SERVICE" }, headers);
        assert.equal(answer.status, 401, `${method} ${JSON.stringify(headers)}`);
        assert.equal(answer.body.code, "unauthenticated");
        assert.doesNotMatch(JSON.stringify(answer.body), new RegExp(server.apiKey));
      }
    }
  });
});

describe("data plane", () => {
  const certificateOf = async (id) => (await call(server, "CreateSessionCredential", { sessionId: id })).credential;
  const stat = (certificate, sessionId = session.id, headers = {}) =>
    post(server, DATA, "Stat", { request: { sessionId, path: "/tmp" } }, {
      ...(certificate === undefined ? {} : { "x-tenki-session-cert": certificate }), ...headers,
    });

  test("a certificate opens its own session, again and again, and no other", async () => {
    const { credential } = await certificateOf(session.id);
    for (let count = 0; count < 3; count++) assert.equal((await stat(credential)).status, 200);
    const answer = await stat(credential, other.id);
    assert.equal(answer.body.code, "unauthenticated");
  });

  test("the API key is no certificate, and without one nothing is answered", async () => {
    for (const [certificate, headers] of [
      [undefined, {}], [undefined, bearer(server)], [server.apiKey, bearer(server)], ["", {}], ["nsc1.a.b", {}], ["nsc1", {}],
    ]) {
      const answer = await stat(certificate, session.id, headers);
      assert.equal(answer.body.code, "unauthenticated", JSON.stringify(answer.body));
    }
  });

  test("a certificate with one changed character is refused", async () => {
    const { credential } = await certificateOf(session.id);
    for (let index = 0; index < credential.length; index += 7) {
      const changed = credential[index] === "A" ? "B" : "A";
      // The last character of a base64 group may carry unused bits; they must not matter either way.
      const answer = await stat(credential.slice(0, index) + changed + credential.slice(index + 1));
      assert.equal(answer.body.code, "unauthenticated", `character ${index}`);
    }
  });

  test("a certificate says when it expires, and a renewed one lives on", async () => {
    const first = await certificateOf(session.id);
    const life = Date.parse(first.expiresAt) - Date.now();
    assert.ok(life > 30_000 && life <= 3_600_000, `${life} ms`);
    const second = await certificateOf(session.id);
    assert.equal((await stat(first.credential)).status, 200);
    assert.equal((await stat(second.credential)).status, 200);
  });

  test("an expired certificate is refused, while the SDK renews its own in time", async () => {
    const brief = await Server.start({
      configuration: "[engine]\ncertificate_ttl_ms = 2500\n[pools]\nslots_ready = 2\nisolated_slots_ready = 1\n",
    });
    const own = client(brief);
    try {
      const created = await own.create(SMALL);
      const stale = await DataPlane.of(brief, created.id);
      assert.equal((await stale.post("Stat", { path: "/tmp" })).status, 200);
      await eventually("the certificate has expired", async () =>
        (await stale.post("Stat", { path: "/tmp" })).body.code === "unauthenticated");
      assert.equal(await shell(created, "echo renewed"), "renewed");
      await created.close();
    } finally {
      await own[Symbol.asyncDispose]();
      await brief.remove();
    }
  });

  test("the certificate of an ended session opens nothing", async () => {
    const ended = await tenki.create(SMALL);
    const { credential } = await certificateOf(ended.id);
    await ended.close();
    const answer = await stat(credential, ended.id);
    assert.equal(answer.body.code, "failed_precondition");
    assert.match(answer.body.message, /terminated/);
  });
});
