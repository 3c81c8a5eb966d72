// gRPC on node's own HTTP/2, frame by frame, so that a test can send what no library would.

import http2 from "node:http2";

const DEADLINE_MS = 30_000;

export class GrpcConnection {
  constructor(endpoint, headers = {}) {
    this.headers = headers;
    this.session = http2.connect(endpoint);
    this.session.on("error", () => {});
  }

  open(service, method, headers = {}) {
    return new GrpcCall(
      this.session.request({
        ":method": "POST",
        ":path": `/${service}/${method}`,
        "content-type": "application/grpc+proto",
        te: "trailers",
        ...this.headers,
        ...headers,
      }),
    );
  }

  close() {
    this.session.close();
  }

  /** As if the client's machine had lost its power. */
  vanish() {
    this.session.destroy();
  }
}

class GrpcCall {
  constructor(stream) {
    this.stream = stream;
    this.messages = [];
    this.waiting = [];
    this.buffer = Buffer.alloc(0);
    this.outcome = { httpStatus: undefined, status: undefined, message: "" };
    const take = (headers) => {
      if (headers[":status"] !== undefined) this.outcome.httpStatus = headers[":status"];
      if (headers["grpc-status"] !== undefined) this.outcome.status = Number(headers["grpc-status"]);
      if (headers["grpc-message"] !== undefined) this.outcome.message = decodeURIComponent(headers["grpc-message"]);
    };
    stream.on("response", take);
    stream.on("trailers", take);
    stream.on("data", (chunk) => this.#read(chunk));
    stream.on("error", (error) => (this.outcome.error = error.message));
    // A server may answer before it has heard everything: its trailers end the call, not ours.
    this.closed = new Promise((resolve) => stream.on("end", resolve).on("close", resolve)).then(() => {
      this.waiting.splice(0).forEach((resolve) => resolve(undefined));
    });
  }

  #read(chunk) {
    this.buffer = Buffer.concat([this.buffer, chunk]);
    while (this.buffer.length >= 5 && this.buffer.length >= 5 + this.buffer.readUInt32BE(1)) {
      const end = 5 + this.buffer.readUInt32BE(1);
      const message = this.buffer.subarray(5, end);
      this.buffer = this.buffer.subarray(end);
      const resolve = this.waiting.shift();
      if (resolve) resolve(message);
      else this.messages.push(message);
    }
  }

  /** One message in its frame. */
  send(message) {
    const head = Buffer.alloc(5);
    head.writeUInt32BE(message.length, 1);
    this.raw(Buffer.concat([head, message]));
  }

  /** Bytes as they are. */
  raw(bytes) {
    this.stream.write(bytes);
  }

  end() {
    this.stream.end();
  }

  cancel() {
    this.stream.close(http2.constants.NGHTTP2_CANCEL);
  }

  /** The next message, or nothing when there are no more. */
  next() {
    if (this.messages.length > 0) return Promise.resolve(this.messages.shift());
    return bounded(Promise.race([new Promise((resolve) => this.waiting.push(resolve)), this.closed]));
  }

  /** What the call ended with: {httpStatus, status, message, error}. */
  async finished() {
    this.stream.resume();
    await bounded(this.closed);
    return this.outcome;
  }
}

async function bounded(promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no answer within ${DEADLINE_MS} ms`)), DEADLINE_MS);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}
