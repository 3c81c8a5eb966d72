//! What a client family's façade is to the server.

use std::future::Future;
use std::pin::Pin;

use http::{Request, Response};
use hyper::body::Incoming;

use crate::wire::body::ResponseBody;
use crate::wire::connection::Via;

pub(crate) type Answer<'a> = Pin<Box<dyn Future<Output = Response<ResponseBody>> + Send + 'a>>;

/// Translates between the protocol of one family of clients and the engine. It decides nothing, and knows no other façade.
pub(crate) trait Facade: Send + Sync {
    /// Whether it answers for this path, with whatever outcome. The first façade of the list that does is asked.
    fn claims(&self, path: &str) -> bool;

    fn call<'a>(&'a self, request: Request<Incoming>, via: Via<'a>) -> Answer<'a>;

    /// Its rpc services by their full names, for whoever asks for a path that nobody claims.
    fn services(&self) -> &'static [&'static str];

    /// What it serves besides, for the same.
    fn paths(&self) -> &'static [&'static str] {
        &[]
    }
}
