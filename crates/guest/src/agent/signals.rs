//! Signals by number and by name.

use rustix::process::Signal;

use crate::messages;

/// The signal a message asks for; `None` when this agent does not know it.
pub fn from_message(signal: buffa::EnumValue<messages::Signal>) -> Option<Signal> {
    Some(match signal.as_known()? {
        messages::Signal::SIGNAL_TERM => Signal::TERM,
        messages::Signal::SIGNAL_KILL => Signal::KILL,
        messages::Signal::SIGNAL_INT => Signal::INT,
        messages::Signal::SIGNAL_HUP => Signal::HUP,
        messages::Signal::SIGNAL_USR1 => Signal::USR1,
        messages::Signal::SIGNAL_USR2 => Signal::USR2,
        messages::Signal::SIGNAL_UNSPECIFIED => return None,
    })
}

/// The usual name of a signal, e.g. `SIGKILL`.
pub fn name(number: i32) -> String {
    const NAMES: [(i32, &str); 31] = [
        (libc::SIGHUP, "SIGHUP"),
        (libc::SIGINT, "SIGINT"),
        (libc::SIGQUIT, "SIGQUIT"),
        (libc::SIGILL, "SIGILL"),
        (libc::SIGTRAP, "SIGTRAP"),
        (libc::SIGABRT, "SIGABRT"),
        (libc::SIGBUS, "SIGBUS"),
        (libc::SIGFPE, "SIGFPE"),
        (libc::SIGKILL, "SIGKILL"),
        (libc::SIGUSR1, "SIGUSR1"),
        (libc::SIGSEGV, "SIGSEGV"),
        (libc::SIGUSR2, "SIGUSR2"),
        (libc::SIGPIPE, "SIGPIPE"),
        (libc::SIGALRM, "SIGALRM"),
        (libc::SIGTERM, "SIGTERM"),
        (libc::SIGSTKFLT, "SIGSTKFLT"),
        (libc::SIGCHLD, "SIGCHLD"),
        (libc::SIGCONT, "SIGCONT"),
        (libc::SIGSTOP, "SIGSTOP"),
        (libc::SIGTSTP, "SIGTSTP"),
        (libc::SIGTTIN, "SIGTTIN"),
        (libc::SIGTTOU, "SIGTTOU"),
        (libc::SIGURG, "SIGURG"),
        (libc::SIGXCPU, "SIGXCPU"),
        (libc::SIGXFSZ, "SIGXFSZ"),
        (libc::SIGVTALRM, "SIGVTALRM"),
        (libc::SIGPROF, "SIGPROF"),
        (libc::SIGWINCH, "SIGWINCH"),
        (libc::SIGIO, "SIGIO"),
        (libc::SIGPWR, "SIGPWR"),
        (libc::SIGSYS, "SIGSYS"),
    ];
    match NAMES.iter().find(|(known, _)| *known == number) {
        Some((_, name)) => (*name).into(),
        None => format!("SIG{number}"),
    }
}
