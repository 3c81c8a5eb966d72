# Calls that reach large or dangerous parts of the kernel.

def kernel_module_init_module():
    image = ctypes.create_string_buffer(b"not a module", 64)
    result, code = call(nr(175, 105), image, 64, ctypes.c_char_p(b""))
    judge(result, code, (errno.ENOEXEC,))


def kernel_module_finit_module():
    fd = os.open("/etc/passwd", os.O_RDONLY)
    result, code = call(nr(313, 273), fd, ctypes.c_char_p(b""), 0)
    judge(result, code, (errno.ENOEXEC,))


def kernel_module_delete_module():
    result, code = call(nr(176, 106), ctypes.c_char_p(b"no_such_module"), os.O_NONBLOCK)
    judge(result, code, (errno.ENOENT,))


def kexec_load():
    result, code = call(nr(246, 104), 0, 0, None, 0xDEAD0000)
    judge(result, code, (errno.EINVAL,))


def bpf_program():
    # BPF_PROG_TYPE_SOCKET_FILTER: r0 = 0; exit
    code = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)
    program = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack("<IIQQIIQII", 1, 2, ctypes.addressof(program), ctypes.addressof(licence), 0, 0, 0, 0, 0)
    attributes = ctypes.create_string_buffer(attributes, 128)
    result, number = call(nr(321, 280), 5, attributes, 128)
    judge(result, number)


def bpf_map():
    attributes = ctypes.create_string_buffer(struct.pack("<IIII", 2, 4, 4, 1), 128)
    result, number = call(nr(321, 280), 0, attributes, 128)
    judge(result, number)


def perf_event_open():
    # PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK, of everybody on processor 0
    attributes = ctypes.create_string_buffer(struct.pack("<IIQ", 1, 120, 0), 120)
    for pid, processor in ((-1, 0), (0, -1)):
        result, number = call(nr(298, 241), attributes, pid, processor, -1, 0)
        if result >= 0:
            break
    judge(result, number)


def userfaultfd():
    for flags in (os.O_CLOEXEC, os.O_CLOEXEC | 1):
        result, number = call(nr(323, 282), flags)
        if result >= 0:
            break
    judge(result, number)


def io_uring():
    parameters = ctypes.create_string_buffer(120)
    judge(*call(425, 4, parameters))


def keyring_add_key():
    result, number = call(
        nr(248, 217), ctypes.c_char_p(b"user"), ctypes.c_char_p(b"nagaya"), ctypes.c_char_p(b"x"), 1, -2)
    judge(result, number)


def keyring_of_the_user():
    # KEYCTL_GET_KEYRING_ID of the user's and of the session's keyring
    for keyring in (-4, -5, -3):
        result, number = call(nr(250, 219), 0, keyring, 1)
        if result >= 0:
            break
    judge(result, number)


def keyring_request_key():
    result, number = call(
        nr(249, 218), ctypes.c_char_p(b"user"), ctypes.c_char_p(b"no such key"), None, -2)
    judge(result, number, (errno.ENOKEY,))


def reboot_of_the_host():
    # LINUX_REBOOT_CMD_CAD_OFF: harmless, and behind the same permission as a reboot.
    result, number = call(nr(169, 142), 0xFEE1DEAD, 672274793, 0, None)
    judge(result, number, (errno.EINVAL,))


def clock_change():
    import time
    real = time.CLOCK_REALTIME
    first_success([
        ("clock_settime", lambda: time.clock_settime(real, time.clock_gettime(real)) or "set"),
        # ADJ_TICK with the usual length of a tick.
        ("adjtimex", lambda: raw(nr(159, 171), ctypes.create_string_buffer(struct.pack("<I", 0x4000) + bytes(84) + struct.pack("<q", 10000), 300)) >= 0 and "set"),
    ])


def kernel_log():
    size = raw_or_none(nr(103, 116), 10, None, 0)
    attempts = [("syslog", lambda: size is not None and f"{size} bytes")]
    for path in ("/dev/kmsg", "/proc/kmsg"):
        attempts.append((path, lambda path=path: os.read(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 4096)))
    first_success(attempts)


def raw_or_none(*arguments):
    result, _ = call(*arguments)
    return None if result < 0 else result


def swap_and_quota():
    first_success([
        ("swapoff", lambda: allowed(call(nr(168, 225), ctypes.c_char_p(b"/no/such/swap")), errno.ENOENT)),
        ("swapon", lambda: allowed(call(nr(167, 224), ctypes.c_char_p(b"/no/such/swap"), 0), errno.ENOENT)),
        ("acct", lambda: allowed(call(nr(163, 89), ctypes.c_char_p(b"/no/such/file")), errno.ENOENT)),
    ])


def allowed(outcome, further):
    result, number = outcome
    return (result >= 0 or number == further) and name_of(number)


def io_ports():
    if not X86:
        absent("no I/O ports")
    for attempt in (lambda: call(172, 3), lambda: call(173, 0x80, 1, 1)):
        result, number = attempt()
        if result >= 0:
            break
    judge(result, number)


def machine_code(code, *arguments):
    import mmap
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    function = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    return function()


def in_child(work):
    """A child that may be killed; what it exits with."""
    pid = os.fork()
    if pid == 0:
        os._exit(work() & 0xFF)
    _, status = os.waitpid(pid, 0)
    return status


def calls_of_32_bit_programs():
    if not X86:
        absent("another architecture")
    # mov eax, 20 (getpid of i386); int 0x80; ret. The pid must come back to count.
    code = b"\xb8\x14\x00\x00\x00\xcd\x80\x48\x98\xc3"
    status = in_child(lambda: 7 if machine_code(code) == os.getpid() else 8)
    if os.WIFSIGNALED(status):
        absent("the kernel runs no 32-bit programs")
    reached("int 0x80") if os.WEXITSTATUS(status) == 7 else refused("int 0x80 gave no pid")


def calls_of_the_x32_interface():
    if not X86:
        absent("another architecture")
    result, number = call(0x40000000 | 39)
    judge(result, number)


def real_time_priority():
    first_success([
        ("SCHED_FIFO", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10)) or "set"),
        ("nice", lambda: os.setpriority(os.PRIO_PROCESS, 0, -15) or "set"),
        ("locked memory", lambda: raise_limit()),
    ])


def raise_limit():
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard + 4096, hard + 4096))
    except ValueError:
        raise OSError(errno.EPERM, "")
    return "raised"


def capabilities_of_the_host():
    # CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE SYS_CHROOT AUDIT_WRITE SETFCAP
    harmless = {0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 29, 31}
    found = set()
    for line in open("/proc/self/status"):
        if line.startswith(("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")):
            bits = int(line.split()[1], 16)
            found |= {number for number in range(64) if bits >> number & 1}
    reached(f"{sorted(found - harmless)}") if found - harmless else refused(f"only {sorted(found)}")
