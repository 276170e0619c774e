//! Why an adapter cannot be had.

use std::sync::Arc;

use peft::PeftError;
use store::StoreError;
use types::GenerationId;

/// Waiters of the same load share one error.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AcquireError {
    /// The generation was trained for another base.
    #[error("generation {generation} belongs to another base model")]
    OtherBase {
        /// The generation.
        generation: GenerationId,
    },
    /// The store could not read it.
    #[error("the adapter cannot be read: {0}")]
    Store(Arc<StoreError>),
    /// Its files are not a valid adapter of this base.
    #[error("the adapter is not valid: {0}")]
    Invalid(#[from] PeftError),
    /// It takes more pages than there are.
    #[error("the adapter needs more than the {pages} pages of {page_bytes} bytes that adapters in use have")]
    TooLarge {
        /// Pages in all.
        pages: usize,
        /// Bytes of each.
        page_bytes: usize,
    },
    /// All slots are leased, or too many requests wait; try again later.
    #[error("the memory for adapters in use is full, and {waiting} requests wait for it")]
    Full {
        /// Requests that wait.
        waiting: usize,
    },
    /// It was not loaded in time.
    #[error("the adapter was not loaded in time")]
    Late,
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Stopped,
}

impl From<StoreError> for AcquireError {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}
