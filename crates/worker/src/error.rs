//! Why a job did not come to an end.

use store::StoreError;
use train::TrainError;

/// What the worker does about each: see [`WorkerError::retry_after_millis`].
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The store failed, or the job belongs to somebody else by now.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Training failed or was stopped.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The head cannot be read to compare with it.
    #[error("the current adapter cannot be read: {0}")]
    Head(#[from] peft::PeftError),
    /// The training thread panicked.
    #[error("training panicked")]
    Panicked,
    /// The training threads cannot be started.
    #[error("the training threads cannot be started: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
    /// A thread or its runtime cannot be started.
    #[error("a thread cannot be started: {0}")]
    Start(#[from] std::io::Error),
}

/// The first wait before another try, and the longest.
const FIRST_WAIT: i64 = 5_000;
const LONGEST_WAIT: i64 = 600_000;

impl WorkerError {
    /// When to try again after so many attempts, twice as late every time; `None` when the same would happen again.
    #[must_use]
    pub fn retry_after_millis(&self, attempts: u32) -> Option<i64> {
        match self {
            Self::Store(_) | Self::Panicked | Self::Threads(_) | Self::Start(_) => {
                let doublings = attempts.saturating_sub(1).min(16);
                Some((FIRST_WAIT << doublings).min(LONGEST_WAIT))
            }
            Self::Train(_) | Self::Head(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_limit() {
        let waits =
            [1, 2, 3, 20, u32::MAX].map(|attempts| WorkerError::Panicked.retry_after_millis(attempts));
        assert_eq!(waits, [5_000, 10_000, 20_000, 600_000, 600_000].map(Some));
        assert_eq!(WorkerError::Train(TrainError::NoExamples).retry_after_millis(1), None);
    }
}
