//! Exposed ports and preview URLs.

use std::time::Duration;

use clap::{Args, Subcommand};
use nagaya_client::{CreatePreviewUrlOptions, ExposeOptions, ExposedPort, ListPreviewUrlsOptions, PreviewUrl, Session};

use crate::errors::Failure;
use crate::output::{Fields, Screen, age, moment};
use crate::resolve::{self, Among, OneSession};
use crate::{connect, parse};

/// A session and a port of it, as options or as words.
#[derive(Debug, Args)]
pub struct SessionPort {
    /// Session: an id, the beginning of one, or a name.
    #[arg(long, value_name = "SESSION")]
    session: Option<String>,
    /// The port, 1 to 65535.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// [SESSION] [PORT]
    #[arg(num_args = 0..=2, value_name = "SESSION")]
    words: Vec<String>,
}

impl SessionPort {
    async fn find(self) -> Result<(Session, u16), Failure> {
        let (session, words) = resolve::split(self.session, self.words, usize::from(self.port.is_none()))?;
        let port = match (self.port, words.first()) {
            (Some(port), _) => Some(port),
            (None, Some(word)) => word.parse().ok().filter(|port| *port > 0),
            (None, None) => None,
        };
        let port = port.ok_or_else(|| Failure::usage("a port is missing", "Give --port N, from 1 to 65535."))?;
        Ok((resolve::session(&connect::client()?, &session, Among::Live).await?, port))
    }
}

#[derive(Debug, Args)]
pub struct Expose {
    #[command(flatten)]
    at: SessionPort,
    /// Close it after this time, such as 1h.
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    ttl: Option<Duration>,
    /// A name for a URL that stays the same.
    #[arg(long)]
    slug: Option<String>,
}

impl Expose {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let (session, port) = self.at.find().await?;
        let exposed = session.expose_port(port, ExposeOptions::default().ttl(self.ttl).slug(self.slug)).await?;
        screen.item(&exposed, |exposed: &ExposedPort| {
            vec![
                ("port", exposed.port.to_string()),
                ("url", exposed.preview_url.clone()),
                ("slug", exposed.slug.clone().unwrap_or_default()),
                ("closes", moment(exposed.expires_at)),
            ]
        })
    }
}

#[derive(Debug, Args)]
pub struct Ports {
    #[command(flatten)]
    session: OneSession,
}

impl Ports {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let session = self.session.find(Among::Live).await?;
        screen.list(&session.exposed_ports().await?, &["PORT", "URL", "SLUG", "CLOSES"], |exposed| {
            vec![
                exposed.port.to_string(),
                exposed.preview_url.clone(),
                exposed.slug.clone().unwrap_or_default(),
                moment(exposed.expires_at),
            ]
        })
    }
}

#[derive(Debug, Args)]
pub struct Unexpose {
    #[command(flatten)]
    at: SessionPort,
}

impl Unexpose {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let (session, port) = self.at.find().await?;
        session.unexpose_port(port).await?;
        screen.done(&serde_json::json!({ "port": port }), |_| format!("port {port} is closed"))
    }
}

