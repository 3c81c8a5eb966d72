//! Who may call, what is not there, and how requests may be written.

use connectrpc::{ErrorCode, Protocol};
use http::Request;
use http_body_util::Full;
use nagaya_api::tenki::v1 as wire;
use serde_json::json;

use crate::support::*;

#[tokio::test]
async fn every_form_of_the_token_opens_the_control_plane() {
    let world = World::new().await;
    let secret = world.secret.as_str();
    for (name, value) in [
        ("authorization", format!("Bearer {secret}")),
        ("x-session-token", secret.to_owned()),
        ("cookie", format!("tenki_session={secret}")),
        ("cookie", format!("theme=dark; ory_kratos_session={secret}")),
    ] {
        let answer = world.control_with(&[(name, &value)]).who_am_i(Default::default()).await;
        assert!(answer.is_ok(), "{name}: {answer:?}");
    }
}

#[tokio::test]
async fn a_bad_token_or_none_is_unauthenticated() {
    let world = World::new().await;
    for headers in [
        &[][..],
        &[("authorization", "Bearer tk_0000000000000000")],
        &[("x-session-token", "nonsense")],
        &[("cookie", "tenki_session=nonsense")],
        &[("x-tenki-session-cert", "nonsense")],
    ] {
        let client = world.control_with(headers);
        assert_eq!(code(client.who_am_i(Default::default()).await), ErrorCode::Unauthenticated, "{headers:?}");
        assert_eq!(code(client.create_session(create()).await), ErrorCode::Unauthenticated, "{headers:?}");
    }
    assert!(world.fakes.store.all_sessions().is_empty());
}

#[tokio::test]
async fn the_caller_learns_its_workspace_and_that_it_has_one_project() {
    let world = World::new().await;
    let me = world.control().who_am_i(Default::default()).await.unwrap();
    assert_eq!(me.owner_type, "USER", "every key is a personal one");
    let [workspace] = &me.workspaces[..] else { panic!("one workspace") };
    assert_eq!(workspace.name, "default");
    assert_eq!(workspace.projects.len(), 1);
    assert_eq!(workspace.projects[0].project_id, workspace.workspace_id);
}

/// Rpcs of the contract that are built.
const BUILT: usize = 68;

/// All rpcs of the contract, from the proto file.
fn rpcs() -> Vec<(String, String)> {
    let proto = |name: &str| {
        let path = format!("{}/../../proto/tenki/sandbox/v1/{name}.proto", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).unwrap()
    };
    let mut rpcs = Vec::new();
    for text in [proto("sandbox"), proto("registry"), proto("template"), proto("ssh_gateway_client")] {
        let mut service = String::new();
        for line in text.lines().map(str::trim) {
            if let Some(rest) = line.strip_prefix("service ") {
                service = rest.split([' ', '{']).next().unwrap().to_owned();
            } else if let Some(rest) = line.strip_prefix("rpc ") {
                rpcs.push((service.clone(), rest.split('(').next().unwrap().trim().to_owned()));
            }
        }
    }
    rpcs
}

#[tokio::test]
async fn every_rpc_of_the_contract_is_answered_and_none_with_http_404() {
    let world = World::new().await;
    let certificate = world.certificate(&world.session().await.0).await;
    let rpcs = rpcs();
    assert_eq!(rpcs.len(), 91);
    let mut unimplemented = 0;
    for (service, method) in rpcs {
        let path = format!("/tenki.sandbox.v1.{service}/{method}");
        let request = |kind: &str, body: &'static [u8]| {
            Request::post(format!("{}{path}", world.url()))
                .header("content-type", kind)
                .header("authorization", format!("Bearer {}", world.secret))
                .header("x-tenki-session-cert", &certificate)
                .body(Full::new(body.into()))
                .unwrap()
        };
        let grpc = world.http2(request("application/grpc", &[0; 5])).await;
        assert_eq!(grpc.status(), 200, "{path}");
        let status = grpc.headers().get("grpc-status").unwrap_or_else(|| panic!("{path} has a status"));
        unimplemented += usize::from(status == "12");
        // A stream asked for as unary is a client's error, but no missing route either.
        let connect = world.http1(request("application/json", b"{}")).await;
        assert_ne!(connect.status(), 404, "{path}");
    }
    assert_eq!(unimplemented, 91 - BUILT);
}

