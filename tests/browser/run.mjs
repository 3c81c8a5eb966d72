// Makes a certificate for the previews' host names, of which Node can be told at its start only, and runs the tests.

import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const directory = mkdtempSync(join(tmpdir(), "nagaya-browser-"));
try {
  const [certificate, key] = [join(directory, "certificate.pem"), join(directory, "key.pem")];
  execFileSync("openssl", [
    "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
    "-subj", "/CN=nagaya test", "-addext", "subjectAltName=IP:127.0.0.1,DNS:*.preview.test", "-keyout", key, "-out", certificate,
  ], { stdio: "ignore" });
  const tests = spawn(process.execPath, [
    "--test", "--test-reporter=spec", "--test-force-exit", "--test-timeout=120000", join(import.meta.dirname, "hot-reload.test.mjs"),
  ], {
    stdio: "inherit",
    env: { ...process.env, NODE_EXTRA_CA_CERTS: certificate, PREVIEW_CERTIFICATE: certificate, PREVIEW_KEY: key },
  });
  const [code] = await once(tests, "exit");
  process.exitCode = code === 0 ? 0 : 1;
} finally {
  rmSync(directory, { recursive: true });
}
