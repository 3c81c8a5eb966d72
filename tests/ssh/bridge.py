"""Carries bytes between a program and a sandbox, through the server's WebSocket bridge.

As `ProxyCommand python3 bridge.py ENDPOINT API_KEY SESSION` for OpenSSH, and as a socket for paramiko. Nothing but
Python's own library, so that what is tested is the server and not a WebSocket package.
"""

import base64
import os
import socket
import struct
import sys
import threading
import urllib.parse

BINARY, CLOSE, PING, PONG = 2, 8, 9, 10


class Refused(Exception):
    """The server answered with something else than a WebSocket."""

    def __init__(self, status, text):
        super().__init__(f"{status}: {text}")
        self.status = status
        self.text = text


class Bridge:
    """A socket as paramiko wants it: send, recv, settimeout, close."""

    def __init__(self, endpoint, api_key, session, headers=()):
        url = urllib.parse.urlsplit(endpoint)
        self.socket = socket.create_connection((url.hostname, url.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [
            f"GET {url.path}/v1/ssh/{session} HTTP/1.1",
            f"Host: {url.netloc}",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key}",
            *([f"Authorization: Bearer {api_key}"] if api_key else []),
            *headers,
        ]
        self.socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        self.file = self.socket.makefile("rb")
        status = int(self.file.readline().split()[1])
        length = 0
        while (line := self.file.readline().strip()):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        if status != 101:
            raise Refused(status, self.file.read(length).decode())
        self.unread = b""
        self.lock = threading.Lock()
        self._closed = False

    def frame(self, kind, data):
        mask = os.urandom(4)
        length = len(data)
        if length < 126:
            head = struct.pack("!BB", 0x80 | kind, 0x80 | length)
        elif length < 65536:
            head = struct.pack("!BBH", 0x80 | kind, 0x80 | 126, length)
        else:
            head = struct.pack("!BBQ", 0x80 | kind, 0x80 | 127, length)
        number = int.from_bytes((mask * (length // 4 + 1))[:length], "little")
        masked = (int.from_bytes(data, "little") ^ number).to_bytes(length, "little")
        with self.lock:
            self.socket.sendall(head + mask + masked)

    def send(self, data):
        data = bytes(data[:65536])
        self.frame(BINARY, data)
        return len(data)

    def exactly(self, count):
        data = self.file.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def recv(self, count):
        while not self.unread:
            try:
                first, second = self.exactly(2)
                length = second & 127
                if length == 126:
                    (length,) = struct.unpack("!H", self.exactly(2))
                elif length == 127:
                    (length,) = struct.unpack("!Q", self.exactly(8))
                data = self.exactly(length)
            except (EOFError, OSError, ValueError):
                return b""
            kind = first & 15
            if kind == CLOSE:
                return b""
            if kind == PING:
                self.frame(PONG, data)
            if kind in (0, BINARY):
                self.unread = data
        data, self.unread = self.unread[:count], self.unread[count:]
        return data

    def settimeout(self, _):
        """Reads wait: whoever uses this reads in a thread of its own."""

    def close(self):
        if not self._closed:
            self._closed = True
            try:
                self.frame(CLOSE, struct.pack("!H", 1000))
                self.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def carry(bridge):
    def outward():
        while data := bridge.recv(1 << 20):
            view = memoryview(data)
            while view:
                view = view[os.write(1, view) :]
        os._exit(0)

    threading.Thread(target=outward, daemon=True).start()
    while data := os.read(0, 65536):
        bridge.send(data)
    bridge.close()


if __name__ == "__main__":
    try:
        carry(Bridge(*sys.argv[1:4]))
    except Refused as refused:
        print(f"the bridge refused: {refused}", file=sys.stderr)
        sys.exit(1)
    except (BrokenPipeError, ConnectionError):
        sys.exit(1)
