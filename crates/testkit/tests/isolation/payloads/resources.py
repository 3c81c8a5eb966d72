# Takes all it can get of one kind of the kernel's resources, and holds it.
#
# take KIND: says `HELD count what-refused-the-next-one`, and lets go when its standard input ends.
# one KIND:  REACHED when there is one for it, else REFUSED.
#
# A kind is a function that gives two: one makes one more, the other unmakes what was made. What goes with its process
# need not be unmade.
import fcntl
import mmap
import resource
import threading


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