#[tokio::test]
async fn unknown_methods_of_known_services_are_unimplemented_not_missing() {
    let world = World::new().await;
    for service in ["SandboxService", "SandboxSessionDataPlaneService", "SSHGatewayClientService"] {
        let path = format!("/tenki.sandbox.v1.{service}/NoSuchMethod");
        let request = |kind: &str| {
            let request = Request::post(format!("{}{path}", world.url())).header("content-type", kind);
            request.body(Full::new([0u8; 5].to_vec().into())).unwrap()
        };
        let grpc = world.http2(request("application/grpc+proto")).await;
        assert_eq!((grpc.status().as_u16(), &grpc.headers()["grpc-status"]), (200, &"12".parse().unwrap()));
        let message = grpc.headers()["grpc-message"].to_str().unwrap();
        assert!(!message.contains("404"), "{message}");
        let connect = world.http1(request("application/json")).await;
        assert_eq!(connect.status(), 501);
        let error: serde_json::Value = serde_json::from_slice(connect.body()).unwrap();
        assert_eq!(error["code"], "unimplemented");
    }
}

#[tokio::test]
async fn json_is_read_leniently_and_written_sparsely() {
    let world = World::new().await;
    let (status, answer) = world
        .json(
            "CreateSession",
            json!({
                "ownerType": "SERVICE", "owner_id": "self", "name": "lenient", "maxDuration": "600s",
                "cpuCores": 1, "memoryMb": 128, "metadata": {"a": "b"},
                "readOnly": true, "somethingNew": {"nested": [1, 2, 3]}
            }),
        )
        .await;
    assert_eq!(status, 200, "{answer}");
    let session = &answer["session"];
    assert_eq!(session["state"], "SESSION_STATE_RUNNING");
    assert_eq!(session["name"], "lenient");
    assert_eq!(session["cpuCores"], 1);
    assert_eq!(answer["routeStatus"], "DATA_PLANE_ROUTE_STATUS_VERIFIED");
    assert_eq!(answer["dataPlaneEndpoint"], world.url());
    assert!(session["createdAt"].as_str().unwrap().ends_with('Z'), "{session}");
    for absent in ["inboundEnabled", "outboundEnabled", "sticky", "terminalError", "pausedAt", "snapshotId"] {
        assert!(session.get(absent).is_none(), "{absent} is zero and left out");
    }

    let id = session["id"].as_str().unwrap();
    let (status, answer) =
        world.json("UpdateSession", json!({"sessionId": id, "name": "new", "idleTimeoutMinutes": 5})).await;
    assert_eq!((status, &answer["session"]["name"]), (200, &json!("new")));
    let (_, usage) = world.json("GetWorkspaceSandboxUsage", json!({})).await;
    let active = usage["limits"].as_array().unwrap().iter().find(|limit| limit["key"] == "active_sessions").unwrap();
    assert_eq!(active["current"], "1", "64-bit numbers travel as text");
}

#[tokio::test]
async fn bad_json_is_an_invalid_argument() {
    let world = World::new().await;
    for body in [json!([]), json!("text"), json!({"cpuCores": "many"}), json!({"maxDuration": "long"})] {
        let (status, error) = world.json("CreateSession", body.clone()).await;
        assert_eq!((status, &error["code"]), (400, &json!("invalid_argument")), "{body}");
    }
}

