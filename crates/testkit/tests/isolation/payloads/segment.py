# A piece of System V shared memory for everybody, until stdin ends: KEY
import ctypes
import sys

libc = ctypes.CDLL(None)
identifier = libc.shmget(int(sys.argv[1]), 4096, 0o1666)
assert identifier >= 0
print("READY", flush=True)
sys.stdin.read()
libc.shmctl(identifier, 0, None)
