//! Files through the data plane.

use bytes::Bytes;
use connectrpc::{CodecFormat, ErrorCode, Protocol, stream_iter};
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::write_file_stream_request::Payload;

use crate::support::*;

fn read(id: &str, path: &str) -> wire::SandboxSessionDataPlaneServiceReadFileRequest {
    let request = wire::ReadFileRequest { session_id: id.into(), path: path.into() };
    wire::SandboxSessionDataPlaneServiceReadFileRequest { request: request.into() }
}

fn write(id: &str, path: &str, content: impl Into<Bytes>) -> wire::SandboxSessionDataPlaneServiceWriteFileRequest {
    let request = wire::WriteFileRequest { session_id: id.into(), path: path.into(), content: content.into() };
    wire::SandboxSessionDataPlaneServiceWriteFileRequest { request: request.into() }
}

fn stat(id: &str, path: &str) -> wire::SandboxSessionDataPlaneServiceStatRequest {
    let request = wire::StatRequest { session_id: id.into(), path: path.into() };
    wire::SandboxSessionDataPlaneServiceStatRequest { request: request.into() }
}

fn mkdir(id: &str, path: &str, recursive: bool) -> wire::SandboxSessionDataPlaneServiceMkdirRequest {
    let request = wire::MkdirRequest { session_id: id.into(), path: path.into(), recursive, ..Default::default() };
    wire::SandboxSessionDataPlaneServiceMkdirRequest { request: request.into() }
}

fn remove(id: &str, path: &str, recursive: bool) -> wire::SandboxSessionDataPlaneServiceRemoveRequest {
    let request = wire::RemoveRequest { session_id: id.into(), path: path.into(), recursive };
    wire::SandboxSessionDataPlaneServiceRemoveRequest { request: request.into() }
}

fn list(id: &str, path: &str, include_hidden: bool) -> wire::SandboxSessionDataPlaneServiceListRequest {
    let request = wire::ListRequest { session_id: id.into(), path: path.into(), include_hidden };
    wire::SandboxSessionDataPlaneServiceListRequest { request: request.into() }
}

fn read_stream(id: &str, path: &str) -> wire::ReadFileStreamRequest {
    wire::ReadFileStreamRequest { session_id: id.into(), path: path.into(), ..Default::default() }
}

fn start(id: &str, path: &str) -> Payload {
    Payload::from(wire::WriteFileStreamStart {
        session_id: id.into(),
        path: path.into(),
        truncate: true,
        ..Default::default()
    })
}

fn frame(payload: Payload) -> wire::SandboxSessionDataPlaneServiceWriteFileStreamRequest {
    let frame = wire::WriteFileStreamRequest { payload: Some(payload) };
    wire::SandboxSessionDataPlaneServiceWriteFileStreamRequest { frame: frame.into() }
}

async fn write_stream(
    client: &DataClient,
    frames: Vec<Payload>,
) -> Result<wire::WriteFileStreamResponse, connectrpc::ConnectError> {
    let frames: Vec<_> = frames.into_iter().map(frame).collect();
    client.write_file_stream(stream_iter(frames)).await.map(|answer| (*answer.response).clone())
}

/// All messages of a ReadFileStream.
async fn read_all(
    client: &DataClient,
    request: wire::ReadFileStreamRequest,
) -> Result<Vec<wire::ReadFileStreamResponse>, connectrpc::ConnectError> {
    let request = wire::SandboxSessionDataPlaneServiceReadFileStreamRequest { request: request.into() };
    let mut stream = client.read_file_stream(request).await?;
    let mut messages = Vec::new();
    while let Some(message) = stream.message().await? {
        messages.push((*message.response).clone());
    }
    Ok(messages)
}

fn joined(messages: &[wire::ReadFileStreamResponse]) -> Vec<u8> {
    messages.iter().flat_map(|message| message.data.to_vec()).collect()
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|n| (n * 7 % 251) as u8).collect()
}

