// The streams of the data plane, frame by frame: what a broken or hostile client may send.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { call } from "./lib/connect.mjs";
import { GrpcConnection } from "./lib/grpc.mjs";
import { SMALL, client, eventually, shell } from "./lib/helpers.mjs";
import { message, parse } from "./lib/protobuf.mjs";
import { CONTROL, DATA } from "./lib/rpcs.mjs";
import { sharedServer } from "./lib/server.mjs";

const INVALID_ARGUMENT = 3;
const NOT_FOUND = 5;
const RESOURCE_EXHAUSTED = 8;
const UNAUTHENTICATED = 16;

let server;
let tenki;
let session;
let certificate;
before(async () => {
  server = await sharedServer();
  tenki = client(server);
  session = await tenki.create(SMALL);
  certificate = (await call(server, "CreateSessionCredential", { sessionId: session.id })).credential.credential;
});
after(async () => {
  await session?.close();
  await tenki[Symbol.asyncDispose]();
  await server.remove();
});

const connect = (headers = { "x-tenki-session-cert": certificate }) => new GrpcConnection(server.endpoint, headers);

// RunRequest: start 1, stdin 2, signal 3, stdin_close 4. RunStart: session 1, cmd 2, stream_stdin 6, timeout_ms 7, pty 5.
const frame = (...fields) => message([1, message(...fields)]);
const start = (argv, ...more) => frame([1, message([1, session.id], ...argv.map((word) => [2, word]), [6, true], ...more)]);
const stdin = (content) => frame([2, content]);
const stdinClose = () => frame([4, true]);

/** What a Run answer holds: {started, stdout, stderr, exit}. */
function answer(bytes) {
  const fields = parse(parse(bytes)[1]);
  const exit = fields[4] && parse(fields[4]);
  return {
    started: fields[1] && { pid: parse(fields[1])[1], window: parse(fields[1])[2] },
    stdout: fields[2]?.toString(),
    stderr: fields[3]?.toString(),
    exit: exit && {
      code: exit[1] ?? 0, signal: exit[2]?.toString() ?? "", timedOut: Boolean(exit[3]), reason: exit[5]?.toString() ?? "",
    },
  };
}

/** All answers until the stream ends. */
async function drain(run) {
  const answers = [];
  for (let bytes; (bytes = await run.next()); ) answers.push(answer(bytes));
  return { answers, ...(await run.finished()) };
}

async function run(connection, ...frames) {
  const opened = connection.open(DATA, "Run");
  for (const each of frames) opened.send(each);
  return opened;
}

const processes = (marker) => shell(session, `grep -lz '^${marker}$' /proc/[0-9]*/cmdline 2>/dev/null | wc -l`);

describe("a run stream in order", () => {
  test("is started, output, one exit, end", async () => {
    const connection = connect();
    const stream = await run(connection, start(["cat"]), stdin("hello"), stdinClose());
    const { answers, httpStatus, status } = await drain(stream);
    assert.deepEqual([httpStatus, status], [200, 0]);
    assert.ok(answers[0].started.pid > 0 && answers[0].started.window > 0);
    assert.equal(answers.slice(1, -1).map(({ stdout }) => stdout).join(""), "hello");
    assert.deepEqual(answers.at(-1).exit, { code: 0, signal: "", timedOut: false, reason: "exit" });
    assert.equal(answers.filter(({ exit }) => exit).length, 1);
    connection.close();
  });

  test("output frames are at most 64 KiB", async () => {
    const connection = connect();
    const stream = await run(connection, start(["head", "-c", "1000000", "/dev/zero"]), stdinClose());
    const { answers } = await drain(stream);
    const sizes = answers.filter(({ stdout }) => stdout).map(({ stdout }) => stdout.length);
    assert.equal(sizes.reduce((sum, size) => sum + size), 1_000_000);
    assert.ok(Math.max(...sizes) <= 65_536);
    connection.close();
  });

  test("a timeout ends it with TERM, and with KILL when that is ignored", async () => {
    const connection = connect();
    const polite = await drain(await run(connection, start(["sleep", "600"], [7, 200])));
    assert.deepEqual(polite.answers.at(-1).exit, { code: -1, signal: "SIGTERM", timedOut: true, reason: "timeout" });
    const stubborn = await drain(
      await run(connection, start(["/bin/sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"], [7, 200])),
    );
    assert.deepEqual(stubborn.answers.at(-1).exit, { code: -1, signal: "SIGKILL", timedOut: true, reason: "grace_timeout" });
    const obedient = await drain(await run(connection, start(["/bin/sh", "-c", "trap 'exit 0' TERM; sleep 600 & wait"], [7, 200])));
    assert.equal(obedient.answers.at(-1).exit.timedOut, true);
    connection.close();
  });

  test("a terminal is one, and its echo comes back", async () => {
    const connection = connect();
    const stream = await run(connection, start(["/bin/sh", "-c", "test -t 0 && test -t 1 && echo a terminal; cat"], [5, true]));
    stream.send(stdin("typed\n\x04"));
    const { answers } = await drain(stream);
    const output = answers.map(({ stdout = "" }) => stdout).join("");
    assert.match(output, /a terminal\r\n/);
    assert.match(output, /typed\r\n(.*\r\n)*typed/);
    assert.equal(answers.at(-1).exit.code, 0);
    connection.close();
  });
});