#[tokio::test]
async fn all_three_protocols_give_the_same_answer() {
    let world = World::new().await;
    let expected = world.control().who_am_i(Default::default()).await.unwrap();
    for (protocol, http2) in
        [(Protocol::Connect, false), (Protocol::Connect, true), (Protocol::GrpcWeb, false), (Protocol::GrpcWeb, true)]
    {
        for json in [false, true] {
            let mut config =
                world.config(protocol).with_default_header("authorization", format!("Bearer {}", world.secret));
            if json {
                config = config.json();
            }
            let http = if http2 {
                connectrpc::client::HttpClient::plaintext_http2_only()
            } else {
                connectrpc::client::HttpClient::plaintext()
            };
            let client = ControlClient::new(http, config);
            let answer = client.who_am_i(Default::default()).await;
            assert_eq!(answer.unwrap(), expected, "{protocol:?} http2={http2} json={json}");
            let missing = client.get_session(wire::GetSessionRequest { session_id: "x".into() }).await;
            assert_eq!(code(missing), ErrorCode::InvalidArgument);
        }
    }
}

/// Where the contract asks for an id, an empty text is none, and JSON has objects for messages.
#[tokio::test]
async fn what_is_no_id_and_what_is_no_message_is_an_invalid_argument() {
    let world = World::new().await;
    let owner = || serde_json::json!({ "ownerId": "self", "ownerType": "USER" });
    let with = |name: &str, value: serde_json::Value| {
        let mut message = owner();
        message[name] = value;
        message
    };
    for (method, message) in [
        ("GetSession", serde_json::json!({ "sessionId": "" })),
        ("GetSession", serde_json::json!({})),
        ("CreateSession", with("workspaceId", "".into())),
        ("CreateSession", with("projectId", "".into())),
        ("CreateSession", with("snapshotId", "".into())),
        ("CreateSession", with("templateSpecId", "".into())),
        ("CreateVolume", serde_json::json!({ "name": "v", "sizeBytes": "1048576", "projectId": "" })),
        ("ListProjectVolumes", serde_json::json!({})),
        ("ListProjectSandboxes", serde_json::json!({ "projectId": "" })),
        ("ListProjectSnapshots", serde_json::json!({})),
        ("ListPreviewUrls", serde_json::json!({ "sessionId": "" })),
        ("ListPreviewUrls", serde_json::json!({ "workspaceId": "" })),
        ("CreatePreviewUrl", serde_json::json!({ "slug": "web", "sessionId": "", "port": 80 })),
        ("GetWorkspaceSandboxUsage", serde_json::json!({ "projectId": "" })),
        ("GetWorkspaceSandboxSettings", serde_json::json!({ "workspaceId": "" })),
        ("UpdateWorkspaceSandboxSettings", serde_json::json!({})),
        ("TerminateSessions", serde_json::json!({ "sessionIds": [""] })),
        ("WhoAmI", serde_json::json!([])),
        ("GetSession", serde_json::json!(["0190a8f0-0000-7000-8000-000000000000"])),
        ("CreateSession", serde_json::json!(["self", "USER"])),
        ("CreateSession", with("egress", serde_json::json!([["a.example"]]))),
        ("CreateSession", with("volumes", serde_json::json!([["0190a8f0-0000-7000-8000-000000000000", "/data"]]))),
    ] {
        let (status, answer) = world.json(method, message.clone()).await;
        assert_eq!((status, answer["code"].as_str()), (400, Some("invalid_argument")), "{method} {message}: {answer}");
    }
    assert!(world.fakes.store.all_sessions().is_empty());
    // Where the contract lets it be empty, or it is absent.
    for (method, message) in [
        ("ListWorkspaceSandboxes", serde_json::json!({ "workspaceId": "" })),
        ("ListVolumes", serde_json::json!({})),
        ("ListWorkspaceSnapshots", serde_json::json!({ "workspaceId": "" })),
        ("ListPreviewUrls", serde_json::json!({ "projectId": "" })),
        ("GetWorkspaceSandboxUsage", serde_json::json!({ "workspaceId": "" })),
        ("WhoAmI", serde_json::json!({})),
    ] {
        let (status, answer) = world.json(method, message.clone()).await;
        assert_eq!(status, 200, "{method} {message}: {answer}");
    }
}
