//! Names shared by every part of Nagaya: ids, names of files as text, and the table of error codes.
//!
//! With the feature `tenki` (on by default) also the generated messages and services of the
//! `tenki.sandbox.v1` protocol, what it fixes in numbers and words, and those of `nagaya.v1`, which goes beyond it. Nothing in this crate does I/O.

pub mod error;
pub mod ids;
#[cfg(feature = "tenki")]
mod json;
#[cfg(feature = "tenki")]
pub mod nagaya;
pub mod names;
#[cfg(feature = "tenki")]
pub mod tenki;
