//! Real servers under load, killed, full, and reached from outside. One program, because each links the whole of what it tests with.

#![allow(clippy::unwrap_used)]

mod capacity;
mod crash;
mod explained;
mod full_host;
mod images;
mod never_lose;
mod pool;
mod previews;
mod s3;
mod takeover;
