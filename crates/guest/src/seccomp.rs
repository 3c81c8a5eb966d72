//! The system calls a sandbox may make, as one compiled BPF program.
//!
//! The filter is the second wall: the first is that a sandbox owns none of its namespaces and holds
//! few capabilities. It takes away calls that reach large, rarely used parts of the kernel, and the
//! ways to make new namespaces. Calls are looked up by binary search, so that the program stays
//! short: the kernel walks it once per system call number when it is installed.

use libc::{BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};

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

/// Address families a sandbox may use, with netlink. Others, such as AF_VSOCK, reach past the
/// network namespace.
const SOCKET_FAMILIES: &[u32] = &[libc::AF_UNIX as u32, libc::AF_INET as u32, libc::AF_INET6 as u32];

/// Netlink's protocols for addresses and for lists of sockets. Of the others some tell of the host:
/// NETLINK_KOBJECT_UEVENT, of all its devices that come and go.
const NETLINK_PROTOCOLS: &[u32] = &[libc::NETLINK_ROUTE as u32, libc::NETLINK_SOCK_DIAG as u32];

/// Terminal requests that put input into somebody else's terminal.
const REFUSED_IOCTLS: &[u32] = &[libc::TIOCSTI as u32, libc::TIOCLINUX as u32];

/// Locks that belong to an open file: the kernel does not tell who holds them, so nobody could be asked for having too
/// many. Answered as kernels did that had none.
const REFUSED_FILE_COMMANDS: &[u32] = &[libc::F_OFD_SETLK as u32, libc::F_OFD_SETLKW as u32];

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
    /// Allow only when the first argument is one of [`SOCKET_FAMILIES`], or netlink with one of
    /// [`NETLINK_PROTOCOLS`] as the third.
    Families,
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
    /// Refuse when the second argument is `SOL_SOCKET` and the third one of [`REFUSED_SOCKET_OPTIONS`].
    SocketOptions,
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
        Verdict::Families => {
            let netlink = one_of(DATA_ARGUMENT_2, NETLINK_PROTOCOLS, RETURN_ALLOW, errno(libc::EPROTONOSUPPORT));
            let others = one_of(DATA_ARGUMENT_0, SOCKET_FAMILIES, RETURN_ALLOW, errno(libc::EAFNOSUPPORT));
            let mut block = vec![load(DATA_ARGUMENT_0), jump(BPF_JEQ, libc::AF_NETLINK as u32, 0, netlink.len() as u8)];
            block.extend(netlink);
            block.extend(others);
            block
        }
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
        Verdict::SocketOptions => {
            let options = one_of(DATA_ARGUMENT_2, REFUSED_SOCKET_OPTIONS, errno(libc::EPERM), RETURN_ALLOW);
            let mut block =
                vec![load(DATA_ARGUMENT_1), jump(BPF_JEQ, libc::SOL_SOCKET as u32, 1, 0), give(RETURN_ALLOW)];
            block.extend(options);
            block
        }
    }
}

fn one_of(argument: u32, values: &[u32], hit: u32, miss: u32) -> Vec<sock_filter> {
    // The kernel looks at the low half of these arguments only, and so do we.
    let mut block = vec![load(argument)];
    for (index, value) in values.iter().enumerate() {
        block.push(jump(BPF_JEQ, *value, (values.len() - index) as u8, 0));
    }
    block.push(give(miss));
    block.push(give(hit));
    block
}

