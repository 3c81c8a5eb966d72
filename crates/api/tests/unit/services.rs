use std::sync::Arc;

use buffa::MessageField;
use bytes::Bytes;
use connectrpc::{ConnectRpcService, RequestContext, Response, Router, ServiceResult, ServiceStream};
use futures::StreamExt as _;
use http_body_util::{BodyExt as _, Full};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use nagaya_api::error::{Code, Error};
use nagaya_api::tenki::v1;

/// Has rpcs of every kind and leaves the others out.
struct FiveRpcs;

impl v1::SandboxService for FiveRpcs {
    async fn get_session(
        &self,
        _context: RequestContext,
        request: v1::GetSessionRequest,
    ) -> ServiceResult<v1::GetSessionResponse> {
        if request.session_id.is_empty() {
            return Err(Error::from(Code::SessionNotFound).into());
        }
        let session = v1::SandboxSession {
            id: request.session_id,
            state: v1::SessionState::Running.into(),
            pause_retention: MessageField::some(buffa_types::google::protobuf::Duration {
                seconds: 600,
                ..Default::default()
            }),
            ..Default::default()
        };
        Response::ok(v1::GetSessionResponse { session: MessageField::some(session) })
    }

    async fn create_volume(
        &self,
        _context: RequestContext,
        request: v1::CreateVolumeRequest,
    ) -> ServiceResult<v1::CreateVolumeResponse> {
        let volume = v1::Volume { size_bytes: request.size_bytes, name: request.name, ..Default::default() };
        Response::ok(v1::CreateVolumeResponse { volume: MessageField::some(volume) })
    }

    async fn wait_session(
        &self,
        _context: RequestContext,
        _request: v1::WaitSessionRequest,
    ) -> ServiceResult<ServiceStream<v1::WaitSessionResponse>> {
        let message =
            |endpoint: &str| v1::WaitSessionResponse { data_plane_endpoint: endpoint.to_owned(), ..Default::default() };
        let items = [Ok(message("first")), Ok(message("second")), Err(Error::from(Code::Draining).into())];
        Ok(Response::stream(futures::stream::iter(items)))
    }
}

impl v1::SandboxSessionDataPlaneService for FiveRpcs {
    async fn run(
        &self,
        _context: RequestContext,
        requests: ServiceStream<v1::SandboxSessionDataPlaneServiceRunRequest>,
    ) -> ServiceResult<ServiceStream<v1::SandboxSessionDataPlaneServiceRunResponse>> {
        Ok(Response::stream(requests.map(|request| {
            let payload = match request?.frame.as_option().and_then(|frame| frame.payload.clone()) {
                Some(v1::run_request::Payload::Stdin(bytes)) => v1::run_response::Payload::Stdout(bytes),
                _ => return Err(Error::from(Code::StreamProtocol).into()),
            };
            let frame = v1::RunResponse { payload: Some(payload) };
            Ok(v1::SandboxSessionDataPlaneServiceRunResponse { frame: MessageField::some(frame) })
        })))
    }

    async fn write_file_stream(
        &self,
        _context: RequestContext,
        mut requests: ServiceStream<v1::SandboxSessionDataPlaneServiceWriteFileStreamRequest>,
    ) -> ServiceResult<v1::SandboxSessionDataPlaneServiceWriteFileStreamResponse> {
        let mut bytes_written = 0;
        while let Some(request) = requests.next().await {
            if let Some(v1::write_file_stream_request::Payload::Data(data)) = &request?.frame.payload {
                bytes_written += data.len() as i64;
            }
        }
        let response = v1::WriteFileStreamResponse { bytes_written, ..Default::default() };
        Response::ok(v1::SandboxSessionDataPlaneServiceWriteFileStreamResponse {
            response: MessageField::some(response),
        })
    }
}

impl v1::SshGatewayClientService for FiveRpcs {}

