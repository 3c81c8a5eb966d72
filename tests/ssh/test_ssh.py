"""SSH into sandboxes with the programs that people use: OpenSSH's ssh, scp and sftp, rsync, and paramiko.

`python3 -m unittest discover tests/ssh`; the server is NAGAYA_BIN, else the debug build.
"""

import hashlib
import logging
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import paramiko

import bridge
from server import Refused, Server

HERE = pathlib.Path(__file__).resolve().parent
MIB = 1 << 20


def setUpModule():
    global server, directory, key, public_key, session
    # One line for each of ten thousand refused channels says nothing more than the test does.
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)
    server = Server()
    unittest.addModuleCleanup(server.remove)
    directory = tempfile.mkdtemp(prefix="nagaya-ssh-")
    unittest.addModuleCleanup(shutil.rmtree, directory)
    key = make_key("id")
    public_key = open(f"{key}.pub").read().strip()
    session = server.session()
    certify(session)


def make_key(name, kind="ed25519"):
    path = f"{directory}/{name}"
    subprocess.run(["ssh-keygen", "-t", kind, "-N", "", "-q", "-f", path], check=True)
    return path


def certify(session, name="cert", **wishes):
    issued = server.certificate(session, public_key, **wishes)
    path = f"{directory}/{name}-cert.pub"
    with open(path, "w") as file:
        file.write(issued["sshCert"] + "\n")
    return issued, path


OPTIONS = ["-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
           "-o", "LogLevel=ERROR", "-o", "IdentitiesOnly=yes"]


def options(by="bridge", certificate=None, of=None):
    """Options of OpenSSH's programs for one of the two ways into a session."""
    common = [*OPTIONS, "-i", key, "-o", f"CertificateFile={certificate or directory + '/cert-cert.pub'}"]
    if by == "bridge":
        carrier = f"{sys.executable} {HERE}/bridge.py {server.endpoint} {server.api_key} {of or session}"
        return [*common, "-o", f"ProxyCommand={carrier}"]
    return [*common, "-o", f"Port={server.gateway()['publicEndpoint'].rsplit(':', 1)[1]}"]


def target(by="bridge", user="tenki", of=None):
    return f"{user}@sandbox" if by == "bridge" else f"{user}@{of or session}@127.0.0.1"


def ssh(*command, by="bridge", user="tenki", of=None, certificate=None, more=(), check=True, timeout=60, **how):
    result = subprocess.run(
        ["ssh", *options(by, certificate, of), *more, target(by, user, of), *command],
        **({"stdin": subprocess.DEVNULL} if "input" not in how else {}),
        capture_output=True, text=how.pop("text", True), timeout=timeout, **how,
    )
    if check and result.returncode != 0:
        raise AssertionError(f"ssh {command} ended with {result.returncode}: {result.stderr}")
    return result


