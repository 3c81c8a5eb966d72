// What bad input gets: a clear error of the right code, and nothing changed.

import assert from "node:assert/strict";
import { once } from "node:events";
import { connect } from "node:net";
import { after, before, describe, test } from "node:test";
import { DataPlane, bearer, call, post, refused } from "./lib/connect.mjs";
import { CONTROL, DATA } from "./lib/rpcs.mjs";
import { sharedServer } from "./lib/server.mjs";

const UNKNOWN = "01890000-0000-7000-8000-00000000dead";
const OWNER = { ownerId: "self", ownerType: "SERVICE" };
const MACHINE = { ...OWNER, cpuCores: 1, memoryMb: 128 };

let server;
let session;
before(async () => {
  server = await sharedServer();
  ({ session } = await call(server, "CreateSession", { ...MACHINE, name: "unchanged", tags: ["kept"], waitReady: true }));
});
after(async () => {
  if (session) await call(server, "TerminateSession", { sessionId: session.id });
  await server.remove();
});

const living = async () => (await call(server, "ListSessions", { pageSize: 100 })).sessions.map(({ id }) => id).sort();

describe("ids", () => {
  const takingSessionId = [
    "GetSession", "CreateSessionCredential", "UpdateSession", "TerminateSession", "ReportSessionActivity",
    ["ExtendSession", { additionalDuration: "1s" }], ["ExecuteCommand", { command: "true" }],
  ].map((entry) => (Array.isArray(entry) ? entry : [entry, {}]));

  test("an id that is no UUID is an invalid argument", async () => {
    for (const [method, rest] of takingSessionId) {
      for (const sessionId of [
        "", "x", "self", session.id.slice(1), `${session.id}0`, ` ${session.id}`, session.id.replaceAll("-", ""),
        `{${session.id}}`, "../../etc/passwd", "'; DROP TABLE sessions; --", "\0", "長".repeat(12),
      ]) {
        await refused(server, method, { sessionId, ...rest }, "invalid_argument");
      }
      await refused(server, method, rest, "invalid_argument");
    }
  });

  test("an unknown id is not found", async () => {
    for (const [method, rest] of takingSessionId) {
      for (const sessionId of [UNKNOWN, "00000000-0000-0000-0000-000000000000"]) {
        const error = await refused(server, method, { sessionId, ...rest }, "not_found");
        assert.match(error.message, /session/);
      }
    }
  });

  test("an upper-case id is the same session or a clear refusal, never another error", async () => {
    const answer = await post(server, CONTROL, "GetSession", { sessionId: session.id.toUpperCase() }, bearer(server));
    if (answer.status === 200) assert.equal(answer.body.session.id, session.id);
    else assert.ok(["invalid_argument", "not_found"].includes(answer.body.code));
  });
});

describe("create", () => {
  const long = (length) => "x".repeat(length);
  const bad = {
    "0 cores": { cpuCores: 0 },
    "17 cores": { cpuCores: 17 },
    "-1 cores": { cpuCores: -1 },
    "127 MB": { memoryMb: 127 },
    "odd memory": { memoryMb: 513 },
    "65537 MB": { memoryMb: 65_537 },
    "65538 MB": { memoryMb: 65_538 },
    "0 MB": { memoryMb: 0 },
    "4 GB of disk": { diskSizeGb: 4 },
    "101 GB of disk": { diskSizeGb: 101 },
    "a name of 65 characters": { name: long(65) },
    "NUL in the name": { name: "a\0b" },
    "21 tags": { tags: Array.from({ length: 21 }, (_, index) => `t${index}`) },
    "a tag of 33 characters": { tags: [long(33)] },
    "an empty tag": { tags: [""] },
    "a tag with a space": { tags: ["a b"] },
    "an upper-case tag": { tags: ["Ab"] },
    "a tag that begins with a dash": { tags: ["-a"] },
    "NUL in an environment value": { env: { A: "x\0" } },
    "NUL in an environment name": { env: { "A\0": "x" } },
    "an empty environment name": { env: { "": "x" } },
    "= in an environment name": { env: { "A=B": "x" } },
    "a workspace that is no UUID": { workspaceId: "mine" },
    "no owner": { ownerId: "" },
    "an unknown owner type": { ownerType: "ROBOT" },
    "a negative life": { maxDuration: "-1s" },
    "no life": { maxDuration: "0s" },
    "a life beyond counting": { maxDuration: "315576000000s" },
    "a negative idle time": { idleTimeoutMinutes: -1 },
    "a negative retention": { pauseRetention: "-1s" },
  };
  for (const [what, fields] of Object.entries(bad)) {
    test(`${what}: invalid argument, and nothing is created`, async () => {
      const before = await living();
      const error = await refused(server, "CreateSession", { ...MACHINE, ...fields }, "invalid_argument");
      assert.ok(error.message.length > "invalid argument".length, error.message);
      assert.deepEqual(await living(), before);
    });
  }

  test("the largest of everything that is allowed is allowed", async () => {
    const created = await call(server, "CreateSession", {
      ...OWNER, cpuCores: 16, memoryMb: 128, diskSizeGb: 5, name: "長".repeat(64),
      tags: Array.from({ length: 20 }, (_, index) => `${index}`.padEnd(32, "x")),
    });
    await call(server, "TerminateSession", { sessionId: created.session.id });
  });

  test("a foreign workspace is not found", async () => {
    await refused(server, "CreateSession", { ...MACHINE, workspaceId: UNKNOWN }, "not_found");
  });
});

