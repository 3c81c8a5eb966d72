//! The first process of a sandbox. See `nagaya_guest::agent`.

use std::process::ExitCode;

fn main() -> ExitCode {
    match nagaya_guest::agent::main(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("nagaya-agent: {reason}");
            ExitCode::FAILURE
        }
    }
}
