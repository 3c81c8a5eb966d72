//! Names shared by every part of Nagaya: ids, limits, names of files as text, and the table of error codes.
//!
//! With the feature `tenki` (on by default) also the generated messages and services of the
//! `tenki.sandbox.v1` protocol and of `nagaya.v1`, which goes beyond it. Nothing in this crate does I/O.

pub mod error;
pub mod ids;
pub mod limits;
#[cfg(feature = "tenki")]
pub mod nagaya;
pub mod names;
#[cfg(feature = "tenki")]
pub mod tenki;
