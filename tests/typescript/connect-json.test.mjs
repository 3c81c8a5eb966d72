// Connect with JSON over HTTP/1.1: all that a client without gRPC has.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { DataPlane, bearer, call, post, refused, stream } from "./lib/connect.mjs";
import { eventually } from "./lib/helpers.mjs";
import { CONTROL } from "./lib/rpcs.mjs";
import { sharedServer } from "./lib/server.mjs";

let server;
let session;
let data;
before(async () => {
  server = await sharedServer();
  const created = await call(server, "CreateSession", {
    ownerId: "self", ownerType: "SERVICE", cpuCores: 1, memoryMb: 512, waitReady: true,
    env: { FROM_SESSION: "yes" }, maxDuration: "3600s", pauseRetention: "86400.500s",
  });
  session = created.session;
  assert.equal(session.state, "SESSION_STATE_RUNNING");
  data = new DataPlane(created.dataPlaneEndpoint, session.id, created.credential.credential);
});
after(async () => {
  if (session) await call(server, "TerminateSession", { sessionId: session.id });
  await server.remove();
});

const base64 = (text) => Buffer.from(text).toString("base64");
const home = (path) => `/home/tenki/${path}`;

describe("JSON as the clients expect it", () => {
  test("a created session carries endpoint, certificate and route at once", async () => {
    const created = await call(server, "CreateSession", {
      ownerId: "self", ownerType: "USER", cpuCores: 1, memoryMb: 128, waitReady: true,
    });
    assert.equal(created.routeStatus, "DATA_PLANE_ROUTE_STATUS_VERIFIED");
    assert.match(created.dataPlaneEndpoint, /^http:\/\/127\.0\.0\.1:\d+$/);
    assert.ok(Date.parse(created.credential.expiresAt) > Date.now());
    await call(server, "TerminateSession", { sessionId: created.session.id });
  });

  test("zero values are left out, enums are names, times are RFC 3339, durations seconds", async () => {
    const { session: seen } = await call(server, "GetSession", { sessionId: session.id });
    for (const absent of ["name", "tags", "terminalError", "sticky", "volumeAttachments", "terminatedAt"]) {
      assert.ok(!(absent in seen), `${absent} is ${JSON.stringify(seen[absent])}`);
    }
    assert.equal(seen.state, "SESSION_STATE_RUNNING");
    assert.match(seen.createdAt, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$/);
    assert.equal(Date.parse(seen.timeoutAt) - Date.parse(seen.createdAt), 3_600_000);
    assert.equal(seen.pauseRetention, "86400.500s");
    assert.equal(seen.cpuCores, 1);
  });

  test("without the flags a session has the network out and none in", async () => {
    const created = await call(server, "CreateSession", { ownerId: "self", ownerType: "SERVICE", memoryMb: 128, cpuCores: 1 });
    const { session: seen } = await call(server, "GetSession", { sessionId: created.session.id });
    assert.ok(!seen.inboundEnabled);
    await call(server, "TerminateSession", { sessionId: seen.id });
  });

  test("int64 travels as text", async () => {
    await data.call("WriteFile", { path: "number.txt", content: base64("12345") });
    const stat = await data.call("Stat", { path: "number.txt" });
    assert.equal(stat.size, "5");
    assert.match(stat.modifiedUnixNs, /^\d{19}$/);
    const { limits } = await call(server, "GetWorkspaceSandboxUsage");
    const sessions = limits.find(({ key }) => key === "active_sessions");
    assert.match(sessions.current, /^\d+$/);
    assert.equal(sessions.unit, "SANDBOX_USAGE_UNIT_COUNT");
  });

  test("unknown fields are ignored, field names may be as in the proto file, enums may be numbers", async () => {
    const { session: updated } = await call(server, "UpdateSession", {
      session_id: session.id, name: "lenient", idleTimeoutMinutes: 5, nonsense: { a: [1, null] },
    });
    assert.equal(updated.name, "lenient");
    await call(server, "ListWorkspaceSandboxes", { state: 3, pageSize: "10", page_token: "", extra: true });
    await call(server, "UpdateSession", { sessionId: session.id, name: "" });
  });

  test("a body that is no JSON, or of the wrong types, is an invalid argument", async () => {
    for (const body of ["{", "[]", '"text"', "nonsense", '{"sessionId":5}', '{"sessionId":{"a":1}}', "{}{}"]) {
      await refused(server, "GetSession", body, "invalid_argument");
    }
  });

  test("an empty body is an empty request, without the protocol's own header too", async () => {
    const response = await fetch(`${server.endpoint}/${CONTROL}/WhoAmI`, {
      method: "POST", headers: { "content-type": "application/json", ...bearer(server) }, body: "{}",
    });
    assert.equal(response.status, 200);
    const identity = await response.json();
    assert.equal(identity.workspaces.length, 1);
    assert.ok(identity.workspaces[0].workspaceId);
  });

  test("an error is JSON with code and message under the fitting HTTP status", async () => {
    const unknown = "01890000-0000-7000-8000-00000000dead";
    for (const [method, body, status, code] of [
      ["GetSession", { sessionId: "x" }, 400, "invalid_argument"],
      ["GetSession", { sessionId: unknown }, 404, "not_found"],
      ["ListTemplates", {}, 501, "unimplemented"],
    ]) {
      const answer = await post(server, CONTROL, method, body, bearer(server));
      assert.deepEqual([answer.status, answer.body.code], [status, code]);
      assert.ok(answer.body.message);
    }
  });
});

