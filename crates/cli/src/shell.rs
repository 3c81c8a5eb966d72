//! Completions and manual pages, made from the command line itself.

use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_complete::Shell;

use crate::errors::{Failure, exit_codes};
use crate::output::print;

#[derive(Debug, Args)]
pub struct Completions {
    /// For which shell.
    shell: Shell,
    /// For which name of this program.
    #[arg(long, default_value = "nagaya")]
    name: String,
}

impl Completions {
    pub fn run(self, mut whole: Command) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut whole, self.name, &mut script);
        print(&String::from_utf8_lossy(&script))
    }
}

#[derive(Debug, Args)]
pub struct Man {
    /// The directory that gets a page for every verb.
    directory: PathBuf,
}

impl Man {
    pub fn run(self, whole: Command) -> Result<(), Failure> {
        let problem = |error: io::Error| Failure::writing(&self.directory, &error);
        std::fs::create_dir_all(&self.directory).map_err(problem)?;
        // Manual pages fill their lines; a paragraph each keeps these apart.
        let codes = exit_codes().replace('\n', "\n\n");
        let whole = whole.after_long_help(format!("EXIT CODES\n\n{codes}"));
        clap_mangen::generate_to(whole, Path::new(&self.directory)).map_err(problem)
    }
}
