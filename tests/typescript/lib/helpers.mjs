// Small things that every test file uses.

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { TenkiSandbox, stdoutText } from "@tenkicloud/sandbox";

/** A machine small enough that many fit on a test host. */
export const SMALL = { cpuCores: 1, memoryMb: 512 };

/** A text that no other test uses, fit for names and tags. */
export const unique = (word) => `${word}-${randomBytes(6).toString("hex")}`;

export function client(server, options = {}) {
  return new TenkiSandbox({ baseUrl: server.endpoint, authToken: server.apiKey, ...options });
}

/** Runs a shell line and returns its trimmed output; any failure fails the test. */
export async function shell(session, line, options = {}) {
  const result = await session.run(["/bin/sh", "-c", line], options);
  assert.equal(result.exitCode, 0, `${line}: ${new TextDecoder().decode(result.stderr)}`);
  return stdoutText(result);
}

/** Asks until the answer is true; the deadline is far beyond what a slow machine needs. */
export async function eventually(what, ask, deadlineMs = 20_000) {
  const deadline = Date.now() + deadlineMs;
  for (;;) {
    const answer = await ask();
    if (answer) return answer;
    if (Date.now() > deadline) assert.fail(`after ${deadlineMs} ms still not true: ${what}`);
    await new Promise((resume) => setTimeout(resume, 25));
  }
}

/** Fails unless the promise is rejected with exactly this class of error; returns the error. */
export async function rejection(promise, expected) {
  let value;
  try {
    value = await promise;
  } catch (error) {
    assert.equal(error.constructor.name, expected.name, `${error.name}: ${error.message}`);
    return error;
  }
  assert.fail(`expected ${expected.name}, got ${JSON.stringify(value)}`);
}

/** Reads a web stream to its end. */
export async function readAll(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return Buffer.concat(chunks);
}

export function streamOf(...chunks) {
  return new ReadableStream({
    start(controller) {
      for (const chunk of chunks) controller.enqueue(chunk);
      controller.close();
    },
  });
}

export const bytes = (text) => new TextEncoder().encode(text);
export const text = (content) => new TextDecoder().decode(content);