describe("sessions", () => {
  test("waiting is a stream that begins with the present state and ends with RUNNING", async () => {
    const created = await call(server, "CreateSession", { ownerId: "self", ownerType: "SERVICE", cpuCores: 1, memoryMb: 128 });
    const { messages, error } = await stream(server, "WaitSession", { sessionId: created.session.id });
    assert.equal(error, undefined);
    const last = messages.at(-1);
    assert.equal(last.session.state, "SESSION_STATE_RUNNING");
    assert.equal(last.routeStatus, "DATA_PLANE_ROUTE_STATUS_VERIFIED");
    assert.ok(last.credential.credential && last.dataPlaneEndpoint);
    await call(server, "TerminateSession", { sessionId: created.session.id });
    const after = await stream(server, "WaitSession", { sessionId: created.session.id });
    assert.equal(after.messages.at(-1).session.state, "SESSION_STATE_TERMINATED");
  });

  test("errors of a stream come in its end frame", async () => {
    const { messages, error } = await stream(server, "WaitSession", { sessionId: "01890000-0000-7000-8000-00000000dead" });
    assert.deepEqual(messages, []);
    assert.equal(error.code, "not_found");
  });

  test("activity is reported and moves the time", async () => {
    const { session: before } = await call(server, "GetSession", { sessionId: session.id });
    const answer = await eventually("the time has moved", async () => {
      const { lastActivityAt } = await call(server, "ReportSessionActivity", { sessionId: session.id });
      return Date.parse(lastActivityAt) > Date.parse(before.lastActivityAt) && lastActivityAt;
    });
    assert.ok(Math.abs(Date.parse(answer) - Date.now()) < 30_000);
  });

  test("extend and terminate answer with the session", async () => {
    const before = (await call(server, "GetSession", { sessionId: session.id })).session;
    const { session: extended } = await call(server, "ExtendSession", { sessionId: session.id, additionalDuration: "600s" });
    assert.equal(Date.parse(extended.timeoutAt) - Date.parse(before.timeoutAt), 600_000);
  });
});

