//! The entries of a directory, also in the form of `ls -l`, which some clients show as it is.

use rustix::fs::{AtFlags, FileType, Stat};

use super::wire::{self, Failure, Reply, Request};
use super::{PACKET_BYTES_MAX, Server};

/// Entries in one answer; more may be asked for.
const ENTRIES_MAX: u32 = 200;
/// Room for one entry: its name twice, and the rest of its line.
const ENTRY_BYTES_MAX: usize = 2 * 255 + 256;

impl Server {
    pub(super) fn read_directory(&mut self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<(), Failure> {
        let (directory, entries) = self.handles.directory(request)?;
        reply.head(wire::NAME);
        let count_at = reply.room_for_number();
        let mut count = 0;
        while count < ENTRIES_MAX && reply.length() + ENTRY_BYTES_MAX < PACKET_BYTES_MAX {
            let Some(entry) = entries.read().transpose()? else { break };
            // One that is gone by now is left out.
            let Ok(status) = rustix::fs::statat(directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let name = entry.file_name().to_bytes();
            reply.string(name);
            reply.string(&[line(&status).as_bytes(), name].concat());
            reply.attributes(&status);
            count += 1;
        }
        if count == 0 {
            return Err(Failure::EndOfFile);
        }
        reply.fill_number(count_at, count);
        Ok(())
    }
}

/// What `ls -l` shows before the name.
fn line(status: &Stat) -> String {
    let own = rustix::process::getuid().as_raw();
    // What the server is run as is known without a look into files that may say anything.
    let user = |id: u32| match id {
        0 => "root".to_owned(),
        id if id == own => std::env::var("USER").unwrap_or_else(|_| id.to_string()),
        other => other.to_string(),
    };
    format!(
        "{} {:>4} {:<8} {:<8} {:>8} {} ",
        mode_text(status.st_mode),
        status.st_nlink,
        user(status.st_uid),
        user(status.st_gid),
        status.st_size,
        date(status.st_mtime)
    )
}

fn mode_text(mode: u32) -> String {
    let kind = match FileType::from_raw_mode(mode) {
        FileType::Directory => 'd',
        FileType::Symlink => 'l',
        FileType::Fifo => 'p',
        FileType::Socket => 's',
        FileType::CharacterDevice => 'c',
        FileType::BlockDevice => 'b',
        _ => '-',
    };
    let mut text = String::from(kind);
    for (shift, special, set, alone) in [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => set,
            (false, true) => alone,
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// Day and time in UTC; the year where it is not this one would need a clock, so it is always told.
fn date(seconds: i64) -> String {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    // Days are counted in years that begin in March, so that leap days come last.
    let days = seconds.div_euclid(86_400) + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, year) = match month {
        0..10 => (month + 2, era * 400 + year_of_era),
        _ => (month - 10, era * 400 + year_of_era + 1),
    };
    let minutes = seconds.rem_euclid(86_400) / 60;
    format!("{} {day:>2} {:02}:{:02} {year}", MONTHS[month as usize], minutes / 60, minutes % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "Jan  1 00:00 1970");
        assert_eq!(date(951_782_400), "Feb 29 00:00 2000");
        assert_eq!(date(1_790_000_000), "Sep 21 14:13 2026");
        assert_eq!(date(-1), "Dec 31 23:59 1969");
    }

    #[test]
    fn modes_look_as_ls_shows_them() {
        assert_eq!(mode_text(0o100644), "-rw-r--r--");
        assert_eq!(mode_text(0o41777), "drwxrwxrwt");
        assert_eq!(mode_text(0o104750), "-rwsr-x---");
        assert_eq!(mode_text(0o120777), "lrwxrwxrwx");
    }
}
