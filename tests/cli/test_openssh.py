"""OpenSSH, sftp and rsync through what `ssh config install` writes, in a scratch home."""

import http.server
import os
import pathlib
import subprocess
import threading
import unittest
import urllib.request

from scratch import Scratch

USERS_LINES = "# mine\nHost *\n    ServerAliveInterval 7\n\nHost old\n\tUser nobody"


def setUpModule():
    global scratch, session, host, config
    scratch = Scratch()
    unittest.addModuleCleanup(scratch.remove)
    session = scratch.create("--name", "box")
    host = f"sbx-{session}"
    # OpenSSH looks for the home directory among the accounts, not in HOME.
    config = f"{scratch.home}/.ssh/config"
    os.mkdir(f"{scratch.home}/.ssh", 0o700)
    pathlib.Path(config).write_text(USERS_LINES)
    os.chmod(config, 0o640)
    scratch.run("tenki", "sandbox", "ssh", "config", "install")


def ssh(*words, **how):
    return scratch.run("ssh", "-F", config, *words, **how)


class Installed(unittest.TestCase):
    def test_commands_run_as_root_or_whoever_is_asked_for(self):
        result = ssh(host, "id -un; echo err >&2; exit 5", check=False)
        self.assertEqual((result.stdout, result.stderr, result.returncode), ("root\n", "err\n", 5))
        self.assertEqual(ssh("-l", "tenki", host, "id -un").stdout, "tenki\n")
        self.assertEqual(ssh("sbx-box", "id -un").stdout, "root\n", "a name does as well")

    def test_nobody_is_asked_about_the_host(self):
        result = ssh("-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", host, "true")
        self.assertEqual(result.stderr, "")

    def test_a_port_of_the_sandbox_is_here(self):
        serve = "python3 -c \"import http.server as h; s = h.HTTPServer(('127.0.0.1', 8000), h.SimpleHTTPRequestHandler); " \
                "print('up', flush=True); s.handle_request()\""
        local = free_port()
        with subprocess.Popen(["ssh", "-F", config, "-L", f"{local}:127.0.0.1:8000", host, f"cd /etc; {serve}"],
                              env=scratch.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True) as process:
            self.assertEqual(process.stdout.readline(), "up\n")
            with urllib.request.urlopen(f"http://127.0.0.1:{local}/hostname", timeout=30) as page:
                self.assertEqual(page.status, 200)

    def test_a_port_of_ours_is_in_the_sandbox(self):
        class Page(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"from the host")

            def log_message(self, *_):
                pass

        served = http.server.HTTPServer(("127.0.0.1", 0), Page)
        threading.Thread(target=served.serve_forever, daemon=True).start()
        self.addCleanup(served.server_close)
        self.addCleanup(served.shutdown)
        fetch = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9000', timeout=30).read().decode())"
        result = ssh("-R", f"9000:127.0.0.1:{served.server_port}", "-o", "ExitOnForwardFailure=yes", host, f'python3 -c "{fetch}"')
        self.assertEqual(result.stdout, "from the host\n")

    def test_sftp_moves_files_both_ways(self):
        pathlib.Path(f"{scratch.home}/up").write_bytes(os.urandom(3_000_000))
        batch = "put up /tmp/sftp\nget /tmp/sftp down\nls -l /tmp/sftp\n"
        scratch.run("sftp", "-F", config, "-b", "-", host, input=batch)
        self.assertEqual(pathlib.Path(f"{scratch.home}/up").read_bytes(), pathlib.Path(f"{scratch.home}/down").read_bytes())

    def test_rsync_moves_trees_both_ways(self):
        tree = pathlib.Path(f"{scratch.home}/tree/deep")
        tree.mkdir(parents=True)
        for number in range(50):
            (tree / str(number)).write_text("x" * number)
        carrier = f"ssh -F {config}"
        scratch.run("rsync", "-a", "-e", carrier, f"{scratch.home}/tree/", f"{host}:/tmp/tree/")
        scratch.run("rsync", "-a", "-e", carrier, f"{host}:/tmp/tree/", f"{scratch.home}/back/")
        scratch.run("diff", "-r", f"{scratch.home}/tree", f"{scratch.home}/back")

    def test_many_at_once_do_not_disturb_each_other(self):
        running = [subprocess.Popen(["ssh", "-F", config, host, f"echo {number}"], env=scratch.environment,
                                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) for number in range(6)]
        said = [process.communicate(timeout=120)[0].strip() for process in running]
        self.assertEqual(said, [str(number) for number in range(6)])

    def test_a_sandbox_that_does_not_exist_is_named(self):
        result = ssh("sbx-nobody", "true", check=False)
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("no session has the name \"nobody\"", result.stderr)

    def test_names_are_words_and_never_commands(self):
        for name in ("sbx-$(touch evil)", "sbx-`touch evil`", "sbx-'; touch evil; '", "sbx-x;touch evil", "sbx-../../evil"):
            ssh("--", name, "true", check=False)
        self.assertEqual([entry for entry in os.listdir(scratch.home) if "evil" in entry], [])

    def test_hosts_of_the_user_are_as_before(self):
        asked = ssh("-G", "old").stdout.splitlines()
        self.assertIn("user nobody", asked)
        self.assertIn("serveraliveinterval 7", asked)
        self.assertFalse([line for line in asked if line.startswith("proxycommand")])


