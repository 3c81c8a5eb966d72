"""What needs no server: how small the program is, and what it tells shells and man about itself."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

from scratch import ROOT

BINARY = os.environ.get("NAGAYA_BIN", str(ROOT / "target/debug/nagaya"))
# Debug builds map more code than anybody ships.
MEMORY_MB_MAX = 15 if "release" in pathlib.Path(BINARY).resolve().parts else 20


def run(*words):
    return subprocess.run([BINARY, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout


# A child counts what its parent had in memory until it is another program, so the parent is a small one.
MEASURE = """
import os, sys
nowhere = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
child = os.posix_spawn(sys.argv[1], [sys.argv[1], "--version"], os.environ, file_actions=[nowhere])
print(os.wait4(child, 0)[2].ru_maxrss / 1024)
"""


class Start(unittest.TestCase):
    def test_it_is_small(self):
        measured = subprocess.run([sys.executable, "-S", "-I", "-c", MEASURE, BINARY], capture_output=True, text=True, check=True)
        self.assertLessEqual(float(measured.stdout), MEMORY_MB_MAX)


class Words(unittest.TestCase):
    def verbs(self, *path):
        """Paths of all verbs, as their help names them."""
        listed = run(*path, "--help").partition("Commands:\n")[2].partition("\n\n")[0]
        for verb in re.findall(r"^  ([a-z][a-z-]*)", listed, re.MULTILINE):
            if verb != "help":
                yield (*path, verb)
                yield from self.verbs(*path, verb)

    def test_every_verb_has_help_and_a_page(self):
        with tempfile.TemporaryDirectory() as directory:
            run("man", directory)
            pages = set(os.listdir(directory))
            verbs = list(self.verbs())
            self.assertGreater(len(verbs), 50)
            self.assertEqual(pages, {"nagaya.1"} | {f"nagaya-{'-'.join(path)}.1" for path in verbs})
            text = pathlib.Path(directory, "nagaya.1").read_text()
            for promised in ("EXIT CODES", "session_not_found", "no_server"):
                self.assertIn(promised, text)

    def test_completions_are_scripts(self):
        for shell in ("bash", "zsh", "fish"):
            script = run("completions", shell, "--name", "tenki")
            self.assertIn("tenki", script)
            self.assertIn("ssh-keys", script)
        checked = subprocess.run(["bash", "-n"], input=run("completions", "bash"), text=True, capture_output=True)
        self.assertEqual((checked.returncode, checked.stderr), (0, ""))


if __name__ == "__main__":
    unittest.main()
