"""A home directory, a PATH with the program under both of its names, and a server."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "ssh"))

from server import ROOT, Server  # noqa: E402, F401

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class Scratch:
    def __init__(self, configuration="", **variables):
        self.server = Server(configuration)
        self.variables = variables
        # Short, because the sockets of tmux and of OpenSSH's masters have short names.
        self.home = tempfile.mkdtemp(prefix="nagaya-home-")
        binary = pathlib.Path(self.server.binary).resolve()
        os.mkdir(f"{self.home}/bin")
        for name in ("tenki", "nagaya"):
            os.symlink(binary, f"{self.home}/bin/{name}")

    @property
    def environment(self):
        return {"HOME": self.home, "PATH": f"{self.home}/bin:{PATH}", "NAGAYA_DATA_DIR": self.server.data_dir,
                "TERM": "screen", "LANG": "C.UTF-8", **self.variables}

    def run(self, *command, check=True, **how):
        how = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120} | how
        if "input" in how:
            del how["stdin"]
        result = subprocess.run(command, env=self.environment, cwd=self.home, **how)
        if check and result.returncode != 0:
            raise AssertionError(f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
        return result

    def create(self, *options):
        return self.run("tenki", "sandbox", "create", "--quiet", "--memory-mb", "512", *options).stdout.strip()

    def remove(self):
        self.server.remove()
        shutil.rmtree(self.home, ignore_errors=True)
