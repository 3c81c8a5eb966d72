# Files of the host, of other sandboxes, and of the kernel.


def markers():
    """Looks everywhere for files whose names hold the marker."""
    marker = sys.argv[1]
    seen = 0
    for directory, names, files in os.walk("/"):
        if directory == "/":
            names[:] = [name for name in names if name not in ("proc", "sys")]
        for name in names + files:
            seen += 1
            if marker in name:
                reached(os.path.join(directory, name))
    refused(f"{seen} names, none of them")


def paths():
    """Tries exact paths, below every root that /proc offers."""
    wanted = sys.argv[1:]
    roots = [""]
    for name in os.listdir("/proc"):
        if name.isdigit() or name in ("self", "thread-self"):
            roots += [f"/proc/{name}/root", f"/proc/{name}/cwd/../../../../../../..", f"/proc/{name}/task/{name}/root"]
            try:
                roots += [f"/proc/{name}/fd/{fd}/../../../../.." for fd in os.listdir(f"/proc/{name}/fd")]
            except OSError:
                pass
    for root in roots:
        for path in wanted:
            try:
                with open(root + path, "rb") as file:
                    reached(f"{root}{path}: {file.read(40)!r}")
            except OSError:
                pass
    refused(f"{len(roots)} roots")


def opened_for_writing(top):
    """Files below a directory that open for writing. Nothing is written."""
    found = []
    for directory, names, files in os.walk(top):
        names[:] = [name for name in names if not os.path.islink(os.path.join(directory, name))]
        for name in files:
            path = os.path.join(directory, name)
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:
                continue
            found.append(path)
            if len(found) == 5:
                return found
    return found


def writes_to_proc():
    # What the kernel lets a process set for itself or its own namespaces is not the host's.
    found = opened_for_writing("/proc/sys")
    for path in ("/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/proc/bus/pci", "/proc/mtrr", "/proc/acpi",
                 "/proc/scsi/scsi", "/proc/timer_list", "/proc/kcore", "/proc/kmsg", "/proc/kpageflags", "/proc/fs",
                 "/proc/latency_stats", "/proc/profile", "/proc/sys/kernel/core_pattern", "/proc/sys/vm/drop_caches"):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            found.append(path)
        except OSError:
            pass
    reached(str(found[:5])) if found else refused("none opens for writing")


def writes_to_sys():
    found = opened_for_writing("/sys")
    reached(str(found[:5])) if found else refused("none opens for writing")


def facts_of_the_host():
    """What tells how busy the host and its neighbours are, what they do, and which machine this is."""
    boot_id = sys.argv[1]
    told = []
    shown = {"cpuinfo", "crypto", "devices", "filesystems", "loadavg", "locks", "meminfo", "misc", "mounts", "net", "self",
             "stat", "sys", "sysvipc", "thread-self", "tty", "uptime", "version"}
    def look(path):
        try:
            with open(path, "rb") as file:
                if file.read(1):
                    told.append(path)
        except OSError:
            pass
    # Whatever this kernel has, and not a list of what was known once.
    for name in os.listdir("/proc"):
        if name.isdigit() or name in shown:
            continue
        path = f"/proc/{name}"
        # There, so that programs find them, and the same everywhere: nothing was ever counted.
        if name in ("swaps", "vmstat"):
            if any(digit in open(path).read() for digit in "123456789"):
                told.append(path)
            continue
        # These block, or are as large as memory.
        if name in ("kmsg", "kcore", "kpagecount", "kpageflags", "kpagecgroup"):
            continue
        look(path)
        if os.path.isdir(path) and not os.path.islink(path):
            told += [os.path.join(path, each) for each in os.listdir(path)]
    for name in ("fs/aio-nr", "fs/dentry-state", "fs/file-nr", "fs/inode-nr", "fs/inode-state", "kernel/pty/nr"):
        look(f"/proc/sys/{name}")
    if boot_id in open("/proc/sys/kernel/random/boot_id").read():
        told.append("boot_id")
    reached(str(told)) if told else refused("nothing")


def secrets_of_the_kernel():
    def kallsyms():
        for line in open("/proc/kallsyms"):
            if int(line.split()[0], 16):
                return line.strip()
    def content(path):
        return os.read(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 64)
    quiet = ("/proc/kcore", "/proc/keys", "/proc/key-users", "/proc/timer_list", "/proc/sched_debug", "/proc/vmallocinfo",
             "/proc/slabinfo", "/proc/kpagecount", "/proc/kpageflags", "/proc/cmdline", "/proc/modules")
    first_success([("kallsyms", kallsyms)] + [(path, lambda path=path: content(path)) for path in quiet])


def control_groups():
    """Files that move processes between groups or start programs of the host."""
    wanted = ("release_agent", "cgroup.procs", "notify_on_release", "cgroup.kill", "cgroup.subtree_control", "devices.allow")
    for directory, names, files in os.walk(sys.argv[1]):
        if directory == "/":
            names[:] = [name for name in names if name != "proc"]
        for name in files:
            if name in wanted:
                reached(os.path.join(directory, name))
    refused("no such file anywhere")


def text_in_the_mount_table():
    needle = sys.argv[1]
    for path in ("/proc/self/mountinfo", "/proc/self/mounts", "/proc/1/mountinfo", "/proc/1/cgroup", "/proc/self/cgroup"):
        try:
            if needle in open(path).read():
                reached(path)
        except OSError:
            pass
    refused("not in it")


def events_on_files():
    """Watches places; the test makes changes on the host at the same paths meanwhile."""
    fd = libc.inotify_init1(os.O_NONBLOCK)
    watched = 0
    for path in sys.argv[1:]:
        if libc.inotify_add_watch(fd, path.encode(), 0xFFF & ~0x31) >= 0:
            watched += 1
    print("WATCHING", flush=True)
    sys.stdin.readline()
    try:
        data = os.read(fd, 4096)
    except BlockingIOError:
        refused(f"{watched} places, no event")
    reached(f"{len(data)} bytes of events")
