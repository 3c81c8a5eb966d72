// The same through TLS, with a certificate authority of our own.

import assert from "node:assert/strict";
import { execFileSync, spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import http2 from "node:http2";
import { get } from "node:https";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { Server } from "./lib/server.mjs";

const missing = spawnSync("openssl", ["version"]).error ? "not run: there is no openssl to make a certificate with" : false;
const directory = mkdtempSync(join(tmpdir(), "nagaya-tls-"));
const authority = join(directory, "certificate.pem");
let server;
before(async () => {
  if (missing) return;
  const key = join(directory, "key.pem");
  execFileSync("openssl", [
    "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
    "-subj", "/CN=nagaya test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", authority,
  ], { stdio: "ignore" });
  server = await Server.start({
    configuration: `[tls]\ncertificate_file = "${authority}"\nkey_file = "${key}"\n[pools]\nslots_ready = 2\nisolated_slots_ready = 1\n`,
  });
});
after(async () => {
  await server?.remove();
  rmSync(directory, { recursive: true, force: true });
});

test("the ready line names https", { skip: missing }, () => assert.match(server.endpoint, /^https:\/\/127\.0\.0\.1:\d+$/));

/** Runs a program beside this file. The SDK's data plane takes its authorities from the environment of a process only. */
async function run(program) {
  const child = spawn(process.execPath, ["--input-type=module", "--eval", program], {
    cwd: import.meta.dirname,
    stdio: ["ignore", "pipe", "inherit"],
    env: {
      ...process.env,
      AUTHORITY: readFileSync(authority, "utf8"),
      DIRECTORY: directory,
      NODE_EXTRA_CA_CERTS: authority,
      TENKI_API_ENDPOINT: server.endpoint,
      TENKI_API_KEY: server.apiKey,
    },
  });
  let output = "";
  child.stdout.setEncoding("utf8").on("data", (text) => (output += text));
  const [code] = await once(child, "exit");
  return [code, output];
}

test("the SDK works on both planes when it trusts the authority", { skip: missing }, async () => {
  const ended = await run(`
    import { TenkiSandbox, stdoutText } from "@tenkicloud/sandbox";
    const tenki = new TenkiSandbox({ rootCertificates: process.env.AUTHORITY });
    const session = await tenki.create({ cpuCores: 1, memoryMb: 128 });
    await session.writeFile("over-tls", "content");
    console.log(stdoutText(await session.exec("cat", { args: ["over-tls"] })));
    await session.close();
    process.exit(0);
  `);
  assert.deepEqual(ended, [0, "content\n"]);
});

test("SSH goes through the bridge in TLS", { skip: missing }, async () => {
  const ended = await run(`
    import { writeFileSync } from "node:fs";
    import { TenkiSandbox } from "@tenkicloud/sandbox";
    import { makeKey, relay, ssh } from "./lib/ssh.mjs";
    const tenki = new TenkiSandbox({ rootCertificates: process.env.AUTHORITY });
    const session = await tenki.create({ cpuCores: 1, memoryMb: 128 });
    const [key, knownHosts] = [process.env.DIRECTORY + "/id", process.env.DIRECTORY + "/known_hosts"];
    const certificate = await tenki.issueSandboxSSHCert(session.id, makeKey(key), { ttlMs: 600_000 });
    writeFileSync(key + "-cert.pub", certificate.sshCert + "\\n");
    writeFileSync(knownHosts, "@cert-authority * " + certificate.caPub + "\\n");
    const listener = await relay(() => session.ssh());
    console.log((await ssh(listener, key, knownHosts, "id -un")).trim());
    console.log((await ssh(listener, key, knownHosts, "head -c 1000000 /dev/zero | base64 -w0")).length);
    await session.close();
    process.exit(0);
  `);
  assert.deepEqual(ended, [0, "tenki\n1333336\n"]);
});

test("HTTP/2 is agreed upon by ALPN, HTTP/1.1 too, and clear text gets no answer of the API", { skip: missing }, async () => {
  const ca = readFileSync(authority);
  const session = http2.connect(server.endpoint, { ca });
  await once(session, "connect");
  assert.equal(session.alpnProtocol, "h2");
  session.close();
  const [response] = await once(get(`${server.endpoint}/healthz`, { ca }), "response");
  assert.equal(response.statusCode, 200);
  response.resume();
  await assert.rejects(fetch(`${server.endpoint.replace("https", "http")}/healthz`));
});
