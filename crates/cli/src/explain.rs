//! `explain` and `logs`: what happened to a session, and what to do about it.

use clap::Args;
use nagaya_client::{Finding, SessionEvent};

use crate::errors::Failure;
use crate::output::{Format, Screen, moment, print, printable};
use crate::resolve::{Among, OneSession};

#[derive(Debug, Args)]
pub struct Explain {
    #[command(flatten)]
    session: OneSession,
}

impl Explain {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let session = self.session.find(Among::All).await?;
        let findings = session.explain().await?;
        match screen.format {
            Format::Table => print(&findings.iter().map(paragraph).collect::<Vec<_>>().join("\n")),
            _ => screen.list(&findings, &[], |_| Vec::new()),
        }
    }
}

/// What, why and what to do, with the code that documents and programs know it by.
fn paragraph(finding: &Finding) -> String {
    let at = match finding.at {
        Some(_) => format!("  {}", moment(finding.at)),
        None => String::new(),
    };
    let mut text = format!("{} [{}]{at}\n", printable(&finding.title), printable(&finding.code));
    if !finding.detail.is_empty() {
        text.push_str(&format!("  {}\n", printable(&finding.detail)));
    }
    if !finding.remedy.is_empty() {
        text.push_str(&format!("  What to do: {}\n", printable(&finding.remedy)));
    }
    text
}

#[derive(Debug, Args)]
pub struct Logs {
    #[command(flatten)]
    session: OneSession,
    /// Go on with what happens from now, until the session ends.
    #[arg(long, short)]
    follow: bool,
}

impl Logs {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let session = self.session.find(Among::All).await?;
        if !self.follow {
            let events = session.events(0).await?;
            return match screen.format {
                Format::Table => events.iter().try_for_each(|event| screen.line(event, line)),
                _ => screen.list(&events, &[], |_| Vec::new()),
            };
        }
        let mut events = session.watch_events(0).await?;
        while let Some(event) = events.next().await? {
            screen.line(&event, line)?;
        }
        Ok(())
    }
}

fn line(event: &SessionEvent) -> String {
    let mut text = format!("{}  {:<18}  {}", moment(event.at), event.kind, event.summary);
    if let Some(id) = &event.execution_id {
        text.push_str(&format!("  (execution {id})"));
    }
    text
}