class Commands(unittest.TestCase):
    def test_output_errors_and_status_are_apart_both_ways_in(self):
        for by in ("bridge", "listener"):
            with self.subTest(by=by):
                result = ssh("echo out; echo err >&2; exit 7", by=by, check=False)
                self.assertEqual((result.stdout, result.stderr, result.returncode), ("out\n", "err\n", 7))
                self.assertEqual(ssh("id -un; pwd", by=by).stdout, "tenki\n/home/tenki\n")
                self.assertEqual(ssh("id -un; pwd", by=by, user="root").stdout, "root\n/root\n")

    def test_a_session_alone_is_a_user_name_on_the_listener(self):
        result = subprocess.run(["ssh", *options("listener"), f"{session}@127.0.0.1", "id -un"], stdin=subprocess.DEVNULL,
                                capture_output=True, text=True, timeout=60)
        self.assertEqual(result.stdout, "tenki\n", result.stderr)

    def test_input_ends(self):
        self.assertEqual(ssh("wc -c", input="x" * 100_000).stdout.strip(), "100000")

    def test_the_sessions_variables_and_the_clients_are_there(self):
        other = server.session(env={"FROM_SESSION": "1", "BOTH": "session"})
        certify(other, "env")
        asked = ["-o", "SetEnv=BOTH=client LC_X=2"]
        result = ssh('echo "$FROM_SESSION $BOTH $LC_X $SSH_CONNECTION"', of=other, certificate=f"{directory}/env-cert.pub",
                     more=asked)
        self.assertRegex(result.stdout, r"^1 client 2 127\.0\.0\.1 \d+ ")
        server.call("TerminateSession", sessionId=other)

    def test_what_passes_is_counted(self):
        before = server.metrics()
        for by in ("bridge", "listener"):
            ssh("head -c 1000000 /dev/zero", by=by, text=False)
        after = server.metrics()
        grown = {name: after[name] - before[name] for name in after if name.startswith("nagaya_ssh_")}
        self.assertEqual(grown["nagaya_ssh_connections_total"], 2)
        self.assertGreater(grown['nagaya_ssh_bytes_total{direction="from_sandbox"}'], 2_000_000)
        self.assertIn(grown['nagaya_ssh_bytes_total{direction="to_sandbox"}'], range(2_000, 200_000))
        wait_until(lambda: server.metrics()["nagaya_ssh_connections_open"] == before["nagaya_ssh_connections_open"])

    def test_a_signal_is_told_as_such(self):
        client = connect()
        channel = client.get_transport().open_session()
        channel.exec_command("kill -KILL $$")
        self.assertEqual(channel.recv_exit_status(), -1)
        client.close()

    def test_a_killed_client_ends_its_command(self):
        process = subprocess.Popen(["ssh", *options(), target(), "echo started; exec sleep 98765"],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.assertEqual(process.stdout.readline(), b"started\n")
        process.kill()
        process.wait()
        process.stdout.close()
        wait_until(lambda: ssh("pgrep -f '[s]leep 98765'", check=False).stdout == "")

    def test_a_terminal_has_its_size_and_follows_it(self):
        client = connect()
        channel = client.get_transport().open_session()
        channel.get_pty("vt100", 91, 33)
        channel.exec_command("stty size; echo $TERM; tty; read line; stty size")
        self.assertIn(b"/dev/pts/", read_until(channel, b"/dev/pts/"))
        channel.resize_pty(101, 44)
        time.sleep(0.3)
        channel.sendall(b"\n")
        rest = read_until(channel, b"44 101")
        self.assertIn(b"44 101", rest)
        self.assertEqual(channel.recv_exit_status(), 0)
        client.close()

    def test_a_shell_is_a_login_shell(self):
        result = subprocess.run(["ssh", *options(), "-tt", target()], input="shopt -q login_shell && echo yes-$((40+2)); exit 3\n",
                                capture_output=True, text=True, timeout=60)
        self.assertIn("yes-42", result.stdout)
        self.assertEqual(result.returncode, 3)

    def test_much_goes_both_ways_at_once(self):
        data = os.urandom(MIB) * 40
        for by in ("bridge", "listener"):
            with self.subTest(by=by):
                result = ssh("cat", by=by, input=data, text=False, timeout=120)
                self.assertEqual(hashlib.sha256(result.stdout).digest(), hashlib.sha256(data).digest())

    def test_keys_are_renewed_on_the_way(self):
        data = os.urandom(MIB) * 30
        result = ssh("cat", by="listener", input=data, text=False, timeout=120, more=["-o", "RekeyLimit=2M"])
        self.assertEqual(hashlib.sha256(result.stdout).digest(), hashlib.sha256(data).digest())

    def test_a_client_that_goes_on_after_its_end_harms_nobody(self):
        client = connect()
        channel = client.get_transport().open_session()
        channel.exec_command("cat; sleep 1")
        for _ in range(3):
            for kind, rest in ((96, b""), (94, b"more")):
                message = paramiko.Message()
                message.add_byte(bytes([kind]))
                message.add_int(channel.remote_chanid)
                if rest:
                    message.add_string(rest)
                client.get_transport()._send_user_message(message)
        self.assertEqual(channel.recv(100), b"")
        self.assertEqual(channel.recv_exit_status(), 0)
        client.close()
        self.assertEqual(ssh("echo alive").stdout, "alive\n")

    def test_what_was_sent_before_a_channel_was_closed_arrives(self):
        client = connect()
        channel = client.get_transport().open_session()
        channel.exec_command("cat > sent")
        channel.sendall(b"x" * 300_000)
        channel.close()
        wait_until(lambda: ssh("wc -c < sent").stdout.strip() == "300000")
        client.close()

    def test_a_program_that_does_not_read_stalls_no_other_channel(self):
        client = connect()
        stuck = client.get_transport().open_session()
        stuck.exec_command("echo up; exec sleep 87654")
        self.assertEqual(stuck.recv(10), b"up\n")
        threading.Thread(target=send_for_ever, args=(stuck,), daemon=True).start()
        time.sleep(1)
        for number in range(5):
            _, output, _ = client.exec_command(f"echo {number}", timeout=20)
            self.assertEqual(output.read(), f"{number}\n".encode())
        client.close()
        wait_until(lambda: ssh("pgrep -f '[s]leep 87654'", check=False).stdout == "")


def send_for_ever(channel):
    try:
        while True:
            channel.sendall(b"x" * 32768)
    except OSError:
        pass


def read_until(channel, wanted, seconds=20):
    channel.settimeout(seconds)
    data = b""
    while wanted not in data:
        more = channel.recv(4096)
        if not more:
            break
        data += more
    return data


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("it did not become true in time")
        time.sleep(0.2)


def connect(of=None, certificate=None, username="tenki"):
    """paramiko over the bridge, as the vendor's documents show it."""
    pkey = paramiko.Ed25519Key.from_private_key_file(key)
    pkey.load_certificate(certificate or f"{directory}/cert-cert.pub")
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    carrier = bridge.Bridge(server.endpoint, server.api_key, of or session)
    client.connect("sandbox", username=username, pkey=pkey, sock=carrier, look_for_keys=False, allow_agent=False)
    return client


class Paramiko(unittest.TestCase):
    def test_the_documented_program_works(self):
        pkey = paramiko.Ed25519Key.from_private_key_file(key)
        pkey.load_certificate(f"{directory}/cert-cert.pub")
        transport = paramiko.Transport(bridge.Bridge(server.endpoint, server.api_key, session))
        transport.connect(username="tenki", pkey=pkey)
        channel = transport.open_session()
        channel.exec_command("echo hello-over-ssh")
        self.assertEqual(channel.makefile().read().decode(), "hello-over-ssh\n")
        transport.close()

    def test_files(self):
        client = connect()
        sftp = client.open_sftp()
        content = os.urandom(3 * MIB + 17)
        with sftp.open("new file", "wb") as file:
            file.set_pipelined(True)
            file.write(content)
        self.assertEqual(sftp.stat("new file").st_size, len(content))
        with sftp.open("new file", "rb") as file:
            file.prefetch()
            self.assertEqual(file.read(), content)
        sftp.posix_rename("new file", "renamed")
        sftp.chmod("renamed", 0o640)
        self.assertEqual(sftp.stat("renamed").st_mode & 0o777, 0o640)
        sftp.symlink("renamed", "link")
        self.assertEqual(sftp.readlink("link"), "renamed")
        self.assertIn("renamed", sftp.listdir("."))
        sftp.mkdir("folder")
        self.assertEqual(sftp.normalize("folder/../folder/."), "/home/tenki/folder")
        sftp.rmdir("folder")
        sftp.remove("link")
        sftp.remove("renamed")
        with self.assertRaises(FileNotFoundError):
            sftp.stat("renamed")
        client.close()


class Files(unittest.TestCase):
    def test_sftp_and_scp_in_both_directions(self):
        source = f"{directory}/source"
        with open(source, "wb") as file:
            file.write(os.urandom(20 * MIB))
        for by in ("bridge", "listener"):
            for program, more in (("sftp-based", []), ("original", ["-O"])):
                with self.subTest(by=by, program=program):
                    run(["scp", *options(by), *more, source, f"{self.place(by)}copied"])
                    run(["scp", *options(by), *more, f"{self.place(by)}copied", f"{source}.back"])
                    self.assertEqual(digest(source), digest(f"{source}.back"))
        script = f"put {source} there\nls -l there\nrename there moved\nget moved {source}.got\nrm moved\nmkdir d\nrmdir d\ndf\n"
        result = subprocess.run(["sftp", *options(), "-b", "-", target()], input=script, capture_output=True, text=True, timeout=60)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(digest(source), digest(f"{source}.got"))
        self.assertRegex(result.stdout, r"-rw-r--r-- .* 20971520 ")
        long_lines = run(["sftp", *options(), "-b", "-", target()], input="ls -l /home/tenki\n").stdout
        self.assertRegex(long_lines, r"-rw-r--r-- +1 tenki +tenki +20971520 \w+ +\d+ \d\d:\d\d \d{4} .*copied")

    def place(self, by):
        # An address with two @ is taken apart at the last one.
        return f"{target(by)}:"

    def test_a_tree_by_rsync_and_recursive_scp(self):
        tree = pathlib.Path(directory) / "tree"
        (tree / "a/b").mkdir(parents=True)
        for number in range(50):
            (tree / f"a/{number}").write_bytes(os.urandom(number * 100))
        os.symlink("a", tree / "link")
        remote = " ".join(f"'{word}'" for word in ["ssh", *options()])
        run(["rsync", "-a", "-e", remote, f"{tree}/", f"{target()}:synced/"])
        (tree / "a/7").write_text("changed")
        result = run(["rsync", "-ai", "--delete", "-e", remote, f"{tree}/", f"{target()}:synced/"])
        self.assertIn("a/7", result.stdout)
        self.assertNotIn("a/8", result.stdout)
        self.assertEqual(ssh("cat synced/a/7; readlink synced/link; ls synced/a | wc -l").stdout, "changeda\n51\n")
        # A link to a directory is what this program fetches from no server.
        ssh("rm synced/link")
        run(["scp", "-r", *options(), f"{target()}:synced", f"{directory}/fetched"])
        self.assertEqual(pathlib.Path(f"{directory}/fetched/a/7").read_text(), "changed")

    def test_tenki_gets_no_files_of_root_and_root_does(self):
        ssh("umask 077; echo secret > /root/hidden; ln -sf /root/hidden /tmp/trap; chmod 700 /root", user="root")
        sftp = connect().open_sftp()
        for path in ("/root/hidden", "/tmp/trap", "/home/tenki/../../root/hidden", "../../root/hidden"):
            with self.subTest(path=path), self.assertRaises(PermissionError):
                sftp.open(path).read()
        for path in ("/etc/made", "/root/made"):
            with self.subTest(path=path), self.assertRaises(OSError):
                sftp.open(path, "w")
        self.assertEqual(connect(username="root").open_sftp().open("/root/hidden").read(), b"secret\n")
        with sftp.open("mine", "w") as file:
            file.write("x")
        self.assertEqual(sftp.stat("mine").st_uid, 1000)

    def test_hostile_packets_end_only_their_own_server(self):
        for packet in (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\5\1\0\0\0\3\0\0\0\x09\x05\0\0\0\1\xff\xff\xff\xff"):
            channel = connect().get_transport().open_session()
            channel.invoke_subsystem("sftp")
            channel.sendall(packet)
            channel.shutdown_write()
            read_until(channel, b"never")
        self.assertEqual(ssh("echo alive").stdout, "alive\n")


def run(command, **how):
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, **how)
    if result.returncode != 0:
        raise AssertionError(f"{command} ended with {result.returncode}: {result.stderr}")
    return result


def digest(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


ECHO = """import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536): self.request.sendall(data)
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("127.0.0.1", PORT), Echo).serve_forever()
"""


class Forwarding(unittest.TestCase):
    def background(self, *more, user="tenki", command=(), **how):
        command = ["ssh", *options(), "-o", "ExitOnForwardFailure=yes", *more, target(user=user), *command]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)
        self.addCleanup(lambda: (process.kill(), process.wait(), process.stdin.close(), process.stdout.close(), process.stderr.close()))
        return process

    def test_local_forwarding_reaches_the_sandboxs_loopback(self):
        port = free_port()
        ssh("cat > echo.py", input=ECHO.replace("PORT", "5601"))
        self.background("-L", f"{port}:localhost:5601", command=["exec python3 echo.py"])
        data = os.urandom(8 * MIB)
        self.assertEqual(exchange(port, data), data)

    def test_local_forwarding_to_other_hosts_is_refused(self):
        port = free_port()
        self.background("-L", f"{port}:169.254.169.254:80", command=["sleep 100"])
        self.assertEqual(exchange(port, b"GET / HTTP/1.0\r\n\r\n", seconds=3), b"")

    def test_remote_forwarding_reaches_the_client(self):
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=answer_once, args=(listener, b"from the client"), daemon=True).start()
        script = "import socket; s = socket.create_connection(('127.0.0.1', 5602)); s.sendall(b'hi'); s.shutdown(1); print(s.recv(100).decode())"
        process = self.background("-R", f"5602:127.0.0.1:{listener.getsockname()[1]}", command=[f'python3 -c "{script}"'])
        out, err = process.communicate(timeout=30)
        self.assertEqual(out, "from the client\n", err)

    def test_unix_sockets_are_forwarded_both_ways(self):
        local = f"{directory}/local.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{directory}/mine.sock")
        listener.listen()
        threading.Thread(target=answer_once, args=(listener, b"by unix"), daemon=True).start()
        script = ("import socket,os\\ns=socket.socket(socket.AF_UNIX); s.bind('/tmp/up.sock'); s.listen(); print('up', flush=True)\\n"
                  "c,_=s.accept(); c.sendall(c.recv(9)[::-1]); c.close()\\n"
                  "d=socket.socket(socket.AF_UNIX); d.connect('/tmp/back.sock'); d.sendall(b'x'); d.shutdown(1); print(d.recv(99).decode(), flush=True)")
        process = self.background("-L", f"{local}:/tmp/up.sock", "-R", f"/tmp/back.sock:{directory}/mine.sock",
                                  command=[f"printf \"{script}\" | python3 -"])
        self.assertEqual(process.stdout.readline(), "up\n", process.stderr.read() if process.poll() else "")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(local)
            client.sendall(b"abc")
            self.assertEqual(client.recv(10), b"cba")
        self.assertEqual(process.stdout.readline(), "by unix\n")

    def test_the_clients_agent_is_there_where_asked_for(self):
        agent = subprocess.run(["ssh-agent", "-s"], capture_output=True, text=True, check=True).stdout
        found = dict(re.findall(r"(SSH_\w+)=([^;]+);", agent))
        self.addCleanup(os.kill, int(found["SSH_AGENT_PID"]), signal.SIGTERM)
        env = {**os.environ, **found}
        run(["ssh-add", "-q", make_key("forwarded")], env=env)
        listing = "echo $SSH_AUTH_SOCK; python3 - <<'END'\nimport os,socket\ns=socket.socket(socket.AF_UNIX); s.connect(os.environ['SSH_AUTH_SOCK'])\n" \
                  "s.sendall(b'\\0\\0\\0\\1\\x0b'); print(s.recv(5)[4]); print(int.from_bytes(s.recv(4)))\nEND"
        result = ssh(listing, more=["-A"], env=env)
        path, kind, count = result.stdout.split()
        self.assertEqual((kind, count), ("12", "1"))
        wait_until(lambda: ssh(f"test -e {path}", check=False).returncode == 1)
        self.assertEqual(ssh("echo ${SSH_AUTH_SOCK:-none}").stdout, "none\n")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def answer_once(listener, text):
    peer, _ = listener.accept()
    while peer.recv(100):
        pass
    peer.sendall(text)
    peer.close()


