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
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Stopped,
}

impl From<StoreError> for AcquireError {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}