/// Preview URLs: names that stay, and lead to a port of a session or to none yet.
#[derive(Debug, Subcommand)]
pub enum Preview {
    /// Make a preview URL; with --session and --port it leads there at once.
    Create {
        /// The name in the URL: 3 to 63 lower-case letters, digits and hyphens.
        #[arg(long)]
        slug: String,
        /// The session that it leads to.
        #[arg(long, value_name = "SESSION", requires = "port")]
        session: Option<String>,
        /// The port that it leads to.
        #[arg(long, value_name = "PORT", requires = "session", value_parser = clap::value_parser!(u16).range(1..))]
        port: Option<u16>,
        /// The workspace that it belongs to.
        #[arg(long, value_name = "WORKSPACE")]
        workspace: Option<String>,
    },
    /// Show one.
    Get {
        /// Preview URL: an id, the beginning of one, or a slug.
        #[arg(value_name = "PREVIEW")]
        preview: String,
    },
    /// Show all.
    #[command(alias = "ls")]
    List {
        /// Only those that lead to this session.
        #[arg(long, value_name = "SESSION")]
        session: Option<String>,
    },
    /// Let it lead to a port of a session.
    Bind {
        /// Preview URL: an id, the beginning of one, or a slug.
        #[arg(value_name = "PREVIEW")]
        preview: String,
        #[command(flatten)]
        at: SessionPort,
    },
    /// Let it lead nowhere.
    Unbind {
        /// Preview URL: an id, the beginning of one, or a slug.
        #[arg(value_name = "PREVIEW")]
        preview: String,
    },
    /// Remove it.
    #[command(alias = "rm")]
    Delete {
        /// Preview URL: an id, the beginning of one, or a slug.
        #[arg(value_name = "PREVIEW")]
        preview: String,
    },
    /// Make a URL with a viewer's token for a port of a session.
    Open {
        #[command(flatten)]
        at: SessionPort,
    },
}

impl Preview {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let client = connect::client()?;
        match self {
            Self::Create { slug, session, port, workspace } => {
                let session = match session {
                    Some(text) => Some(resolve::session(&client, &text, Among::Live).await?),
                    None => None,
                };
                let session_id = session.map(|session| session.id().to_owned());
                let options = CreatePreviewUrlOptions::default()
                    .slug(slug)
                    .session_id(session_id)
                    .port(port)
                    .workspace_id(workspace);
                screen.item(&client.create_preview_url(options).await?, fields)
            }
            Self::Get { preview } => {
                let id = resolve::preview(&client, &preview).await?;
                screen.item(&client.get_preview_url(&id).await?, fields)
            }
            Self::List { session } => {
                let session_id = match session {
                    Some(text) => Some(resolve::session(&client, &text, Among::All).await?.id().to_owned()),
                    None => None,
                };
                let options = ListPreviewUrlsOptions::default().session_id(session_id);
                list(screen, &client.list_preview_urls(options).await?)
            }
            Self::Bind { preview, at } => {
                let id = resolve::preview(&client, &preview).await?;
                let (session, port) = at.find().await?;
                screen.item(&client.bind_preview_url(&id, session.id(), port).await?, fields)
            }
            Self::Unbind { preview } => {
                let id = resolve::preview(&client, &preview).await?;
                screen.item(&client.unbind_preview_url(&id).await?, fields)
            }
            Self::Delete { preview } => {
                let id = resolve::preview(&client, &preview).await?;
                client.delete_preview_url(&id).await?;
                screen.done(&serde_json::json!({ "id": id }), |_| format!("{id} is deleted"))
            }
            Self::Open { at } => {
                let (session, port) = at.find().await?;
                screen.item(&session.open_preview(port).await?, |opened| {
                    vec![
                        ("port", opened.port.to_string()),
                        ("url", opened.preview_url.clone()),
                        ("token", opened.viewer_token.clone()),
                        ("expires", moment(opened.expires_at)),
                    ]
                })
            }
        }
    }
}

fn list(screen: Screen, previews: &[PreviewUrl]) -> Result<(), Failure> {
    screen.list(previews, &["ID", "SLUG", "SESSION", "PORT", "URL", "AGE"], |preview| {
        vec![
            preview.id.clone(),
            preview.slug.clone(),
            preview.session_id.clone().unwrap_or_default(),
            preview.port.map(|port| port.to_string()).unwrap_or_default(),
            preview.preview_url.clone(),
            age(preview.created_at),
        ]
    })
}

fn fields(preview: &PreviewUrl) -> Fields {
    vec![
        ("id", preview.id.clone()),
        ("slug", preview.slug.clone()),
        ("url", preview.preview_url.clone()),
        ("session", preview.session_id.clone().unwrap_or_default()),
        ("port", preview.port.map(|port| port.to_string()).unwrap_or_default()),
        ("created", moment(preview.created_at)),
    ]
}
