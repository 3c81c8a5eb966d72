use std::collections::BTreeSet;

use super::*;
use crate::error::CUT_MARK;

/// The error that the Go client reports for an answer; the order of its searches matters.
fn go(status: Status, text: &str) -> &'static str {
    first_match(status, text, GO_NOT_FOUND, "SessionNotFound", "RawError")
}

/// The same for the TypeScript client, which looks for a missing file later.
fn typescript(status: Status, text: &str) -> &'static str {
    first_match(status, text, TYPESCRIPT_NOT_FOUND, "SessionNotFound", "SandboxError")
}

type Searches = &'static [(&'static str, &'static str)];

const GO_NOT_FOUND: Searches = &[
    ("template build", "TemplateBuildNotFound"),
    ("template", "TemplateNotFound"),
    ("registry image", "RegistryImageNotFound"),
    ("no such file or directory", "FileNotFound"),
    ("session", "SessionNotFound"),
    ("snapshot", "SnapshotNotFound"),
    ("volume", "VolumeNotFound"),
    ("artifact", "SessionExpired"),
];
const TYPESCRIPT_NOT_FOUND: Searches = &[
    ("template build", "TemplateBuildNotFound"),
    ("template", "TemplateNotFound"),
    ("registry image", "RegistryImageNotFound"),
    ("snapshot", "SnapshotNotFound"),
    ("volume", "VolumeNotFound"),
    ("artifact", "SessionExpired"),
    ("no such file or directory", "FileNotFound"),
];
const RESOURCE_EXHAUSTED: Searches = &[
    ("maximum exposed ports", "PortLimitExceeded"),
    ("volume", "VolumeLimitExceeded"),
    ("rate limit", "RateLimited"),
    ("capacity", "CapacityUnavailable"),
];
const FAILED_PRECONDITION: Searches = &[
    ("snapshot not yet durable", "SnapshotNotDurable"),
    ("template build already in progress", "TemplateBuildInProgress"),
    ("build in progress", "TemplateBuildInProgress"),
    ("terminated", "SessionTerminated"),
    ("failed (exit_code=", "GitOperationFailed"),
    ("sync_pending", "VolumeSyncPending"),
    ("sync pending", "VolumeSyncPending"),
    ("volume is attached", "VolumeInUse"),
    ("volume is in use", "VolumeInUse"),
    ("inbound access is disabled", "InboundDisabled"),
    ("ssh", "SSHUnavailable"),
];

fn first_match(
    status: Status,
    text: &str,
    not_found: Searches,
    not_found_else: &'static str,
    raw: &'static str,
) -> &'static str {
    let (searches, otherwise): (Searches, _) = match status {
        Status::Unauthenticated => (&[], "Unauthorized"),
        Status::PermissionDenied => (&[], "PermissionDenied"),
        Status::DeadlineExceeded => (&[], "CommandTimeout"),
        Status::NotFound => (not_found, not_found_else),
        Status::AlreadyExists => (&[("template", "TemplateExists")], raw),
        Status::ResourceExhausted => (RESOURCE_EXHAUSTED, "QuotaExceeded"),
        Status::FailedPrecondition => (FAILED_PRECONDITION, "InvalidState"),
        Status::Unavailable => (&[("ssh", "SSHUnavailable")], raw),
        Status::Unimplemented => (&[("404", "DataPlaneNotReady")], raw),
        Status::InvalidArgument | Status::Aborted | Status::Internal => (&[], raw),
    };
    let text = text.to_lowercase();
    searches.iter().find(|(word, _)| text.contains(word)).map_or(otherwise, |(_, class)| class)
}

