// SSH through the official SDK: its transport under a real OpenSSH client, and its certificates.

import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { InvalidStateError, SessionNotFoundError, UnauthorizedError } from "@tenkicloud/sandbox";
import { call } from "./lib/connect.mjs";
import { SMALL, client, rejection } from "./lib/helpers.mjs";
import { sharedServer } from "./lib/server.mjs";
import { makeKey, relay, ssh } from "./lib/ssh.mjs";

const UNKNOWN = "0190a8f0-0000-7000-8000-000000000000";

let server;
let tenki;
let session;
let directory;
let key;
let publicKey;
before(async () => {
  server = await sharedServer();
  tenki = client(server);
  session = await tenki.create(SMALL);
  directory = mkdtempSync(join(tmpdir(), "nagaya-ssh-"));
  key = join(directory, "id");
  publicKey = makeKey(key);
});
after(async () => {
  await session.close();
  await tenki[Symbol.asyncDispose]();
  rmSync(directory, { recursive: true });
  await server.remove();
});

describe("certificates", () => {
  test("one opens its session over the SDK's transport, and pins the host", async () => {
    const certificate = await tenki.issueSandboxSSHCert(session.id, publicKey, { ttlMs: 600_000 });
    assert.match(certificate.sshCert, /^ssh-ed25519-cert-v01@openssh\.com /);
    assert.match(certificate.certSerial, /^[0-9a-f]+$/);
    assert.ok(Math.abs(certificate.expiresAt - Date.now() - 600_000) < 5_000);
    assert.ok(certificate.renewalAfterMs > 0 && certificate.renewalAfterMs <= 600_000);
    assert.deepEqual({ ...certificate.permissions }, {
      allowPty: true, allowAgentForwarding: true, allowPortForwardingLocal: true, allowPortForwardingRemote: true, allowX11Forwarding: false,
    });
    writeFileSync(`${key}-cert.pub`, `${certificate.sshCert}\n`);
    const knownHosts = join(directory, "known_hosts");
    writeFileSync(knownHosts, `@cert-authority * ${certificate.caPub}\n`);
    for (const open of [() => session.ssh(), () => tenki.ssh(session.id)]) {
      const listener = await relay(open);
      try {
        assert.equal(await ssh(listener, key, knownHosts, "id -un"), "tenki\n");
        assert.equal((await ssh(listener, key, knownHosts, "head -c 1000000 /dev/zero | base64 -w0")).length, 1_333_336);
      } finally {
        listener.close();
      }
    }
  });

  test("none is given for what is no session, or no key", async () => {
    await rejection(tenki.issueSandboxSSHCert(UNKNOWN, publicKey), SessionNotFoundError);
    await assert.rejects(tenki.issueSandboxSSHCert(session.id, "ssh-ed25519 nonsense and more of it"), /public_key/);
  });
});

describe("the transport", () => {
  test("is refused with the SDK's own errors", async () => {
    await rejection(tenki.ssh(UNKNOWN), SessionNotFoundError);
    const stranger = client(server, { authToken: "tk_unknown" });
    await rejection(stranger.ssh(session.id), UnauthorizedError);
    await stranger[Symbol.asyncDispose]();
    const paused = await tenki.create(SMALL);
    await paused.pause();
    await rejection(tenki.ssh(paused.id), InvalidStateError);
    await paused.close();
    await rejection(tenki.ssh(paused.id), InvalidStateError);
  });

  test("begins with the server's version, and ends when it is closed", async () => {
    const connection = await session.ssh();
    assert.match(Buffer.from(await connection.read()).toString(), /^SSH-2\.0-Nagaya/);
    connection.close();
  });
});

test("keys replace a session's keys", async () => {
  await call(server, "UpdateSSHAuthorizedKeys", { sessionId: session.id, sshAuthorizedKeys: [publicKey.trim()] });
  await assert.rejects(call(server, "UpdateSSHAuthorizedKeys", { sessionId: session.id, sshAuthorizedKeys: [] }));
});
