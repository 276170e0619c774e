//! What the parts report, in the words for clients.

use std::time::Duration;

use adapters::AcquireError;
use engine::SubmitError;
use store::StoreError;
use text::TextError;
use types::IdError;

use crate::error::{ApiError, Code};

/// When to come back if the whole server is busy.
const BUSY_RETRY: Duration = Duration::from_secs(2);

/// When to come back if a part of the server is gone.
const UNAVAILABLE_RETRY: Duration = Duration::from_secs(10);

/// The server, or the part the request needs, is going away.
pub(crate) fn unavailable(cause: impl std::fmt::Display) -> ApiError {
    ApiError::new(Code::Unavailable, "the server is shutting down or starting: try again")
        .cause(cause)
        .retry_after(UNAVAILABLE_RETRY)
}

/// The whole server has too much to do.
pub(crate) fn overloaded(message: &str) -> ApiError {
    ApiError::new(Code::Overloaded, message).retry_after(BUSY_RETRY)
}

/// The time of a request is over.
pub(crate) fn deadline(what: &str) -> ApiError {
    ApiError::new(Code::DeadlineExceeded, format!("the time for this request is over: {what}"))
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::IdempotencyConflict { .. } => {
                Self::new(Code::IdempotencyKeyReused, error.to_string()).param("Idempotency-Key")
            }
            StoreError::ItemConflict { .. } => {
                Self::new(Code::ItemConflict, error.to_string()).param("items")
            }
            StoreError::Invalid { field, .. } => {
                Self::new(Code::InvalidValue, error.to_string()).param(*field)
            }
            StoreError::DiskFull { .. } => {
                Self::new(Code::StorageFull, "the server's disk is full").cause(&error)
            }
            StoreError::Stopped => unavailable(&error),
            _ => Self::internal(&error),
        }
    }
}

impl From<AcquireError> for ApiError {
    fn from(error: AcquireError) -> Self {
        match &error {
            AcquireError::OtherBase { .. } => {
                let message = "this user's adapter was trained for another base model: upload history to train a new one";
                Self::new(Code::AdapterIncompatible, message).cause(&error)
            }
            AcquireError::TooLarge { .. } => {
                let message = "this user's adapter is larger than this server's memory for adapters in use";
                Self::new(Code::AdapterIncompatible, message).cause(&error)
            }
            AcquireError::Full { .. } => {
                overloaded("the memory for adapters in use is full: try again").cause(&error)
            }
            AcquireError::Late => deadline("the adapter was not loaded in time"),
            AcquireError::Stopped => unavailable(&error),
            AcquireError::Store(_) | AcquireError::Invalid(_) => {
                Self::new(Code::Internal, "this user's adapter cannot be read").cause(&error)
            }
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match &error {
            SubmitError::Busy { .. } => overloaded("the server is busy: try again").cause(&error),
            SubmitError::EmptyPrompt => Self::new(Code::InvalidValue, error.to_string()),
            SubmitError::TooLong { .. } => Self::new(Code::ContextLengthExceeded, error.to_string()),
            SubmitError::TokenOutOfRange { .. } => Self::new(Code::InvalidValue, error.to_string()),
            SubmitError::Stopped => unavailable(&error),
        }
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        if matches!(error, TextError::TextTooLong { .. }) {
            Self::new(Code::ContextLengthExceeded, error.to_string())
        } else if error.is_callers_fault() {
            Self::new(Code::InvalidValue, error.to_string())
        } else {
            Self::internal(&error)
        }
    }
}

/// An id that a client wrote.
pub(crate) fn invalid_id(param: &str, error: &IdError) -> ApiError {
    ApiError::new(Code::InvalidValue, error.to_string()).param(param)
}