fn router() -> Router {
    let router = v1::SandboxService::register(Arc::new(FiveRpcs), Router::new());
    let router = v1::SandboxSessionDataPlaneService::register(Arc::new(FiveRpcs), router);
    v1::SshGatewayClientService::register(Arc::new(FiveRpcs), router)
}

/// Posts without a network; returns the HTTP status, the headers and the body.
async fn post(path: &str, content_type: &str, body: impl Into<Bytes>) -> (u16, http::HeaderMap, Bytes) {
    let request = http::Request::post(format!("http://sandbox.test/{path}"))
        .header("content-type", content_type)
        .body(Full::new(body.into()))
        .expect("a well-formed request");
    let response = ConnectRpcService::new(router()).oneshot(request).await.expect("infallible");
    let (head, body) = response.into_parts();
    let body = body.collect().await.expect("a whole body");
    let mut headers = head.headers;
    headers.extend(body.trailers().cloned().unwrap_or_default());
    (head.status.as_u16(), headers, body.to_bytes())
}

async fn post_json(rpc: &str, body: Value) -> (u16, Value) {
    let path = format!("tenki.sandbox.v1.SandboxService/{rpc}");
    let (status, _, body) = post(&path, "application/json", body.to_string()).await;
    (status, serde_json::from_slice(&body).expect("JSON"))
}

/// Protobuf's JSON has objects for messages. The derived code would also take their fields' values in a row.
#[test]
fn an_array_is_no_message_at_any_depth() {
    let read = |text: &str| serde_json::from_str::<v1::CreateSessionRequest>(text);
    let good =
        r#"{"ownerId": "self", "runtime": [], "volumes": [{"mountPath": "/a"}], "egress": {"allowDomains": ["a"]}}"#;
    let message = read(good).unwrap();
    assert_eq!((message.owner_id.as_str(), message.volumes.len()), ("self", 1));
    for bad in [
        "[]",
        r#"["self", "USER"]"#,
        r#"{"egress": []}"#,
        r#"{"egress": [["a"]]}"#,
        r#"{"volumes": [["id", "/a"]]}"#,
        "null",
        "1",
        r#""self""#,
    ] {
        assert!(read(bad).is_err(), "{bad}");
    }
    for empty in ["[]", "[1]"] {
        assert!(serde_json::from_str::<v1::WhoAmIRequest>(empty).is_err());
    }
    assert!(serde_json::from_str::<v1::WhoAmIRequest>("{}").is_ok());
    let text = serde_json::to_string(&message).unwrap();
    assert_eq!(read(&text).unwrap(), message, "written as it is read");
}

#[test]
fn every_rpc_has_a_route() {
    assert_eq!(router().methods().count(), 91);
    assert!(router().has_method("tenki.sandbox.v1.SandboxSessionDataPlaneService/WriteFileStream"));
}

#[tokio::test]
async fn rpcs_left_out_answer_unimplemented_inside_a_normal_grpc_response() {
    // An empty message in a gRPC frame. Clients would take an HTTP 404 for a missing route.
    let router = router();
    let mut refused = 0;
    for path in router.methods() {
        let (status, headers, _) = post(path, "application/grpc+proto", vec![0; 5]).await;
        assert_eq!(status, 200, "{path}");
        if headers["grpc-status"] == "12" {
            let message = headers["grpc-message"].to_str().expect("text");
            assert!(message.ends_with("[unimplemented]"), "{message}");
            refused += 1;
        }
    }
    assert_eq!(refused, 91 - 5);
}

#[tokio::test]
async fn errors_carry_status_text_and_code() {
    let (status, body) = post_json("GetSession", json!({})).await;
    assert_eq!(status, 404);
    assert_eq!(body, json!({"code": "not_found", "message": "session not found [session_not_found]"}));
}

#[tokio::test]
async fn json_answers_omit_zero_values_and_name_enums() {
    let (status, body) = post_json("GetSession", json!({"sessionId": "a"})).await;
    assert_eq!(status, 200);
    let expected = json!({"session": {"id": "a", "state": "SESSION_STATE_RUNNING", "pauseRetention": "600s"}});
    assert_eq!(body, expected);
}

