"""What a sandbox's SSH does and what OpenSSH's sshd does on this machine, side by side: the same words to both, as root."""

import os
import pwd
import re
import select
import signal
import socket
import subprocess
import tempfile
import termios
import time
import unittest

import test_ssh as base
from test_ssh import OPTIONS, free_port, wait_until

SSHD = "/usr/sbin/sshd"


def setUpModule():
    global sshd
    base.setUpModule()
    sshd = Sshd()
    unittest.addModuleCleanup(sshd.remove)


class Sshd:
    """The real one, on a port of the loopback device, for one key."""

    def __init__(self):
        self.directory = tempfile.mkdtemp(prefix="nagaya-sshd-")
        unittest.addModuleCleanup(lambda: subprocess.run(["rm", "-rf", self.directory], check=True))
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        self.port = free_port()
        subprocess.run(["ssh-keygen", "-t", "ed25519", "-N", "", "-q", "-f", f"{self.directory}/host"], check=True)
        with open(f"{self.directory}/keys", "w") as file:
            file.write(base.public_key + "\n")
        with open(f"{self.directory}/config", "w") as file:
            file.write(f"ListenAddress 127.0.0.1:{self.port}\nHostKey {self.directory}/host\nPidFile none\nUsePAM no\n"
                       f"PermitRootLogin yes\nAuthorizedKeysFile {self.directory}/keys\nStrictModes no\nLogLevel ERROR\n")
        self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", f"{self.directory}/config"], stdin=subprocess.DEVNULL)
        wait_until(self.is_up)

    def is_up(self):
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
            return True
        except ConnectionRefusedError:
            return False

    def remove(self):
        self.process.terminate()
        self.process.wait()


def words(who, *more):
    """The beginning of a command line that logs in as root: to the sandbox, or to sshd."""
    if who == "sshd":
        return ["ssh", *OPTIONS, "-i", base.key, "-p", str(sshd.port), *more, "root@127.0.0.1"]
    return ["ssh", *base.options(), *more, base.target(user="root")]


def run(who, line, *more, **how):
    how = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 60} | how
    return subprocess.run([*words(who, *more), line], **how)


