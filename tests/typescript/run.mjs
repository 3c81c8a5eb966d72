// Runs every conformance test against one real server, then looks for what it left behind.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync, readdirSync } from "node:fs";
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
const left = leftovers(server.dataDir);
if (left.length > 0) {
  console.error(`still on the host after the purge:\n${left.join("\n")}`);
  failed = true;
}
process.exitCode = failed ? 1 : 0;

/** Processes, mounts and loop devices that still name the data directory. */
function leftovers(dataDir) {
  const found = new Set();
  const read = (path) => {
    try {
      return readFileSync(path, "utf8");
    } catch {
      // Gone while we looked, which is as it should be.
      return "";
    }
  };
  for (const pid of readdirSync("/proc").filter((name) => /^\d+$/.test(name))) {
    if (read(`/proc/${pid}/cmdline`).includes(dataDir)) found.add(`process ${pid}`);
    for (const line of read(`/proc/${pid}/mountinfo`).split("\n")) if (line.includes(dataDir)) found.add(`mount ${line}`);
  }
  for (const device of readdirSync("/sys/block")) {
    if (read(`/sys/block/${device}/loop/backing_file`).includes(dataDir)) found.add(`loop device ${device}`);
  }
  return [...found];
}