/// What a user of a client should see for each code; `None` where clients have no class of their own.
fn intended(code: Code) -> Option<&'static str> {
    Some(match code {
        Code::Unauthenticated | Code::InvalidCertificate | Code::PreviewPrivate => "Unauthorized",
        Code::PermissionDenied => "PermissionDenied",
        // Clients have no class for these; they name the session instead.
        Code::SessionNotFound | Code::WorkspaceNotFound | Code::ExecutionNotFound | Code::PreviewNotFound => {
            "SessionNotFound"
        }
        Code::FileNotFound | Code::CommandNotFound => "FileNotFound",
        Code::TemplateNotFound => "TemplateNotFound",
        Code::TemplateBuildNotFound => "TemplateBuildNotFound",
        Code::RegistryImageNotFound => "RegistryImageNotFound",
        Code::SnapshotNotFound => "SnapshotNotFound",
        Code::VolumeNotFound => "VolumeNotFound",
        Code::ArtifactExpired => "SessionExpired",
        Code::SessionTerminated => "SessionTerminated",
        Code::SessionNotRunning
        | Code::RecordsMissing
        | Code::SnapshotInUse
        | Code::SnapshotNotReady
        | Code::SnapshotDamaged
        | Code::VolumeRefused
        | Code::PreviewUnbound
        | Code::PreviewPaused
        | Code::PauseFailed
        | Code::ResumeFailed
        | Code::RootUnavailable
        | Code::ImageRefused
        | Code::RootMismatch
        | Code::IsADirectory
        | Code::NotADirectory
        | Code::NotARegularFile
        | Code::DirectoryNotEmpty
        | Code::BindFailed
        | Code::FileSystem => "InvalidState",
        Code::GitFailed => "GitOperationFailed",
        Code::InboundDisabled => "InboundDisabled",
        Code::SshUnavailable | Code::SshGatewayUnavailable => "SSHUnavailable",
        Code::SnapshotNotDurable => "SnapshotNotDurable",
        Code::TemplateBuildInProgress => "TemplateBuildInProgress",
        Code::VolumeInUse | Code::VolumeBusy => "VolumeInUse",
        Code::VolumeSyncPending => "VolumeSyncPending",
        Code::TemplateExists => "TemplateExists",
        Code::DiskFull | Code::QuotaExceeded | Code::MessageTooLarge => "QuotaExceeded",
        Code::CapacityUnavailable => "CapacityUnavailable",
        Code::PortLimit => "PortLimitExceeded",
        Code::VolumeLimit => "VolumeLimitExceeded",
        Code::RateLimited => "RateLimited",
        Code::CommandTimedOut | Code::DeadlineExceeded => "CommandTimeout",
        Code::InvalidArgument
        | Code::InvalidId
        | Code::InvalidResources
        | Code::InvalidCommand
        | Code::InvalidPath
        | Code::PathRefused
        | Code::StreamProtocol
        | Code::FileExists
        | Code::SlugTaken
        | Code::SessionNameTaken
        | Code::PreviewFailed
        | Code::Draining
        | Code::ServiceNotListening
        | Code::ServiceBroken
        | Code::ServiceTimedOut
        | Code::HostRefused
        | Code::GuestUnreachable
        | Code::ConnectionRefused
        | Code::TransportUnfit
        | Code::CapabilityUnavailable
        | Code::Unimplemented
        | Code::ImageInvalid
        | Code::ImageUnavailable
        | Code::SnapshotFailed
        | Code::VolumeFailed
        | Code::StoreDamaged
        | Code::Internal => return None,
    })
}

#[track_caller]
fn assert_reported_as_intended(error: &Error) {
    let (status, text) = (error.code.status(), wire_text(error));
    assert_eq!(go(status, &text), intended(error.code).unwrap_or("RawError"), "Go client, {text:?}");
    assert_eq!(
        typescript(status, &text),
        intended(error.code).unwrap_or("SandboxError"),
        "TypeScript client, {text:?}"
    );
}

#[test]
fn every_code_is_reported_as_intended_by_both_clients() {
    for code in Code::ALL {
        assert_reported_as_intended(&Error::from(*code));
    }
}

#[test]
fn every_error_that_clients_match_by_text_can_be_caused() {
    let reachable: BTreeSet<_> = Code::ALL.iter().filter_map(|code| intended(*code)).collect();
    for (_, class) in [GO_NOT_FOUND, TYPESCRIPT_NOT_FOUND, RESOURCE_EXHAUSTED, FAILED_PRECONDITION].concat() {
        assert!(reachable.contains(class), "{class}");
    }
}

/// Everything that any client searches for in any text.
fn all_words() -> impl Iterator<Item = &'static str> {
    [GO_NOT_FOUND, TYPESCRIPT_NOT_FOUND, RESOURCE_EXHAUSTED, FAILED_PRECONDITION]
        .into_iter()
        .flatten()
        .map(|(word, _)| *word)
        .chain(["404", "HTTP status 404"])
}

