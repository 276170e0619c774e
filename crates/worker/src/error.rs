//! Why a job did not come to an end.

use store::StoreError;
use train::TrainError;

/// What the worker does about each: see `WorkerError::report`.
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
    /// What is written down of the job, and when to try again, in milliseconds; `None` when the same would happen again,
    /// or this was the last of `most` attempts.
    pub(crate) fn report(&self, attempts: u32, most: u32) -> (String, Option<i64>) {
        match self.retry_after_millis(attempts) {
            Some(_) if attempts >= most => {
                (format!("gave up after {attempts} attempts; the last one: {self}"), None)
            }
            again => (self.to_string(), again),
        }
    }

    /// Twice as late every time.
    fn retry_after_millis(&self, attempts: u32) -> Option<i64> {
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

    #[test]
    fn the_last_attempt_is_said_to_be_the_last() {
        assert_eq!(WorkerError::Panicked.report(2, 3), ("training panicked".to_owned(), Some(10_000)));
        let (reason, again) = WorkerError::Panicked.report(3, 3);
        assert_eq!(
            (reason.as_str(), again),
            ("gave up after 3 attempts; the last one: training panicked", None)
        );
        // What would happen again was not given up for want of attempts.
        let (reason, again) = WorkerError::Train(TrainError::NoExamples).report(3, 3);
        assert!(!reason.contains("gave up") && again.is_none(), "{reason}");
    }
}
