"""A real server for the tests: on a free port, with a data directory of its own, removed with everything it made."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGURATION = "[pools]\nslots_ready = 3\nisolated_slots_ready = 1\n"
CONTROL = "tenki.sandbox.v1.SandboxService"
GATEWAYS = "tenki.sandbox.v1.SSHGatewayClientService"


class Refused(Exception):
    """An rpc answered with an error."""

    def __init__(self, error):
        super().__init__(error.get("message", ""))
        self.code = error.get("code")


class Server:
    def __init__(self, configuration=""):
        self.data_dir = tempfile.mkdtemp(prefix="nagaya-test-")
        network = f'[network]\ncidr = "10.{random.randrange(192, 255)}.{random.randrange(256) & 0xF0}.0/20"\n'
        with open(f"{self.data_dir}/test.toml", "w") as file:
            file.write(CONFIGURATION + network + configuration)
        self.log = []
        self.start()

    @property
    def binary(self):
        return os.environ.get("NAGAYA_BIN", str(ROOT / "target/debug/nagaya"))

    def start(self):
        self.process = subprocess.Popen(
            [self.binary, "serve", "--listen", "127.0.0.1:0", "--ssh-listen", "127.0.0.1:0"]
            + ["--data-dir", self.data_dir, "--config", f"{self.data_dir}/test.toml"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "NAGAYA_LOG": os.environ.get("NAGAYA_LOG", "info,nagaya_gateway=debug")},
        )
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        for line in self.process.stdout:
            if line.startswith("nagaya ready on "):
                self.endpoint = line.split()[-1]
                break
        else:
            raise RuntimeError("the server did not become ready:\n" + "".join(self.log))
        with open(f"{self.data_dir}/api-key") as file:
            self.api_key = file.read().strip()

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        return self.process.wait(60)

    def remove(self):
        if self.process.poll() is None:
            self.stop()
        subprocess.run([self.binary, "purge", "--data-dir", self.data_dir], check=True, capture_output=True)
        shutil.rmtree(self.data_dir, ignore_errors=True)

    def call(self, method, service=CONTROL, api_key=None, **body):
        request = urllib.request.Request(
            f"{self.endpoint}/{service}/{method}",
            json.dumps(body).encode(),
            {"content-type": "application/json", "authorization": f"Bearer {api_key or self.api_key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise Refused(json.load(error)) from None

    def metrics(self):
        """Every number of /metrics by its name and labels."""
        with urllib.request.urlopen(f"{self.endpoint}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}

    def session(self, **wishes):
        made = self.call("CreateSession", ownerType="SERVICE", ownerId="self", waitReady=True, memoryMb=512, **wishes)
        return made["session"]["id"]

    def certificate(self, session, public_key, **wishes):
        return self.call("IssueSandboxSSHCert", GATEWAYS, sessionId=session, publicKey=public_key, **wishes)

    def gateway(self):
        return self.call("ListActiveSSHGateways", GATEWAYS)["gateways"][0]
