# Hands a descriptor of a secret to everybody who connects: NAME SECRET
import array
import socket
import sys
import threading

name, secret = sys.argv[1:3]
path = f"/tmp/{name}-secret"
with open(path, "w") as file:
    file.write(secret)


def serve(address):
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(address)
    server.listen()
    def give():
        while True:
            stream, _ = server.accept()
            with open(path) as file, stream:
                fds = array.array("i", [file.fileno()])
                stream.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    threading.Thread(target=give, daemon=True).start()


serve("\0" + name)
serve(f"/tmp/{name}")
print("READY", flush=True)
sys.stdin.read()
