//! `volume`: disks that outlive sessions.

use std::time::Duration;

use clap::Subcommand;
use nagaya_client::{CreateVolumeOptions, DetachOptions, Volume, VolumeAttachment, VolumeMount};

use crate::errors::Failure;
use crate::output::{Fields, Screen, bytes};
use crate::resolve::{self, Among};
use crate::{connect, parse};

#[derive(Debug, Subcommand)]
pub enum VolumeVerb {
    /// Make a volume.
    Create {
        /// A name to find it by.
        #[arg(long)]
        name: String,
        /// Its size with a unit, such as 20GB or 512MiB.
        #[arg(long, value_name = "SIZE", value_parser = parse::size)]
        size: u64,
        /// The workspace that it belongs to.
        #[arg(long, value_name = "WORKSPACE")]
        workspace: Option<String>,
    },
    /// Show one and where it is attached.
    Get {
        /// Volume: an id, the beginning of one, or a name.
        #[arg(value_name = "VOLUME")]
        volume: String,
    },
    /// Show all.
    #[command(alias = "ls")]
    List {
        /// Only those of this workspace.
        #[arg(long, value_name = "WORKSPACE", default_value = "", hide_default_value = true)]
        workspace: String,
    },
    /// Let it grow.
    Resize {
        /// Volume: an id, the beginning of one, or a name.
        #[arg(value_name = "VOLUME")]
        volume: String,
        /// Its new size with a unit, such as 20GB.
        #[arg(long, value_name = "SIZE", value_parser = parse::size)]
        size: u64,
    },
    /// Mount it in a running session.
    Attach {
        /// Session: an id, the beginning of one, or a name.
        #[arg(long, value_name = "SESSION")]
        session: Option<String>,
        /// [SESSION] VOLUME
        #[arg(num_args = 1..=2, required = true, value_name = "SESSION")]
        words: Vec<String>,
        /// Where in the sandbox.
        #[arg(long, value_name = "PATH")]
        mount: String,
        /// For reading only.
        #[arg(long, alias = "read-only")]
        readonly: bool,
    },
    /// Take it out of a session.
    Detach {
        /// Session: an id, the beginning of one, or a name.
        #[arg(long, value_name = "SESSION")]
        session: Option<String>,
        /// [SESSION] VOLUME
        #[arg(num_args = 1..=2, required = true, value_name = "SESSION")]
        words: Vec<String>,
        /// Also when files on it are open.
        #[arg(long)]
        force: bool,
        /// How long it may take; 0 does not wait.
        #[arg(long, value_name = "TIME", value_parser = parse::duration, default_value = "2m")]
        wait_timeout: Duration,
    },
    /// Delete it and everything on it.
    #[command(alias = "rm")]
    Delete {
        /// Volume: an id, the beginning of one, or a name.
        #[arg(value_name = "VOLUME")]
        volume: String,
    },
}

impl VolumeVerb {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let client = connect::client()?;
        match self {
            Self::Create { name, size, workspace } => {
                let options = CreateVolumeOptions::default().name(name).size_bytes(size).workspace_id(workspace);
                screen.item(&client.create_volume(options).await?, fields)
            }
            Self::Get { volume } => {
                let details = client.get_volume(&resolve::volume(&client, &volume).await?).await?;
                screen.item(&details, |details| {
                    let attached = details.attachments.iter().map(place).collect::<Vec<_>>().join(" ");
                    let mut all = fields(&details.volume);
                    all.push(("attached", attached));
                    all
                })
            }
            Self::List { workspace } => {
                let volumes = client.list_volumes(&workspace).await?;
                screen.list(&volumes, &["ID", "NAME", "STATE", "SIZE"], |volume| {
                    vec![volume.id.clone(), volume.name.clone(), volume.state.to_string(), bytes(volume.size_bytes)]
                })
            }
            Self::Resize { volume, size } => {
                let id = resolve::volume(&client, &volume).await?;
                screen.item(&client.resize_volume(&id, size).await?, fields)
            }
            Self::Attach { session, words, mount, readonly } => {
                let (session, words) = resolve::split(session, words, 1)?;
                let session = resolve::session(&client, &session, Among::Live).await?;
                let volume_id = resolve::volume(&client, wanted(&words)?).await?;
                let mount = VolumeMount { volume_id, mount_path: mount, read_only: readonly };
                screen.done(&session.attach_volume(mount).await?, |attachment| {
                    format!("{} is attached to {}", attachment.volume_id, place(attachment))
                })
            }
            Self::Detach { session, words, force, wait_timeout } => {
                let (session, words) = resolve::split(session, words, 1)?;
                let session = resolve::session(&client, &session, Among::Live).await?;
                let volume = resolve::volume(&client, wanted(&words)?).await?;
                let wait = (!wait_timeout.is_zero()).then_some(wait_timeout);
                session.detach_volume(&volume, DetachOptions::default().force(force).wait(wait)).await?;
                let done = serde_json::json!({ "volume_id": volume, "session_id": session.id() });
                screen.done(&done, |_| format!("{volume} is detached from {}", session.id()))
            }
            Self::Delete { volume } => {
                let id = resolve::volume(&client, &volume).await?;
                client.delete_volume(&id).await?;
                screen.done(&serde_json::json!({ "id": id }), |_| format!("{id} is deleted"))
            }
        }
    }
}

fn wanted(words: &[String]) -> Result<&str, Failure> {
    let word = words.first().map(String::as_str);
    word.ok_or_else(|| Failure::usage("a volume is missing", "Write `volume attach SESSION VOLUME --mount PATH`."))
}

fn place(attachment: &VolumeAttachment) -> String {
    let ending = if attachment.read_only { ":ro" } else { "" };
    format!("{}:{}{ending}", attachment.session_id, attachment.mount_path)
}

fn fields(volume: &Volume) -> Fields {
    vec![
        ("id", volume.id.clone()),
        ("name", volume.name.clone()),
        ("state", volume.state.to_string()),
        ("size", bytes(volume.size_bytes)),
        ("tags", volume.tags.join(" ")),
        ("created", volume.created_at.clone()),
    ]
}
