//! Who the caller is, what is left of the quota, and keys for servers elsewhere.

use std::fs;
use std::io::{self, BufRead, IsTerminal};
use std::path::Path;

use clap::Args;
use nagaya_client::{Client, ClientOptions, UsageUnit};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use serde_json::json;

use crate::connect;
use crate::errors::{Failure, Local};
use crate::output::{Screen, bytes};
use crate::ssh_config::replace;

/// Shows who the caller is and which server that is asked of.
pub async fn whoami(screen: Screen) -> Result<(), Failure> {
    let found = connect::find()?;
    let token_from = found.token_from;
    let client = Client::new(found.options)?;
    let identity = client.who_am_i().await?;
    let value = json!({
        "endpoint": client.endpoint(),
        "credential_from": token_from,
        "owner_type": identity.owner_type,
        "owner_id": identity.owner_id,
        "workspaces": identity.workspaces,
    });
    screen.item(&value, |_| {
        let workspaces = identity.workspaces.iter().map(|workspace| format!("{} ({})", workspace.id, workspace.name));
        vec![
            ("server", client.endpoint().to_string()),
            ("key from", token_from.clone()),
            ("owner", format!("{} {}", identity.owner_type.to_lowercase(), identity.owner_id)),
            ("workspaces", workspaces.collect::<Vec<_>>().join(", ")),
        ]
    })
}

#[derive(Debug, Args)]
pub struct Usage {
    /// Of this workspace.
    #[arg(long, value_name = "WORKSPACE", default_value = "", hide_default_value = true)]
    workspace: String,
}

impl Usage {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let limits = connect::client()?.usage(&self.workspace).await?;
        screen.list(&limits, &["WHAT", "NOW", "AT MOST"], |limit| {
            let number = |value: i64| match limit.unit {
                UsageUnit::Bytes => bytes(u64::try_from(value).unwrap_or_default()),
                _ => value.to_string(),
            };
            let name = if limit.label.is_empty() { &limit.key } else { &limit.label };
            vec![name.clone(), number(limit.current), limit.max.map_or_else(|| "unlimited".to_owned(), number)]
        })
    }
}

#[derive(Debug, Args)]
pub struct Login {
    /// The server's address [default: TENKI_API_ENDPOINT, or http://127.0.0.1:7070].
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// The key. Other users of this machine can see it here: without it, it is asked for or read from stdin.
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
}

impl Login {
    /// Tries the key, and writes it down for later calls when the server knows it.
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let file =
            connect::login_file().ok_or_else(|| Failure::usage("HOME is not set", "Set it to your home directory."))?;
        let from_environment = ClientOptions::from_env();
        let endpoint = self.endpoint.or_else(|| from_environment.endpoint.clone());
        let endpoint = endpoint.unwrap_or_else(|| nagaya_client::DEFAULT_ENDPOINT.to_owned());
        let token = match self.api_key {
            Some(key) => key,
            None => ask(&format!("API key for {endpoint}: "))?,
        };
        let token = token.trim().to_owned();
        if token.is_empty() {
            return Err(Failure::new(
                Local::NoCredential,
                "no key was given",
                "`nagaya serve` prints one at its first start.",
            ));
        }
        let options = from_environment.endpoint(Some(endpoint.clone())).token(Some(token.clone()));
        Client::new(options)?.who_am_i().await?;
        let text = serde_saphyr::to_string(&json!({ "endpoint": endpoint, "auth_token": token }));
        let text = text.expect("two strings");
        replace(&file, text.as_bytes()).map_err(|error| Failure::writing(&file, &error))?;
        let done = json!({ "endpoint": endpoint, "file": file });
        screen.done(&done, |_| format!("logged in to {endpoint}; the key is in {}", file.display()))
    }
}

/// Forgets what `login` wrote.
pub fn logout(screen: Screen) -> Result<(), Failure> {
    let file =
        connect::login_file().ok_or_else(|| Failure::usage("HOME is not set", "Set it to your home directory."))?;
    match fs::remove_file(&file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Failure::writing(&file, &error)),
        _ => {}
    }
    screen.done(&json!({ "file": file }), |_| format!("{} is gone", file.display()))
}

/// A line from stdin, which is not shown while it is typed.
fn ask(question: &str) -> Result<String, Failure> {
    let stdin = io::stdin();
    let problem = |error: io::Error| Failure::reading(Path::new("stdin"), &error);
    let hidden = match stdin.is_terminal() {
        true => {
            eprint!("{question}");
            let before = tcgetattr(&stdin).map_err(|errno| problem(errno.into()))?;
            let mut silent = before.clone();
            silent.local_modes.remove(LocalModes::ECHO);
            tcsetattr(&stdin, OptionalActions::Flush, &silent).map_err(|errno| problem(errno.into()))?;
            Some(before)
        }
        false => None,
    };
    let mut line = String::new();
    let read = stdin.lock().read_line(&mut line);
    if let Some(before) = hidden {
        let _ = tcsetattr(&stdin, OptionalActions::Flush, &before);
        eprintln!();
    }
    read.map_err(problem)?;
    Ok(line)
}
