//! Numbered changes of the schema, each applied once and recorded with its checksum.

use std::path::Path;

use nagaya_engine::ports::StoreError;
use rusqlite::{Connection, OpenFlags, OptionalExtension, TransactionBehavior};

use crate::health;

/// The scripts in order: number 1 is the first. A released script is never edited again.
const SCRIPTS: &[&str] = &[
    include_str!("../migrations/0001_sessions.sql"),
    include_str!("../migrations/0002_life.sql"),
    include_str!("../migrations/0003_previews.sql"),
    include_str!("../migrations/0004_egress.sql"),
    include_str!("../migrations/0005_events.sql"),
    include_str!("../migrations/0006_end_reasons.sql"),
    include_str!("../migrations/0007_resources.sql"),
    include_str!("../migrations/0008_names.sql"),
];

const TABLE: &str = "CREATE TABLE IF NOT EXISTS schema_migrations (
    number   INTEGER PRIMARY KEY,
    checksum TEXT NOT NULL
) STRICT";

/// Refuses a database that this program cannot use, without changing a byte of it.
pub(crate) fn check(path: &Path) -> Result<(), StoreError> {
    let database =
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)
            .map_err(|error| health::error(&format!("open {}", path.display()), &error))?;
    applied(&database).map(|_| ()).map_err(|refusal| refusal.of(&format!("open {}", path.display())))
}

/// Brings the schema up to date, all steps or none.
pub(crate) fn run(database: &mut Connection) -> Result<(), StoreError> {
    let fail = |error: rusqlite::Error| health::error("migrate the database", &error);
    let transaction = database.transaction_with_behavior(TransactionBehavior::Immediate).map_err(fail)?;
    let done = applied(&transaction).map_err(|refusal| refusal.of("migrate the database"))?;
    transaction.execute_batch(TABLE).map_err(fail)?;
    for (script, number) in SCRIPTS.iter().zip(1i64..).skip(done) {
        transaction.execute_batch(script).map_err(fail)?;
        transaction
            .execute("INSERT INTO schema_migrations (number, checksum) VALUES (?1, ?2)", (number, checksum(script)))
            .map_err(fail)?;
    }
    transaction.commit().map_err(fail)
}

/// Why a database cannot be used.
enum Refusal {
    Foreign(String),
    Unreadable(rusqlite::Error),
}

impl Refusal {
    fn of(self, action: &str) -> StoreError {
        match self {
            Self::Foreign(reason) => StoreError::Failed(format!("{action}: {reason}")),
            Self::Unreadable(error) => health::error(action, &error),
        }
    }
}

impl From<&str> for Refusal {
    fn from(reason: &str) -> Self {
        Self::Foreign(reason.to_owned())
    }
}

/// How many scripts have been applied.
fn applied(database: &Connection) -> Result<usize, Refusal> {
    let text = Refusal::Unreadable;
    let count = |sql: &str| database.query_row(sql, [], |row| row.get::<_, i64>(0));
    if count("SELECT count(*) FROM sqlite_schema WHERE name = 'schema_migrations'").map_err(text)? == 0 {
        return match count("SELECT count(*) FROM sqlite_schema").map_err(text)? {
            0 => Ok(0),
            _ => Err("this is a database of another program; choose another data directory".into()),
        };
    }
    let newest = count("SELECT coalesce(max(number), 0) FROM schema_migrations").map_err(text)?;
    let known = SCRIPTS.len();
    let newest = usize::try_from(newest).unwrap_or(usize::MAX);
    if newest > known {
        return Err(Refusal::Foreign(format!(
            "the database has schema {newest} but this version of nagaya knows schemas up to {known}; \
             start the newer version that wrote it, or choose another data directory"
        )));
    }
    for (script, number) in SCRIPTS[..newest].iter().zip(1i64..) {
        let recorded = database
            .query_row("SELECT checksum FROM schema_migrations WHERE number = ?1", [number], |row| {
                row.get::<_, String>(0)
            })
            .optional()
            .map_err(text)?;
        if recorded.as_deref() != Some(checksum(script).as_str()) {
            return Err(Refusal::Foreign(format!(
                "schema change {number} was applied in another form than this version of nagaya has; \
                 start the version that wrote the database"
            )));
        }
    }
    Ok(newest)
}

fn checksum(script: &str) -> String {
    blake3::hash(script.as_bytes()).to_hex().to_string()
}
