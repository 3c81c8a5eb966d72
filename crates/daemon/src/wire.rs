//! What all façades share of HTTP: bodies within bounds, connections, and the server's phases.

pub(crate) mod body;
pub(crate) mod connection;
pub(crate) mod instrument;
pub(crate) mod lifecycle;
pub(crate) mod limits;
pub(crate) mod measured;
pub(crate) mod outcome;
pub(crate) mod rechunk;
