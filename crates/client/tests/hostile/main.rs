//! The client against servers that fail, stall and lie.

#![allow(clippy::unwrap_used)]

mod fake;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use fake::{ID, Script, babble, client, serve};
use nagaya_api::tenki::v1;
use nagaya_client::{CreateOptions, Error, ListOptions, RefusalKind};
use v1::run_response::Payload;

const CREATING: v1::SessionState = v1::SessionState::Creating;
const RUNNING: v1::SessionState = v1::SessionState::Running;
const TERMINATED: v1::SessionState = v1::SessionState::Terminated;

fn started() -> Payload {
    v1::RunStarted { pid: 7, ..Default::default() }.into()
}

#[tokio::test]
async fn a_refused_certificate_is_replaced_once() {
    let served = serve(Script { certificates_refused: 1, ..Default::default() }).await;
    let session = served.session();
    let stat = session.files().stat("x").await.unwrap();
    assert_eq!((stat.size, stat.modified), (0, UNIX_EPOCH), "what cannot be is nothing");
    assert_eq!((*served.minted.borrow(), served.calls.load(Ordering::Relaxed)), (2, 2));
    session.files().stat("x").await.unwrap();
    assert_eq!(*served.minted.borrow(), 2, "the new one is kept");

    let served = serve(Script { certificates_refused: u32::MAX, ..Default::default() }).await;
    let refused = served.session().files().stat("x").await.unwrap_err();
    assert!(matches!(refused, Error::Refused { kind: RefusalKind::Unauthorized, .. }), "{refused:?}");
    assert_eq!((*served.minted.borrow(), served.calls.load(Ordering::Relaxed)), (2, 2), "and then it gives up");
    let refused = served.session().command(["true"]).output().await.unwrap_err();
    assert!(matches!(refused, Error::Refused { kind: RefusalKind::Unauthorized, .. }), "{refused:?}");
}

#[tokio::test]
async fn certificates_are_renewed_as_long_as_there_is_a_handle() {
    let mut served = serve(Script { certificate_life: Duration::from_secs(2), ..Default::default() }).await;
    let session = served.session();
    let clone = session.clone();
    session.files().stat("x").await.unwrap();
    drop(session);
    let renewed = served.minted.wait_for(|minted| *minted >= 3);
    tokio::time::timeout(Duration::from_secs(20), renewed).await.expect("it is renewed unasked").unwrap();
    drop(clone);
    served.minted.borrow_and_update();
    let further = tokio::time::timeout(Duration::from_millis(2_500), served.minted.changed()).await;
    assert!(further.is_err(), "nobody needs a certificate any more");
}

#[tokio::test]
async fn a_route_that_comes_late_is_waited_for() {
    let served = serve(Script { lost_calls: AtomicU32::new(2), ..Default::default() }).await;
    served.session().files().stat("x").await.unwrap();
    assert_eq!(served.calls.load(Ordering::Relaxed), 1);
    let run = vec![started(), v1::RunExit::default().into()];
    let served = serve(Script { lost_calls: AtomicU32::new(2), run, ..Default::default() }).await;
    assert!(served.session().command(["true"]).output().await.unwrap().is_success());

    let served = serve(Script { lost_calls: AtomicU32::new(u32::MAX), ..Default::default() }).await;
    let never = served.session().files().stat("x").await.unwrap_err();
    assert!(
        matches!(&never, Error::Refused { kind: RefusalKind::DataPlaneNotReady, .. }) && never.retryable(),
        "{never:?}"
    );
}

#[tokio::test]
async fn lists_without_an_end_are_given_up() {
    let served = serve(Script { next_page: |_| "again", ..Default::default() }).await;
    let stalled = served.client.list(ListOptions::default()).await.unwrap_err();
    assert!(matches!(&stalled, Error::PaginationStalled { token } if token == "again"), "{stalled:?}");
    let served = serve(Script { next_page: |page| if page.is_empty() { "2" } else { "" }, ..Default::default() }).await;
    assert_eq!(served.client.list(ListOptions::default()).await.unwrap().len(), 2);
}

