//! The threads that make adapters ready, at low priority: who is being served goes first.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use thread_priority::{ThreadPriority, ThreadPriorityValue, set_current_thread_priority};

/// The threads' priority of 0 to 99; on Linux niceness 10: beside the model's threads on busy cores about a tenth of one is
/// theirs.
const PRIORITY: u8 = 25;

type Work = Box<dyn FnOnce() + Send>;

/// A few threads with one queue. They end when it is dropped and all work is done.
#[derive(Debug)]
pub(crate) struct Loaders(SyncSender<Work>);

impl Loaders {
    /// `count` threads, at least one, for as much work at a time.
    pub(crate) fn new(count: usize) -> Self {
        let (sender, receiver) = sync_channel(count.max(1));
        let receiver = Arc::new(Mutex::new(receiver));
        for index in 0..count.max(1) {
            let queue = Arc::clone(&receiver);
            let started =
                std::thread::Builder::new().name(format!("loader-{index}")).spawn(move || serve(&queue));
            if let Err(error) = started {
                tracing::error!(%error, "a loader thread did not start");
            }
        }
        Self(sender)
    }

    /// Has `work` done when a thread is free; drops it if there is none, or more is under way than was asked for.
    pub(crate) fn run(&self, work: impl FnOnce() + Send + 'static) {
        if self.0.try_send(Box::new(work)).is_err() {
            tracing::error!("there is no thread to load an adapter");
        }
    }
}

/// Where it is not possible the thread runs as others do.
fn lower() {
    let Ok(priority) = ThreadPriorityValue::try_from(PRIORITY) else { return };
    if let Err(error) = set_current_thread_priority(ThreadPriority::Crossplatform(priority)) {
        tracing::warn!(?error, "adapters load at normal priority");
    }
}

fn serve(queue: &Mutex<Receiver<Work>>) {
    if cfg!(target_os = "linux") {
        lower();
    }
    loop {
        let work = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(work) = work else { return };
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        if ended.is_err() {
            tracing::error!("loading an adapter panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_in_the_background_and_outlives_a_panic() {
        let loaders = Loaders::new(4);
        let (done, results) = sync_channel(3);
        loaders.run(|| panic!("a damaged file"));
        for at in 0..3 {
            let done = done.clone();
            loaders.run(move || {
                let name = std::thread::current().name().unwrap_or_default().to_owned();
                done.send((at, name)).expect("somebody listens");
            });
        }
        drop((loaders, done));
        let mut results: Vec<(i32, String)> = results.iter().collect();
        results.sort_unstable();
        assert_eq!(results.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(results.iter().all(|(_, name)| name.starts_with("loader-")), "{results:?}");
    }
}
