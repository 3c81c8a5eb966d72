//! `snapshot`: disks of sessions, kept.

use std::time::{Duration, SystemTime};

use clap::Subcommand;
use nagaya_client::{CreateOptions, CreateSnapshotOptions, Snapshot};

use crate::errors::Failure;
use crate::output::{Fields, Screen, age, bytes, moment};
use crate::resolve::{self, Among, OneSession};
use crate::{connect, parse, session};

#[derive(Debug, Subcommand)]
pub enum SnapshotVerb {
    /// Keep the disk of a session as it is now.
    Create {
        #[command(flatten)]
        session: OneSession,
        /// A name to find it by.
        #[arg(long)]
        name: Option<String>,
        /// Delete it at this moment, such as 2027-03-20T12:00:00Z.
        #[arg(long, value_name = "MOMENT", value_parser = parse::moment)]
        expires_at: Option<SystemTime>,
        /// Return before it is ready.
        #[arg(long, conflicts_with = "wait_timeout")]
        no_wait: bool,
        /// How long it may take until it is ready.
        #[arg(long, value_name = "TIME", value_parser = parse::duration, default_value = "5m")]
        wait_timeout: Duration,
    },
    /// Show one.
    Get {
        /// Snapshot: an id, the beginning of one, or a name.
        #[arg(value_name = "SNAPSHOT")]
        snapshot: String,
    },
    /// Show all.
    #[command(alias = "ls")]
    List {
        /// Only those of this session.
        #[arg(long, value_name = "SESSION")]
        session: Option<String>,
        /// Only those of this workspace.
        #[arg(long, value_name = "WORKSPACE", default_value = "", hide_default_value = true)]
        workspace: String,
    },
    /// Create a session that begins with it, as `create --snapshot` does.
    Restore {
        /// Snapshot: an id, the beginning of one, or a name.
        #[arg(value_name = "SNAPSHOT")]
        snapshot: String,
        /// The new session's name.
        #[arg(long)]
        name: Option<String>,
    },
    /// Delete it.
    #[command(alias = "rm")]
    Delete {
        /// Snapshot: an id, the beginning of one, or a name.
        #[arg(value_name = "SNAPSHOT")]
        snapshot: String,
    },
}

impl SnapshotVerb {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let client = connect::client()?;
        match self {
            Self::Create { session, name, expires_at, no_wait, wait_timeout } => {
                let session = session.find(Among::Live).await?;
                let options = CreateSnapshotOptions::default().name(name).expires_at(expires_at);
                let snapshot = match no_wait {
                    true => session.create_snapshot_async(options).await?,
                    false => session.create_snapshot_and_wait(options, wait_timeout).await?,
                };
                screen.item(&snapshot, fields)
            }
            Self::Get { snapshot } => {
                let id = resolve::snapshot(&client, &snapshot).await?;
                screen.item(&client.get_snapshot(&id).await?, fields)
            }
            Self::List { session, workspace } => {
                let snapshots = match session {
                    Some(text) => resolve::session(&client, &text, Among::All).await?.snapshots().await?,
                    None => client.list_snapshots(&workspace).await?,
                };
                screen.list(&snapshots, &["ID", "NAME", "STATE", "SIZE", "SESSION", "AGE"], |snapshot| {
                    vec![
                        snapshot.id.clone(),
                        snapshot.name.clone().unwrap_or_default(),
                        snapshot.state.to_string(),
                        bytes(snapshot.size_bytes),
                        snapshot.session_id.clone(),
                        age(snapshot.created_at),
                    ]
                })
            }
            Self::Restore { snapshot, name } => {
                let snapshot_id = Some(resolve::snapshot(&client, &snapshot).await?);
                let restored = client
                    .create(CreateOptions::default().name(name).snapshot_id(snapshot_id).allow_inbound(false))
                    .await?;
                screen.item(&session::known(&restored).await?, session::fields)
            }
            Self::Delete { snapshot } => {
                let id = resolve::snapshot(&client, &snapshot).await?;
                screen.done(&client.delete_snapshot(&id).await?, |_| format!("{id} is deleted"))
            }
        }
    }
}

fn fields(snapshot: &Snapshot) -> Fields {
    vec![
        ("id", snapshot.id.clone()),
        ("name", snapshot.name.clone().unwrap_or_default()),
        ("state", snapshot.state.to_string()),
        ("why", snapshot.failure_reason.clone()),
        ("durability", snapshot.durability.to_string()),
        ("session", snapshot.session_id.clone()),
        ("size", bytes(snapshot.size_bytes)),
        ("created", moment(snapshot.created_at)),
        ("expires", moment(snapshot.expires_at)),
    ]
}
