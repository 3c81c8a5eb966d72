# A machine with addresses of the public internet: echoes on port 80, and answers for names.
# ECHO_ADDRESSES... The name server is 11.22.33.53.
import socket
import struct
import sys
import threading
import time

NAME_SERVER = "11.22.33.53"
ADDRESSES = {
    "one.example": ["11.22.33.1"],
    "two.example": ["11.22.33.2"],
    "y.cdn.example": ["11.22.33.3"],
    "xn--bcher-kva.example": ["11.22.33.5"],
    "v6.example": ["11.22.33.6"],
    "private.example": ["10.77.0.5"],
    "loop.example": ["127.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "mixed.example": ["11.22.33.4", "192.168.1.1"],
    "host.example": ["11.99.0.1"],
    "slow.example": ["11.22.33.8"],
    "garbage.example": ["11.22.33.9"],
    "big.example": ["11.22.33.11"] + ["11.22.40.%d" % n for n in range(199)],
    "strange.example": [],
}
ALIASES = {"alias.example": "x.cdn.example", "x.cdn.example": "y.cdn.example", "round.example": "around.example", "around.example": "round.example"}


def encode(name):
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"


def record(name, kind, data, ttl=1):
    return encode(name) + struct.pack("!HHIH", kind, 1, ttl, len(data)) + data


def answer(query, udp):
    at, labels = 12, []
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode())
        at += 1 + query[at]
    name = ".".join(labels).lower()
    (kind,) = struct.unpack("!H", query[at + 1 : at + 3])
    question = query[12 : at + 5]
    if name == "dead.example":
        return None
    if name == "slow.example":
        time.sleep(1.2)
    if name == "garbage.example":
        return query[:2] + b"\x81\x80" + b"\xff" * 300
    records, rcode, target = [], 0, name
    for _ in range(4):
        if target in ALIASES:
            records.append(record(target, 5, encode(ALIASES[target])))
            target = ALIASES[target]
    addresses = ADDRESSES.get(target)
    if target.endswith(".sub.example"):
        addresses = ["11.22.33.7"]
    if name == "strange.example":
        records.append(record("two.example", 1, socket.inet_aton("11.22.33.2")))
    if addresses is None and not records:
        rcode = 3
    if kind == 1:
        records += [record(target, 1, socket.inet_aton(address)) for address in addresses or []]
    elif kind == 28 and name == "v6.example":
        records += [record(name, 28, b"\x26\x00" + b"\0" * 13 + b"\1")]
    elif kind == 16:
        records += [record(name, 16, b"\x04text")]
    flags = 0x8180 | rcode
    if udp and len(records) > 20:
        return query[:2] + struct.pack("!HHHHH", flags | 0x200, 1, 0, 0, 0) + question
    return query[:2] + struct.pack("!HHHHH", flags, 1, len(records), 0, 0) + question + b"".join(records)


def serve_packets():
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((NAME_SERVER, 53))
    def one(query, peer):
        reply = answer(query, True)
        if reply is not None:
            server.sendto(reply, peer)
    while True:
        query, peer = server.recvfrom(4096)
        threading.Thread(target=one, args=(query, peer), daemon=True).start()


def serve_streams():
    server = socket.create_server((NAME_SERVER, 53))
    def one(stream):
        length = stream.recv(2)
        query = stream.recv(struct.unpack("!H", length)[0])
        reply = answer(query, False)
        if reply is not None:
            stream.sendall(struct.pack("!H", len(reply)) + reply)
        stream.close()
    while True:
        stream, _ = server.accept()
        threading.Thread(target=one, args=(stream,), daemon=True).start()


def echo(address):
    server = socket.create_server((address, 80))
    def one(stream):
        while data := stream.recv(65536):
            stream.sendall(data)
        stream.close()
    while True:
        stream, _ = server.accept()
        threading.Thread(target=one, args=(stream,), daemon=True).start()


def echo_packets(address):
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, 80))
    while True:
        data, peer = server.recvfrom(4096)
        server.sendto(data, peer)


for work in [serve_packets, serve_streams]:
    threading.Thread(target=work, daemon=True).start()
for address in sys.argv[1:]:
    for work in [echo, echo_packets]:
        threading.Thread(target=work, args=(address,), daemon=True).start()
time.sleep(0.3)
print("READY", flush=True)
sys.stdin.read()
