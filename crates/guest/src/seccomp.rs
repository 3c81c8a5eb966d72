//! The system calls a sandbox may make, as one compiled BPF program.
//!
//! The filter is the second wall: the first is that a sandbox owns none of its namespaces and holds
//! few capabilities. It takes away calls that reach large, rarely used parts of the kernel, and the
//! ways to make new namespaces. Calls are looked up by binary search, so that the program stays
//! short: the kernel walks it once per system call number when it is installed.

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter,
};

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

const RETURN_ALLOW: u32 = 0x7fff_0000;
const RETURN_ERRNO: u32 = 0x0005_0000;
/// Error 0: the call is not made, and answered with success.
const DONE_NOTHING: u32 = RETURN_ERRNO;
const RETURN_NOTIFY: u32 = 0x7fc0_0000;

/// Offsets in `struct seccomp_data`.
const DATA_NUMBER: u32 = 0;
const DATA_ARCH: u32 = 4;
const DATA_ARGUMENT_0: u32 = 16;
const DATA_ARGUMENT_1: u32 = 24;
const DATA_ARGUMENT_2: u32 = 32;
const DATA_ARGUMENT_3: u32 = 40;
/// From an argument to its upper half, which the kernel does not look at where it takes an `int`.
const UPPER_HALF: u32 = 4;

/// The newest call of Linux 6.17; later ones do not exist for a sandbox until somebody looked at them.
const LAST_KNOWN: u32 = 469;
/// `open_tree_attr`, which the libc crate does not name yet.
const OPEN_TREE_ATTR: i64 = 467;
/// Numbers from here on belong to the x32 interface.
const X32_START: u32 = 0x4000_0000;

const NEW_NAMESPACES: u32 = (libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP
    | 0x80/* CLONE_NEWTIME */) as u32;

/// Refused with EPERM.
const REFUSED: &[i64] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_nfsservctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    OPEN_TREE_ATTR,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
    #[cfg(target_arch = "x86_64")]
    174, // create_module, which the libc crate does not name
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_sysfs,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ustat,
];

/// Answered with ENOSYS, so that programs fall back to something older. Contexts of asynchronous I/O have one count for
/// the whole host.
const ABSENT: &[i64] = &[
    libc::SYS_clone3,
    libc::SYS_io_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
];

/// Huge pages are the host's, a fixed number that no control group of ours counts: call, the argument with the flag,
/// the flag. Answered as a host without any does.
const HUGE_PAGES: &[(i64, u32, u32)] = &[
    (libc::SYS_mmap, DATA_ARGUMENT_3, libc::MAP_HUGETLB as u32),
    (libc::SYS_memfd_create, DATA_ARGUMENT_1, libc::MFD_HUGETLB),
    (libc::SYS_shmget, DATA_ARGUMENT_2, libc::SHM_HUGETLB as u32),
];

/// Options of `SOL_SOCKET` that compile a program into the kernel, for which the whole host has one space.
const REFUSED_SOCKET_OPTIONS: &[u32] = &[libc::SO_ATTACH_FILTER as u32, libc::SO_ATTACH_REUSEPORT_CBPF as u32];

/// Both numbers of an option of `SOL_SOCKET` that keeps a copy of what was sent, which is counted to nobody. Answered as
/// a kernel without it does.
const ABSENT_SOCKET_OPTIONS: &[u32] = &[37, 65];

/// Options of `SOL_SOCKET` that let a socket hold more.
const BUFFER_OPTIONS: &[u32] = &[libc::SO_RCVBUF as u32, libc::SO_SNDBUF as u32];

/// Address families of the network, and those of the sandbox itself. Others, such as AF_VSOCK, reach past the network
/// namespace.
const NETWORK_FAMILIES: &[u32] = &[libc::AF_INET as u32, libc::AF_INET6 as u32];
const OWN_FAMILIES: &[u32] = &[libc::AF_UNIX as u32];
/// The part of a socket's type that is not flags.
const SOCKET_TYPE: u32 = 0xf;
/// Sockets for `ping`.
const ECHO_PROTOCOLS: &[u32] = &[libc::IPPROTO_ICMP as u32, libc::IPPROTO_ICMPV6 as u32];

