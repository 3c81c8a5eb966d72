//! `nagaya backup`.

use std::path::Path;
use std::process::ExitCode;

use crate::config::Config;
use crate::guard;
use crate::server::DATABASE;

pub fn run(config: &Config, file: &Path) -> anyhow::Result<ExitCode> {
    nagaya_store::backup(&config.data_dir.join(DATABASE), file).map_err(guard::store_error)?;
    crate::say(format_args!("records of {} written to {}", config.data_dir.display(), file.display()));
    crate::say(format_args!(
        "to restore them: stop the server, put this file in the place of {DATABASE}, remove {DATABASE}-wal and {DATABASE}-shm, \
         and run `nagaya recover`"
    ));
    Ok(ExitCode::SUCCESS)
}
