# Answers on TCP and UDP at a port: PORT GREETING ADDRESS...
import socket
import sys
import threading

port, greeting, addresses = int(sys.argv[1]), sys.argv[2].encode(), sys.argv[3:]


def streams(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.create_server((address, port), family=family)
    def serve():
        while True:
            stream, _ = server.accept()
            stream.sendall(greeting)
            stream.close()
    threading.Thread(target=serve, daemon=True).start()


def datagrams(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.socket(family, socket.SOCK_DGRAM)
    server.bind((address, port))
    def serve():
        while True:
            _, peer = server.recvfrom(2048)
            server.sendto(greeting, peer)
    threading.Thread(target=serve, daemon=True).start()


for address in addresses:
    streams(address)
    datagrams(address)
print("READY", flush=True)
sys.stdin.read()