#[tokio::test]
async fn json_requests_may_hold_unknown_fields_and_both_forms_of_names_and_numbers() {
    for body in [
        json!({"name": "n", "sizeBytes": "1048576", "readOnly": true}),
        json!({"name": "n", "size_bytes": 1_048_576, "nested": {"unknown": [1, null]}}),
    ] {
        let (status, answer) = post_json("CreateVolume", body).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer, json!({"volume": {"name": "n", "sizeBytes": "1048576"}}));
    }
}

#[cfg(feature = "client")]
mod client {
    use connectrpc::Protocol;
    use connectrpc::client::{ClientConfig, ServiceTransport};

    use super::*;

    type Transport = ServiceTransport<ConnectRpcService<Router>>;

    fn connect() -> (Transport, ClientConfig) {
        let config = ClientConfig::new("http://sandbox.test".parse().expect("a URL")).with_protocol(Protocol::Grpc);
        (ServiceTransport::new(ConnectRpcService::new(router())), config)
    }

    fn control() -> v1::SandboxServiceClient<Transport> {
        let (transport, config) = connect();
        v1::SandboxServiceClient::new(transport, config)
    }

    fn data() -> v1::SandboxSessionDataPlaneServiceClient<Transport> {
        let (transport, config) = connect();
        v1::SandboxSessionDataPlaneServiceClient::new(transport, config)
    }

    #[tokio::test]
    async fn unary_calls_return_the_message_or_the_code() {
        let request = v1::GetSessionRequest { session_id: "a".into() };
        let answer = control().get_session(request).await.expect("an answer");
        assert_eq!(answer.session.id, "a");
        assert_eq!(answer.session.state.as_known(), Some(v1::SessionState::Running));

        let error = control().get_session(v1::GetSessionRequest::default()).await.expect_err("no id");
        let text = error.message.expect("a text");
        assert_eq!(Code::in_wire_text(&text), Some(Code::SessionNotFound));
    }

    #[tokio::test]
    async fn a_server_stream_yields_its_messages_and_then_its_error() {
        let mut stream = control().wait_session(v1::WaitSessionRequest::default()).await.expect("a stream");
        for expected in ["first", "second"] {
            let message = stream.message().await.expect("no error yet").expect("not the end yet");
            assert_eq!(message.data_plane_endpoint, expected);
        }
        let error = stream.message().await.map(drop).expect_err("the error at the end");
        assert_eq!(Code::in_wire_text(&error.message.expect("a text")), Some(Code::Draining));
    }

    #[tokio::test]
    async fn a_bidi_stream_carries_bytes_both_ways() {
        let mut run = data().run().await.expect("a stream");
        for text in ["one", "two"] {
            let payload = v1::run_request::Payload::Stdin(text.into());
            let frame = v1::RunRequest { payload: Some(payload) };
            let request = v1::SandboxSessionDataPlaneServiceRunRequest { frame: MessageField::some(frame) };
            run.send(request).await.expect("sent");
            let answer = run.message().await.expect("no error").expect("not the end");
            assert_eq!(answer.frame.payload, Some(v1::run_response::Payload::Stdout(text.into())));
        }
        run.close_send();
        assert!(run.message().await.expect("a clean end").is_none());
    }

    #[tokio::test]
    async fn a_client_stream_is_sent_to_its_end() {
        let requests = ["ab", "cde"].map(|text| {
            let payload = v1::write_file_stream_request::Payload::Data(text.into());
            let frame = v1::WriteFileStreamRequest { payload: Some(payload) };
            v1::SandboxSessionDataPlaneServiceWriteFileStreamRequest { frame: MessageField::some(frame) }
        });
        let answer = data().write_file_stream(futures::stream::iter(requests)).await.expect("an answer");
        assert_eq!(answer.response.bytes_written, 5);
    }
}
