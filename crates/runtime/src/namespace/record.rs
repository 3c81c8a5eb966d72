//! What the driver writes down about a sandbox, so that a later server can take it over.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nagaya_engine::model::Machine;
use serde::{Deserialize, Serialize};

const FILE: &str = "record.json";

/// Written before the first process starts. New fields must have defaults: sandboxes outlive servers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub slot: u32,
    pub machine: Machine,
    /// The base layer, which must stay while the sandbox lives.
    pub base: PathBuf,
}

impl Record {
    /// Not synced: after a power cut no sandbox runs that it could describe.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        fs::write(directory.join(FILE), serde_json::to_vec(self)?)
    }

    pub fn read(directory: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(directory.join(FILE))?)?)
    }
}
