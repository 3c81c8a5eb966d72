//! The proxy between real sockets: raw clients on one side, services that answer what a test says on the other.

#![allow(clippy::unwrap_used)]

mod answers;
mod hostile;
mod streams;
mod support;
mod tunnels;
