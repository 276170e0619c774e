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
    /// An item cannot be turned into an example.
    #[error("history item {item}: {problem}")]
    Item {
        /// The item's id.
        item: String,
        /// Why.
        problem: String,
    },
    /// The head cannot be read to compare with it.
    #[error("the current adapter cannot be read: {0}")]
    Head(#[from] peft::PeftError),
    /// The training thread panicked.
    #[error("training panicked")]
    Panicked,
    /// The training threads cannot be started.
    #[error("the training threads cannot be started: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

impl WorkerError {
    /// When to try again; `None` when the same would happen again.
    #[must_use]
    pub fn retry_after_millis(&self) -> Option<i64> {
        match self {
            Self::Store(_) | Self::Panicked | Self::Threads(_) => Some(5_000),
            Self::Train(_) | Self::Item { .. } | Self::Head(_) => None,
        }
    }
}
