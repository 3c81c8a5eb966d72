"""An interactive shell in a sandbox, as somebody at a terminal has it: keys, window size, Ctrl-C, Ctrl-D, exit codes.

`python3 -m unittest discover tests/cli`; tmux is the terminal, the server is NAGAYA_BIN, else the debug build.
"""

import os
import time
import unittest

from scratch import Scratch

PATIENCE = 30


def setUpModule():
    global scratch, session
    scratch = Scratch()
    unittest.addModuleCleanup(scratch.remove)
    session = scratch.create("--name", "box")


class Terminal:
    """A terminal of 80 by 24 with a shell of this machine in it."""

    count = 0

    def __init__(self):
        # A server of its own for each: the last one may still be ending.
        Terminal.count += 1
        self.socket = f"{scratch.home}/tmux-{Terminal.count}"
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", "env PS1='here> ' bash --norc --noprofile")
        self.expect("here>")

    def tmux(self, *words):
        return scratch.run("tmux", "-S", self.socket, *words).stdout

    def screen(self):
        return self.tmux("capture-pane", "-p", "-J")

    def type(self, text):
        self.tmux("send-keys", "-l", text)
        self.key("Enter")

    def key(self, name):
        self.tmux("send-keys", name)

    def expect(self, text, times=1):
        """Waits until the screen shows this; what else it shows is in the error."""
        deadline = time.monotonic() + PATIENCE
        while (screen := self.screen()).count(text) < times:
            if time.monotonic() > deadline:
                raise AssertionError(f"{text!r} did not appear:\n{screen}")
            time.sleep(0.02)
        return screen

    def close(self):
        scratch.run("tmux", "-S", self.socket, "kill-server", check=False)


class Shells(unittest.TestCase):
    def setUp(self):
        self.terminal = Terminal()
        self.addCleanup(self.terminal.close)

    def enter(self, command):
        self.terminal.type(command)
        self.terminal.type("PS1='there''> '; stty -a | grep -o 'rows.*columns [0-9]*'")
        return self.terminal.expect("there>")

    def by_exec(self):
        return self.enter("tenki sandbox exec --session box --tty bash --norc --noprofile")

    def test_the_window_has_the_size_of_ours_and_follows_it(self):
        self.assertIn("rows 24; columns 80", self.by_exec())
        self.terminal.tmux("resize-window", "-x", "101", "-y", "33")
        # The change arrives some time after the window has changed here.
        self.terminal.type("until [ \"$(stty size)\" = '33 101' ]; do sleep 0.05; done; echo resi''zed")
        self.terminal.expect("resized")

    def test_interrupts_reach_the_program_and_not_the_shell_around_it(self):
        self.by_exec()
        self.terminal.type("sleep 98765; echo slept $?")
        self.terminal.expect("sleep 98765")
        self.wait_for_process("sleep 98765")
        self.terminal.key("C-c")
        self.terminal.type("echo still he''re")
        self.terminal.expect("still here")
        self.assertNotIn("slept", self.terminal.screen().replace("echo slept", ""))

    def wait_for_process(self, words):
        deadline = time.monotonic() + PATIENCE
        while scratch.run("tenki", "sandbox", "exec", "-q", "--session", "box", "pgrep", "-f", f"^{words}",
                          check=False).returncode != 0:
            self.assertLess(time.monotonic(), deadline, f"{words} does not run")

    def test_the_end_of_input_ends_the_shell_and_the_terminal_is_as_before(self):
        self.by_exec()
        self.terminal.key("C-d")
        self.terminal.expect("succeeded, exit code 0")
        self.terminal.type("stty -a | grep -o ' icanon\\| echo\\b' | tr -d '\\n'; echo")
        self.terminal.expect(" icanon echo")

    def test_the_exit_code_is_the_shells(self):
        self.by_exec()
        self.terminal.type("exit 42")
        self.terminal.expect("failed, exit code 42")
        self.terminal.type("echo code=$?")
        self.terminal.expect("code=42")

    def test_full_screen_programs_draw(self):
        self.by_exec()
        self.terminal.type("printf '\\033[2J\\033[5;10Hdrawn'; read -n 1; exit")
        self.terminal.expect("drawn")
        self.assertTrue(self.terminal.screen().splitlines()[4].startswith("         drawn"))
        self.terminal.key("x")
        self.terminal.expect("exit code 0")

    def test_the_same_by_ssh(self):
        self.enter("tenki sandbox ssh box")
        self.terminal.tmux("resize-window", "-x", "90", "-y", "30")
        self.terminal.type("until [ \"$(stty size)\" = '30 90' ]; do sleep 0.05; done; echo resi''zed; id -un")
        self.terminal.expect("resized\nroot")
        self.terminal.type("exit 7")
        # Not the prompt from before, nor the end of the other one: what is typed until then is the shell's that ends.
        self.terminal.expect("logout\nhere>")
        self.terminal.type("echo code=$?")
        self.terminal.expect("code=7")


class Keys(unittest.TestCase):
    def test_a_key_that_is_asked_for_is_not_shown(self):
        terminal = Terminal()
        self.addCleanup(terminal.close)
        terminal.type(f"tenki login --endpoint {scratch.server.endpoint}")
        terminal.expect("API key for")
        terminal.type(scratch.server.api_key)
        screen = terminal.expect("logged in to")
        self.assertNotIn(scratch.server.api_key[:12], screen)
        terminal.type("tenki logout")
        terminal.expect("is gone")

    def test_progress_shows_while_something_is_copied(self):
        terminal = Terminal()
        self.addCleanup(terminal.close)
        os.mkfifo(f"{scratch.home}/pipe")
        terminal.type("tenki sandbox cp pipe box:/tmp/x")
        # Its end is ours to decide, which leaves time to look.
        with open(f"{scratch.home}/pipe", "wb", 0) as pipe:
            pipe.write(bytes(70_000))
            terminal.expect("68.36 KiB")
        screen = terminal.expect("/tmp/x: 68.4 KiB copied")
        self.assertNotIn("68.36 KiB", screen, "the bar goes when it is done")

    def test_a_table_fits_the_terminal(self):
        terminal = Terminal()
        self.addCleanup(terminal.close)
        terminal.type("tenki sandbox list")
        rows = terminal.expect("running").splitlines()
        self.assertTrue(all(len(row) <= 80 for row in rows))


if __name__ == "__main__":
    unittest.main()
