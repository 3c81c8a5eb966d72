"""A server with TLS whose authority only its owner knows."""

import shutil
import subprocess
import tempfile
import unittest

from scratch import Scratch


def setUpModule():
    global scratch, authority
    directory = tempfile.mkdtemp(prefix="nagaya-tls-")
    unittest.addModuleCleanup(shutil.rmtree, directory)
    authority = f"{directory}/certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=nagaya test", "-addext", "subjectAltName=IP:127.0.0.1",
         "-addext", "basicConstraints=critical,CA:FALSE", "-keyout", f"{directory}/key.pem",
         "-out", authority], check=True, capture_output=True)
    tls = f'[tls]\ncertificate_file = "{authority}"\nkey_file = "{directory}/key.pem"\n'
    scratch = Scratch(tls, NAGAYA_ROOT_CERTIFICATES=authority)
    unittest.addModuleCleanup(scratch.remove)


class Trust(unittest.TestCase):
    def test_everything_goes_through_tls(self):
        self.assertTrue(scratch.server.endpoint.startswith("https://"))
        session = scratch.create()
        self.assertEqual(scratch.run("tenki", "sandbox", "exec", "-q", session, "echo", "word").stdout, "word\n")
        self.assertEqual(scratch.run("tenki", "sandbox", "ssh", session, "id", "-un").stdout, "root\n")

    def test_an_unknown_authority_is_refused_and_named_as_the_cause(self):
        refused = scratch.run("env", "-u", "NAGAYA_ROOT_CERTIFICATES", "tenki", "sandbox", "list", check=False)
        self.assertEqual(refused.returncode, 69, refused.stderr)
        self.assertIn("certificate", refused.stderr)
        self.assertIn("[no_server]", refused.stderr)
        self.assertIn("NAGAYA_ROOT_CERTIFICATES", refused.stderr)

    def test_a_file_of_certificates_must_be_there(self):
        missing = scratch.run("env", "NAGAYA_ROOT_CERTIFICATES=/nowhere.pem", "tenki", "sandbox", "list", check=False)
        self.assertEqual(missing.returncode, 66, missing.stderr)
        self.assertIn("/nowhere.pem", missing.stderr)


if __name__ == "__main__":
    unittest.main()
