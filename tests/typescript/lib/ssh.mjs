// A real OpenSSH client whose connections are the SDK's.

import { execFile, execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { createServer } from "node:net";
import { promisify } from "node:util";

const run = promisify(execFile);

/** Makes a key in this file; returns its public half. */
export function makeKey(path) {
  execFileSync("ssh-keygen", ["-t", "ed25519", "-N", "", "-q", "-f", path]);
  return readFileSync(`${path}.pub`, "utf8");
}

/** A port of this machine behind which every connection is one of the SDK's. */
export async function relay(open) {
  const listener = createServer(async (socket) => {
    socket.on("error", () => {});
    const ssh = await open();
    socket.on("data", (chunk) => ssh.write(chunk).catch(() => socket.destroy()));
    socket.on("close", () => ssh.close());
    for (;;) {
      const chunk = await ssh.read();
      if (chunk === null) break;
      socket.write(chunk);
    }
    socket.end();
  });
  await new Promise((resolve) => listener.listen(0, "127.0.0.1", resolve));
  return listener;
}

/** Runs a command with this key and the certificate beside it; returns its output. */
export async function ssh(listener, key, knownHosts, ...command) {
  const options = ["BatchMode=yes", "StrictHostKeyChecking=yes", `UserKnownHostsFile=${knownHosts}`, "IdentitiesOnly=yes"];
  const { stdout } = await run("ssh", [
    "-F", "none", ...options.flatMap((option) => ["-o", option]), "-i", key, "-p", String(listener.address().port),
    "tenki@127.0.0.1", ...command,
  ], { maxBuffer: 16 << 20 });
  return stdout;
}
