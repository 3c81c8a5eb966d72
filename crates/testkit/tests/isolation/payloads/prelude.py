# What every attempt starts with. An attempt ends by saying one of three things:
#   REACHED what   it got through: on the host that is the control, in a sandbox it is an escape
#   REFUSED why    something stopped it
#   ABSENT why     the kernel has no such thing at all
# Anything else, a crash above all, counts as a broken attempt.
import ctypes
import ctypes.util
import errno
import os
import platform
import signal
import socket
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
MISSING = (errno.ENOSYS, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ENODEV)


def say(word, text):
    print(word, text, flush=True)
    sys.stdout.flush()
    os._exit(0)


def reached(text=""):
    say("REACHED", text)


def refused(text=""):
    say("REFUSED", text)


def absent(text=""):
    say("ABSENT", text)


def name_of(number):
    return errno.errorcode.get(number, str(number))


def call(number, *arguments):
    """A raw system call; returns (result, errno)."""
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[
        ctypes.c_long(each) if isinstance(each, int) else each for each in arguments
    ])
    return result, ctypes.get_errno()


def judge(result, number, allowed=(), what="the call was carried out"):
    """A call got through when it succeeded, or failed later than at a permission check."""
    if result >= 0:
        reached(what)
    if number in allowed:
        reached(what + " as far as " + name_of(number))
    if number in MISSING:
        absent(name_of(number))
    refused(name_of(number))


def first_success(attempts):
    """Runs (name, action) pairs; an action that returns something true got through."""
    reasons = []
    for name, action in attempts:
        try:
            outcome = action()
        except OSError as error:
            reasons.append(f"{name}: {name_of(error.errno)}")
            continue
        if outcome:
            reached(f"{name}: {outcome}")
        reasons.append(f"{name}: nothing")
    refused("; ".join(reasons)[:2000])


def check(result):
    """Turns a failed libc call into an OSError."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def raw(number, *arguments):
    """A raw system call that raises."""
    result, code = call(number, *arguments)
    if result < 0:
        raise OSError(code, os.strerror(code))
    return result


X86 = platform.machine() == "x86_64"


def nr(x86_64, aarch64):
    return x86_64 if X86 else aarch64
