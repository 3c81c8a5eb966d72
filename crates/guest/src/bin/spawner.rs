//! The program that makes sandboxes' first processes, so that the threaded server never forks.
//!
//! It has one thread and one mount namespace of its own that holds nothing of the host, which keeps
//! every `clone3` short. It ends when the server does; the sandboxes it made live on.

fn main() {
    nagaya_guest::spawner::serve();
}