class SideBySide(unittest.TestCase):
    def each(self):
        """Both, with a number of seconds that nothing else on this machine sleeps for."""
        return [(who, f"{os.getpid() + 100_000}.{index}") for index, who in enumerate(("sshd", "sandbox"))]

    def alive(self, who, seconds):
        pattern = f"[s]leep {re.escape(seconds)}"
        return [int(pid) for pid in run(who, f"pgrep -f '^{pattern}'").stdout.split()]

    def end(self, who, seconds):
        pids = " ".join(map(str, self.alive(who, seconds)))
        if pids:
            run(who, f"kill {pids}")

    def until_asleep(self, count, seconds):
        """A line that waits for so many `sleep`s: until then `nohup` and `setsid` have not done their part."""
        return f"until [ \"$(pgrep -fc '^[s]leep {re.escape(seconds)}$')\" = {count} ]; do sleep 0.05; done"

    def drop(self, who, line, *more):
        """Starts a line, waits for its first word, and breaks the connection."""
        process = subprocess.Popen([*words(who, *more), line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.assertIn(b"started", process.stdout.readline())
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()

    def test_a_broken_connection_ends_nothing_but_the_streams(self):
        for who, seconds in self.each():
            mark = f"/tmp/nagaya-mark-{seconds}"
            self.addCleanup(run, who, f"rm -f {mark}")
            self.addCleanup(self.end, who, seconds)
            # What writes to it finds a broken pipe, and what sleeps does not notice, in the same process group.
            self.drop(who, f"sleep {seconds} & nohup sleep {seconds} >/dev/null 2>&1 & echo started; yes; "
                           f"echo $? > {mark}; exec sleep {seconds}")
            wait_until(lambda: run(who, f"cat {mark}").stdout == "141\n")
            wait_until(lambda: len(self.alive(who, seconds)) == 3)

    def test_a_broken_connection_is_the_end_of_what_is_read(self):
        for who, seconds in self.each():
            mark = f"/tmp/nagaya-mark-{seconds}"
            self.addCleanup(run, who, f"rm -f {mark}")
            self.drop(who, f"echo started; cat >/dev/null; echo $? > {mark}")
            wait_until(lambda: run(who, f"cat {mark}").stdout == "0\n")

    def test_a_broken_connection_hangs_up_a_terminal(self):
        for who, seconds in self.each():
            other = seconds + "5"
            self.addCleanup(self.end, who, seconds)
            self.addCleanup(self.end, who, other)
            # With the terminal go those that do not mind hanging up; in the foreground and the background.
            self.drop(who, f"nohup sleep {seconds} >/dev/null 2>&1 & (setsid sleep {seconds} >/dev/null 2>&1 &); sleep {other} & "
                           f"{self.until_asleep(2, seconds)}; echo started; sleep {other}", "-tt")
            wait_until(lambda: self.alive(who, other) == [])
            self.assertEqual(len(self.alive(who, seconds)), 2)

    def test_a_shell_that_is_left_has_hung_up(self):
        for who, seconds in self.each():
            self.addCleanup(self.end, who, seconds)
            process = subprocess.Popen(words(who, "-tt"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            process.stdin.write(f"nohup sleep {seconds} >/dev/null 2>&1 &\n{self.until_asleep(1, seconds)}\necho star''ted\n".encode())
            process.stdin.flush()
            while b"started" not in process.stdout.readline():
                pass
            shells = run(who, "pgrep -x bash; true").stdout.split()
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
            wait_until(lambda: set(shells) - set(run(who, "pgrep -x bash; true").stdout.split()))
            self.assertEqual(len(self.alive(who, seconds)), 1)

    def test_commands_and_shells_start_alike(self):
        told = {}
        for who, _ in self.each():
            line = 'echo "$0 $-"; shopt login_shell; umask; ulimit -Sc; pwd; echo "$HOME $USER $LOGNAME $SHELL $TERM"'
            command = run(who, line).stdout
            shell = run(who, line, "-tt").stdout
            login = subprocess.run(words(who), input=line + "\n", capture_output=True, text=True, timeout=60).stdout
            told[who] = (command, shell.replace("\r", ""), login[login.index("-bash"):])
        self.assertEqual(told["sandbox"], told["sshd"])

    @unittest.skipUnless(pwd.getpwuid(0).pw_shell == "/bin/bash", "root of this machine has another shell than root of sandboxes")
    def test_terminals_are_as_the_client_wants_them(self):
        told = {}
        for who, _ in self.each():
            told[who] = [self.terminal(who, change) for change in (plain, odd)]
        self.assertEqual(told["sandbox"], told["sshd"])
        self.assertIn(" iutf8", told["sandbox"][0])
        self.assertIn("-iutf8", told["sandbox"][1])
        self.assertIn("intr = ^X", told["sandbox"][1])

    def terminal(self, who, change):
        """What `stty -a` says at the other end of a terminal that is like this here."""
        ours, theirs = os.openpty()
        try:
            termios.tcsetwinsize(theirs, (37, 93))
            modes = termios.tcgetattr(theirs)
            change(modes)
            termios.tcsetattr(theirs, termios.TCSANOW, modes)
            process = subprocess.Popen([*words(who, "-t"), "stty -a; echo ended"], stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL,
                                       env={**os.environ, "TERM": "xterm-256color"})
            text, deadline = b"", time.monotonic() + 30
            while b"ended" not in text and time.monotonic() < deadline:
                if select.select([ours], [], [], 1)[0]:
                    text += os.read(ours, 4096)
            process.wait(30)
            return text.decode().replace("\r", "").partition("ended")[0]
        finally:
            os.close(ours)
            os.close(theirs)


def plain(modes):
    modes[0] |= 0o40000  # IUTF8, which Python has no name for


def odd(modes):
    plain(modes)
    modes[0] &= ~(0o40000 | termios.IXON)
    modes[1] &= ~termios.ONLCR
    modes[3] &= ~(termios.ECHOK | termios.ECHOCTL)
    modes[6][termios.VINTR] = b"\x18"
    modes[6][termios.VERASE] = b"\x08"


if __name__ == "__main__":
    unittest.main()