class Uninstalled(unittest.TestCase):
    """Last by its name: nothing of ours stays."""

    def test_the_users_file_is_as_it_was(self):
        again = scratch.run("tenki", "sandbox", "ssh", "config", "install", "--json").stdout
        self.assertIn('"changed": false', again)
        scratch.run("tenki", "sandbox", "ssh", "config", "uninstall")
        self.assertEqual(pathlib.Path(config).read_text(), USERS_LINES)
        self.assertEqual(os.stat(config).st_mode & 0o777, 0o640)
        self.assertFalse(os.path.exists(f"{scratch.home}/.local/state/nagaya/ssh"))
        self.assertIn("not installed", scratch.run("tenki", "sandbox", "ssh", "config", "status").stdout)


class Directly(unittest.TestCase):
    def test_arguments_of_ssh_are_ssh_s(self):
        result = scratch.run("tenki", "sandbox", "ssh", "box", "-o", "LogLevel=QUIET", "id -un; exit 6", check=False)
        self.assertEqual((result.stdout, result.returncode), ("root\n", 6))
        result = scratch.run("tenki", "sandbox", "ssh", "--session", "box", "--user", "tenki", "--batch-mode",
                             "--connect-timeout", "10s", "--strict-host-key-checking", "yes", "id", "-un")
        self.assertEqual(result.stdout, "tenki\n")

    def test_a_key_of_the_user_s_is_used(self):
        scratch.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{scratch.home}/own")
        command = ["tenki", "sandbox", "ssh", "--identity-file", "own", "box", "id -un"]
        self.assertEqual(scratch.run(*command).stdout, "root\n")
        os.remove(f"{scratch.home}/own.pub")
        self.assertEqual(scratch.run(*command).stdout, "root\n")
        missing = scratch.run("tenki", "sandbox", "ssh", "--identity-file", "none", "box", "true", check=False)
        self.assertEqual(missing.returncode, 66, missing.stderr)

    def test_nothing_is_left_in_the_temporary_directory(self):
        temporary = f"{scratch.home}/tmp"
        os.mkdir(temporary)
        subprocess.run(["tenki", "sandbox", "ssh", "box", "true"], env=scratch.environment | {"TMPDIR": temporary},
                       stdin=subprocess.DEVNULL, check=True)
        self.assertEqual(os.listdir(temporary), [])


def free_port():
    import socket
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


if __name__ == "__main__":
    unittest.main()
