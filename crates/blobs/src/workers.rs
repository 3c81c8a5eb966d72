//! Work on many chunks at once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nagaya_engine::ports::BlobError;

/// One hashes while the other waits for the disk; memory stays at two chunks and their like.
const WORKERS: usize = 2;

/// Runs `work` on every number below `count`, in no order. Each worker begins with its own `state`; as they are in the
/// end, they are the result. After the first error no new work is begun, and the error is the result.
pub(crate) fn on_each<State: Send>(
    count: usize,
    state: impl Fn() -> State + Sync,
    work: impl Fn(&mut State, usize) -> Result<(), BlobError> + Sync,
) -> Result<Vec<State>, BlobError> {
    let next = AtomicUsize::new(0);
    let stopped = AtomicBool::new(false);
    let first_error = Mutex::new(None);
    let run = || {
        let mut state = state();
        while !stopped.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                break;
            }
            if let Err(error) = work(&mut state, number) {
                stopped.store(true, Ordering::Relaxed);
                first_error.lock().expect("no holder of this lock panics").get_or_insert(error);
            }
        }
        state
    };
    let states = std::thread::scope(|scope| {
        let others: Vec<_> = (1..WORKERS.min(count)).map(|_| scope.spawn(run)).collect();
        let mut states = vec![run()];
        for other in others {
            // A worker that panicked takes this thread along.
            states.push(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        states
    });
    first_error.into_inner().expect("no holder of this lock panics").map_or(Ok(states), Err)
}
