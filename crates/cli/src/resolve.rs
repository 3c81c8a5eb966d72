//! Which session, volume or snapshot is meant: by id, by an unambiguous beginning of one, or by name.

use clap::Args;
use nagaya_client::{Client, ListOptions, Session};

use crate::connect;
use crate::errors::{Failure, Local};

/// Names the session of every verb that has none on its command line.
pub const DEFAULT_SESSION: &str = "NAGAYA_SESSION";

/// A session, named by `--session`, by the first word, or by `NAGAYA_SESSION`.
#[derive(Debug, Args)]
pub struct OneSession {
    /// Session: an id, the beginning of one, or a name.
    #[arg(value_name = "SESSION", id = "session_word")]
    word: Option<String>,
    /// The same, as an option.
    #[arg(long, value_name = "SESSION", conflicts_with = "session_word")]
    session: Option<String>,
}

impl OneSession {
    pub async fn find(self, among: Among) -> Result<Session, Failure> {
        let (text, _) = split(self.session, self.word.into_iter().collect(), 0)?;
        session(&connect::client()?, &text, among).await
    }
}

/// What a name may stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Among {
    /// Sessions that have not ended.
    Live,
    /// Those first, and ended ones where none of them fits.
    All,
}

/// The session's text and the other words of a verb which takes `others` of them. The first word is the session when
/// no option names one and there are words enough, else it is the default.
pub fn split(option: Option<String>, mut words: Vec<String>, others: usize) -> Result<(String, Vec<String>), Failure> {
    let session = match option {
        Some(session) => session,
        None if words.len() > others => words.remove(0),
        None => default_session()?,
    };
    match words.get(others) {
        Some(surplus) => Err(Failure::usage(format!("unexpected word {surplus:?}"), "`--help` shows what goes where.")),
        None => Ok((session, words)),
    }
}

/// The value of `NAGAYA_SESSION`.
pub fn default_session() -> Result<String, Failure> {
    std::env::var(DEFAULT_SESSION).ok().filter(|text| !text.is_empty()).ok_or_else(|| {
        let remedy = format!("Give --session ID, or set {DEFAULT_SESSION}; `nagaya sandbox list` shows what there is.");
        Failure::new(Local::NoSession, "no session is named", remedy)
    })
}

/// Finds a session. A whole id costs no call: the verb itself finds out whether it exists.
pub async fn session(client: &Client, text: &str, among: Among) -> Result<Session, Failure> {
    if is_id(text) {
        return Ok(client.session(&text.to_lowercase()));
    }
    let mut candidates = client.list(ListOptions::default()).await?;
    let mut chosen = choose(text, &named(&candidates));
    if among == Among::All && matches!(chosen, Err(Choice::None)) {
        candidates = client.list(ListOptions::default().include_terminated(true)).await?;
        chosen = choose(text, &named(&candidates));
    }
    let index = chosen.map_err(|choice| choice.told("session", text, "nagaya sandbox list"))?;
    Ok(candidates.swap_remove(index))
}

fn named(sessions: &[Session]) -> Vec<Named> {
    let name = |session: &Session| session.info().map(|info| info.name).unwrap_or_default();
    sessions.iter().map(|session| Named { id: session.id().to_owned(), name: name(session) }).collect()
}

/// The id of a volume.
pub async fn volume(client: &Client, text: &str) -> Result<String, Failure> {
    if is_id(text) {
        return Ok(text.to_lowercase());
    }
    let volumes = client.list_volumes("").await?;
    let named: Vec<Named> = volumes.into_iter().map(|volume| Named { id: volume.id, name: volume.name }).collect();
    one("volume", text, named, "nagaya sandbox volume list")
}

/// The id of a snapshot.
pub async fn snapshot(client: &Client, text: &str) -> Result<String, Failure> {
    if is_id(text) {
        return Ok(text.to_lowercase());
    }
    let snapshots = client.list_snapshots("").await?;
    let named = snapshots.into_iter().map(|s| Named { id: s.id, name: s.name.unwrap_or_default() }).collect();
    one("snapshot", text, named, "nagaya sandbox snapshot list")
}

/// The id of a named preview URL, whose name is its slug.
pub async fn preview(client: &Client, text: &str) -> Result<String, Failure> {
    if is_id(text) {
        return Ok(text.to_lowercase());
    }
    let previews = client.list_preview_urls(nagaya_client::ListPreviewUrlsOptions::default()).await?;
    let named = previews.into_iter().map(|preview| Named { id: preview.id, name: preview.slug }).collect();
    one("preview URL", text, named, "nagaya sandbox preview list")
}

