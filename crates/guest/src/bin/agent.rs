//! The first process of a sandbox, see `nagaya_guest::agent`; called `sftp`, a file server, see `nagaya_guest::sftp`.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args();
    let result = match arguments.next().as_deref() {
        Some(nagaya_guest::agent::SFTP) => nagaya_guest::sftp::main(),
        _ => nagaya_guest::agent::main(arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            // Nobody is left to tell when this cannot be printed.
            let _ = writeln!(std::io::stderr(), "nagaya-agent: {reason}");
            ExitCode::FAILURE
        }
    }
}
