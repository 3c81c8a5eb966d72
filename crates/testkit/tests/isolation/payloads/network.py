# Addresses, sockets and links.
TIMEOUT = 0.7


def connects(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as stream:
        stream.settimeout(TIMEOUT)
        stream.connect((address, port))
        return stream.recv(64) or b"connected"


def answers(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as datagram:
        datagram.settimeout(TIMEOUT)
        datagram.sendto(b"ping", (address, port))
        return datagram.recv(64)


def echoes(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as ping:
        ping.settimeout(TIMEOUT)
        ping.sendto(struct.pack("!BBHHH", 8, 0, 0, 1, 1) + b"x" * 8, (address, 0))
        return ping.recv(64)


def timed(action):
    try:
        return action()
    except TimeoutError:
        raise OSError(errno.ETIMEDOUT, "")


def reach():
    """Any of the addresses, at a port, by any protocol. All at once, for a refusal may be silence."""
    from concurrent.futures import ThreadPoolExecutor
    port, addresses = int(sys.argv[1]), sys.argv[2:]
    work = []
    with ThreadPoolExecutor(64) as pool:
        for address in addresses:
            work.append((f"tcp {address}", pool.submit(timed, lambda address=address: connects(address, port))))
            work.append((f"udp {address}", pool.submit(timed, lambda address=address: answers(address, port))))
            # A sandbox has a loopback device of its own, which echoes.
            if ":" not in address and not address.startswith(("127.", "0.", "localhost")):
                work.append((f"icmp {address}", pool.submit(timed, lambda address=address: echoes(address))))
    first_success([(name, future.result) for name, future in work])


def reach_by_tcp():
    port, addresses = int(sys.argv[1]), sys.argv[2:]
    first_success([(address, lambda address=address: timed(lambda: connects(address, port))) for address in addresses])


def ask_a_name_server():
    from concurrent.futures import ThreadPoolExecutor
    work = []
    with ThreadPoolExecutor(64) as pool:
        for address in sys.argv[1:]:
            work.append((address, pool.submit(timed, lambda address=address: answers(address, 53))))
            work.append((f"tcp {address}", pool.submit(timed, lambda address=address: connects(address, 53))))
    first_success([(name, future.result) for name, future in work])


def raw_sockets():
    kinds = {"icmp": (socket.AF_INET, socket.IPPROTO_ICMP), "tcp": (socket.AF_INET, socket.IPPROTO_TCP),
             "raw": (socket.AF_INET, socket.IPPROTO_RAW), "icmp6": (socket.AF_INET6, 58)}
    first_success([(name, lambda kind=kind: socket.socket(kind[0], socket.SOCK_RAW, kind[1]) and "made")
                   for name, kind in kinds.items()])


def packet_sockets():
    first_success([("raw", lambda: socket.socket(17, socket.SOCK_RAW, 0x0300) and "made"),
                   ("datagram", lambda: socket.socket(17, socket.SOCK_DGRAM, 0x0300) and "made")])


def family(number):
    try:
        socket.socket(number, socket.SOCK_STREAM).close()
    except OSError as error:
        for kind in (socket.SOCK_SEQPACKET, socket.SOCK_DGRAM, socket.SOCK_RAW):
            try:
                socket.socket(number, kind).close()
                reached("made")
            except OSError:
                pass
        judge(-1, error.errno)
    reached("made")


def vsock():
    family(40)


def kernel_crypto():
    try:
        socket.socket(38, socket.SOCK_SEQPACKET).close()
    except OSError as error:
        judge(-1, error.errno)
    reached("made")


def own_address():
    import fcntl
    def by_ioctl(link):
        request = struct.pack("16sHH4s8x", link.encode(), socket.AF_INET, 0, socket.inet_aton("10.99.99.99"))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as some:
            fcntl.ioctl(some, 0x8916, request)
        return "set"
    def by_netlink():
        # RTM_NEWADDR 10.99.99.99/32 on link 1
        body = struct.pack("=BBBBi", socket.AF_INET, 32, 0, 0, 1) + struct.pack("=HH4s", 8, 2, socket.inet_aton("10.99.99.99"))
        message = struct.pack("=IHHII", 16 + len(body), 20, 5 | 0x600, 1, 0) + body
        with socket.socket(16, socket.SOCK_RAW, 0) as netlink:
            netlink.settimeout(TIMEOUT)
            netlink.send(message)
            code = struct.unpack_from("=i", netlink.recv(4096), 16)[0]
        if code:
            raise OSError(-code, "")
        return "set"
    links = [name for _, name in socket.if_nameindex()]
    first_success([(link, lambda link=link: by_ioctl(link + ":1")) for link in links] + [("netlink", by_netlink)])


def foreign_source_address():
    """Sends with an address that is not ours."""
    port, target, source = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    def bound(option):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
            if option is not None:
                datagram.setsockopt(socket.IPPROTO_IP, option, 1)
            datagram.bind((source, 0))
            datagram.sendto(b"ping", (target, port))
        return "sent"
    first_success([("plain", lambda: bound(None)), ("IP_FREEBIND", lambda: bound(15)), ("IP_TRANSPARENT", lambda: bound(19))])


def packet_filter():
    """The rules of the network: reads or changes them."""
    def batch():
        # nfnetlink: NFT_MSG_GETTABLE, dump
        message = struct.pack("=IHHII", 20, (10 << 8) | 1, 0x301, 1, 0) + struct.pack("=BBH", 0, 0, 0)
        with socket.socket(16, socket.SOCK_RAW, 12) as netlink:
            netlink.settimeout(TIMEOUT)
            netlink.send(message)
            answer = netlink.recv(4096)
        kind = struct.unpack_from("=IHH", answer)[1]
        if kind == 2:
            code = struct.unpack_from("=i", answer, 16)[0]
            raise OSError(-code, "")
        return f"kind {kind}"
    first_success([("nftables", lambda: timed(batch))])


def events_of_the_kernel():
    """Hears of devices that come and go on the host, which the test makes meanwhile."""
    try:
        netlink = socket.socket(16, socket.SOCK_RAW, 15)
        netlink.bind((0, 1))
    except OSError as error:
        print("LISTENING", flush=True)
        sys.stdin.readline()
        refused(name_of(error.errno))
    netlink.setblocking(False)
    print("LISTENING", flush=True)
    sys.stdin.readline()
    try:
        reached(repr(netlink.recv(200)))
    except BlockingIOError:
        refused("nothing to hear")


def abstract_socket():
    name = sys.argv[1]
    def one(kind):
        with socket.socket(socket.AF_UNIX, kind) as stream:
            stream.connect("\0" + name)
        return "connected"
    first_success([("stream", lambda: one(socket.SOCK_STREAM)), ("datagram", lambda: one(socket.SOCK_DGRAM))])


def sockets_of_the_host():
    needle = sys.argv[1]
    for name in ("unix", "tcp", "tcp6", "udp", "udp6", "netlink", "packet"):
        try:
            if needle in open(f"/proc/net/{name}").read():
                reached(name)
        except OSError:
            pass
    refused("not in any list")


def take_a_descriptor():
    """Connects to whoever may hand over a descriptor by this name."""
    import array
    name = sys.argv[1]
    def take(address):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.connect(address)
            size = socket.CMSG_SPACE(4)
            _, ancillary, _, _ = stream.recvmsg(1, size)
            fds = array.array("i", ancillary[0][2])
        return os.read(fds[0], 64)
    first_success([("abstract", lambda: take("\0" + name)), ("path", lambda: take(f"/tmp/{name}"))])


def shared_memory_of_the_host():
    key = int(sys.argv[1])
    def by_key():
        identifier = check(libc.shmget(key, 1, 0))
        libc.shmat.restype = ctypes.c_void_p
        address = libc.shmat(identifier, None, 0x1000)
        return ctypes.string_at(address, 16)
    def listed():
        return [line for line in open("/proc/sysvipc/shm") if str(key) in line]
    first_success([("shmget", by_key), ("list", listed)])