describe("changes", () => {
  test("a bad change changes nothing", async () => {
    const sessionId = session.id;
    const before = (await call(server, "GetSession", { sessionId })).session;
    for (const fields of [
      { name: "x".repeat(65) },
      { name: "new", tags: ["NOT A TAG"] },
      { name: "new", tags: Array.from({ length: 21 }, (_, index) => `t${index}`) },
      { sticky: true, maxDuration: "-5s" },
    ]) {
      await refused(server, "UpdateSession", { sessionId, ...fields }, "invalid_argument");
    }
    for (const additionalDuration of [undefined, "0s", "-1s", "315576000000s", "soon"]) {
      await refused(server, "ExtendSession", { sessionId, additionalDuration }, "invalid_argument");
    }
    const after = (await call(server, "GetSession", { sessionId })).session;
    assert.deepEqual(after, before);
  });

  test("ending none, more than a hundred, or something that is no id is refused as a whole", async () => {
    await refused(server, "TerminateSessions", {}, "invalid_argument");
    await refused(server, "TerminateSessions", { sessionIds: Array(101).fill(UNKNOWN) }, "invalid_argument");
    await refused(server, "TerminateSessions", { sessionIds: [session.id, "x"] }, "invalid_argument");
    assert.equal((await call(server, "GetSession", { sessionId: session.id })).session.state, "SESSION_STATE_RUNNING");
  });
});

describe("the data plane", () => {
  test("empty, NUL and endless paths are invalid arguments", async () => {
    const data = await DataPlane.of(server, session.id);
    for (const method of ["ReadFile", "WriteFile", "Stat", "Mkdir", "Remove", "List"]) {
      for (const path of [undefined, "", "\0", "a\0b", "/x".repeat(2_500)]) {
        await data.refused(method, { path }, "invalid_argument");
      }
    }
  });

  test("the root directory is not removed", async () => {
    const data = await DataPlane.of(server, session.id);
    for (const path of ["/", "//", "/..", "/home/../."]) {
      const answer = await data.post("Remove", { path, recursive: true });
      assert.notEqual(answer.status, 200, `${path}: ${JSON.stringify(answer.body)}`);
    }
    assert.equal((await data.call("Stat", { path: "/home/tenki" })).exists, true);
  });

  test("an id in the request that is not the certificate's is refused", async () => {
    const data = await DataPlane.of(server, session.id);
    const answer = await post(data, DATA, "Stat", { request: { sessionId: UNKNOWN, path: "/" } }, {
      "x-tenki-session-cert": data.certificate,
    });
    assert.equal(answer.body.code, "unauthenticated");
  });
});

describe("bodies", () => {
  /** Sends a request head and part of a body by hand; returns the first piece of the answer. */
  async function send(head, body = "") {
    const { hostname, port } = new URL(server.endpoint);
    const socket = connect(Number(port), hostname);
    await once(socket, "connect");
    socket.on("error", () => {});
    socket.write(`${head}\r\n\r\n`);
    socket.write(body);
    let answer = "";
    for await (const chunk of socket) {
      answer += chunk;
      if (answer.includes("}")) break;
    }
    socket.destroy();
    return answer;
  }

  const head = (path, type, length) =>
    `POST ${path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer ${server.apiKey}\r\ncontent-type: ${type}\r\ncontent-length: ${length}`;

  test("a JSON body of 1 GiB is refused before it is sent", async () => {
    const answer = await send(head(`/${CONTROL}/CreateSession`, "application/json", 2 ** 30), `{"name":"${"x".repeat(1000)}`);
    assert.match(answer, /^HTTP\/1\.1 (413|429) /);
    assert.match(answer, /resource_exhausted/);
  });

  test("a Connect frame that announces 4 GiB is refused before it is sent", async () => {
    const frame = Buffer.from([0, 0xff, 0xff, 0xff, 0xff, ...Buffer.from("{}")]);
    const answer = await send(head(`/${CONTROL}/WaitSession`, "application/connect+json", 2 ** 32), frame);
    assert.match(answer, /resource_exhausted|invalid_argument/);
  });

  test("JSON nested a hundred thousand deep is refused, and the server lives", async () => {
    const body = `{"metadata":${'{"a":'.repeat(100_000)}1${"}".repeat(100_000)}}`;
    await refused(server, "CreateSession", body, "invalid_argument");
    await refused(server, "CreateSession", `{"unknown":${"[".repeat(100_000)}${"]".repeat(100_000)}}`, "invalid_argument");
    await call(server, "WhoAmI");
  });

  test("requests that are no HTTP are dropped, and the server lives", async () => {
    const { hostname, port } = new URL(server.endpoint);
    for (const garbage of ["\0\0\0\0", "GET\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff", "x".repeat(200_000)]) {
      const socket = connect(Number(port), hostname);
      socket.on("error", () => {});
      socket.end(Buffer.from(garbage, "latin1"));
      socket.resume();
      await once(socket, "close");
    }
    await call(server, "WhoAmI");
  });
});

test("after all of that the session is as it was", async () => {
  const { session: seen } = await call(server, "GetSession", { sessionId: session.id });
  assert.deepEqual([seen.name, seen.tags, seen.state], ["unchanged", ["kept"], "SESSION_STATE_RUNNING"]);
});