def exchange(port, data, seconds=20):
    """What comes back for these bytes, tried until somebody listens, or to no avail."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            peer = socket.create_connection(("127.0.0.1", port), timeout=20)
        except ConnectionRefusedError:
            time.sleep(0.1)
            continue
        with peer:
            sender = threading.Thread(target=send_all, args=(peer, data))
            sender.start()
            got = b""
            try:
                while len(got) < len(data) and (more := peer.recv(MIB)):
                    got += more
            except ConnectionError:
                pass
            sender.join()
        if got:
            return got
        # The tunnel is there and what it leads to is not yet.
        time.sleep(0.3)
    return b""


def send_all(peer, data):
    try:
        peer.sendall(data)
    except OSError:
        pass


class Admission(unittest.TestCase):
    def test_the_bridge_refuses_as_the_contract_says(self):
        for headers, wanted, of in (
            ([], 401, session),
            (["Authorization: Bearer tk_wrong"], 401, session),
            ([f"Cookie: tenki_session={server.api_key}", "Origin: https://evil.example"], 403, session),
            # A page of a preview: the same host, another port.
            ([f"Cookie: tenki_session={server.api_key}", "Origin: http://127.0.0.1:20001"], 403, session),
            ([f"Authorization: Bearer {server.api_key}"], 404, "0190a8f0-0000-7000-8000-000000000000"),
            ([f"Authorization: Bearer {server.api_key}"], 404, "nonsense"),
        ):
            with self.subTest(wanted=wanted, of=of), self.assertRaises(bridge.Refused) as refused:
                bridge.Bridge(server.endpoint, None, of, headers)
            self.assertEqual(refused.exception.status, wanted)
            self.assertLessEqual(len(refused.exception.text), 256)

    def test_a_paused_or_ended_session_is_an_invalid_state_and_ends_its_connections(self):
        other = server.session()
        _, certificate = certify(other, "ended")
        client = connect(other, certificate)
        server.call("PauseSession", sessionId=other)
        with self.assertRaises(bridge.Refused) as refused:
            bridge.Bridge(server.endpoint, server.api_key, other)
        self.assertEqual(refused.exception.status, 409)
        result = ssh("true", by="listener", of=other, certificate=certificate, check=False)
        self.assertIn("PAUSED", result.stderr)
        server.call("ResumeSession", sessionId=other)
        self.assertEqual(client.exec_command("echo again")[1].read(), b"again\n")
        server.call("TerminateSession", sessionId=other)
        wait_until(lambda: not client.get_transport().is_active())
        with self.assertRaises(bridge.Refused) as refused:
            bridge.Bridge(server.endpoint, server.api_key, other)
        self.assertEqual(refused.exception.status, 409)
        with self.assertRaises(Refused):
            certify(other)

    def test_a_paused_session_is_woken_where_that_is_configured(self):
        global server
        ours, server = server, Server("[engine]\nwake_on_visit = 'always'\n")
        try:
            paused = server.session()
            _, certificate = certify(paused, "woken")
            for by in ("bridge", "listener"):
                server.call("PauseSession", sessionId=paused)
                self.assertEqual(ssh("echo awake", by=by, of=paused, certificate=certificate).stdout, "awake\n")
        finally:
            server.remove()
            server = ours

    def test_certificates_that_are_not_good_here(self):
        other = server.session()
        _, foreign = certify(other, "foreign")
        _, narrow = certify(session, "narrow", sourceAddresses=["10.1.2.3"])
        _, wide = certify(session, "wide", sourceAddresses=["127.0.0.0/8", "::1"])
        _, short = certify(session, "short", requestedTtl="1s")
        made = lambda name, *more: self.forged(name, *more)
        forged = made("forged", "-n", f"session:{session}")
        time.sleep(1.5)
        for by in ("bridge", "listener"):
            self.assertEqual(ssh("echo in", by=by, certificate=wide).stdout, "in\n")
            for name, certificate in dict(foreign=foreign, narrow=narrow, short=short, forged=forged, none="/dev/null").items():
                with self.subTest(by=by, certificate=name):
                    result = ssh("echo in", by=by, certificate=certificate, check=False)
                    self.assertEqual((result.stdout, result.returncode), ("", 255))
                    self.assertIn("Permission denied", result.stderr)
        for user in ("nobody", "Root", ""):
            result = ssh("echo in", user=user or "-", check=False)
            self.assertEqual(result.returncode, 255)
        server.call("TerminateSession", sessionId=other)

    def forged(self, name, *more):
        authority = make_key(f"{name}-ca")
        subprocess.run(["cp", f"{key}.pub", f"{directory}/{name}.pub"], check=True)
        run(["ssh-keygen", "-q", "-s", authority, "-I", "x", *more, f"{directory}/{name}.pub"])
        return f"{directory}/{name}-cert.pub"

    def test_what_a_certificate_says(self):
        issued, path = certify(session, "shown", requestedTtl="99999999s", sourceAddresses=["10.0.0.0/8"])
        self.assertTrue(issued["caPub"].startswith("ssh-ed25519 "))
        self.assertRegex(issued["certSerial"], "^[0-9a-f]{16}$")
        self.assertEqual(issued["permissions"], {name: True for name in (
            "allowPty", "allowAgentForwarding", "allowPortForwardingLocal", "allowPortForwardingRemote")})
        shown = run(["ssh-keygen", "-L", "-f", path]).stdout
        self.assertIn(f"session:{session}", shown)
        self.assertIn("source-address 10.0.0.0/8", shown)
        self.assertIn("permit-pty", shown)
        # The wish for a time was cut to a day.
        self.assertAlmostEqual(float(issued["renewalAfter"][:-1]), 43_200, delta=60)
        for wrong in (dict(key="ssh-ed25519 " + "A" * 64), dict(key="x" * 31), dict(sourceAddresses=["example.org"]),
                      dict(sourceAddresses=["10.0.0.0/33"]), dict(sourceAddresses=["10.0.0.1"] * 17), dict(requestedTtl="-1s")):
            with self.subTest(wrong=wrong), self.assertRaises(Refused) as refused:
                server.certificate(session, wrong.pop("key", public_key), **wrong)
            self.assertEqual(refused.exception.code, "invalid_argument")

    def test_the_authority_vouches_for_the_host(self):
        known = f"{directory}/known_hosts"
        with open(known, "w") as file:
            file.write("@cert-authority * " + server.certificate(session, public_key)["caPub"] + "\n")
        strict = ["-o", "StrictHostKeyChecking=yes", "-o", f"UserKnownHostsFile={known}"]
        for by in ("bridge", "listener"):
            result = run(["ssh", *strict, *options(by), target(by), "echo sure"])
            self.assertEqual(result.stdout, "sure\n")

    def test_rsa_and_ecdsa_keys(self):
        for kind in ("rsa", "ecdsa"):
            with self.subTest(kind=kind):
                path = make_key(f"key-{kind}", kind)
                issued = server.certificate(session, open(f"{path}.pub").read().strip())
                with open(f"{path}-cert.pub", "w") as file:
                    file.write(issued["sshCert"] + "\n")
                result = run(["ssh", *OPTIONS, "-i", path, "-o", options()[-1], target(), "echo", kind])
                self.assertEqual(result.stdout, f"{kind}\n")

    def test_the_sessions_own_keys_open_it_through_the_bridge_only(self):
        plain = make_key("plain")
        line = open(f"{plain}.pub").read().strip()
        def login(by):
            return subprocess.run(["ssh", *OPTIONS, "-i", plain, *options(by)[-2:], target(by), "echo in"],
                                  stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60).stdout
        self.assertEqual(login("bridge"), "")
        server.call("UpdateSSHAuthorizedKeys", sessionId=session, sshAuthorizedKeys=[line])
        self.assertEqual(login("bridge"), "in\n")
        self.assertEqual(login("listener"), "")
        server.call("UpdateSSHAuthorizedKeys", sessionId=session, sshAuthorizedKeys=['command="true" ' + line])
        self.assertEqual(login("bridge"), "")
        with self.assertRaises(Refused):
            server.call("UpdateSSHAuthorizedKeys", sessionId=session, sshAuthorizedKeys=[])


class Faults(unittest.TestCase):
    def listener(self):
        host, port = server.gateway()["publicEndpoint"].rsplit(":", 1)
        return socket.create_connection((host, int(port)), timeout=40)

    def test_garbage_in_place_of_a_version_ends_only_its_connection(self):
        for garbage in (b"\r\n" * 100, b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"SSH-2.0-" + b"A" * 100_000,
                        b"SSH-1.5-old\r\n", b"SSH-2.0-x\r\n" + os.urandom(4096), b"SSH-2.0-x\r\n\x7f\xff\xff\xff"):
            with self.listener() as peer:
                try:
                    peer.sendall(garbage)
                    while peer.recv(4096):
                        pass
                except ConnectionError:
                    pass
        self.assertEqual(ssh("echo alive", by="listener").stdout, "alive\n")

    def test_a_client_that_says_nothing_is_sent_away(self):
        with self.listener() as peer:
            before = time.monotonic()
            while peer.recv(4096):
                pass
            self.assertLess(time.monotonic() - before, 25)

    def test_ten_thousand_channels(self):
        client = connect()
        transport = client.get_transport()
        opened, refused = [], 0
        for _ in range(1_000):
            try:
                opened.append(transport.open_session(timeout=20))
            except paramiko.ChannelException as error:
                self.assertEqual(error.code, 4)
                refused += 1
        self.assertEqual((len(opened), refused), (256, 744))
        # The rest without waiting for the answers.
        for number in range(9_000):
            message = paramiko.Message()
            message.add_byte(bytes([90]))
            message.add_string("session")
            for value in (100_000 + number, 1 << 21, 1 << 15):
                message.add_int(value)
            transport._send_user_message(message)
        opened[0].exec_command("echo still here")
        self.assertEqual(read_until(opened[0], b"\n"), b"still here\n")
        client.close()
        self.assertLess(memory_mb(), 400)

    def test_a_client_that_grants_nothing_costs_nothing(self):
        client = connect()
        before = memory_mb()
        channels = []
        for _ in range(20):
            channel = client.get_transport().open_session(window_size=1)
            channel.exec_command("exec cat /dev/zero")
            channels.append(channel)
        time.sleep(2)
        self.assertEqual(client.exec_command("echo fine")[1].read(), b"fine\n")
        self.assertLess(memory_mb() - before, 64)
        client.close()
        wait_until(lambda: ssh("pgrep -c -f '[c]at /dev/zero'", check=False).stdout.strip() == "0")

    def test_the_server_says_goodbye_and_the_keys_stay(self):
        before = server.gateway(), server.certificate(session, public_key)["caPub"]
        client = connect()
        started = time.monotonic()
        self.assertEqual(server.stop(), 0)
        self.assertLess(time.monotonic() - started, 10)
        wait_until(lambda: not client.get_transport().is_active())
        server.start()
        self.assertEqual(server.certificate(session, public_key)["caPub"], before[1])
        # A certificate from before is good, and the sandbox is the same.
        self.assertEqual(ssh("echo back").stdout, "back\n")
        server.stop(signal.SIGKILL)
        server.start()
        wait_until(lambda: ssh("echo back", check=False).stdout == "back\n")


def memory_mb():
    with open(f"/proc/{server.process.pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024


if __name__ == "__main__":
    unittest.main()
