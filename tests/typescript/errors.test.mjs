// The SDK's typed errors, and the parts of the contract that are not built yet.

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import {
  CapacityUnavailableError, DataPlaneNotReadyError, MissingAuthTokenError, SandboxError,
  SessionNotFoundError, UnauthorizedError,
} from "@tenkicloud/sandbox";
import { useSandbox } from "./lib/fixtures.mjs";
import { SMALL, client, rejection, shell } from "./lib/helpers.mjs";
import { Server } from "./lib/server.mjs";

const UNKNOWN = "01890000-0000-7000-8000-00000000dead";
const UNIMPLEMENTED = 12;

let server;
let tenki;
let session;
useSandbox((made) => ({ server, tenki, session } = made));

describe("credentials", () => {
  test("a wrong key is Unauthorized in every form the SDK sends", async () => {
    for (const authToken of [`tk_${"0".repeat(64)}`, "tk_", "ory_st_wrong", "a-cookie"]) {
      const stranger = client(server, { authToken });
      await rejection(stranger.whoAmI(), UnauthorizedError);
      await rejection(stranger.create(), UnauthorizedError);
      await rejection(stranger.get(session.id), UnauthorizedError);
      await rejection(stranger.list(), UnauthorizedError);
      await stranger[Symbol.asyncDispose]();
    }
  });

  test("another cookie name works, and no key at all is the SDK's own error", async () => {
    const named = client(server, { authToken: "wrong", cookieName: "ory_kratos_session" });
    await rejection(named.whoAmI(), UnauthorizedError);
    await named[Symbol.asyncDispose]();
    assert.throws(() => client(server, { authToken: " " }), MissingAuthTokenError);
  });
});

describe("sessions that are not there", () => {
  test("every call on an unknown session is SessionNotFound", async () => {
    await rejection(tenki.get(UNKNOWN), SessionNotFoundError);
    await rejection(tenki.updateSession(UNKNOWN, { name: "x" }), SessionNotFoundError);
    const handle = await tenki.get(session.id);
    Object.defineProperty(handle, "id", { value: UNKNOWN });
    for (const attempt of [
      () => handle.refresh(), () => handle.update({ name: "x" }), () => handle.extend(1_000),
      () => handle.waitReady(5_000), () => handle.exec("true"), () => handle.readFile("x"),
      () => handle.writeFile("x", "y"), () => handle.close(),
    ]) {
      await rejection(attempt(), SessionNotFoundError);
    }
  });
});

describe("what is not built yet answers unimplemented, and never looks like a missing route", () => {
  const expectUnimplemented = async (name, attempt) => {
    const error = await attempt().then(() => assert.fail(`${name} succeeded`), (reason) => reason);
    assert.ok(!(error instanceof DataPlaneNotReadyError), `${name}: ${error.message}`);
    assert.equal(error.code ?? error.cause?.code, UNIMPLEMENTED, `${name}: ${error.name}: ${error.message}`);
    assert.doesNotMatch(error.message, /\b404\b/);
  };

  test("templates", async () => {
    const verbs = {
      createTemplate: () => tenki.createTemplate({ name: "x" }),
      listTemplates: () => tenki.listTemplates(),
    };
    for (const [name, attempt] of Object.entries(verbs)) await expectUnimplemented(name, attempt);
    // Nothing of that may have changed the session.
    await session.refresh();
    assert.equal(session.state, "RUNNING");
    assert.equal(await shell(session, "echo fine"), "fine");
  });
});

describe("limits of the server", () => {
  test("one session more than the server may have is CapacityUnavailable with the limit's name, and room is given back", async () => {
    const small = await Server.start({
      configuration: "[engine]\nsessions_max = 2\n[pools]\nslots_ready = 2\nisolated_slots_ready = 1\n",
    });
    const own = client(small);
    try {
      const sessions = [await own.create(SMALL), await own.create(SMALL)];
      const error = await rejection(own.create(SMALL), CapacityUnavailableError);
      assert.match(error.message, /sessions_max/);
      await sessions[0].close();
      sessions[0] = await own.create(SMALL);
      assert.equal(sessions[0].state, "RUNNING");
      await Promise.all(sessions.map((each) => each.close()));
    } finally {
      await own[Symbol.asyncDispose]();
      await small.remove();
    }
  });
});

test("an error is a SandboxError with the cause the server gave", async () => {
  const error = await session.readFile("missing").then(() => assert.fail("read"), (reason) => reason);
  assert.ok(error instanceof SandboxError);
  assert.equal(error.cause.code, 5);
});
