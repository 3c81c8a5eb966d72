use std::sync::{Arc, Mutex};
use std::time::Duration;

use nagaya_client::{Backoff, Client, ClientOptions, Error, TunnelOptions, TunnelState};
use nagaya_testkit::Server;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::network::{echo_here, echoed};
use crate::world::{World, client, say, small};

crate::cases!(certificates_are_renewed, a_resilient_tunnel_outlives_the_server, everything_goes_through_tls);

const PATIENCE: Duration = Duration::from_secs(60);

/// A place that leads to another one, which may change: a server gets another port when it starts again.
struct Way {
    address: String,
    leads_to: Arc<Mutex<String>>,
}

impl Way {
    async fn to(endpoint: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let leads_to = Arc::new(Mutex::new(endpoint.to_owned()));
        let target = Arc::clone(&leads_to);
        tokio::spawn(async move {
            while let Ok((mut here, _)) = listener.accept().await {
                let there = target.lock().unwrap().strip_prefix("http://").unwrap().to_owned();
                tokio::spawn(async move {
                    if let Ok(mut there) = TcpStream::connect(there).await {
                        let _ = tokio::io::copy_bidirectional(&mut here, &mut there).await;
                    }
                });
            }
        });
        Self { address, leads_to }
    }

    fn lead_to(&self, endpoint: &str) {
        *self.leads_to.lock().unwrap() = endpoint.to_owned();
    }
}

async fn certificates_are_renewed(_: &World) {
    let server = Server::start_with("[pools]\nslots_ready = 1\n[engine]\ncertificate_ttl_ms = 2000\n");
    let caller = client(server.endpoint(), &server);
    let session = caller.create(small()).await.unwrap();
    let mut running = session.command(["cat"]).start().await.unwrap();
    let started = tokio::time::Instant::now();
    while started.elapsed() < Duration::from_secs(5) {
        assert_eq!(say(&session, "echo yes").await, "yes");
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    // What was begun with the first certificate goes on without it.
    drop(running.take_stdin());
    assert!(running.wait().await.unwrap().is_success());
    session.close().await.unwrap();
}

async fn a_resilient_tunnel_outlives_the_server(_: &World) {
    let mut server = Server::start();
    let way = Way::to(server.endpoint()).await;
    let caller = client(&way.address, &server);
    let session = caller.create(small()).await.unwrap();
    let target = echo_here().await;
    let backoff = Backoff::default().initial(Duration::from_millis(50)).max(Duration::from_millis(500));
    let tunnel = session.resilient_tunnel(&target, TunnelOptions::default(), backoff).await.unwrap();
    let mut states = tunnel.states();
    let TunnelState::Open { sandbox_port, .. } = tunnel.state() else { panic!("{:?}", tunnel.state()) };
    assert_eq!(echoed(&session, sandbox_port, 3).await, "15 and 3 bytes");

    server.kill();
    let lost = states.wait_for(|state| !matches!(state, TunnelState::Open { .. }));
    tokio::time::timeout(PATIENCE, lost).await.expect("it notices").unwrap();
    let unreachable = session.refresh().await.unwrap_err();
    assert!(matches!(unreachable, Error::Unreachable { .. }), "{unreachable:?}");
    server.restart();
    way.lead_to(server.endpoint());
    let open = states.wait_for(|state| matches!(state, TunnelState::Open { .. }));
    let state = tokio::time::timeout(PATIENCE, open).await.expect("it comes back").unwrap().clone();
    let TunnelState::Open { sandbox_port, .. } = state else { panic!("{state:?}") };
    assert_eq!(echoed(&session, sandbox_port, 1 << 20).await, "1048594 and 1048576 bytes");

    server.terminate();
    server.restart();
    way.lead_to(server.endpoint());
    let open = states.wait_for(|state| matches!(state, TunnelState::Open { .. }));
    tokio::time::timeout(PATIENCE, open).await.expect("it comes back").unwrap();
    tunnel.close().await;
    session.close().await.unwrap();
}

async fn everything_goes_through_tls(_: &World) {
    let directory = tempfile::tempdir().unwrap();
    let certified = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let (certificate, key) = (directory.path().join("certificate.pem"), directory.path().join("key.pem"));
    std::fs::write(&certificate, certified.cert.pem()).unwrap();
    std::fs::write(&key, certified.signing_key.serialize_pem()).unwrap();
    let server = Server::start_with(&format!(
        "[tls]\ncertificate_file = {certificate:?}\nkey_file = {key:?}\n[pools]\nslots_ready = 1\n"
    ));
    assert!(server.endpoint().starts_with("https://"), "{}", server.endpoint());
    let options = |root_certificates| {
        ClientOptions::default()
            .token(Some(server.api_key()))
            .endpoint(Some(server.endpoint().to_owned()))
            .root_certificates(root_certificates)
    };
    let caller = Client::new(options(Some(std::fs::read(&certificate).unwrap()))).unwrap();
    let session = caller.create(small()).await.unwrap();
    assert_eq!(say(&session, "echo safe").await, "safe");
    session.files().write("large", vec![1; 3 << 20]).await.unwrap();
    assert_eq!(session.files().read("large").await.unwrap().len(), 3 << 20);
    let mut stream = session.ssh().await.unwrap();
    stream.write_all(b"SSH-2.0-test\r\n").await.unwrap();
    let mut greeting = [0; 8];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"SSH-2.0-");
    session.close().await.unwrap();

    // The system does not know this authority.
    match Client::new(options(None)) {
        Err(Error::InvalidOptions(_)) => {}
        Err(other) => panic!("{other:?}"),
        Ok(stranger) => {
            let refused = stranger.who_am_i().await.unwrap_err();
            assert!(matches!(&refused, Error::Unreachable { unsent: true, .. }), "{refused:?}");
            assert!(refused.message().contains("certificate"), "{refused}");
        }
    }
    assert!(matches!(Client::new(options(Some(b"nonsense".to_vec()))), Err(Error::InvalidOptions(_))));
}
