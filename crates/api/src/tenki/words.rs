//! What clients of this family read out of the texts of errors.
//!
//! They have a class of errors for what they find in a text, whatever the status says. So a detail, which may come from a name
//! or a path that a user chose, must not hold what they search for.

use crate::error::{Code, Error, Status, bounded};

/// By these words clients know a failure of git.
const GIT_WORDS: &str = "failed (exit_code=";
/// The same of one of which nothing more is told.
const GIT_FAILED: &str = "git operation failed (exit_code=unknown)";

/// What clients are told: text, detail and `[code]`. A detail with a word that would make a
/// client report another error is left out. A text that is too long for an answer is cut.
pub fn wire_text(error: &Error) -> String {
    let whole = whole_text(error);
    bounded(&whole).unwrap_or(whole)
}

/// Whether clients are told only the beginning of it.
pub fn is_cut(error: &Error) -> bool {
    bounded(&whole_text(error)).is_some()
}

fn whole_text(error: &Error) -> String {
    let text = text_of_code(error.code);
    // Judged together with the text, because a word may begin in one and end in the other.
    let with_detail = text_of(error);
    let misleads = |word: &&str| !contains(text, word) && contains(&with_detail, word);
    let told = match misleading_words(error.code).iter().any(misleads) {
        true => text,
        false => &with_detail,
    };
    format!("{told} [{}]", error.code.name())
}

const fn text_of_code(code: Code) -> &'static str {
    match code {
        Code::GitFailed => GIT_FAILED,
        other => other.text(),
    }
}

/// Clients read the exit status and what git said out of a text of one shape, which the detail has already.
fn text_of(error: &Error) -> String {
    let (text, detail) = (text_of_code(error.code), &error.detail);
    match error.code == Code::GitFailed && detail.starts_with("git ") && detail.contains(GIT_WORDS) {
        true => detail.clone(),
        false if detail.is_empty() => text.to_owned(),
        false => format!("{text}: {detail}"),
    }
}

fn contains(text: &str, lower_case_word: &str) -> bool {
    text.to_lowercase().contains(lower_case_word)
}

/// Words that clients search for, in any case, in the text of an answer with this status.
/// Which error they report depends on the first one found.
const fn searched_words(status: Status) -> &'static [&'static str] {
    match status {
        Status::NotFound => &[
            "template build",
            "template",
            "registry image",
            "no such file or directory",
            "session",
            "snapshot",
            "volume",
            "artifact",
        ],
        Status::AlreadyExists => &["template"],
        Status::ResourceExhausted => &["maximum exposed ports", "volume", "rate limit", "capacity"],
        Status::FailedPrecondition => &[
            "snapshot not yet durable",
            "build in progress",
            "build already in progress",
            "terminated",
            GIT_WORDS,
            "sync_pending",
            "sync pending",
            "volume is attached",
            "volume is in use",
            "inbound access is disabled",
            "ssh",
        ],
        Status::Unavailable => &["ssh"],
        Status::Unimplemented => &["404"],
        _ => &[],
    }
}

/// Words in a text that may lead clients away from this code.
fn misleading_words(code: Code) -> &'static [&'static str] {
    let searched = searched_words(code.status());
    match code {
        // What is searched after git's own words is found too late, so that what git says of SSH can be told.
        Code::GitFailed => {
            let own = searched.iter().position(|word| *word == GIT_WORDS);
            &searched[..own.unwrap_or(searched.len())]
        }
        _ => searched,
    }
}

#[cfg(test)]
#[path = "words_tests.rs"]
mod tests;
