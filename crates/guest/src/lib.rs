pub mod agent;
pub mod frame;
pub mod handshake;
pub mod messages;
pub mod mux;
pub mod processor_times;
pub mod sftp;
mod writer;

#[allow(unsafe_code)]
pub mod mount;
#[allow(unsafe_code)]
pub mod seccomp;
pub mod spawn;
#[allow(unsafe_code)]
pub mod spawner;