/// Runs of numbers with one verdict, as (first number, verdict), ascending, from 0.
fn table(pin_cores: bool, sysinfo: Verdict) -> Vec<(u32, Verdict)> {
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
    verdicts[libc::SYS_setsockopt as usize] = Verdict::SocketOptions;
    verdicts[libc::SYS_socket as usize] = Verdict::Families;
    verdicts[libc::SYS_socketpair as usize] = Verdict::Families;
    verdicts[libc::SYS_ioctl as usize] = Verdict::Ioctls;
    verdicts[libc::SYS_fcntl as usize] = Verdict::FileCommands;
    verdicts[libc::SYS_sysinfo as usize] = sysinfo;

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

/// The compiled filter; with `pin_cores` the limit of core files stays what it is. Either whoever installs it listens to
/// calls of `sysinfo` and answers them, or they tell the host's memory.
pub fn program(pin_cores: bool, answers_sysinfo: bool) -> Vec<sock_filter> {
    let mut program = vec![
        load(DATA_ARCH),
        jump(BPF_JEQ, AUDIT_ARCH, 1, 0),
        give(errno(libc::ENOSYS)),
        load(DATA_NUMBER),
        jump(BPF_JGE, X32_START, 0, 1),
        give(errno(libc::ENOSYS)),
    ];
    program.extend(search(&table(pin_cores, if answers_sysinfo { Verdict::Notify } else { Verdict::Allow })));
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
                code if code == BPF_JMP => at += instruction.k as usize,
                code if code == BPF_JMP | BPF_JEQ | BPF_K => at += taken(accumulator == instruction.k),
                code if code == BPF_JMP | BPF_JGE | BPF_K => at += taken(accumulator >= instruction.k),
                code if code == BPF_JMP | BPF_JSET | BPF_K => at += taken(accumulator & instruction.k != 0),
                code if code == BPF_RET | BPF_K => return instruction.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn native(number: i64, [first, second]: [u32; 2]) -> u32 {
        verdict(&program(false, true), AUDIT_ARCH, number as u32, [first, second, 0, 0])
    }

    #[test]
    fn every_listed_call_gets_its_verdict_and_all_others_are_allowed() {
        let program = program(false, true);
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
        let program = program(false, true);
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
        for family in SOCKET_FAMILIES {
            assert_eq!(native(libc::SYS_socket, [*family, 1]), RETURN_ALLOW);
        }
        for family in [libc::AF_VSOCK, libc::AF_PACKET, libc::AF_ALG, libc::AF_BLUETOOTH] {
            assert_eq!(native(libc::SYS_socket, [family as u32, 1]), errno(libc::EAFNOSUPPORT));
        }
    }

    #[test]
    fn netlink_tells_of_addresses_and_sockets_and_of_nothing_else() {
        let program = program(false, true);
        let open = |protocol: i32| {
            let arguments = [libc::AF_NETLINK as u32, libc::SOCK_RAW as u32, protocol as u32, 0];
            verdict(&program, AUDIT_ARCH, libc::SYS_socket as u32, arguments)
        };
        for protocol in [libc::NETLINK_ROUTE, libc::NETLINK_SOCK_DIAG] {
            assert_eq!(open(protocol), RETURN_ALLOW);
        }
        for protocol in [libc::NETLINK_KOBJECT_UEVENT, libc::NETLINK_NETFILTER, libc::NETLINK_AUDIT, libc::NETLINK_XFRM]
        {
            assert_eq!(open(protocol), errno(libc::EPROTONOSUPPORT));
        }
    }

    #[test]
    fn the_limit_of_core_files_stays_only_where_it_is_pinned() {
        let core = u64::from(libc::RLIMIT_CORE);
        let program = |pin_cores| super::program(pin_cores, true);
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
        let program = program(false, true);
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
        let program = program(false, true);
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
    fn sysinfo_is_answered_by_somebody_else_where_somebody_listens() {
        assert_eq!(native(libc::SYS_sysinfo, [0, 0]), RETURN_NOTIFY);
        assert_eq!(verdict(&program(false, false), AUDIT_ARCH, libc::SYS_sysinfo as u32, [0, 0, 0, 0]), RETURN_ALLOW);
    }

    #[test]
    fn input_cannot_be_pushed_into_terminals() {
        assert_eq!(native(libc::SYS_ioctl, [0, libc::TIOCSTI as u32]), errno(libc::EPERM));
        assert_eq!(native(libc::SYS_ioctl, [0, libc::TIOCLINUX as u32]), errno(libc::EPERM));
        assert_eq!(native(libc::SYS_ioctl, [0, libc::TIOCGWINSZ as u32]), RETURN_ALLOW);
    }
}