/// Netlink's protocols for addresses and for lists of sockets. Of the others some tell of the host:
/// NETLINK_KOBJECT_UEVENT, of all its devices that come and go.
const NETLINK_PROTOCOLS: &[u32] = &[libc::NETLINK_ROUTE as u32, libc::NETLINK_SOCK_DIAG as u32];

/// Terminal requests that put input into somebody else's terminal.
const REFUSED_IOCTLS: &[u32] = &[libc::TIOCSTI as u32, libc::TIOCLINUX as u32];

/// Locks that belong to an open file: the kernel does not tell who holds them, so nobody could be asked for having too
/// many. Answered as kernels did that had none.
const REFUSED_FILE_COMMANDS: &[u32] = &[libc::F_OFD_SETLK as u32, libc::F_OFD_SETLKW as u32];

/// Whoever installs the filter listens to calls of which the kernel's own answer is not enough, and answers them.
#[derive(Clone, Copy, PartialEq)]
pub struct Listener {
    /// The listener is under the filter, too. Its own calls are those that have this number, which nobody else knows, in
    /// the upper halves of their first two arguments.
    pub secret: u64,
}

impl Listener {
    /// The two arguments, as the listener's own calls have them.
    pub fn sign(self, first: i32, second: i32) -> [u64; 2] {
        let signed = |argument: i32, half: u32| (u64::from(half) << 32) | u64::from(argument as u32);
        [signed(first, self.secret as u32), signed(second, (self.secret >> 32) as u32)]
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Verdict {
    Allow,
    Errno(i32),
    /// Somebody else answers.
    Notify,
    /// Refuse when the argument at that offset has any of these bits.
    RefuseBits {
        argument: u32,
        bits: u32,
        errno: i32,
    },
    /// Allow only families of the network and of the sandbox itself, and netlink with one of [`NETLINK_PROTOCOLS`] as the
    /// third argument. A listener counts netlink and, among the network's, datagrams; without one, what nobody counts
    /// is refused.
    Sockets(Option<Listener>),
    /// The same families; no pair of what would be counted can be made.
    Pairs,
    /// Refuse when the second argument is one of [`REFUSED_IOCTLS`].
    Ioctls,
    /// Refuse when the second argument is one of [`REFUSED_FILE_COMMANDS`].
    FileCommands,
    /// Refuse when the first argument, a process, is not 0. With pinned cores do nothing, as if it were done, when the
    /// third gives `RLIMIT_CORE` a new value: who wants no core files has that, and programs that take precautions would
    /// complain.
    OwnLimits {
        pin_cores: bool,
    },
    /// Do nothing, as above, when the first argument is `RLIMIT_CORE`.
    NoCoreLimit,
    /// When the second argument is `SOL_SOCKET`: refuse [`REFUSED_SOCKET_OPTIONS`] and [`ABSENT_SOCKET_OPTIONS`] as the
    /// third, and let the listener set [`BUFFER_OPTIONS`]; without one they stay as they are.
    SocketOptions(Option<Listener>),
    /// The listener counts programs of this kind, if the first arguments ask for one. Without one they are refused, as
    /// by a kernel without them.
    Filters {
        first: u32,
        second: Option<u32>,
        listens: bool,
    },
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn jump(condition: u32, k: u32, jump_true: u8, jump_false: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | condition | BPF_K) as u16, jt: jump_true, jf: jump_false, k }
}

fn load(offset: u32) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, offset)
}

fn give(value: u32) -> sock_filter {
    statement(BPF_RET | BPF_K, value)
}

fn errno(number: i32) -> u32 {
    RETURN_ERRNO | number as u32
}