fn one(kind: &str, text: &str, mut named: Vec<Named>, list: &str) -> Result<String, Failure> {
    let index = choose(text, &named).map_err(|choice| choice.told(kind, text, list))?;
    Ok(named.swap_remove(index).id)
}

/// Whether this is a whole id: 36 characters of hexadecimal digits and hyphens.
fn is_id(text: &str) -> bool {
    let hyphen = |index| matches!(index, 8 | 13 | 18 | 23);
    text.len() == 36
        && text
            .bytes()
            .enumerate()
            .all(|(index, byte)| if hyphen(index) { byte == b'-' } else { byte.is_ascii_hexdigit() })
}

struct Named {
    id: String,
    name: String,
}

#[derive(Debug, PartialEq, Eq)]
enum Choice {
    None,
    /// More than one fits; these are descriptions of them.
    Several(Vec<String>),
}

impl Choice {
    fn told(self, kind: &str, text: &str, list: &str) -> Failure {
        match self {
            Self::None => {
                let what = format!("no {kind} has the name {text:?} or an id that begins so");
                Failure::new(Local::NotFound, what, format!("`{list}` shows what there is."))
            }
            Self::Several(fitting) => {
                let what = format!("{text:?} fits {} {kind}s: {}", fitting.len(), fitting.join(", "));
                Failure::new(Local::Ambiguous, what, "Write more of the id.")
            }
        }
    }
}

/// The index of the one that is meant: a name that is equal goes before an id that begins so.
fn choose(text: &str, candidates: &[Named]) -> Result<usize, Choice> {
    let lower = text.to_lowercase();
    let fitting = |fits: &dyn Fn(&Named) -> bool| -> Vec<usize> {
        candidates.iter().enumerate().filter(|(_, candidate)| fits(candidate)).map(|(index, _)| index).collect()
    };
    if text.is_empty() {
        return Err(Choice::None);
    }
    let mut found = fitting(&|candidate| candidate.name == text);
    if found.is_empty() {
        found = fitting(&|candidate| candidate.id.starts_with(&lower));
    }
    match found[..] {
        [] => Err(Choice::None),
        [only] => Ok(only),
        _ => Err(Choice::Several(found.iter().map(|index| describe(&candidates[*index])).collect())),
    }
}

fn describe(candidate: &Named) -> String {
    match candidate.name.is_empty() {
        true => candidate.id.clone(),
        false => format!("{} ({})", candidate.id, candidate.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Vec<Named> {
        [("0190aa-1", "web"), ("0190aa-2", "web"), ("0190ab-3", "0190"), ("02", "")]
            .map(|(id, name)| Named { id: id.to_owned(), name: name.to_owned() })
            .into()
    }

    #[test]
    fn a_name_goes_before_a_beginning() {
        assert_eq!(choose("0190", &some()), Ok(2));
    }

    #[test]
    fn a_beginning_must_be_unambiguous() {
        assert_eq!(choose("0190AB", &some()), Ok(2));
        assert_eq!(choose("02", &some()), Ok(3));
        let Err(Choice::Several(fitting)) = choose("0190aa", &some()) else { panic!("two fit") };
        assert_eq!(fitting, ["0190aa-1 (web)", "0190aa-2 (web)"]);
        assert!(matches!(choose("web", &some()), Err(Choice::Several(_))));
        assert_eq!(choose("x", &some()), Err(Choice::None));
        assert_eq!(choose("", &some()), Err(Choice::None), "having no name is not a name");
    }

    #[test]
    fn ids_are_whole_or_they_are_looked_up() {
        assert!(is_id("0190c3a4-7e1b-7c3d-8f00-0123456789ab"));
        for text in ["0190c3a4", "0190c3a4-7e1b-7c3d-8f00-0123456789ag", "0190c3a4-7e1b-7c3d-8f00-0123456789abc", ""] {
            assert!(!is_id(text), "{text}");
        }
    }

    #[test]
    fn words_after_the_session_are_the_verbs() {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let done = |option: Option<&str>, given: &[&str], others| {
            split(option.map(str::to_owned), words(given), others).map_err(|failure| failure.exit_code())
        };
        assert_eq!(done(Some("s"), &["8080"], 1), Ok(("s".into(), words(&["8080"]))));
        assert_eq!(done(None, &["s", "8080"], 1), Ok(("s".into(), words(&["8080"]))));
        assert_eq!(done(None, &["s"], 0), Ok(("s".into(), words(&[]))));
        assert_eq!(done(Some("s"), &["t"], 0), Err(64));
        assert_eq!(done(None, &["s", "1", "2"], 1), Err(64));
    }
}