describe("the old command rpcs", () => {
  const execute = (body) => call(server, "ExecuteCommand", { sessionId: session.id, ...body });
  const follow = (executionId) => stream(server, "StreamCommandOutput", { sessionId: session.id, executionId });
  const output = (messages, wanted) =>
    messages.filter(({ data, isStderr = false }) => data && isStderr === wanted)
      .map(({ data: content }) => Buffer.from(content, "base64").toString()).join("");

  test("a command is executed to its end, with args, env and exit code", async () => {
    const { execution } = await execute({
      command: "/bin/sh",
      args: ["-c", `echo "$FROM_SESSION $OWN $(pwd) $(id -un)" > out.txt; exit 3`],
      env: { OWN: "own" },
    });
    assert.equal(execution.status, "COMMAND_STATUS_FAILED");
    assert.equal(execution.exitCode, 3);
    assert.equal(execution.sessionId, session.id);
    assert.match(execution.id, /^[0-9a-f-]{36}$/);
    assert.ok(Date.parse(execution.endedAt) >= Date.parse(execution.startedAt));
    const { content } = await data.call("ReadFile", { path: home("out.txt") });
    assert.equal(Buffer.from(content, "base64").toString(), "yes own /home/tenki tenki\n");
  });

  test("success leaves out the zero exit code", async () => {
    const { execution } = await execute({ command: "true" });
    assert.equal(execution.status, "COMMAND_STATUS_SUCCEEDED");
    assert.ok(!("exitCode" in execution));
  });

  test("the timeout ends it, and it never looks like success", async () => {
    const { execution } = await execute({
      command: "/bin/sh", args: ["-c", "trap 'exit 0' TERM; sleep 600 & wait"], timeout: "0.3s",
    });
    assert.equal(execution.status, "COMMAND_STATUS_TIMED_OUT");
    assert.ok(Number(execution.durationMs) >= 300 && Number(execution.durationMs) < 30_000);
  });

  test("output of a running command is streamed from its beginning to the final message", async () => {
    const { execution } = await execute({
      command: "/bin/sh",
      args: ["-c", "echo first; echo wrong >&2; until [ -e go ]; do sleep 0.02; done; echo last; exit 4"],
      streamOutput: true,
    });
    assert.equal(execution.status, "COMMAND_STATUS_RUNNING");
    const following = follow(execution.id);
    await data.call("WriteFile", { path: "go", content: "" });
    const { messages, error } = await following;
    assert.equal(error, undefined);
    assert.equal(output(messages, false), "first\nlast\n");
    assert.equal(output(messages, true), "wrong\n");
    const last = messages.at(-1);
    assert.equal(last.isFinal, true);
    assert.equal(last.exitCode, 4);
    assert.ok(messages.slice(0, -1).every(({ isFinal }) => !isFinal));
    // Once more after its end: the same.
    assert.equal(output((await follow(execution.id)).messages, false), "first\nlast\n");
  });

  test("a streamed command that times out says so in its last message", async () => {
    const { execution } = await execute({ command: "sleep", args: ["600"], timeout: "0.2s", streamOutput: true });
    const { messages } = await follow(execution.id);
    assert.equal(messages.at(-1).timedOut, true);
  });

  test("five megabytes of output are streamed whole", async () => {
    const { execution } = await execute({ command: "head", args: ["-c", "5000000", "/dev/zero"], streamOutput: true });
    const { messages } = await follow(execution.id);
    const total = messages.reduce((sum, { data: content = "" }) => sum + Buffer.from(content, "base64").length, 0);
    assert.equal(total, 5_000_000);
  });

  test("a command that cannot start, unknown executions and foreign ones are refused", async () => {
    await refused(server, "ExecuteCommand", { sessionId: session.id, command: "no-such-program" }, "not_found");
    await refused(server, "ExecuteCommand", { sessionId: session.id, command: "" }, "invalid_argument");
    await refused(server, "ExecuteCommand", { sessionId: session.id, command: "echo", args: ["\0"] }, "invalid_argument");
    await refused(server, "ExecuteCommand", { sessionId: session.id, command: "true", timeout: "-1s" }, "invalid_argument");
    const { error } = await follow("01890000-0000-7000-8000-00000000dead");
    assert.equal(error.code, "not_found");
  });
});

