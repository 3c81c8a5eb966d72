# Process 1, and other processes.
import ctypes


def target():
    """Process 1, or a child of our own: the control shows that the means works."""
    if "own" not in sys.argv:
        return 1
    pid = os.fork()
    if pid == 0:
        # It ends with us, and holds nothing of ours open.
        libc.prctl(1, signal.SIGKILL)
        null = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        while True:
            signal.pause()
    # Only when it waits is it sure to be set up.
    import time
    while open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "S":
        time.sleep(0.001)
    return pid


def memory_of_process_1():
    pid = target()
    def read(mode):
        with open(f"/proc/{pid}/maps") as maps:
            start = next(int(line.split("-")[0], 16) for line in maps if " r" in line)
        fd = os.open(f"/proc/{pid}/mem", mode)
        return os.pread(fd, 16, start)
    first_success([
        ("open /proc/pid/mem", lambda: os.open(f"/proc/{pid}/mem", os.O_RDONLY) and "opened"),
        ("open for writing", lambda: os.open(f"/proc/{pid}/mem", os.O_RDWR) and "opened"),
        ("read", lambda: read(os.O_RDONLY)),
    ])


def secrets_of_process_1():
    pid = target()
    first_success([(name, lambda name=name: os.read(os.open(f"/proc/{pid}/{name}", os.O_RDONLY), 4096))
                   for name in ("environ", "auxv", "maps", "syscall", "stack", "pagemap", "io", "smaps")])


def descriptors_of_process_1():
    pid = target()
    def each():
        for name in os.listdir(f"/proc/{pid}/fd"):
            yield os.readlink(f"/proc/{pid}/fd/{name}")
    first_success([
        ("list", lambda: list(each())),
        ("open", lambda: os.open(f"/proc/{pid}/fd/0", os.O_RDONLY) and "opened"),
        ("info", lambda: os.listdir(f"/proc/{pid}/fdinfo")),
        ("cwd", lambda: os.readlink(f"/proc/{pid}/cwd")),
        ("root", lambda: os.readlink(f"/proc/{pid}/root")),
        ("exe", lambda: os.readlink(f"/proc/{pid}/exe")),
        ("map_files", lambda: os.listdir(f"/proc/{pid}/map_files")),
        ("task", lambda: os.readlink(f"/proc/{pid}/task/{pid}/fd/0")),
    ])


def descriptor_taken_from_process_1():
    pid = target()
    fd = raw(434, pid, 0)
    first_success([(f"descriptor {number}", lambda number=number: raw(438, fd, number, 0) + 1) for number in range(64)])


def trace_process_1():
    pid = target()
    def one(request, data):
        raw(nr(101, 117), request, pid, 0, data)
        return "traced"
    first_success([("PTRACE_SEIZE", lambda: one(0x4206, 0)), ("PTRACE_ATTACH", lambda: one(16, 0))])


def read_process_1():
    pid = target()
    buffer = ctypes.create_string_buffer(64)
    address = ctypes.addressof(buffer)
    local = ctypes.create_string_buffer(struct.pack("<QQ", address, 16))
    remote = ctypes.create_string_buffer(struct.pack("<QQ", address, 16))
    first_success([
        ("process_vm_readv", lambda: found(call(nr(310, 270), pid, local, 1, remote, 1, 0))),
        ("process_vm_writev", lambda: found(call(nr(311, 271), pid, local, 1, remote, 1, 0))),
        ("kcmp", lambda: found(call(nr(312, 272), pid, os.getpid(), 0, 0, 0))),
        ("get_robust_list", lambda: found(call(nr(274, 100), pid, buffer, buffer))),
        ("process_madvise", lambda: found(call(440, raw(434, pid, 0), remote, 1, 20, 0))),
    ])


def found(outcome):
    result, number = outcome
    # EFAULT means that the permission was given, and only the address was wrong.
    if result >= 0 or number == errno.EFAULT:
        return name_of(number) if result < 0 else "done"
    raise OSError(number, "")


def kill_process_1():
    pid = target()
    signals = [number for number in range(1, 65) if number not in (32, 33)]
    if os.geteuid() == 0:
        # Root may power its own sandbox off, and these ask for that. Nobody else's signal may do anything.
        signals = [number for number in signals if number not in (signal.SIGPWR, signal.SIGUSR1, signal.SIGUSR2, 37, 38)]
    if pid != 1:
        signals = [signal.SIGKILL]
    fd = raw(434, pid, 0)
    for number in signals:
        for send in (lambda: os.kill(pid, number), lambda: raw(424, fd, number, None, 0)):
            try:
                send()
            except OSError:
                pass
    if pid != 1:
        _, status = os.waitpid(pid, 0)
        reached("it died") if os.WIFSIGNALED(status) else refused("it lives")
    import time
    stat = open("/proc/1/stat").read().rsplit(")", 1)[1].split()[0]
    refused("sent all signals") if stat in "SRD" else reached(f"its state is {stat}")


