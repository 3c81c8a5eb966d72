// A real server for the tests: started on a free port with a data directory of its own, and
// removed with everything it made.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";

const READY = /^nagaya ready on (https?:\/\/\S+)$/;
const START_TIMEOUT_MS = 60_000;
const STOP_TIMEOUT_MS = 60_000;

// Small pools: the tests make few sandboxes at a time and start several servers.
const CONFIGURATION = "[pools]\nslots_ready = 4\nisolated_slots_ready = 1\n";

/** The program under test: NAGAYA_BIN, else the debug build of this workspace. */
export function binary() {
  const path = process.env.NAGAYA_BIN ?? resolve(import.meta.dirname, "../../../target/debug/nagaya");
  if (!existsSync(path)) throw new Error(`there is no server binary at ${path}: build it, or name one in NAGAYA_BIN`);
  return path;
}

export class Server {
  constructor(dataDir) {
    this.dataDir = dataDir;
    this.listen = "127.0.0.1:0";
    this.log = "";
  }

  /** Starts a server. `configuration` is TOML that comes after the tests' own. */
  static async start({ configuration = "" } = {}) {
    const server = new Server(mkdtempSync(join(tmpdir(), "nagaya-test-")));
    const network = `[network]\ncidr = "${freeNetwork()}"\n`;
    writeFileSync(join(server.dataDir, "test.toml"), (configuration || CONFIGURATION) + network);
    await server.launch();
    return server;
  }

  async launch() {
    const directory = ["--data-dir", this.dataDir];
    this.process = spawn(
      binary(),
      ["serve", "--listen", this.listen, ...directory, "--config", join(this.dataDir, "test.toml")],
      { stdio: ["ignore", "pipe", "pipe"] },
    );
    this.process.stderr.setEncoding("utf8").on("data", (text) => (this.log += text));
    this.exited = once(this.process, "exit");
    const ready = (async () => {
      for await (const line of createInterface({ input: this.process.stdout })) {
        const match = READY.exec(line);
        if (match) return match[1];
      }
      throw new Error(`the server ended before it was ready:\n${this.log}`);
    })();
    this.endpoint = await within(START_TIMEOUT_MS, ready, () => `the server did not become ready:\n${this.log}`);
    // Nobody reads more than the first line; the pipe must not fill up.
    this.process.stdout.resume();
    this.apiKey = readFileSync(join(this.dataDir, "api-key"), "utf8").trim();
  }

  /** Ends the server as an operator would; its sandboxes go on. */
  async stop() {
    if (this.process.exitCode === null && this.process.signalCode === null) this.process.kill("SIGTERM");
    const [code, signal] = await within(STOP_TIMEOUT_MS, this.exited, () => {
      this.process.kill("SIGKILL");
      return `the server did not end after SIGTERM:\n${this.log}`;
    });
    if (code !== 0) throw new Error(`the server ended with ${signal ?? code}:\n${this.log}`);
  }

  /** Ends the server as an accident would. */
  async kill() {
    this.process.kill("SIGKILL");
    await this.exited;
  }

  /** Starts the server again on the same data. */
  async restart() {
    await this.launch();
  }

  /** From the next start on it listens where it does now, so that clients find it again. */
  stay() {
    this.listen = new URL(this.endpoint).host;
  }

  /** Stops the server, removes every sandbox and the data directory. */
  async remove() {
    try {
      await this.stop();
    } finally {
      await run(binary(), ["purge", "--data-dir", this.dataDir]);
      rmSync(this.dataDir, { recursive: true, force: true });
    }
  }
}

/** The server of a whole test run when `run.mjs` started one, else one for this file alone. */
export async function sharedServer() {
  const { NAGAYA_TEST_ENDPOINT: endpoint, NAGAYA_TEST_API_KEY: apiKey } = process.env;
  if (endpoint && apiKey) return { endpoint, apiKey, async remove() {} };
  return Server.start();
}

/** A network that no other server on this host uses: several of them run beside each other here. */
function freeNetwork() {
  const used = new Set(
    readFileSync("/proc/net/route", "utf8").split("\n").slice(1).map((line) => line.split("\t")[1] ?? "")
      // Little endian: 0000F60A is 10.246.0.0.
      .filter((destination) => destination.endsWith("0A")).map((destination) => Number.parseInt(destination.slice(4, 6), 16)),
  );
  for (let count = 0; count < 128; count++) {
    const number = 64 + ((process.pid + count) % 128);
    if (!used.has(number)) return `10.${number}.0.0/16`;
  }
  throw new Error("this host has a route to every network that a test server could use");
}

async function run(command, commandArguments) {
  const child = spawn(command, commandArguments, { stdio: ["ignore", "ignore", "pipe"] });
  let errors = "";
  child.stderr.setEncoding("utf8").on("data", (text) => (errors += text));
  const [code] = await once(child, "exit");
  if (code !== 0) throw new Error(`${commandArguments.join(" ")} ended with ${code}:\n${errors}`);
}

async function within(milliseconds, promise, describe) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(describe())), milliseconds);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}