#[tokio::test]
async fn what_is_written_is_read_and_seen() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    for bytes in [0, 1, 65_536, 1_000_000] {
        let content = pattern(bytes);
        let answer = client.write_file(write(&id, "file", content.clone())).await.unwrap();
        assert_eq!(answer.response.size_bytes, bytes as i64);
        assert_eq!(client.read_file(read(&id, "/home/tenki/file")).await.unwrap().response.content, content);
        let stat = client.stat(stat(&id, "file")).await.unwrap();
        assert_eq!((stat.response.exists, stat.response.is_dir, stat.response.size), (true, false, bytes as i64));
    }
}

#[tokio::test]
async fn a_missing_path_is_an_answer_of_stat_and_an_error_of_the_others() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    assert!(!client.stat(stat(&id, "nothing")).await.unwrap().response.exists);
    assert!(!client.remove(remove(&id, "nothing", true)).await.unwrap().response.removed);
    let error = client.read_file(read(&id, "templates/session/nothing")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
    let text = error.message.unwrap();
    assert!(text.contains("no such file or directory"), "{text}");
    assert!(!text.contains("templates"), "clients would take it for a missing template: {text}");
    assert_eq!(code(read_all(&client, read_stream(&id, "nothing")).await), ErrorCode::NotFound);
    assert_eq!(code(client.list(list(&id, "nothing", false)).await), ErrorCode::NotFound);
}

#[tokio::test]
async fn directories_are_made_listed_and_removed() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    assert_eq!(code(client.mkdir(mkdir(&id, "a/b", false)).await), ErrorCode::NotFound);
    assert!(client.mkdir(mkdir(&id, "a/b", true)).await.is_ok());
    assert!(client.mkdir(mkdir(&id, "a/b", true)).await.is_ok());
    client.write_file(write(&id, "a/file", "12345")).await.unwrap();
    client.write_file(write(&id, "a/.hidden", "")).await.unwrap();
    let names = |answer: wire::SandboxSessionDataPlaneServiceListResponse| {
        answer.response.entries.iter().map(|entry| (entry.name.clone(), entry.is_dir, entry.size)).collect::<Vec<_>>()
    };
    let shown = names(client.list(list(&id, "a", false)).await.unwrap());
    assert_eq!(shown.len(), 2);
    assert_eq!((shown[0].0.as_str(), shown[0].1), ("b", true));
    assert_eq!(shown[1], ("file".to_owned(), false, 5));
    assert_eq!(names(client.list(list(&id, "a", true)).await.unwrap()).len(), 3);
    assert_eq!(code(client.read_file(read(&id, "a")).await), ErrorCode::FailedPrecondition);
    assert_eq!(code(client.remove(remove(&id, "a", false)).await), ErrorCode::FailedPrecondition);
    let removed = client.remove(remove(&id, "a", true)).await.unwrap().response;
    assert!(removed.removed && removed.entries_removed == 4, "{removed:?}");
}

#[tokio::test]
async fn streams_carry_large_files_in_order() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let content = Bytes::from(pattern(5_000_000));
    let mut frames = vec![start(&id, "big")];
    let mut rest = content.clone();
    while !rest.is_empty() {
        frames.push(Payload::Data(rest.split_to(rest.len().min(300_000))));
    }
    let written = write_stream(&client, frames).await.unwrap();
    assert_eq!((written.bytes_written, written.path.as_str()), (5_000_000, "big"));

    let messages = read_all(&client, read_stream(&id, "big")).await.unwrap();
    assert_eq!(joined(&messages), content);
    assert!(messages.iter().all(|message| message.total_size == 5_000_000));
    assert!(messages.last().unwrap().eof && messages.iter().filter(|message| message.eof).count() == 1);

    let part =
        wire::ReadFileStreamRequest { offset: 1_000, length: 70_000, chunk_bytes: 4_096, ..read_stream(&id, "big") };
    let messages = read_all(&client, part).await.unwrap();
    assert_eq!(joined(&messages), content[1_000..71_000]);
    assert!(messages.iter().all(|message| message.data.len() <= 4_096));
}

