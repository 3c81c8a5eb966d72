# Takes all it can get of one kind of the kernel's resources, and holds it.
#
# take KIND: says `HELD count what-refused-the-next-one`, and lets go when its standard input ends.
# one KIND:  REACHED when there is one for it, else REFUSED.
#
# A kind is a function that gives two: one makes one more, the other unmakes what was made. What goes with its process
# need not be unmade.
import fcntl
import itertools
import mmap
import resource
import threading
import time


def nothing(_):
    pass


def inotify_instances():
    return lambda: check(libc.inotify_init1(0)), nothing


def queued_signals():
    number = signal.SIGRTMIN + 5
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    libc.sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    return lambda: check(libc.sigqueue(os.getpid(), number, None)), nothing


def timers():
    made = ctypes.c_void_p()
    return lambda: check(libc.timer_create(1, None, ctypes.byref(made))), nothing


def message_queues_of_posix():
    names = (f"/nagaya-{os.getpid()}-{number}".encode() for number in range(10 ** 6))
    def make():
        name = next(names)
        # O_CREAT | O_EXCL | O_RDWR
        check(libc.mq_open(name, 0o302, 0o600, None))
        return name
    return make, libc.mq_unlink


def message_queues_of_system_v():
    return lambda: check(libc.msgget(0, 0o1600)), lambda made: libc.msgctl(made, 0, None)


def semaphores():
    return lambda: check(libc.semget(0, 100, 0o1600)), lambda made: libc.semctl(made, 0, 0)


def segments(size, flags):
    return lambda: check(libc.shmget(0, size, 0o1600 | flags)), lambda made: libc.shmctl(made, 0, None)


def segments_of_16_mib():
    return segments(ctypes.c_size_t(16 << 20), 0)


def terminals():
    return lambda: os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY), nothing


def contexts_of_asynchronous_io():
    def make():
        context = ctypes.c_ulong()
        raw(nr(206, 0), 1, ctypes.byref(context))
    return make, nothing


def huge_pages_by_mmap():
    # MAP_NORESERVE: the control must not need any to be there.
    kept = []
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000 | 0x40000
    return lambda: kept.append(mmap.mmap(-1, 2 << 20, flags=flags)), nothing


def huge_pages_by_memory_file():
    return lambda: os.memfd_create("huge", 4), nothing


def huge_pages_by_segment():
    # SHM_NORESERVE
    return segments(ctypes.c_size_t(2 << 20), 0o14000)


def programs_on_sockets():
    code = ctypes.create_string_buffer(struct.pack("<HBBI", 6, 0, 0, 0))
    program = struct.pack("<HxxxxxxQ", 1, ctypes.addressof(code))
    kept = [code]
    def make():
        kept.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        kept[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            kept[-1].setsockopt(socket.SOL_SOCKET, 26, program)
        except PermissionError:
            kept[-1].setsockopt(socket.SOL_SOCKET, 51, program)
    return make, nothing


def sockets(*kinds):
    turns = itertools.cycle(kinds)
    kept = []
    return lambda: kept.append(socket.socket(*next(turns))), nothing


NETLINK = ((socket.AF_NETLINK, socket.SOCK_RAW, 0), (socket.AF_NETLINK, socket.SOCK_DGRAM, 4))
UDP = ((socket.AF_INET, socket.SOCK_DGRAM, 0), (socket.AF_INET6, socket.SOCK_DGRAM, 17))
PING = ((socket.AF_INET, socket.SOCK_DGRAM, 1), (socket.AF_INET6, socket.SOCK_DGRAM, 58))


def netlink_sockets():
    return sockets(*NETLINK)


def datagram_sockets():
    return sockets(*UDP, *PING)


def filters_of_system_calls():
    # Allows everything.
    code = ctypes.create_string_buffer(struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000))
    program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", 1, ctypes.addressof(code)))
    def by_prctl():
        return check(libc.prctl(22, 2, program, 0, 0))
    def by_seccomp():
        return raw(nr(317, 277), 1, 0, program)
    check(libc.prctl(38, 1, 0, 0, 0))
    ways = itertools.cycle((by_prctl, by_seccomp))
    kept = [code]
    return lambda: kept.append(next(ways)()), nothing


def held_by(one):
    """Bytes that a socket holds of what it received, and how many it may."""
    return struct.unpack("9I", one.getsockopt(socket.SOL_SOCKET, 55, 36))[:2]


def full_of_answers(one):
    """Whoever asks for what does not exist gets the question back."""
    question = struct.pack("<IHHII", 3000, 0x7FFF, 5, 0, 0) + bytes(2984)
    for _ in range(4_000):
        one.send(question)


def full_of_echoes(one):
    for _ in range(200):
        one.sendto(struct.pack("!BBHHH", 8, 0, 0, 1, 1) + bytes(60_000), ("127.0.0.1", 0))


def full_of_errors(one):
    # IP_RECVERR; nobody is there at that port.
    one.setsockopt(socket.IPPROTO_IP, 11, 1)
    one.connect(("127.0.0.1", 9))
    for _ in range(2_000):
        try:
            one.send(bytes(500))
        except OSError:
            # Of the one before.
            pass


def full_of_copies(one):
    """Of what was sent, with the time of sending."""
    if one.type == socket.SOCK_STREAM:
        server = socket.create_server(("127.0.0.1", 0))
        one.connect(server.getsockname())
        receiver = server.accept()[0]
    else:
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind(("127.0.0.1", 0))
        one.connect(receiver.getsockname())
    receiver.setblocking(False)
    KEPT.append(receiver)
    for _ in range(300):
        # SO_TIMESTAMPING: when the device took it, when it was queued, when it was acknowledged.
        one.sendmsg([bytes(4_000)], [(socket.SOL_SOCKET, 37, struct.pack("I", 0x302))])
        try:
            receiver.recv(1 << 20)
        except BlockingIOError:
            pass


