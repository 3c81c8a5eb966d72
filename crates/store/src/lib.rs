//! The engine's records on SQLite.
//!
//! One thread writes, a few read; no async thread ever waits for the disk. What
//! [`Store::commit`](nagaya_engine::ports::Store::commit) acknowledged has been flushed to the disk.
//! This crate knows rows and queries; what the rows mean is decided in the engine.

mod backup;
mod health;
mod lists;
mod lock;
mod migrate;
mod mirror;
mod reserve;
mod rows;
mod sqlite;
mod writer;

pub use backup::backup;
pub use lock::DirectoryLock;
pub use mirror::Kind;
pub use sqlite::SqliteStore;