fn leaf(verdict: Verdict) -> Vec<sock_filter> {
    match verdict {
        Verdict::Allow => vec![give(RETURN_ALLOW)],
        Verdict::Errno(number) => vec![give(errno(number))],
        Verdict::Notify => vec![give(RETURN_NOTIFY)],
        Verdict::RefuseBits { argument, bits, errno: number } => {
            vec![load(argument), jump(BPF_JSET, bits, 0, 1), give(errno(number)), give(RETURN_ALLOW)]
        }
        Verdict::Sockets(listener) => {
            let netlink = match listener {
                Some(listener) => unless_signed(listener),
                None => vec![give(errno(libc::EPROTONOSUPPORT))],
            };
            let datagram = match listener {
                Some(_) => vec![give(RETURN_NOTIFY)],
                None => one_of(DATA_ARGUMENT_2, ECHO_PROTOCOLS, errno(libc::EACCES), RETURN_ALLOW),
            };
            let mut network = vec![load(DATA_ARGUMENT_1), statement(BPF_ALU | BPF_AND | BPF_K, SOCKET_TYPE)];
            network.push(jump(BPF_JEQ, libc::SOCK_DGRAM as u32, 1, 0));
            network.push(give(RETURN_ALLOW));
            network.extend(datagram);
            families(netlink, network)
        }
        Verdict::Pairs => families(vec![give(RETURN_ALLOW)], vec![give(RETURN_ALLOW)]),
        Verdict::Ioctls => one_of(DATA_ARGUMENT_1, REFUSED_IOCTLS, errno(libc::EPERM), RETURN_ALLOW),
        Verdict::FileCommands => one_of(DATA_ARGUMENT_1, REFUSED_FILE_COMMANDS, errno(libc::EINVAL), RETURN_ALLOW),
        Verdict::OwnLimits { pin_cores } => {
            let mut block = vec![load(DATA_ARGUMENT_0), jump(BPF_JEQ, 0, 1, 0), give(errno(libc::EPERM))];
            if pin_cores {
                block.extend([
                    load(DATA_ARGUMENT_1),
                    jump(BPF_JEQ, libc::RLIMIT_CORE, 0, 5),
                    // Either half of the pointer.
                    load(DATA_ARGUMENT_2),
                    jump(BPF_JEQ, 0, 0, 2),
                    load(DATA_ARGUMENT_2 + 4),
                    jump(BPF_JEQ, 0, 1, 0),
                    give(DONE_NOTHING),
                ]);
            }
            block.push(give(RETURN_ALLOW));
            block
        }
        Verdict::NoCoreLimit => {
            vec![load(DATA_ARGUMENT_0), jump(BPF_JEQ, libc::RLIMIT_CORE, 0, 1), give(DONE_NOTHING), give(RETURN_ALLOW)]
        }
        Verdict::SocketOptions(listener) => {
            let buffers = listener.map_or(vec![give(DONE_NOTHING)], unless_signed);
            let others = choose(DATA_ARGUMENT_2, BUFFER_OPTIONS, buffers, vec![give(RETURN_ALLOW)]);
            let absent = vec![give(errno(libc::ENOPROTOOPT))];
            let options = choose(DATA_ARGUMENT_2, ABSENT_SOCKET_OPTIONS, absent, others);
            let options = choose(DATA_ARGUMENT_2, REFUSED_SOCKET_OPTIONS, vec![give(errno(libc::EPERM))], options);
            choose(DATA_ARGUMENT_1, &[libc::SOL_SOCKET as u32], options, vec![give(RETURN_ALLOW)])
        }
        Verdict::Filters { first, second, listens } => {
            let mut asked = vec![give(if listens { RETURN_NOTIFY } else { errno(libc::EINVAL) })];
            if let Some(second) = second {
                asked = choose(DATA_ARGUMENT_1, &[second], asked, vec![give(RETURN_ALLOW)]);
            }
            choose(DATA_ARGUMENT_0, &[first], asked, vec![give(RETURN_ALLOW)])
        }
    }
}

fn families(netlink: Vec<sock_filter>, network: Vec<sock_filter>) -> Vec<sock_filter> {
    let netlink = choose(DATA_ARGUMENT_2, NETLINK_PROTOCOLS, netlink, vec![give(errno(libc::EPROTONOSUPPORT))]);
    let own = one_of(DATA_ARGUMENT_0, OWN_FAMILIES, RETURN_ALLOW, errno(libc::EAFNOSUPPORT));
    let others = choose(DATA_ARGUMENT_0, NETWORK_FAMILIES, network, own);
    choose(DATA_ARGUMENT_0, &[libc::AF_NETLINK as u32], netlink, others)
}