#[tokio::test]
async fn without_being_told_it_asks() {
    let served = serve(Script { states: vec![CREATING, CREATING, RUNNING], ..Default::default() }).await;
    let session = served.client.create(CreateOptions::default()).await.unwrap();
    assert_eq!(session.info().unwrap().state, nagaya_client::SessionState::Running);

    let served = serve(Script { states: vec![CREATING, TERMINATED], ..Default::default() }).await;
    let ended = served.client.create(CreateOptions::default()).await.unwrap_err();
    assert!(
        matches!(ended, Error::Refused { kind: RefusalKind::SessionTerminated, .. })
            && ended.message().contains("the disk was lost"),
        "{ended:?}"
    );

    let served = serve(Script { states: vec![CREATING], ..Default::default() }).await;
    let options = CreateOptions::default().wait_timeout(Some(Duration::from_millis(300)));
    match served.client.create(options).await.unwrap_err() {
        Error::WaitReadyFailed { session_id, cause } => {
            assert_eq!(session_id, ID);
            assert!(matches!(*cause, Error::TimedOut { .. }), "{cause:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_server_that_stops_telling_is_an_error() {
    let script = |told| Script { states: vec![CREATING], told: Some(told), ..Default::default() };
    let served = serve(script(vec![CREATING, RUNNING])).await;
    served.client.create(CreateOptions::default()).await.unwrap();
    let served = serve(script(vec![CREATING])).await;
    let failed = served.client.create(CreateOptions::default()).await.unwrap_err();
    assert!(
        matches!(&failed, Error::WaitReadyFailed { cause, .. } if matches!(**cause, Error::StreamClosed(_))),
        "{failed:?}"
    );
    let served = serve(script(vec![TERMINATED])).await;
    let ended = served.client.create(CreateOptions::default()).await.unwrap_err();
    assert!(matches!(ended, Error::Refused { kind: RefusalKind::SessionTerminated, .. }), "{ended:?}");
}

#[tokio::test]
async fn commands_end_in_order_or_not_at_all() {
    let run = async |run: Vec<Payload>| {
        let served = serve(Script { run, ..Default::default() }).await;
        served.session().command(["true"]).output().await
    };
    let out = || Payload::Stdout(Bytes::from_static(b"x"));
    let exit = |reason: &str| Payload::from(v1::RunExit { reason: reason.into(), errno: 2, ..Default::default() });
    assert_eq!(run(vec![started(), out(), exit("exit")]).await.unwrap().stdout_text(), "x");
    assert!(matches!(run(vec![started(), out()]).await, Err(Error::StreamClosed(_))));
    assert!(matches!(run(vec![]).await, Err(Error::StreamClosed(_))));
    assert!(matches!(run(vec![out(), exit("exit")]).await, Err(Error::BadAnswer(_))));
    assert!(matches!(run(vec![exit("ENOENT")]).await, Err(Error::StartFailed { errno: 2, .. })));
    assert!(matches!(run(vec![exit("capability_unavailable")]).await, Err(Error::CapabilityUnavailable(_))));
    let ended = run(vec![started(), exit("session_terminated:idle")]).await;
    assert!(matches!(ended, Err(Error::Refused { kind: RefusalKind::SessionTerminated, .. })), "{ended:?}");
}

#[tokio::test]
async fn answers_about_something_else_are_not_believed() {
    let served = serve(Script { answers_about: "another".into(), ..Default::default() }).await;
    assert!(matches!(served.session().refresh().await, Err(Error::BadAnswer(_))));
    let served = serve(Script { answers_about: String::new(), ..Default::default() }).await;
    assert!(matches!(served.client.create(CreateOptions::default()).await, Err(Error::BadAnswer(_))));
    for endpoint in ["nonsense", "ftp://a", "http://user@a"] {
        let served = serve(Script { endpoint: endpoint.into(), ..Default::default() }).await;
        let refused = served.session().files().stat("x").await.unwrap_err();
        assert!(matches!(refused, Error::BadAnswer(_)), "{endpoint}: {refused:?}");
    }
}

#[tokio::test]
async fn what_is_no_server_is_unreachable() {
    for said in [&b""[..], b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno", &[0xff; 64]] {
        let asked = client(&babble(said).await);
        let asked = tokio::time::timeout(Duration::from_secs(20), asked.who_am_i()).await.expect("it is given up");
        assert!(matches!(asked, Err(Error::Unreachable { .. })), "{said:?}: {asked:?}");
    }
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    match client(&format!("http://{address}")).who_am_i().await.unwrap_err() {
        Error::Unreachable { message, unsent } => {
            assert!(unsent && message.contains(&address) && message.contains("refused"), "{message}");
        }
        other => panic!("{other:?}"),
    }
}
