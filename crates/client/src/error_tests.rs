use connectrpc::{ConnectError, ErrorCode};
use nagaya_api::error::{Code, Error as ServerError};

use super::*;

fn mapped(status: ErrorCode, text: &str) -> String {
    let error = Error::of_rpc(ConnectError::new(status, text));
    match error {
        Error::Refused { kind, .. } => format!("{kind:?}"),
        other => format!("{other:?}").split(['(', ' ', '{']).next().unwrap_or_default().to_owned(),
    }
}

#[test]
fn status_and_words_decide_from_top_to_bottom() {
    use ErrorCode::*;
    let table = [
        (Unimplemented, "HTTP error 404: content-type", "DataPlaneNotReady"),
        (Unimplemented, "not implemented", "Other"),
        (Unimplemented, "volume 4041 is odd", "Other"),
        (Unauthenticated, "", "Unauthorized"),
        (PermissionDenied, "", "PermissionDenied"),
        (NotFound, "Template Build not found", "TemplateBuildNotFound"),
        (NotFound, "template session", "TemplateNotFound"),
        (NotFound, "registry image not found", "RegistryImageNotFound"),
        (NotFound, "session x: no such file or directory", "FileNotFound"),
        (NotFound, "session not found", "SessionNotFound"),
        (NotFound, "snapshot not found", "SnapshotNotFound"),
        (NotFound, "volume not found", "VolumeNotFound"),
        (NotFound, "artifact gone", "SessionExpired"),
        (NotFound, "what?", "SessionNotFound"),
        (NotFound, "preview URL not found [preview_not_found]", "NotFound"),
        (NotFound, "execution not found in this session [execution_not_found]", "NotFound"),
        (AlreadyExists, "template already exists", "TemplateExists"),
        (AlreadyExists, "slug already in use", "Other"),
        (DeadlineExceeded, "", "DeadlineExceeded"),
        (ResourceExhausted, "maximum exposed ports reached", "PortLimitExceeded"),
        (ResourceExhausted, "volume limit reached", "VolumeLimitExceeded"),
        (ResourceExhausted, "Rate limit", "RateLimited"),
        (ResourceExhausted, "no capacity left", "CapacityUnavailable"),
        (ResourceExhausted, "else", "QuotaExceeded"),
        (FailedPrecondition, "snapshot not yet durable", "SnapshotNotDurable"),
        (FailedPrecondition, "a build in progress", "TemplateBuildInProgress"),
        (FailedPrecondition, "session is terminated", "SessionTerminated"),
        (FailedPrecondition, "git clone failed (exit_code=128)", "GitFailed"),
        (FailedPrecondition, "volume sync pending", "VolumeSyncPending"),
        (FailedPrecondition, "state SYNC_PENDING", "VolumeSyncPending"),
        (FailedPrecondition, "volume is attached", "VolumeInUse"),
        (FailedPrecondition, "volume is in use", "VolumeInUse"),
        (FailedPrecondition, "inbound access is disabled", "InboundDisabled"),
        (FailedPrecondition, "SSH is off", "SshUnavailable"),
        (FailedPrecondition, "session not RUNNING (state=PAUSED)", "InvalidState"),
        (Unavailable, "no SSH gateway is ready", "SshUnavailable"),
        (Unavailable, "the server is shutting down", "Other"),
        (InvalidArgument, "", "Other"),
        (Internal, "", "Other"),
    ];
    for (status, text, variant) in table {
        assert_eq!(mapped(status, text), variant, "{status:?} {text:?}");
    }
}

/// What our own server says is what its clients understand.
#[test]
fn every_code_of_the_server_survives_the_way() {
    for code in Code::ALL {
        let error = Error::of_rpc(ConnectError::from(ServerError::from(*code)));
        assert_eq!(error.code(), Some(*code), "{error:?}");
    }
    let of = |code: Code| Error::of_rpc(ConnectError::from(ServerError::from(code))).kind();
    for (code, kind) in [
        (Code::SessionNotFound, RefusalKind::SessionNotFound),
        (Code::FileNotFound, RefusalKind::FileNotFound),
        (Code::CommandNotFound, RefusalKind::FileNotFound),
        (Code::WorkspaceNotFound, RefusalKind::NotFound),
        (Code::VolumeBusy, RefusalKind::VolumeInUse),
        (Code::SessionNotRunning, RefusalKind::InvalidState),
        (Code::CapacityUnavailable, RefusalKind::CapacityUnavailable),
        (Code::DiskFull, RefusalKind::QuotaExceeded),
    ] {
        assert_eq!(of(code), Some(kind), "{code:?}");
    }
}

#[test]
fn an_error_survives_the_way_through_io() {
    let there: io::Error = Error::of_rpc(ConnectError::not_found("no such file or directory")).into();
    assert_eq!(there.kind(), io::ErrorKind::NotFound);
    assert!(matches!(Error::in_io(&there), Some(Error::Refused { kind: RefusalKind::FileNotFound, .. })));
    assert!(matches!(Error::from(there), Error::Refused { kind: RefusalKind::FileNotFound, .. }));
    assert!(matches!(Error::from(io::Error::other("disk")), Error::Io(_)));
}

#[test]
fn what_may_help_to_repeat_is_marked() {
    let of = |status, text: &str| Error::of_rpc(ConnectError::new(status, text)).retryable();
    assert!(of(ErrorCode::Unavailable, "the server is shutting down"));
    assert!(of(ErrorCode::ResourceExhausted, "rate limit reached"));
    assert!(of(ErrorCode::FailedPrecondition, "volume sync pending"));
    assert!(!of(ErrorCode::ResourceExhausted, "workspace quota reached"));
    assert!(!of(ErrorCode::NotFound, "session not found"));
    assert!(!of(ErrorCode::Internal, "x"));
}

#[test]
fn what_the_rpc_library_says_is_converted_inside_of_this_crate_only() {
    struct Probe<T>(std::marker::PhantomData<T>);
    trait Otherwise {
        fn converts(&self) -> bool {
            false
        }
    }
    impl<T> Otherwise for Probe<T> {}
    impl<T> Probe<T>
    where
        Error: From<T>,
    {
        fn converts(&self) -> bool {
            true
        }
    }
    assert!(Probe::<io::Error>(std::marker::PhantomData).converts(), "the probe sees conversions");
    assert!(!Probe::<ConnectError>(std::marker::PhantomData).converts());
}
