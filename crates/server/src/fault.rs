//! What the parts report, in the words for clients.

use std::time::Duration;

use adapters::AcquireError;
use engine::SubmitError;
use peft::PeftError;
use store::StoreError;
use text::TextError;
use types::{GenerationId, IdError};

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
            StoreError::HeadMoved { current } => {
                let head = current.map_or_else(|| "none".to_owned(), |head| head.to_string());
                let message = format!("the head is not the one expected: it is {head}");
                Self::new(Code::HeadMoved, message).param("expected_head").current_head(*current)
            }
            StoreError::NotFound { what: "generation", id } => unknown_generation(id),
            // Looked up before, and erased since.
            StoreError::NotFound { what: "user", .. } => {
                Self::new(Code::AdapterNotFound, "the adapter was deleted meanwhile").cause(&error)
            }
            StoreError::IsHead { id } => {
                let message = format!("the generation {id} is the head: move the head first");
                Self::new(Code::GenerationInUse, message).param("generation").current_head(Some(*id))
            }
            StoreError::Pinned { id } => {
                let message = format!("the generation {id} is pinned: unpin it first");
                Self::new(Code::GenerationInUse, message).param("generation")
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
                let message = "this adapter was made for another base model: train or upload a new one";
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
                Self::new(Code::Internal, "this adapter cannot be read").cause(&error)
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

/// The files are no adapter of this base; names the field or tensor that is wrong.
pub(crate) fn invalid_adapter(error: &PeftError) -> ApiError {
    let param = match error {
        PeftError::Field { field, .. } | PeftError::Unsupported { field, .. } => field,
        PeftError::Tensor { tensor, .. } => tensor,
        PeftError::Json(_) => "adapter_config.json",
        PeftError::Safetensors(_) => "adapter_model.safetensors",
    };
    ApiError::new(Code::InvalidAdapter, error.to_string()).param(param)
}

/// An adapter of another base model than this server's.
pub(crate) fn other_base(param: &str, given: &[u8; 32], expected: &[u8; 32]) -> ApiError {
    // A hash of a base is written as one of a generation is.
    let [given, expected] = [given, expected].map(|hash| GenerationId::from_bytes(*hash));
    let message = format!("this adapter belongs to the base {given}, and this server's base is {expected}");
    ApiError::new(Code::AdapterIncompatible, message).param(param)
}

/// No such generation of this adapter.
pub(crate) fn unknown_generation(id: &str) -> ApiError {
    ApiError::new(Code::GenerationNotFound, format!("this adapter has no generation {id:?}"))
        .param("generation")
}

/// An id that a client wrote.
pub(crate) fn invalid_id(param: &str, error: &IdError) -> ApiError {
    ApiError::new(Code::InvalidValue, error.to_string()).param(param)
}