/// Notifies, but not of the listener's own calls.
fn unless_signed(listener: Listener) -> Vec<sock_filter> {
    let [first, second] = listener.sign(0, 0).map(|argument| (argument >> 32) as u32);
    vec![
        load(DATA_ARGUMENT_0 + UPPER_HALF),
        jump(BPF_JEQ, first, 0, 3),
        load(DATA_ARGUMENT_1 + UPPER_HALF),
        jump(BPF_JEQ, second, 0, 1),
        give(RETURN_ALLOW),
        give(RETURN_NOTIFY),
    ]
}

fn one_of(argument: u32, values: &[u32], hit: u32, miss: u32) -> Vec<sock_filter> {
    choose(argument, values, vec![give(hit)], vec![give(miss)])
}

/// Goes on with one block when the argument is one of the values, and with another one else.
fn choose(argument: u32, values: &[u32], hit: Vec<sock_filter>, miss: Vec<sock_filter>) -> Vec<sock_filter> {
    // The kernel looks at the low half of these arguments only, and so do we.
    let mut block = vec![load(argument)];
    for (index, value) in values.iter().enumerate() {
        block.push(jump(BPF_JEQ, *value, (values.len() - 1 - index + miss.len()) as u8, 0));
    }
    block.extend(miss);
    block.extend(hit);
    block
}

/// Runs of numbers with one verdict, as (first number, verdict), ascending, from 0.
fn table(pin_cores: bool, listener: Option<Listener>) -> Vec<(u32, Verdict)> {
    let mut verdicts = vec![Verdict::Allow; LAST_KNOWN as usize + 1];
    for number in REFUSED {
        verdicts[*number as usize] = Verdict::Errno(libc::EPERM);
    }
    for number in ABSENT {
        verdicts[*number as usize] = Verdict::Errno(libc::ENOSYS);
    }
    let refuse_bits = |argument, bits| Verdict::RefuseBits { argument, bits, errno: libc::EPERM };
    verdicts[libc::SYS_clone as usize] = refuse_bits(DATA_ARGUMENT_0, NEW_NAMESPACES);
    verdicts[libc::SYS_unshare as usize] = refuse_bits(DATA_ARGUMENT_0, NEW_NAMESPACES);
    // Limits of any process but the caller's own: root of the sandbox could take its agent's.
    verdicts[libc::SYS_prlimit64 as usize] = Verdict::OwnLimits { pin_cores };
    if pin_cores {
        verdicts[libc::SYS_setrlimit as usize] = Verdict::NoCoreLimit;
    }
    for (number, argument, bits) in HUGE_PAGES {
        verdicts[*number as usize] = Verdict::RefuseBits { argument: *argument, bits: *bits, errno: libc::ENOMEM };
    }
    verdicts[libc::SYS_setsockopt as usize] = Verdict::SocketOptions(listener);
    verdicts[libc::SYS_socket as usize] = Verdict::Sockets(listener);
    verdicts[libc::SYS_socketpair as usize] = Verdict::Pairs;
    verdicts[libc::SYS_ioctl as usize] = Verdict::Ioctls;
    verdicts[libc::SYS_fcntl as usize] = Verdict::FileCommands;
    let filters = |first, second| Verdict::Filters { first, second, listens: listener.is_some() };
    verdicts[libc::SYS_seccomp as usize] = filters(libc::SECCOMP_SET_MODE_FILTER, None);
    verdicts[libc::SYS_prctl as usize] = filters(libc::PR_SET_SECCOMP as u32, Some(libc::SECCOMP_MODE_FILTER));
    if listener.is_some() {
        verdicts[libc::SYS_sysinfo as usize] = Verdict::Notify;
    }

    let mut runs: Vec<(u32, Verdict)> = Vec::new();
    for (number, verdict) in verdicts.into_iter().enumerate() {
        if runs.last().is_none_or(|(_, last)| *last != verdict) {
            runs.push((number as u32, verdict));
        }
    }
    runs.push((LAST_KNOWN + 1, Verdict::Errno(libc::ENOSYS)));
    runs
}