#[tokio::test]
async fn an_empty_file_is_one_message_that_says_so() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    write_stream(&client, vec![start(&id, "empty")]).await.unwrap();
    let messages = read_all(&client, read_stream(&id, "empty")).await.unwrap();
    assert_eq!(messages.len(), 1);
    assert!(messages[0].eof && messages[0].data.is_empty());
}

#[tokio::test]
async fn file_streams_work_in_json_as_well() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    client.write_file(write(&id, "file", pattern(200_000))).await.unwrap();
    let certificate = world.certificate(&id).await;
    let config = world
        .config(Protocol::Connect)
        .with_codec_format(CodecFormat::Json)
        .with_default_header("x-tenki-session-cert", certificate);
    let client = DataClient::new(connectrpc::client::HttpClient::plaintext(), config);
    let messages = read_all(&client, read_stream(&id, "file")).await.unwrap();
    assert_eq!(joined(&messages), pattern(200_000));
    let written = write_stream(&client, vec![start(&id, "json"), Payload::Data("abc".into())]).await.unwrap();
    assert_eq!(written.bytes_written, 3);
}

#[tokio::test]
async fn a_stream_that_breaks_the_order_of_frames_writes_nothing() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let data = || Payload::Data("new".into());
    client.write_file(write(&id, "file", "old")).await.unwrap();
    for frames in
        [vec![], vec![data()], vec![data(), start(&id, "file")], vec![start(&id, "file"), data(), start(&id, "file")]]
    {
        assert_eq!(code(write_stream(&client, frames).await), ErrorCode::InvalidArgument);
    }
    assert_eq!(client.read_file(read(&id, "file")).await.unwrap().response.content, "old");
}

#[tokio::test]
async fn a_write_that_is_given_up_leaves_the_file_as_it_was() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    client.write_file(write(&id, "file", "old")).await.unwrap();
    // The end never comes: the call is dropped when its frames have been sent.
    let (sent, is_sent) = tokio::sync::oneshot::channel();
    let mut sent = Some(sent);
    let rest = futures::stream::poll_fn(move |_| {
        sent.take().map(|sent| sent.send(()));
        std::task::Poll::Pending
    });
    let frames = stream_iter(vec![frame(start(&id, "file")), frame(Payload::Data("new".into()))]);
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.write_file_stream(futures::StreamExt::chain(frames, rest)).await }
    });
    soon(is_sent).await.unwrap();
    call.abort();
    let canceled = "nagaya_rpc_calls_total{rpc=\"WriteFileStream\",code=\"canceled\"}";
    soon(async {
        while metric(&world, canceled).await.as_deref() != Some("1") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(client.read_file(read(&id, "file")).await.unwrap().response.content, "old");
}

async fn metric(world: &World, name: &str) -> Option<String> {
    let request = http::Request::get("/metrics").header("host", "x").body(Default::default()).unwrap();
    let text = String::from_utf8(world.http1(request).await.into_body().to_vec()).unwrap();
    text.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
}

#[tokio::test]
async fn bad_paths_and_numbers_are_refused() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let long = "x".repeat(4_097);
    for path in ["", "a\0b", long.as_str()] {
        assert_eq!(code(client.stat(stat(&id, path)).await), ErrorCode::InvalidArgument);
        assert_eq!(code(client.read_file(read(&id, path)).await), ErrorCode::InvalidArgument);
        assert_eq!(code(client.write_file(write(&id, path, "")).await), ErrorCode::InvalidArgument);
        assert_eq!(code(client.mkdir(mkdir(&id, path, true)).await), ErrorCode::InvalidArgument);
        assert_eq!(code(client.remove(remove(&id, path, true)).await), ErrorCode::InvalidArgument);
        assert_eq!(code(client.list(list(&id, path, true)).await), ErrorCode::InvalidArgument);
        assert_eq!(code(read_all(&client, read_stream(&id, path)).await), ErrorCode::InvalidArgument);
        assert_eq!(code(write_stream(&client, vec![start(&id, path)]).await), ErrorCode::InvalidArgument);
    }
    assert_eq!(
        code(client.stat(Default::default()).await),
        ErrorCode::InvalidArgument,
        "the inner request is required"
    );
    for request in [
        wire::ReadFileStreamRequest { offset: -1, ..read_stream(&id, "x") },
        wire::ReadFileStreamRequest { length: -1, ..read_stream(&id, "x") },
    ] {
        assert_eq!(code(read_all(&client, request).await), ErrorCode::InvalidArgument);
    }
}

