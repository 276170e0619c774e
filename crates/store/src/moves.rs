//! How often heads have moved, so that who remembers a head can tell without a read that it is still the head.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use types::AdapterId;

/// Counters; adapters share them by hash.
const COUNTERS: usize = 4096;

/// The counters of one store.
pub(crate) struct HeadMoves {
    counters: Box<[AtomicU64]>,
    hasher: RandomState,
}

impl HeadMoves {
    pub(crate) fn new() -> Self {
        let counters = (0..COUNTERS).map(|_| AtomicU64::new(0)).collect();
        Self { counters, hasher: RandomState::new() }
    }

    fn counter(&self, adapter: &AdapterId) -> &AtomicU64 {
        &self.counters[self.hasher.hash_one(adapter) as usize % COUNTERS]
    }

    /// Grows with every move of the adapter's head (and of some others').
    pub(crate) fn of(&self, adapter: &AdapterId) -> u64 {
        self.counter(adapter).load(Ordering::SeqCst)
    }

    /// The head may be about to move; it is counted when this is dropped, whatever has become of it.
    pub(crate) fn moving(&self, adapter: &AdapterId) -> Moving<'_> {
        Moving(self.counter(adapter))
    }
}

/// A move under way: held from before the transaction until after its commit.
pub(crate) struct Moving<'a>(&'a AtomicU64);

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}