fn search(runs: &[(u32, Verdict)]) -> Vec<sock_filter> {
    let [(_, only)] = runs else {
        let (left, right) = runs.split_at(runs.len() / 2);
        let (below, above) = (search(left), search(right));
        let mut block = Vec::with_capacity(below.len() + above.len() + 2);
        // Conditional jumps reach 255 instructions; an unconditional one carries longer distances.
        block.push(jump(BPF_JGE, right[0].0, 0, 1));
        block.push(statement(BPF_JMP, below.len() as u32));
        block.extend(below);
        block.extend(above);
        return block;
    };
    leaf(*only)
}

/// The compiled filter; with `pin_cores` the limit of core files stays what it is. Without a listener `sysinfo` tells the
/// host's memory, and what nobody else bounds is refused.
pub fn program(pin_cores: bool, listener: Option<Listener>) -> Vec<sock_filter> {
    let mut program = vec![
        load(DATA_ARCH),
        jump(BPF_JEQ, AUDIT_ARCH, 1, 0),
        give(errno(libc::ENOSYS)),
        load(DATA_NUMBER),
        jump(BPF_JGE, X32_START, 0, 1),
        give(errno(libc::ENOSYS)),
    ];
    program.extend(search(&table(pin_cores, listener)));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would.
    fn verdict(program: &[sock_filter], arch: u32, number: u32, arguments: [u32; 4]) -> u32 {
        verdict_of(program, arch, number, arguments.map(u64::from))
    }

    fn verdict_of(program: &[sock_filter], arch: u32, number: u32, arguments: [u64; 4]) -> u32 {
        let (mut at, mut accumulator) = (0usize, 0u32);
        loop {
            let instruction = program[at];
            at += 1;
            let taken = |condition: bool| usize::from(if condition { instruction.jt } else { instruction.jf });
            match u32::from(instruction.code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    accumulator = match instruction.k {
                        DATA_NUMBER => number,
                        DATA_ARCH => arch,
                        // Both halves of each argument, the low one first.
                        offset @ DATA_ARGUMENT_0.. => {
                            let (index, half) = ((offset - DATA_ARGUMENT_0) / 8, offset % 8 / 4);
                            (arguments[index as usize] >> (32 * half)) as u32
                        }
                        other => panic!("load from {other}"),
                    }
                }
                code if code == BPF_ALU | BPF_AND | BPF_K => accumulator &= instruction.k,
                code if code == BPF_JMP => at += instruction.k as usize,
                code if code == BPF_JMP | BPF_JEQ | BPF_K => at += taken(accumulator == instruction.k),
                code if code == BPF_JMP | BPF_JGE | BPF_K => at += taken(accumulator >= instruction.k),
                code if code == BPF_JMP | BPF_JSET | BPF_K => at += taken(accumulator & instruction.k != 0),
                code if code == BPF_RET | BPF_K => return instruction.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    const LISTENER: Option<Listener> = Some(Listener { secret: 0x0123_4567_89ab_cdef });

    fn native(number: i64, [first, second]: [u32; 2]) -> u32 {
        verdict(&program(false, LISTENER), AUDIT_ARCH, number as u32, [first, second, 0, 0])
    }

    #[test]
    fn every_listed_call_gets_its_verdict_and_all_others_are_allowed() {
        let program = program(false, LISTENER);
        for number in 0..=LAST_KNOWN {
            let special = [
                libc::SYS_clone,
                libc::SYS_unshare,
                libc::SYS_prlimit64,
                libc::SYS_socket,
                libc::SYS_socketpair,
                libc::SYS_ioctl,
                libc::SYS_setsockopt,
                libc::SYS_fcntl,
                libc::SYS_sysinfo,
                libc::SYS_seccomp,
                libc::SYS_prctl,
            ];
            if special.contains(&i64::from(number)) {
                continue;
            }
            let expected = if REFUSED.contains(&i64::from(number)) {
                errno(libc::EPERM)
            } else if ABSENT.contains(&i64::from(number)) {
                errno(libc::ENOSYS)
            } else {
                RETURN_ALLOW
            };
            assert_eq!(verdict(&program, AUDIT_ARCH, number, [0, 0, 0, 0]), expected, "call {number}");
        }
    }

    #[test]
    fn other_interfaces_and_unknown_calls_do_not_exist() {
        let program = program(false, LISTENER);
        assert_eq!(verdict(&program, 0x4000_0003, 1, [0, 0, 0, 0]), errno(libc::ENOSYS));
        for number in [LAST_KNOWN + 1, X32_START, X32_START | libc::SYS_mount as u32, u32::MAX] {
            assert_eq!(verdict(&program, AUDIT_ARCH, number, [0, 0, 0, 0]), errno(libc::ENOSYS));
        }
    }

    #[test]
    fn new_namespaces_are_refused_and_threads_are_not() {
        let thread = (libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_THREAD | libc::CLONE_SIGHAND) as u32;
        assert_eq!(native(libc::SYS_clone, [thread, 0]), RETURN_ALLOW);
        for flag in [libc::CLONE_NEWUSER, libc::CLONE_NEWNS, libc::CLONE_NEWNET, libc::CLONE_NEWPID] {
            assert_eq!(native(libc::SYS_clone, [thread | flag as u32, 0]), errno(libc::EPERM));
            assert_eq!(native(libc::SYS_unshare, [flag as u32, 0]), errno(libc::EPERM));
        }
        assert_eq!(native(libc::SYS_unshare, [libc::CLONE_FILES as u32, 0]), RETURN_ALLOW);
    }

    #[test]
    fn processes_set_their_own_limits_only() {
        assert_eq!(native(libc::SYS_prlimit64, [0, 7]), RETURN_ALLOW);
        for pid in [1, 2, u32::MAX] {
            assert_eq!(native(libc::SYS_prlimit64, [pid, 7]), errno(libc::EPERM));
        }
    }

    #[test]
    fn only_namespaced_address_families_open_sockets() {
        for family in NETWORK_FAMILIES.iter().chain(OWN_FAMILIES) {
            assert_eq!(native(libc::SYS_socket, [*family, libc::SOCK_STREAM as u32]), RETURN_ALLOW);
            assert_eq!(native(libc::SYS_socketpair, [*family, libc::SOCK_DGRAM as u32]), RETURN_ALLOW);
        }
        for family in [libc::AF_VSOCK, libc::AF_PACKET, libc::AF_ALG, libc::AF_BLUETOOTH] {
            assert_eq!(native(libc::SYS_socket, [family as u32, 1]), errno(libc::EAFNOSUPPORT));
            assert_eq!(native(libc::SYS_socketpair, [family as u32, 1]), errno(libc::EAFNOSUPPORT));
        }
    }

    #[test]
    fn netlink_tells_of_addresses_and_sockets_and_of_nothing_else() {
        let program = program(false, LISTENER);
        let open = |protocol: i32| {
            let arguments = [libc::AF_NETLINK as u32, libc::SOCK_RAW as u32, protocol as u32, 0];
            verdict(&program, AUDIT_ARCH, libc::SYS_socket as u32, arguments)
        };
        for protocol in [libc::NETLINK_ROUTE, libc::NETLINK_SOCK_DIAG] {
            assert_eq!(open(protocol), RETURN_NOTIFY);
        }
        for protocol in [libc::NETLINK_KOBJECT_UEVENT, libc::NETLINK_NETFILTER, libc::NETLINK_AUDIT, libc::NETLINK_XFRM]
        {
            assert_eq!(open(protocol), errno(libc::EPROTONOSUPPORT));
        }
    }

    #[test]
    fn the_limit_of_core_files_stays_only_where_it_is_pinned() {
        let core = u64::from(libc::RLIMIT_CORE);
        let program = |pin_cores| super::program(pin_cores, LISTENER);
        let prlimit = |pin_cores, arguments: [u64; 4]| {
            verdict_of(&program(pin_cores), AUDIT_ARCH, libc::SYS_prlimit64 as u32, arguments)
        };
        let setrlimit = |pin_cores, resource: u64| {
            verdict_of(&program(pin_cores), AUDIT_ARCH, libc::SYS_setrlimit as u32, [resource, 1, 0, 0])
        };
        for new in [1, 1 << 32, u64::MAX] {
            assert_eq!(prlimit(true, [0, core, new, 0]), DONE_NOTHING, "{new:#x}");
            assert_eq!(prlimit(false, [0, core, new, 0]), RETURN_ALLOW);
            assert_eq!(prlimit(true, [0, core + 1, new, 0]), RETURN_ALLOW);
            assert_eq!(prlimit(true, [2, core, new, 0]), errno(libc::EPERM));
        }
        assert_eq!(prlimit(true, [0, core, 0, 1]), RETURN_ALLOW, "it can be read");
        assert_eq!((setrlimit(true, core), setrlimit(false, core)), (DONE_NOTHING, RETURN_ALLOW));
        assert_eq!(setrlimit(true, core + 1), RETURN_ALLOW);
    }

    #[test]
    fn huge_pages_are_the_hosts() {
        let program = program(false, LISTENER);
        for (number, argument, bits) in HUGE_PAGES {
            let mut arguments = [0; 4];
            assert_eq!(verdict(&program, AUDIT_ARCH, *number as u32, arguments), RETURN_ALLOW);
            arguments[((argument - DATA_ARGUMENT_0) / 8) as usize] = bits | 1;
            assert_eq!(verdict(&program, AUDIT_ARCH, *number as u32, arguments), errno(libc::ENOMEM));
        }
    }

    #[test]
    fn locks_tell_who_holds_them() {
        for command in [libc::F_OFD_SETLK, libc::F_OFD_SETLKW] {
            assert_eq!(native(libc::SYS_fcntl, [3, command as u32]), errno(libc::EINVAL));
        }
        for command in [libc::F_SETLK, libc::F_SETLKW, libc::F_GETLK, libc::F_OFD_GETLK, libc::F_SETFL] {
            assert_eq!(native(libc::SYS_fcntl, [3, command as u32]), RETURN_ALLOW);
        }
    }

    #[test]
    fn no_programs_are_attached_to_sockets() {
        let program = program(false, LISTENER);
        let set = |level: i32, option: i32| {
            let arguments = [3, level as u32, option as u32, 0];
            verdict(&program, AUDIT_ARCH, libc::SYS_setsockopt as u32, arguments)
        };
        for option in [libc::SO_ATTACH_FILTER, libc::SO_ATTACH_REUSEPORT_CBPF] {
            assert_eq!(set(libc::SOL_SOCKET, option), errno(libc::EPERM));
            assert_eq!(set(libc::IPPROTO_TCP, option), RETURN_ALLOW);
        }
        assert_eq!(set(libc::SOL_SOCKET, libc::SO_REUSEADDR), RETURN_ALLOW);
    }

    #[test]
    fn sockets_that_nobody_counts_are_the_listeners_matter() {
        let flags = (libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u32;
        let open = |listener, family: i32, kind: i32, protocol: i32| {
            let arguments = [family as u32, kind as u32 | flags, protocol as u32, 0];
            verdict(&program(false, listener), AUDIT_ARCH, libc::SYS_socket as u32, arguments)
        };
        for family in [libc::AF_INET, libc::AF_INET6] {
            for protocol in [0, libc::IPPROTO_UDP, libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6] {
                assert_eq!(open(LISTENER, family, libc::SOCK_DGRAM, protocol), RETURN_NOTIFY);
                let uncounted = protocol == libc::IPPROTO_ICMP || protocol == libc::IPPROTO_ICMPV6;
                let expected = if uncounted { errno(libc::EACCES) } else { RETURN_ALLOW };
                assert_eq!(open(None, family, libc::SOCK_DGRAM, protocol), expected);
            }
            assert_eq!(open(LISTENER, family, libc::SOCK_STREAM, 0), RETURN_ALLOW);
        }
        assert_eq!(open(LISTENER, libc::AF_UNIX, libc::SOCK_DGRAM, 0), RETURN_ALLOW);
        let netlink = |listener| open(listener, libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
        assert_eq!((netlink(LISTENER), netlink(None)), (RETURN_NOTIFY, errno(libc::EPROTONOSUPPORT)));
    }

    #[test]
    fn buffers_are_set_by_the_listener_or_stay() {
        for option in BUFFER_OPTIONS {
            let set = |listener, level: i32| {
                let arguments = [3, level as u32, *option, 0];
                verdict(&program(false, listener), AUDIT_ARCH, libc::SYS_setsockopt as u32, arguments)
            };
            let both = |level| (set(LISTENER, level), set(None, level));
            assert_eq!(both(libc::SOL_SOCKET), (RETURN_NOTIFY, DONE_NOTHING));
            assert_eq!(both(libc::IPPROTO_TCP), (RETURN_ALLOW, RETURN_ALLOW));
        }
        for option in ABSENT_SOCKET_OPTIONS {
            let arguments = [3, libc::SOL_SOCKET as u32, *option, 0];
            let told = verdict(&program(false, LISTENER), AUDIT_ARCH, libc::SYS_setsockopt as u32, arguments);
            assert_eq!(told, errno(libc::ENOPROTOOPT));
        }
    }

    #[test]
    fn only_who_knows_the_secret_passes_by_the_listener() {
        let program = program(false, LISTENER);
        let listener = LISTENER.unwrap();
        let calls = [
            (libc::SYS_socket, [libc::AF_NETLINK, libc::SOCK_RAW], libc::NETLINK_ROUTE),
            (libc::SYS_setsockopt, [3, libc::SOL_SOCKET], libc::SO_RCVBUF),
        ];
        for (number, [first, second], third) in calls {
            let told = |[first, second]: [u64; 2]| {
                verdict_of(&program, AUDIT_ARCH, number as u32, [first, second, third as u64, 0])
            };
            let signed = listener.sign(first, second);
            assert_eq!(told(signed), RETURN_ALLOW);
            for bit in 32..64 {
                assert_eq!(told([signed[0] ^ (1 << bit), signed[1]]), RETURN_NOTIFY);
                assert_eq!(told([signed[0], signed[1] ^ (1 << bit)]), RETURN_NOTIFY);
            }
        }
        // What the listener never does itself is not passed.
        let signed = listener.sign(libc::AF_INET, libc::SOCK_DGRAM);
        assert_eq!(
            verdict_of(&program, AUDIT_ARCH, libc::SYS_socket as u32, [signed[0], signed[1], 0, 0]),
            RETURN_NOTIFY
        );
    }

    #[test]
    fn filters_of_programs_are_counted_or_refused() {
        let told = |listener, number: i64, first: i32, second: u32| {
            let arguments = [first as u32, second, 0, 0];
            verdict(&program(false, listener), AUDIT_ARCH, number as u32, arguments)
        };
        let set = libc::SECCOMP_SET_MODE_FILTER as i32;
        for (number, first, second) in
            [(libc::SYS_seccomp, set, 0), (libc::SYS_prctl, libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER)]
        {
            assert_eq!(told(LISTENER, number, first, second), RETURN_NOTIFY);
            assert_eq!(told(None, number, first, second), errno(libc::EINVAL));
        }
        let strict = (libc::SYS_prctl, libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT);
        for (number, first, second) in [(libc::SYS_prctl, libc::PR_SET_NAME, 2), (libc::SYS_seccomp, 0, 0), strict] {
            assert_eq!(told(LISTENER, number, first, second), RETURN_ALLOW);
        }
    }

    #[test]
    fn sysinfo_is_answered_by_somebody_else_where_somebody_listens() {
        assert_eq!(native(libc::SYS_sysinfo, [0, 0]), RETURN_NOTIFY);
        assert_eq!(verdict(&program(false, None), AUDIT_ARCH, libc::SYS_sysinfo as u32, [0, 0, 0, 0]), RETURN_ALLOW);
    }

    #[test]
    fn input_cannot_be_pushed_into_terminals() {
        assert_eq!(native(libc::SYS_ioctl, [0, libc::TIOCSTI as u32]), errno(libc::EPERM));
        assert_eq!(native(libc::SYS_ioctl, [0, libc::TIOCLINUX as u32]), errno(libc::EPERM));
        assert_eq!(native(libc::SYS_ioctl, [0, libc::TIOCGWINSZ as u32]), RETURN_ALLOW);
    }
}
