// Runs every conformance test against one real server, then looks for what it left behind.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { Server } from "./lib/server.mjs";

const directory = import.meta.dirname;
const wanted = process.argv.slice(2);
const files = readdirSync(directory)
  .filter((name) => name.endsWith(".test.mjs"))
  .filter((name) => wanted.length === 0 || wanted.some((word) => name.includes(word)))
  .map((name) => join(directory, name));

const server = await Server.start();
let failed = false;
try {
  // One file at a time: the machine is small, and usage counts would mix.
  const tests = spawn(process.execPath, ["--test", "--test-reporter=spec", "--test-force-exit", "--test-concurrency=1", "--test-timeout=120000", ...files], {
    stdio: "inherit",
    env: { ...process.env, NAGAYA_TEST_ENDPOINT: server.endpoint, NAGAYA_TEST_API_KEY: server.apiKey },
  });
  const [code] = await once(tests, "exit");
  failed = code !== 0;
} finally {
  if (failed) console.error(`the server's log:\n${server.log.slice(-20_000)}`);
  await server.remove();
}
process.exitCode = failed ? 1 : 0;