describe("frames out of order", () => {
  test("stdin, signal or close before start is an invalid argument", async () => {
    const connection = connect();
    for (const first of [stdin("early"), frame([3, message([1, 1])]), stdinClose(), frame(), message()]) {
      const { answers, status, httpStatus } = await drain(await run(connection, first, start(["true"])));
      assert.deepEqual([httpStatus, status, answers], [200, INVALID_ARGUMENT, []]);
    }
    connection.close();
  });

  test("a second start is an invalid argument and ends the process", async () => {
    const connection = connect();
    const stream = await run(connection, start(["sleep", "7654321"]));
    assert.ok(answer(await stream.next()).started);
    assert.equal(await processes(7654321), "1");
    stream.send(start(["touch", "/tmp/second-start"]));
    const { status } = await drain(stream);
    assert.equal(status, INVALID_ARGUMENT);
    await eventually("the process is gone", async () => (await processes(7654321)) === "0");
    assert.equal(await shell(session, "ls /tmp/second-start 2>/dev/null | wc -l"), "0");
    connection.close();
  });

  test("a stream that ends before its start is an invalid argument", async () => {
    const connection = connect();
    const stream = connection.open(DATA, "Run");
    stream.end();
    assert.equal((await drain(stream)).status, INVALID_ARGUMENT);
    const write = connection.open(DATA, "WriteFileStream");
    write.end();
    assert.equal((await write.finished()).status, INVALID_ARGUMENT);
    connection.close();
  });

  test("an upload with data before start, or with two, is refused and writes nothing", async () => {
    const connection = connect();
    const begin = frame([1, message([1, session.id], [2, "/tmp/twice"], [4, true])]);
    for (const frames of [[stdin("data"), begin], [begin, stdin("data"), begin]]) {
      const upload = connection.open(DATA, "WriteFileStream");
      for (const each of frames) upload.send(each);
      upload.end();
      assert.equal((await upload.finished()).status, INVALID_ARGUMENT);
      assert.equal(await shell(session, "ls -A /tmp | grep -c twice || true"), "0");
    }
    connection.close();
  });

  test("an empty command is an invalid argument, one that is missing is not found, and no exit comes first", async () => {
    const connection = connect();
    for (const [argv, expected] of [[[], INVALID_ARGUMENT], [[""], INVALID_ARGUMENT], [["no-such-program"], NOT_FOUND]]) {
      const { answers, status } = await drain(await run(connection, start(argv), stdinClose()));
      assert.deepEqual([answers, status], [[], expected]);
    }
    connection.close();
  });
});