#[test]
fn no_detail_changes_what_clients_report() {
    for code in Code::ALL {
        for word in all_words() {
            for detail in [
                word.to_string(),
                word.to_uppercase(),
                format!("/home/tenki/{word}s/a"),
                format!("state=PAUSED, {word}-box"),
            ] {
                assert_reported_as_intended(&Error::new(*code, detail));
            }
        }
    }
}

#[test]
fn a_word_that_begins_in_the_text_and_ends_in_the_detail_is_noticed() {
    for code in Code::ALL {
        for word in all_words() {
            for (split, _) in word.char_indices() {
                assert_reported_as_intended(&Error::new(*code, &word[split..]));
            }
        }
    }
}

#[test]
fn known_traps_are_avoided() {
    let path = Error::new(Code::FileNotFound, "/home/tenki/templates/a");
    assert_eq!(wire_text(&path), "no such file or directory [file_not_found]");
    let name = Error::new(Code::SessionNotRunning, "session ssh-box");
    assert_eq!(wire_text(&name), "session not RUNNING [session_not_running]");
    let number = Error::new(Code::Unimplemented, "port 404");
    assert_eq!(wire_text(&number), "not implemented by this server yet [unimplemented]");
}

#[test]
fn harmless_details_reach_the_client() {
    let paused = Error::new(Code::SessionNotRunning, "state=PAUSED");
    assert_eq!(wire_text(&paused), "session not RUNNING: state=PAUSED [session_not_running]");
    // A word may be repeated where the text has it already, and where it is not searched for.
    let limit = Error::new(Code::CapacityUnavailable, "sessions_max, the capacity, is 4");
    assert!(wire_text(&limit).contains("sessions_max, the capacity, is 4"));
}

#[test]
fn what_git_said_is_told_in_the_shape_that_clients_read() {
    let shape = "git clone failed (exit_code=128); check the repository, ref and access token:";
    let told = |stderr: &str| wire_text(&Error::new(Code::GitFailed, format!("{shape} {stderr}")));
    let refused = "ssh: connect to host: the volume is in use";
    assert_eq!(told(refused), format!("{shape} {refused} [git_failed]"));
    // Clients would take it for the end of the session.
    assert_eq!(told("Terminated"), "git operation failed (exit_code=unknown) [git_failed]");
    for stderr in [refused, "Terminated", "build in progress", "fatal: repository not found"] {
        assert_reported_as_intended(&Error::new(Code::GitFailed, format!("{shape} {stderr}")));
    }
}

/// What gRPC's header fields hold of a text, in the header and the trailers together.
fn carried(text: &str) -> usize {
    let percent: String = text
        .bytes()
        .map(|byte| match byte {
            b' '..=b'~' if byte != b'%' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect();
    2 * ("grpc-message: ".len() + percent.len()) + "grpc-status-details-bin: ".len() + (text.len() + 8).div_ceil(3) * 4
}

#[test]
fn no_text_is_longer_than_an_answer_may_be() {
    let git = "git diff failed (exit_code=129); check the repository, ref and access token: ";
    for unit in ["a", "%", "é", "長", "🦀", "\n", "a long text of words\r\n", "\u{7f}x"] {
        for count in [1, 100, 800, 1_000, 2_100, 2_200, 17_000, 100_000] {
            for code in [Code::GitFailed, Code::InvalidArgument] {
                let detail = unit.repeat(count / unit.len() + 1);
                let error = Error::new(code, if code == Code::GitFailed { format!("{git}{detail}") } else { detail });
                let told = wire_text(&error);
                assert!(carried(&told) < 7 * 1024, "{unit:?} × {count}: {}", carried(&told));
                assert_eq!(Code::in_wire_text(&told), Some(code), "the code stays: {told}");
                assert_eq!(is_cut(&error), told.contains(CUT_MARK), "what is cut is marked: {told}");
                let whole = whole_text(&error);
                assert_eq!(is_cut(&error), told != whole, "{unit:?} × {count}");
                let kept = told.split(CUT_MARK).next().unwrap();
                assert!(whole.starts_with(kept), "cut at a character");
                // As much as fits is told.
                assert!(!is_cut(&error) || carried(&told) > 6 * 1024, "{unit:?} × {count}: {}", carried(&told));
            }
        }
    }
    assert_eq!(bounded("short"), None);
}
