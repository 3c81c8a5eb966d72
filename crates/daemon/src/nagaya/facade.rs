//! Says who asks, and hands requests to the rpc layer.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::Router;
use http::Request;
use hyper::body::Incoming;
use nagaya_engine::Engine;

use super::service::Nagaya;
use super::services;
use crate::facade::{Answer, Facade};
use crate::rpc::auth;
use crate::rpc::service::{Asking, RpcService, Shared, Streams, service_of};
use crate::wire::connection::Via;

const SERVICE: &str = "nagaya.v1.NagayaService";

const STREAMS: Streams =
    Streams { long: &["WatchSessionEvents", "PullImage", "ImportImages"], say_farewell: &[], rechunked: &[] };

pub(crate) struct NagayaFacade {
    engine: Engine,
    rpcs: RpcService<Router>,
}

impl Facade for NagayaFacade {
    fn claims(&self, path: &str) -> bool {
        service_of(path) == Some(SERVICE)
    }

    fn call<'a>(&'a self, request: Request<Incoming>, via: Via<'a>) -> Answer<'a> {
        Box::pin(
            self.rpcs.answer(request, via, |parts| {
                self.engine.authenticate(auth::token(&parts.headers)?).map(Asking::Caller)
            }),
        )
    }

    fn services(&self) -> &'static [&'static str] {
        &[SERVICE]
    }
}

impl NagayaFacade {
    pub(crate) fn new(engine: Engine, shared: Shared, create_hold: Duration) -> Self {
        let nagaya = Arc::new(Nagaya { engine: engine.clone(), create_hold });
        Self { engine, rpcs: RpcService::new(services::router(&nagaya), STREAMS, shared) }
    }
}
