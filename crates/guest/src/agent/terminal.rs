//! Terminals for commands: how they are made, and how clients want them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nagaya_api::error::Code;
use rustix::fs::{Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::pty::OpenptFlags;
use rustix::termios::{
    ControlModes, InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios, Winsize,
};

use super::failure::Failure;
use super::program::nonblocking;
use crate::messages::{Resize, Terminal};

/// How a special character is said to be off.
const NO_CHARACTER: u32 = 255;

/// Our side and the command's side of a new terminal, which is the user's.
pub fn open(user: u32, wanted: &Terminal) -> Result<(OwnedFd, OwnedFd), Failure> {
    let unavailable = |errno| match errno {
        // None is left of this sandbox's or of the host's.
        Errno::NOSPC | Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN | Errno::IO => {
            Failure::with(Code::CapacityUnavailable, "terminals in the sandbox; close some that are open", errno)
        }
        errno => Failure::with(Code::CapabilityUnavailable, "terminals", errno),
    };
    let ours =
        rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).map_err(unavailable)?;
    rustix::pty::unlockpt(&ours).map_err(unavailable)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let theirs = match rustix::pty::ioctl_tiocgptpeer(&ours, flags) {
        Ok(theirs) => theirs,
        Err(_) => {
            let name = rustix::pty::ptsname(&ours, Vec::new()).map_err(unavailable)?;
            rustix::fs::open(&*name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
                .map_err(unavailable)?
        }
    };
    // The user must be able to open its own terminal by name. Its group is `tty`, as the file system has it.
    let _ = rustix::fs::fchown(&theirs, Some(Uid::from_raw(user)), None);
    let _ = rustix::fs::fchmod(&theirs, Mode::from_raw_mode(0o620));
    set_up(theirs.as_fd(), wanted);
    Ok((nonblocking(ours)?, theirs))
}

fn set_up(terminal: BorrowedFd<'_>, wanted: &Terminal) {
    if let Some(size) = wanted.size.as_option() {
        let _ = rustix::termios::tcsetwinsize(terminal, winsize(size));
    }
    if let Ok(mut termios) = rustix::termios::tcgetattr(terminal) {
        // The kernel's default is off, and every character of today's clients and programs is UTF-8.
        termios.input_modes |= InputModes::IUTF8;
        for mode in &wanted.modes {
            set(&mut termios, mode.opcode, mode.value);
        }
        let _ = rustix::termios::tcsetattr(terminal, OptionalActions::Now, &termios);
    }
}

pub fn winsize(size: &Resize) -> Winsize {
    let short = |number: u32| number.min(u16::MAX.into()) as u16;
    Winsize {
        ws_col: short(size.columns),
        ws_row: short(size.rows),
        ws_xpixel: short(size.width_px),
        ws_ypixel: short(size.height_px),
    }
}

/// Changes one setting by its number in RFC 4254, section 8, with those that OpenSSH added. What Linux does not have is
/// skipped.
fn set(termios: &mut Termios, opcode: u32, value: u32) {
    if let Some(index) = character(opcode) {
        termios.special_codes[index] = if value == NO_CHARACTER { 0 } else { value as u8 };
        return;
    }
    let on = value != 0;
    match opcode {
        30 => termios.input_modes.set(InputModes::IGNPAR, on),
        31 => termios.input_modes.set(InputModes::PARMRK, on),
        32 => termios.input_modes.set(InputModes::INPCK, on),
        33 => termios.input_modes.set(InputModes::ISTRIP, on),
        34 => termios.input_modes.set(InputModes::INLCR, on),
        35 => termios.input_modes.set(InputModes::IGNCR, on),
        36 => termios.input_modes.set(InputModes::ICRNL, on),
        37 => termios.input_modes.set(InputModes::IUCLC, on),
        38 => termios.input_modes.set(InputModes::IXON, on),
        39 => termios.input_modes.set(InputModes::IXANY, on),
        40 => termios.input_modes.set(InputModes::IXOFF, on),
        41 => termios.input_modes.set(InputModes::IMAXBEL, on),
        42 => termios.input_modes.set(InputModes::IUTF8, on),
        50 => termios.local_modes.set(LocalModes::ISIG, on),
        51 => termios.local_modes.set(LocalModes::ICANON, on),
        52 => termios.local_modes.set(LocalModes::XCASE, on),
        53 => termios.local_modes.set(LocalModes::ECHO, on),
        54 => termios.local_modes.set(LocalModes::ECHOE, on),
        55 => termios.local_modes.set(LocalModes::ECHOK, on),
        56 => termios.local_modes.set(LocalModes::ECHONL, on),
        57 => termios.local_modes.set(LocalModes::NOFLSH, on),
        58 => termios.local_modes.set(LocalModes::TOSTOP, on),
        59 => termios.local_modes.set(LocalModes::IEXTEN, on),
        60 => termios.local_modes.set(LocalModes::ECHOCTL, on),
        61 => termios.local_modes.set(LocalModes::ECHOKE, on),
        62 => termios.local_modes.set(LocalModes::PENDIN, on),
        70 => termios.output_modes.set(OutputModes::OPOST, on),
        71 => termios.output_modes.set(OutputModes::OLCUC, on),
        72 => termios.output_modes.set(OutputModes::ONLCR, on),
        73 => termios.output_modes.set(OutputModes::OCRNL, on),
        74 => termios.output_modes.set(OutputModes::ONOCR, on),
        75 => termios.output_modes.set(OutputModes::ONLRET, on),
        // Of a line's parity and size of characters, which terminals without a line do not have, the kernel keeps this.
        93 => termios.control_modes.set(ControlModes::PARODD, on),
        // A speed of nothing would mean a line that is hung up.
        128 if on => drop(termios.set_input_speed(value)),
        129 if on => drop(termios.set_output_speed(value)),
        _ => {}
    }
}

fn character(opcode: u32) -> Option<SpecialCodeIndex> {
    Some(match opcode {
        1 => SpecialCodeIndex::VINTR,
        2 => SpecialCodeIndex::VQUIT,
        3 => SpecialCodeIndex::VERASE,
        4 => SpecialCodeIndex::VKILL,
        5 => SpecialCodeIndex::VEOF,
        6 => SpecialCodeIndex::VEOL,
        7 => SpecialCodeIndex::VEOL2,
        8 => SpecialCodeIndex::VSTART,
        9 => SpecialCodeIndex::VSTOP,
        10 => SpecialCodeIndex::VSUSP,
        12 => SpecialCodeIndex::VREPRINT,
        13 => SpecialCodeIndex::VWERASE,
        14 => SpecialCodeIndex::VLNEXT,
        16 => SpecialCodeIndex::VSWTC,
        18 => SpecialCodeIndex::VDISCARD,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::TerminalMode;

    /// How a terminal is that was asked for like this.
    fn made(modes: &[(u32, u32)]) -> Termios {
        let modes = modes.iter().map(|&(opcode, value)| TerminalMode { opcode, value }).collect();
        let size = Resize { columns: 91, rows: 33, width_px: 910, height_px: 100_000 };
        let wanted = Terminal { size: Some(size).into(), modes };
        let user = rustix::process::getuid().as_raw();
        let (_ours, theirs) = open(user, &wanted).unwrap();
        let size = rustix::termios::tcgetwinsize(&theirs).unwrap();
        assert_eq!((size.ws_col, size.ws_row, size.ws_xpixel, size.ws_ypixel), (91, 33, 910, u16::MAX));
        rustix::termios::tcgetattr(&theirs).unwrap()
    }

    #[test]
    fn terminals_know_utf8_unless_told_otherwise() {
        assert!(made(&[]).input_modes.contains(InputModes::IUTF8));
        assert!(!made(&[(42, 0)]).input_modes.contains(InputModes::IUTF8));
    }

    #[test]
    fn backspace_takes_back_a_whole_character() {
        let user = rustix::process::getuid().as_raw();
        let (ours, theirs) = open(user, &Terminal::default()).unwrap();
        rustix::io::write(&ours, "aé長\x7f\x7fb\n".as_bytes()).unwrap();
        let mut line = [0; 64];
        let length = rustix::io::read(&theirs, &mut line).unwrap();
        assert_eq!(&line[..length], b"ab\n");
    }

    #[test]
    fn every_mode_that_linux_has_is_set_and_cleared() {
        let flags = (30..=42).chain(50..=62).chain(70..=75).chain([93]);
        for opcode in flags {
            let (on, off) = (made(&[(opcode, 1)]), made(&[(opcode, 0)]));
            let all = |of: &Termios| {
                (of.input_modes.bits(), of.output_modes.bits(), of.local_modes.bits(), of.control_modes.bits())
            };
            assert_ne!(all(&on), all(&off), "{opcode}");
        }
        for opcode in (1..=10).chain(12..=14).chain([16, 18]) {
            let index = character(opcode).unwrap();
            assert_eq!(made(&[(opcode, 0x42)]).special_codes[index], 0x42, "{opcode}");
            assert_eq!(made(&[(opcode, NO_CHARACTER)]).special_codes[index], 0, "{opcode}");
        }
        let speeds = made(&[(128, 9_600), (129, 19_200), (128, 0)]);
        assert_eq!((speeds.input_speed(), speeds.output_speed()), (9_600, 19_200));
    }

    #[test]
    fn unknown_modes_change_nothing() {
        let plain = made(&[]);
        let odd = made(&[
            (0, 1),
            (11, 1),
            (15, 1),
            (17, 1),
            (19, 9),
            (43, 1),
            (90, 1),
            (92, 1),
            (200, 1),
            (u32::MAX, u32::MAX),
        ]);
        assert_eq!(format!("{plain:?}"), format!("{odd:?}"));
    }
}
