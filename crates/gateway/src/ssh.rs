//! The SSH server of every sandbox.