#[tokio::test]
async fn a_file_too_large_for_one_message_is_refused_with_the_way_out() {
    let world = World::with(|config| config.limits.message_bytes_max = 1 << 20).await;
    let (id, client) = world.session().await;
    let half = || Payload::Data(Bytes::from(vec![0; 700_000]));
    write_stream(&client, vec![start(&id, "big"), half(), half()]).await.unwrap();
    let error = client.read_file(read(&id, "big")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::ResourceExhausted);
    assert!(error.message.unwrap().contains("ReadFileStream"));
    assert_eq!(joined(&read_all(&client, read_stream(&id, "big")).await.unwrap()).len(), 1_400_000);
    assert_eq!(code(client.write_file(write(&id, "big", vec![0; 1 << 20])).await), ErrorCode::ResourceExhausted);
}

#[tokio::test]
async fn only_the_sessions_own_certificate_opens_it() {
    let world = World::new().await;
    let (first, client) = world.session().await;
    let (second, _) = world.session().await;
    assert!(client.stat(stat(&first, "/")).await.is_ok());
    assert_eq!(code(client.stat(stat(&second, "/")).await), ErrorCode::Unauthenticated, "foreign");
    for certificate in ["nonsense", "nsc1.AAAA.BBBB", &world.secret] {
        assert_eq!(code(world.data(certificate).stat(stat(&first, "/")).await), ErrorCode::Unauthenticated);
    }
    let bearer = world.config(Protocol::Grpc).with_default_header("authorization", format!("Bearer {}", world.secret));
    let bearer = DataClient::new(connectrpc::client::HttpClient::plaintext_http2_only(), bearer);
    assert_eq!(code(bearer.stat(stat(&first, "/")).await), ErrorCode::Unauthenticated, "a key is no certificate");
    world.fakes.clock.advance(600_001);
    assert_eq!(code(client.stat(stat(&first, "/")).await), ErrorCode::Unauthenticated, "expired");
}

#[tokio::test]
async fn a_terminated_session_says_so() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let request = wire::TerminateSessionRequest { session_id: id.clone() };
    world.control().terminate_session(request).await.unwrap();
    let error = client.stat(stat(&id, "/")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition);
    assert!(error.message.unwrap().contains("terminated"));
}

#[tokio::test]
async fn a_probe_is_no_activity() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let get = || wire::GetSessionRequest { session_id: id.clone() };
    let before = world.control().get_session(get()).await.unwrap().session.last_activity_at.clone();
    world.fakes.clock.advance(10_000);
    let certificate = world.certificate(&id).await;
    let config = world
        .config(Protocol::Grpc)
        .with_default_header("x-tenki-session-cert", certificate)
        .with_default_header("x-tenki-dataplane-probe", "warmup");
    let probe = DataClient::new(connectrpc::client::HttpClient::plaintext_http2_only(), config);
    assert!(probe.stat(stat(&id, "/home/tenki")).await.unwrap().response.exists);
    assert_eq!(world.control().get_session(get()).await.unwrap().session.last_activity_at, before);
    client.stat(stat(&id, "/home/tenki")).await.unwrap();
    assert_ne!(world.control().get_session(get()).await.unwrap().session.last_activity_at, before);
}