KEPT = []


def uncounted_buffers():
    """Fills what no control group counts with all that it can be made to hold, and says how much that is."""
    tcp = (socket.AF_INET, socket.SOCK_STREAM, 0)
    for name, kind, fill in (("netlink", NETLINK[0], full_of_answers), ("echoes", PING[0], full_of_echoes),
                             ("errors", UDP[0], full_of_errors), ("copies", UDP[0], full_of_copies),
                             ("copies-tcp", tcp, full_of_copies)):
        most = 0
        for _ in range(20):
            one = socket.socket(*kind)
            KEPT.append(one)
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                one.setsockopt(socket.SOL_SOCKET, option, 1 << 30)
            one.setblocking(kind == tcp)
            for _ in range(20):
                try:
                    fill(one)
                    break
                except OSError:
                    pass
            most = max(most, held_by(one)[0])
        print(name, most, flush=True)
    try:
        KEPT[0].setsockopt(socket.SOL_SOCKET, 37, 0)
        print("timestamps 1")
    except OSError as error:
        print("timestamps 0", name_of(error.errno))
    sys.exit(0)


def ordinary_use():
    """What programs do with the calls that somebody else answers, and what the kernel would have answered."""
    def error_of(action):
        try:
            action()
        except OSError as error:
            return name_of(error.errno)
    buffer_of = lambda one: one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    for kind, flags in ((NETLINK[0], 0), (NETLINK[1], 0o2004000), (UDP[0], 0o2000000), (PING[0], 0o4000)):
        one = check(libc.socket(kind[0], kind[1] | flags, kind[2]))
        assert fcntl.fcntl(one, fcntl.F_GETFD) == (1 if flags & 0o2000000 else 0), (kind, flags)
        assert bool(fcntl.fcntl(one, fcntl.F_GETFL) & os.O_NONBLOCK) == bool(flags & 0o4000), (kind, flags)
        os.close(one)
    begin = time.monotonic()
    for _ in range(1_000):
        socket.if_nameindex()
        socket.socket(*NETLINK[0]).close()
        socket.socket(*UDP[0]).close()
    took = time.monotonic() - begin
    assert took < 5, took
    for kind in (*UDP, *PING, NETLINK[0], (socket.AF_INET, socket.SOCK_STREAM, 0), (socket.AF_UNIX, socket.SOCK_DGRAM, 0)):
        with socket.socket(*kind) as one:
            for wanted in (8_192, 100_000):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)
                assert buffer_of(one) == 2 * wanted, (kind, buffer_of(one))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            assert buffer_of(one) >= 2 * 212_992, (kind, buffer_of(one))
    with socket.socket(*UDP[0]) as one:
        set_buffer = lambda number, size: check(libc.setsockopt(one.fileno(), 1, 8, number, size))
        assert error_of(lambda: set_buffer(None, 4)) == "EFAULT"
        assert error_of(lambda: set_buffer(ctypes.byref(ctypes.c_int(4)), 3)) == "EINVAL"
    number = ctypes.byref(ctypes.c_int(4096))
    assert error_of(lambda: check(libc.setsockopt(999, 1, 8, number, 4))) == "EBADF"
    assert error_of(lambda: check(libc.setsockopt(os.open("/", 0), 1, 8, number, 4))) == "ENOTSOCK"
    # Threads other than the first.
    results = []
    def in_thread():
        with socket.socket(*NETLINK[0]) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_192)
            results.append(buffer_of(one))
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert results == [16_384], results
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    full = []
    assert error_of(lambda: [full.append(os.dup(0)) for _ in range(64)]) == "EMFILE"
    for kind in (NETLINK[0], UDP[0]):
        assert error_of(lambda: check(libc.socket(*kind))) == "EMFILE", kind
    os.close(full.pop())
    check(libc.socket(*NETLINK[0]))
    make, _ = filters_of_system_calls()
    make()
    make()
    os.write(1, b"REACHED all\n")
    os._exit(0)


def threads():
    threading.stack_size(64 << 10)
    end = threading.Event()
    def make():
        try:
            threading.Thread(target=end.wait, daemon=True).start()
        except RuntimeError:
            raise OSError(errno.EAGAIN, "")
    return make, lambda _: end.set()


def pipes_of_full_size():
    def make():
        if fcntl.fcntl(os.pipe()[0], 1032) < 65536:
            raise OSError(errno.ENOSPC, "smaller than usual")
    return make, nothing


def open_files():
    return lambda: os.open("/dev/null", os.O_RDONLY), nothing


def locks_without_end():
    """Until somebody ends it."""
    files = [os.open(f"lock{number}", os.O_RDWR | os.O_CREAT) for number in range(100)]
    try:
        # F_OFD_SETLK: a lock whose holder is not told.
        fcntl.fcntl(files[0], 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0))
        reached("a lock without a holder")
    except OSError:
        pass
    os.write(1, b"LOCKING\n")
    for place in range(50_000):
        for file in files:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * place)
    reached("five million locks")


def take():
    make, unmake = globals()[sys.argv[1]]()
    made, end = [], "nothing"
    try:
        while len(made) < 300_000:
            made.append(make())
    except OSError as error:
        end = name_of(error.errno)
    # Not by print: there may be no descriptor and no memory left for anything else.
    os.write(1, f"HELD {len(made)} {end}\n".encode())
    os.read(0, 1)
    for one in made:
        unmake(one)
    os._exit(0)


def one():
    make, unmake = globals()[sys.argv[1]]()
    try:
        unmake(make())
    except OSError as error:
        refused(name_of(error.errno))
    reached("one")