describe("frames that lie", () => {
  test("a frame that announces 4 GiB is refused at once", async () => {
    const connection = connect();
    for (const [service, method] of [[DATA, "Run"], [DATA, "WriteFile"], [DATA, "WriteFileStream"], [CONTROL, "WhoAmI"]]) {
      const opened = connection.open(service, method, { authorization: `Bearer ${server.apiKey}` });
      opened.raw(Buffer.from([0, 0xff, 0xff, 0xff, 0xff, 1, 2, 3]));
      const { httpStatus, status } = await opened.finished();
      assert.deepEqual([httpStatus, status], [200, RESOURCE_EXHAUSTED], method);
    }
    connection.close();
  });

  test("a message that is no protobuf is refused and harms no other call", async () => {
    const connection = connect();
    for (const garbage of [Buffer.alloc(40, 0xff), Buffer.from([0x0a, 0x7f, 1]), Buffer.from([0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f])]) {
      const stream = await run(connection, garbage);
      const { status } = await drain(stream);
      assert.ok([INVALID_ARGUMENT, 13].includes(status), `status ${status}`);
      const fine = await drain(await run(connection, start(["true"]), stdinClose()));
      assert.equal(fine.answers.at(-1).exit.code, 0);
    }
    connection.close();
  });

  test("a compressed flag without an encoding, and half a frame, are errors", async () => {
    const connection = connect();
    const compressed = connection.open(DATA, "Stat");
    compressed.raw(Buffer.from([1, 0, 0, 0, 2, 0x0a, 0x00]));
    compressed.end();
    assert.notEqual((await compressed.finished()).status, 0);
    const half = connection.open(DATA, "Stat");
    half.raw(Buffer.from([0, 0, 0, 0, 50, 0x0a]));
    half.end();
    assert.notEqual((await half.finished()).status, 0);
    connection.close();
  });

  test("streams without a certificate, or with another session's, are unauthenticated", async () => {
    const other = await tenki.create(SMALL);
    const foreign = (await call(server, "CreateSessionCredential", { sessionId: other.id })).credential.credential;
    for (const headers of [{}, { "x-tenki-session-cert": foreign }, { authorization: `Bearer ${server.apiKey}` }]) {
      const connection = connect(headers);
      const { answers, status } = await drain(await run(connection, start(["true"])));
      assert.deepEqual([answers, status], [[], UNAUTHENTICATED]);
      connection.close();
    }
    await other.close();
  });
});

describe("a client that vanishes", () => {
  const stubborn = (marker) => start(["/bin/bash", "-c", `trap '' TERM; exec -a ${marker} sleep 7000`]);

  test("in the middle of a run ends its process: TERM first", async () => {
    const connection = connect();
    const script = "trap 'echo terminated > /tmp/farewell; exit' TERM; echo ready; while :; do sleep 0.05; done";
    const stream = await run(connection, start(["/bin/sh", "-c", script]));
    await stream.next();
    assert.equal(answer(await stream.next()).stdout, "ready\n");
    connection.vanish();
    await eventually("the process was told", async () => (await shell(session, "cat /tmp/farewell 2>/dev/null || true")) === "terminated");
  });

  test("or cancels only its stream, also one that ignores TERM, which gets KILL after 5 s", async () => {
    const connection = connect();
    const stream = await run(connection, stubborn("stubborn-one"));
    assert.ok(answer(await stream.next()).started);
    await eventually("it runs", async () => (await processes("stubborn-one")) === "1");
    const cancelled = Date.now();
    stream.cancel();
    await eventually("it is dead", async () => (await processes("stubborn-one")) === "0");
    assert.ok(Date.now() - cancelled > 3_000, "KILL must leave time for TERM");
    // The connection itself is still good.
    assert.equal((await drain(await run(connection, start(["true"]), stdinClose()))).answers.at(-1).exit.code, 0);
    connection.close();
  });

  test("while it floods stdin or does not read output harms nobody else", async () => {
    for (const argv of [["sleep", "7654322"], ["yes", "7654322"]]) {
      const connection = connect();
      const stream = await run(connection, start(argv));
      stream.stream.pause();
      for (let count = 0; count < 100; count++) stream.send(stdin(Buffer.alloc(32_768)));
      assert.equal(await shell(session, "echo others"), "others");
      connection.vanish();
    }
    await eventually("both are gone", async () => (await processes(7654322)) === "0");
  });

  test("in the middle of an upload leaves no file", async () => {
    const connection = connect();
    await shell(session, "mkdir -p /tmp/vanished");
    const upload = connection.open(DATA, "WriteFileStream");
    upload.send(frame([1, message([1, session.id], [2, "/tmp/vanished/file"], [4, true])]));
    for (let count = 0; count < 20; count++) upload.send(stdin(Buffer.alloc(65_536)));
    await shell(session, "echo the upload has been under way for a round trip");
    connection.vanish();
    await eventually("nothing is left", async () => (await shell(session, "ls -A /tmp/vanished | wc -l")) === "0");
  });

  test("hundreds of times leaves no process behind", async () => {
    const before = Number(await shell(session, "ls -d /proc/[0-9]* | wc -l"));
    for (let round = 0; round < 10; round++) {
      const connection = connect();
      const streams = await Promise.all(Array.from({ length: 20 }, () => run(connection, start(["sleep", "7654323"]))));
      await Promise.all(streams.slice(0, 10).map((stream) => stream.next()));
      connection.vanish();
    }
    await eventually("all are gone", async () => (await processes(7654323)) === "0");
    await eventually("nothing is left of them", async () => Number(await shell(session, "ls -d /proc/[0-9]* | wc -l")) <= before);
  });
});