def limits_of_process_1():
    pid = target()
    import resource
    first_success([
        ("prlimit", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, 8)) and "set"),
        ("oom_score_adj", lambda: os.write(os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY), b"900")),
        ("oom_adj", lambda: os.write(os.open(f"/proc/{pid}/oom_adj", os.O_WRONLY), b"15")),
        ("coredump_filter", lambda: os.write(os.open(f"/proc/{pid}/coredump_filter", os.O_WRONLY), b"0xff")),
        ("comm", lambda: os.write(os.open(f"/proc/{pid}/task/{pid}/comm", os.O_WRONLY), b"x")),
        ("clear_refs", lambda: os.write(os.open(f"/proc/{pid}/clear_refs", os.O_WRONLY), b"1")),
        ("timerslack_ns", lambda: os.write(os.open(f"/proc/{pid}/timerslack_ns", os.O_WRONLY), b"1")),
    ])


def ways_to_threads(pid):
    """Every directory of /proc that leads to a thread of that process."""
    for name in range(1, 400):
        try:
            status = open(f"/proc/{name}/status").read()
        except OSError:
            continue
        if f"\nTgid:\t{pid}\n" in status:
            yield f"/proc/{name}"
            for task in os.listdir(f"/proc/{name}/task"):
                yield f"/proc/{name}/task/{task}"


def files_of_process_1_by_its_threads():
    pid = target()
    changed = {"oom_score_adj": b"900", "oom_adj": b"15", "coredump_filter": b"0xff", "sched": b"0", "clear_refs": b"1",
               "timerslack_ns": b"1", "autogroup": b"1", "comm": b"x", "make-it-fail": b"1", "fail-nth": b"1"}
    told = ("environ", "auxv", "maps", "syscall", "stack", "pagemap", "io", "smaps", "mem")
    def write(path, value):
        fd = os.open(path, os.O_WRONLY)
        return os.write(fd, value)
    attempts, ways = [], list(ways_to_threads(pid))
    for way in ways:
        attempts += [(f"{way}/{name}", lambda path=f"{way}/{name}", value=value: write(path, value))
                     for name, value in changed.items()]
        attempts += [(f"{way}/{name}", lambda path=f"{way}/{name}": os.read(os.open(path, os.O_RDONLY), 64))
                     for name in told]
        attempts.append((f"{way}/fd", lambda way=way: os.listdir(f"{way}/fd")))
    if pid == 1 and not any("/task/" not in way and way != "/proc/1" for way in ways):
        say("BROKEN", f"process 1 has no other thread now: {ways}")
    first_success(attempts)


def less_likely_to_be_killed():
    # Below 0 is less likely than the host's own programs.
    value = sys.argv[1].encode()
    first_success([("oom_score_adj", lambda: os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), value))])


def processes_of_others():
    secret = sys.argv[1]
    me = os.getpid()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in (me, os.getppid()):
            continue
        for kind in ("cmdline", "environ", "comm"):
            try:
                text = open(f"/proc/{name}/{kind}", "rb").read()
            except OSError:
                continue
            if secret.encode() in text:
                reached(f"process {name}")
    refused("only own processes")


def kill_everybody():
    # A child shows that the signal went out; the test looks after the other sandbox.
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    try:
        os.kill(-1, signal.SIGKILL)
    except OSError as error:
        refused(name_of(error.errno))
    _, status = os.waitpid(pid, 0)
    refused("sent") if os.WIFSIGNALED(status) else refused("lost")


def terminal_input():
    import fcntl
    import termios
    leader, follower = os.openpty()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        fcntl.ioctl(follower, termios.TIOCSCTTY, 0)
        code = 0
        for request, argument in ((termios.TIOCSTI, b"x"), (0x541C, b"\x03")):
            try:
                fcntl.ioctl(follower, request, argument)
                os._exit(0)
            except OSError as error:
                code = error.errno
        os._exit(code or 1)
    _, status = os.waitpid(pid, 0)
    code = os.WEXITSTATUS(status)
    reached("TIOCSTI") if code == 0 else refused(name_of(code))


def descriptors_that_came_along():
    if "own" in sys.argv:
        os.dup2(os.open("/etc/passwd", os.O_RDONLY), 9)
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            # The descriptor of the listing itself.
            continue
    strange = {name: target for name, target in found.items() if name not in ("0", "1", "2")}
    reached(str(strange)) if strange else refused(str(found))
