//! What the cases share: a server, a caller and a running session.

use nagaya_client::{Client, ClientOptions, CreateOptions, Session};
use nagaya_testkit::Server;

pub struct World {
    pub client: Client,
    pub session: Session,
    _server: Server,
}

impl World {
    pub async fn make() -> Self {
        let server = Server::start();
        let client = client(server.endpoint(), &server);
        let session = client.create(small()).await.unwrap();
        Self { client, session, _server: server }
    }
}

pub fn client(endpoint: &str, server: &Server) -> Client {
    let options = ClientOptions::default().token(Some(server.api_key())).endpoint(Some(endpoint.to_owned()));
    Client::new(options).unwrap()
}

/// A session as small as most cases need.
pub fn small() -> CreateOptions {
    CreateOptions::default().name(Some("small".into())).cpu_cores(Some(1)).memory_mb(Some(512)).allow_outbound(false)
}

/// Standard output of a script that must succeed.
pub async fn say(session: &Session, script: &str) -> String {
    let output = session.shell(script).output().await.unwrap().check().unwrap();
    output.stdout_text().trim_end().to_owned()
}
