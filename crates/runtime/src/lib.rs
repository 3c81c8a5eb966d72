//! Drivers: the technologies that run sandboxes, behind `nagaya_engine::ports::Driver`.
//!
//! This crate talks to the host's kernel and never hears of a client family. The static programs it
//! carries (spawner and agent) come from `nagaya-guest`.

pub mod agent_client;
pub mod cgroup;
pub mod doctor;
pub mod host;
pub mod namespace;
mod programs;
pub mod spawner;
mod sys;

pub use sys::give_memory_back;
