//! Heartbeats that wait for their turn to be written: whoever claims meanwhile must know of them.

use std::sync::{Mutex, PoisonError};

use crate::Fence;

/// The heartbeats that are under way. All claims go through the same store, because nobody else can have the folder open.
#[derive(Default)]
pub(crate) struct Beats {
    waiting: Mutex<Vec<(Fence, i64)>>,
}

impl Beats {
    /// Makes it known that this lease is about to be extended by so many milliseconds, until what is given back is
    /// dropped.
    pub(crate) fn announce(&self, fence: &Fence, lease_millis: i64) -> Announced<'_> {
        self.with(|waiting| waiting.push((fence.clone(), lease_millis)));
        Announced { beats: self, fence: fence.clone() }
    }

    /// Those that wait now.
    pub(crate) fn waiting(&self) -> Vec<(Fence, i64)> {
        self.with(|waiting| waiting.clone())
    }

    fn with<T>(&self, run: impl FnOnce(&mut Vec<(Fence, i64)>) -> T) -> T {
        run(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A heartbeat under way.
pub(crate) struct Announced<'a> {
    beats: &'a Beats,
    fence: Fence,
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        self.beats.with(|waiting| {
            if let Some(at) = waiting.iter().position(|(fence, _)| *fence == self.fence) {
                waiting.swap_remove(at);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::sync::Arc;

    use types::{AdapterId, ManualClock, NewItem};

    use crate::Store;

    /// Whether a claim that waits for a busy store gets a job whose lease has run out meanwhile, if its worker's
    /// heartbeat waits `behind` the claim.
    async fn is_stolen(behind: bool) -> bool {
        let clock = Arc::new(ManualClock::default());
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), clock.clone()).await.unwrap();
        let user = AdapterId::new("acme".parse().unwrap(), "alice".parse().unwrap());
        let item = NewItem { id: None, input: None, output: "a".into(), created_at: None, metadata: None };
        store.append(&user, None, [0; 32], vec![item]).await.unwrap();
        let fence = store.claim("worker", 100, 3).await.unwrap().unwrap().fence;

        let busy = store.write().await.unwrap();
        let claim = store.claim("thief", 100, 3);
        let beat = async {
            match behind {
                true => store.beat(&fence, None, 100).await.is_ok(),
                false => false,
            }
        };
        let free = async {
            clock.advance_millis(1000);
            drop(busy);
        };
        // Polled in this order, each as far as it comes.
        let (stolen, kept, ()) = tokio::join!(biased; claim, beat, free);
        assert_eq!(kept, behind);
        stolen.unwrap().is_some()
    }

    #[tokio::test]
    async fn a_beat_that_waits_for_its_turn_keeps_the_job() {
        assert!(!is_stolen(true).await);
        // Negative control: who does not beat loses it.
        assert!(is_stolen(false).await);
    }
}
