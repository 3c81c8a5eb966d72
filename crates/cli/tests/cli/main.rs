//! The command line as people use it: the real program under the name `tenki`, against a real server.

#![allow(clippy::unwrap_used)]

mod bad_input;
mod copies;
mod person;
mod seeds;
mod transcripts;
