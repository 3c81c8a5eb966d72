//! Says who asks, and hands requests to the rpc layer or to the bridge for SSH.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use nagaya_api::error::Error;
use nagaya_engine::Engine;
use nagaya_gateway::ssh::SshServer;

use super::limits::Limits;
use super::service::TenkiService;
use super::zero_copy::{self, ZeroCopyDispatcher};
use super::{certificate, ssh};
use crate::download::Downloads;
use crate::facade::{Answer, Facade};
use crate::rpc::auth;
use crate::rpc::service::{Asking, RpcService, Shared, Streams, service_of};
use crate::wire::connection::Via;

const CONTROL_PLANE: &str = "tenki.sandbox.v1.SandboxService";
const DATA_PLANE: &str = "tenki.sandbox.v1.SandboxSessionDataPlaneService";
const SSH_GATEWAYS: &str = "tenki.sandbox.v1.SSHGatewayClientService";

const STREAMS: Streams = Streams {
    long: &["Run", "WaitSession", "StreamCommandOutput", "Dial", "HostPortTunnel"],
    say_farewell: &["HostPortTunnel"],
    rechunked: &[zero_copy::WRITE_FILE_STREAM],
};

/// What the façade is made from.
pub(crate) struct Dependencies {
    pub(crate) shared: Shared,
    pub(crate) limits: Limits,
    pub(crate) engine: Engine,
    pub(crate) public_url: Option<String>,
    pub(crate) downloads: Arc<Downloads>,
    pub(crate) ssh: SshServer,
    /// Where SSH is spoken without the bridge.
    pub(crate) ssh_address: Option<SocketAddr>,
}

pub(crate) struct TenkiFacade {
    tenki: Arc<TenkiService>,
    rpcs: RpcService<ZeroCopyDispatcher>,
}

impl Facade for TenkiFacade {
    fn claims(&self, path: &str) -> bool {
        service_of(path).is_some_and(|service| self.services().contains(&service)) || ssh::bridge_to(path).is_some()
    }

    fn call<'a>(&'a self, request: Request<Incoming>, via: Via<'a>) -> Answer<'a> {
        match ssh::bridge_to(request.uri().path()) {
            Some(_) => Box::pin(ssh::bridge(&self.tenki, request, via)),
            None => Box::pin(self.rpcs.answer(request, via, |parts| self.authenticate(parts))),
        }
    }

    fn services(&self) -> &'static [&'static str] {
        &[CONTROL_PLANE, DATA_PLANE, SSH_GATEWAYS]
    }
}

impl TenkiFacade {
    pub(crate) fn new(dependencies: Dependencies) -> Self {
        let Dependencies { shared, limits, engine, public_url, downloads, ssh, ssh_address } = dependencies;
        let tenki = Arc::new(TenkiService {
            engine,
            metrics: Arc::clone(&shared.metrics),
            public_url,
            downloads,
            ssh,
            ssh_address,
            message_bytes_max: shared.limits.message_bytes_max,
            stdin_window_bytes: limits.stdin_window_bytes,
            read_chunk_bytes: limits.read_chunk_bytes as usize,
            create_hold: Duration::from_millis(limits.create_hold_ms),
            deadline_margin: Duration::from_millis(limits.deadline_margin_ms),
            lifecycle: Arc::clone(&shared.lifecycle),
            tunnel_ping_interval: Duration::from_millis(shared.limits.keep_alive_interval_ms),
            tunnel_ping_timeout: Duration::from_millis(shared.limits.keep_alive_timeout_ms),
        });
        let rpcs = RpcService::new(ZeroCopyDispatcher::new(Arc::clone(&tenki)), STREAMS, shared);
        Self { tenki, rpcs }
    }

    /// The data plane takes certificates only, everything else keys.
    fn authenticate(&self, parts: &http::request::Parts) -> Result<Asking, Error> {
        let engine = &self.tenki.engine;
        if service_of(parts.uri.path()) == Some(DATA_PLANE) {
            engine.certified_session(certificate::shown(&parts.headers)?).map(Asking::Certified)
        } else {
            engine.authenticate(auth::token(&parts.headers)?).map(Asking::Caller)
        }
    }
}

#[cfg(test)]
mod tests {
    use connectrpc::{Dispatcher, MethodKind, Router};
    use nagaya_api::tenki::v1::{SandboxService, SandboxSessionDataPlaneService, SshGatewayClientService};

    use super::*;

    struct Nothing;

    impl SandboxService for Nothing {}
    impl SandboxSessionDataPlaneService for Nothing {}
    impl SshGatewayClientService for Nothing {}

    #[test]
    fn services_and_streams_are_named_as_in_the_contract() {
        let router = SandboxService::register(Arc::new(Nothing), Router::new());
        let router = SandboxSessionDataPlaneService::register(Arc::new(Nothing), router);
        let router = SshGatewayClientService::register(Arc::new(Nothing), router);
        let kind = |path: &str| router.lookup(path).map(|method| method.kind);
        for (service, method) in
            [(CONTROL_PLANE, "WhoAmI"), (DATA_PLANE, "Stat"), (SSH_GATEWAYS, "ListActiveSSHGateways")]
        {
            assert!(kind(&format!("{service}/{method}")).is_some(), "{service}");
        }
        for method in STREAMS.long.iter().chain(STREAMS.say_farewell) {
            let kinds: Vec<_> =
                [CONTROL_PLANE, DATA_PLANE].iter().filter_map(|of| kind(&format!("{of}/{method}"))).collect();
            assert!(matches!(kinds[..], [MethodKind::ServerStreaming | MethodKind::BidiStreaming]), "{method}");
        }
        for path in STREAMS.rechunked {
            assert!(matches!(kind(path), Some(MethodKind::ClientStreaming)), "{path}");
        }
    }
}
