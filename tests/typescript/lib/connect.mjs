// Connect with JSON over HTTP/1.1, as a client without any library speaks it.

import assert from "node:assert/strict";
import { CONTROL, DATA } from "./rpcs.mjs";

const HEADERS = { "content-type": "application/json", "connect-protocol-version": "1" };

/** One unary call; the answer is {status, body} whatever the status. */
export async function post(server, service, method, body, headers = {}) {
  const response = await fetch(`${server.endpoint}/${service}/${method}`, {
    method: "POST",
    headers: { ...HEADERS, ...headers },
    body: typeof body === "string" ? body : JSON.stringify(body),
  });
  const content = await response.text();
  let parsed;
  try {
    parsed = JSON.parse(content);
  } catch {
    assert.fail(`${method} answered HTTP ${response.status} with something that is no JSON: ${content.slice(0, 200)}`);
  }
  return { status: response.status, body: parsed, headers: response.headers };
}

export const bearer = (server) => ({ authorization: `Bearer ${server.apiKey}` });

/** A control-plane call that must succeed. */
export async function call(server, method, body = {}) {
  const answer = await post(server, CONTROL, method, body, bearer(server));
  assert.equal(answer.status, 200, `${method}: ${JSON.stringify(answer.body)}`);
  return answer.body;
}

/** A control-plane call that must fail with this Connect code; returns the error. */
export async function refused(server, method, body, code) {
  const answer = await post(server, CONTROL, method, body, bearer(server));
  assert.equal(answer.body.code, code, `${method} ${JSON.stringify(body).slice(0, 200)}: ${JSON.stringify(answer.body)}`);
  assert.notEqual(answer.status, 200);
  return answer.body;
}

/** The data plane of one session: unary calls with its certificate. */
export class DataPlane {
  constructor(endpoint, sessionId, certificate) {
    Object.assign(this, { endpoint, sessionId, certificate });
  }

  static async of(server, sessionId) {
    const answer = await call(server, "CreateSessionCredential", { sessionId });
    return new DataPlane(answer.dataPlaneEndpoint, sessionId, answer.credential.credential);
  }

  /** {status, body} of one call; the session's id is filled in. */
  post(method, request) {
    const body = { request: { sessionId: this.sessionId, ...request } };
    return post(this, DATA, method, body, this.certificate ? { "x-tenki-session-cert": this.certificate } : {});
  }

  async call(method, request) {
    const answer = await this.post(method, request);
    assert.equal(answer.status, 200, `${method}: ${JSON.stringify(answer.body)}`);
    return answer.body.response ?? {};
  }

  async refused(method, request, code) {
    const answer = await this.post(method, request);
    assert.equal(answer.body.code, code, `${method}: ${JSON.stringify(answer.body)}`);
    return answer.body;
  }
}

/** A server stream: every message, then the error of the end frame, if there is one. */
export async function stream(server, method, body, headers = bearer(server), service = CONTROL) {
  const message = Buffer.from(JSON.stringify(body));
  const frame = Buffer.alloc(5 + message.length);
  frame.writeUInt32BE(message.length, 1);
  message.copy(frame, 5);
  const response = await fetch(`${server.endpoint}/${service}/${method}`, {
    method: "POST",
    headers: { ...HEADERS, "content-type": "application/connect+json", ...headers },
    body: frame,
  });
  assert.equal(response.status, 200);
  const content = Buffer.from(await response.arrayBuffer());
  const messages = [];
  let error;
  for (let offset = 0; offset < content.length; ) {
    const length = content.readUInt32BE(offset + 1);
    const value = JSON.parse(content.subarray(offset + 5, offset + 5 + length).toString() || "{}");
    if (content[offset] & 2) error = value.error;
    else messages.push(value);
    offset += 5 + length;
  }
  return { messages, error };
}