describe("the data plane", () => {
  test("files are written, read, looked at and removed", async () => {
    const content = Buffer.from(Array.from({ length: 256 }, (_, index) => index));
    const written = await data.call("WriteFile", { path: home("raw.bin"), content: content.toString("base64") });
    assert.equal(written.sizeBytes, "256");
    const read = await data.call("ReadFile", { path: "raw.bin" });
    assert.deepEqual(Buffer.from(read.content, "base64"), content);
    const stat = await data.call("Stat", { path: "raw.bin" });
    assert.deepEqual([stat.exists, stat.size, stat.mode & 0o777], [true, "256", 0o644]);
    assert.deepEqual(await data.call("Stat", { path: "missing" }), {});
    const removed = await data.call("Remove", { path: "raw.bin" });
    assert.deepEqual([removed.removed, removed.entriesRemoved], [true, "1"]);
    assert.deepEqual(await data.call("Remove", { path: "raw.bin" }), {});
  });

  test("directories are made, listed and removed; recursive only when asked", async () => {
    const made = await data.call("Mkdir", { path: home("json/deep"), recursive: true, mode: 0o700 });
    assert.match(made.modifiedUnixNs, /^\d{19}$/);
    await data.refused("Mkdir", { path: "json/no/parent" }, "not_found");
    await data.refused("Mkdir", { path: "json" }, "already_exists");
    await data.call("WriteFile", { path: "json/.dot", content: base64("x") });
    await data.call("WriteFile", { path: "json/plain", content: base64("xyz") });
    const { entries } = await data.call("List", { path: "json" });
    assert.deepEqual(entries.map(({ name, size = "0", isDir = false }) => [name, size, isDir]).map(([name, , isDir]) => [name, isDir]), [
      ["deep", true], ["plain", false],
    ]);
    assert.equal((await data.call("List", { path: "json", includeHidden: true })).entries.length, 3);
    await data.refused("Remove", { path: "json" }, "failed_precondition");
    assert.equal((await data.call("Remove", { path: "json", recursive: true })).entriesRemoved, "4");
  });

  test("its errors have the codes of the contract", async () => {
    const missing = await data.refused("ReadFile", { path: "templates/missing" }, "not_found");
    assert.match(missing.message, /no such file or directory/);
    assert.doesNotMatch(missing.message, /template/);
    const directory = await data.refused("ReadFile", { path: "/tmp" }, "failed_precondition");
    assert.match(directory.message, /is a directory/);
    await data.refused("ReadFile", { path: "" }, "invalid_argument");
    await data.refused("ReadFile", {}, "invalid_argument");
    await data.refused("List", { path: "/etc/passwd" }, "failed_precondition");
  });

  test("a request without its inner message, or for another session, is refused", async () => {
    const headers = { "x-tenki-session-cert": data.certificate };
    const service = "tenki.sandbox.v1.SandboxSessionDataPlaneService";
    const empty = await post(server, service, "Stat", {}, headers);
    assert.equal(empty.body.code, "invalid_argument");
    const malformed = await post(server, service, "Stat", { request: { sessionId: "x", path: "/" } }, headers);
    assert.equal(malformed.body.code, "invalid_argument");
  });

  test("a file is streamed over HTTP/1.1 too", async () => {
    await data.call("WriteFile", { path: "streamed", content: base64("0123456789") });
    const { messages, error } = await stream(
      server, "ReadFileStream", { request: { sessionId: session.id, path: "streamed", offset: "2", length: "5", chunkBytes: 2 } },
      { "x-tenki-session-cert": data.certificate }, "tenki.sandbox.v1.SandboxSessionDataPlaneService",
    );
    assert.equal(error, undefined);
    const frames = messages.map(({ response }) => response);
    assert.equal(frames.map(({ data: content = "" }) => Buffer.from(content, "base64").toString()).join(""), "23456");
    assert.equal(frames.at(-1).eof, true);
    assert.equal(frames[0].totalSize, "10");
  });
});
