//! What façades over gRPC, gRPC-Web and Connect share: how a request is admitted and handed to the rpc layer, and the
//! messages in which more than one package speaks of sessions.
//!
//! Absent on purpose: any rpc, and any decision of one façade.

pub(crate) mod auth;
pub(crate) mod convert;
pub(crate) mod parse;
pub(crate) mod service;
