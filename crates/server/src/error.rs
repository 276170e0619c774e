//! The one error that clients see: stable codes, rendered in OpenAI's envelope or in TGI's shape.

use std::fmt::Display;
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use types::GenerationId;
use utoipa::ToSchema;

/// Longest message that is sent; what a client wrote may be quoted in it.
const MAX_MESSAGE_CHARS: usize = 400;

/// What went wrong, as clients can rely on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// The body is not JSON, or not the JSON it should be.
    InvalidJson,
    /// A value is of the wrong type or out of range.
    InvalidValue,
    /// A value is needed and not there.
    MissingParameter,
    /// A parameter that this server does not know.
    UnknownParameter,
    /// A parameter that clients of this API may send, and that this server does not support.
    UnsupportedParameter,
    /// Prompt and answer do not fit the context.
    ContextLengthExceeded,
    /// An upload without items.
    EmptyHistory,
    /// The body is not the form it should be.
    InvalidMultipart,
    /// The files are no adapter of this base that can be served.
    InvalidAdapter,
    /// Adapters are trained here from an uploaded history, not loaded by name.
    AdapterLoadUnsupported,
    /// The API key is missing or wrong.
    InvalidApiKey,
    /// The API key is one of a tenant, and the request concerns all tenants.
    OperatorKeyNeeded,
    /// No such model, or no such adapter that a model name stands for.
    ModelNotFound,
    /// No such user.
    UserNotFound,
    /// The user has no adapter, or there is no such shared adapter.
    AdapterNotFound,
    /// The adapter has no such generation.
    GenerationNotFound,
    /// No such job.
    JobNotFound,
    /// No such history item.
    ItemNotFound,
    /// The job has ended, so it cannot be cancelled.
    JobEnded,
    /// No such route.
    RouteNotFound,
    /// The route does not know the method.
    MethodNotAllowed,
    /// The body did not arrive in time.
    RequestTimeout,
    /// An item with this id and other content exists.
    ItemConflict,
    /// The adapter belongs to another base model.
    AdapterIncompatible,
    /// The head is not the one the request expects.
    HeadMoved,
    /// The head and pinned generations are not deleted.
    GenerationInUse,
    /// The body is too large.
    BodyTooLarge,
    /// The user's history would be too large.
    HistoryFull,
    /// The body is of another media type.
    UnsupportedMediaType,
    /// The idempotency key was used with another request.
    IdempotencyKeyReused,
    /// Too many requests of this user, or too many bytes.
    RateLimited,
    /// A fault of the server.
    Internal,
    /// The engine gave up an answer.
    GenerationFailed,
    /// The server has too much to do.
    Overloaded,
    /// The server is shutting down, or a part of it is not there.
    Unavailable,
    /// The request's time is over.
    DeadlineExceeded,
    /// The server's disk is full.
    StorageFull,
}

impl Code {
    /// The code as it is sent, its status, and OpenAI's type of error.
    const fn facts(self) -> (&'static str, u16, &'static str) {
        const REQUEST: &str = "invalid_request_error";
        match self {
            Self::InvalidJson => ("invalid_json", 400, REQUEST),
            Self::InvalidValue => ("invalid_value", 400, REQUEST),
            Self::MissingParameter => ("missing_required_parameter", 400, REQUEST),
            Self::UnknownParameter => ("unknown_parameter", 400, REQUEST),
            Self::UnsupportedParameter => ("unsupported_parameter", 400, REQUEST),
            Self::ContextLengthExceeded => ("context_length_exceeded", 400, REQUEST),
            Self::EmptyHistory => ("empty_history", 400, REQUEST),
            Self::InvalidMultipart => ("invalid_multipart", 400, REQUEST),
            Self::InvalidAdapter => ("invalid_adapter", 400, REQUEST),
            Self::AdapterLoadUnsupported => ("adapter_load_unsupported", 400, REQUEST),
            Self::InvalidApiKey => ("invalid_api_key", 401, "authentication_error"),
            Self::OperatorKeyNeeded => ("operator_key_needed", 403, "permission_error"),
            Self::ModelNotFound => ("model_not_found", 404, REQUEST),
            Self::UserNotFound => ("user_not_found", 404, REQUEST),
            Self::AdapterNotFound => ("adapter_not_found", 404, REQUEST),
            Self::GenerationNotFound => ("generation_not_found", 404, REQUEST),
            Self::JobNotFound => ("job_not_found", 404, REQUEST),
            Self::ItemNotFound => ("item_not_found", 404, REQUEST),
            Self::JobEnded => ("job_ended", 409, REQUEST),
            Self::RouteNotFound => ("route_not_found", 404, REQUEST),
            Self::MethodNotAllowed => ("method_not_allowed", 405, REQUEST),
            Self::RequestTimeout => ("request_timeout", 408, REQUEST),
            Self::ItemConflict => ("item_conflict", 409, REQUEST),
            Self::AdapterIncompatible => ("adapter_incompatible", 409, REQUEST),
            Self::HeadMoved => ("head_moved", 409, REQUEST),
            Self::GenerationInUse => ("generation_in_use", 409, REQUEST),
            Self::BodyTooLarge => ("body_too_large", 413, REQUEST),
            Self::HistoryFull => ("history_full", 413, REQUEST),
            Self::UnsupportedMediaType => ("unsupported_media_type", 415, REQUEST),
            Self::IdempotencyKeyReused => ("idempotency_key_reused", 422, REQUEST),
            Self::RateLimited => ("rate_limit_exceeded", 429, "rate_limit_error"),
            Self::Internal => ("internal_error", 500, "server_error"),
            Self::GenerationFailed => ("generation_failed", 500, "server_error"),
            Self::Overloaded => ("overloaded", 503, "server_error"),
            Self::Unavailable => ("unavailable", 503, "server_error"),
            Self::DeadlineExceeded => ("deadline_exceeded", 504, "server_error"),
            Self::StorageFull => ("storage_full", 507, "server_error"),
        }
    }

    /// The code as it is sent.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        self.facts().0
    }

    /// The HTTP status in OpenAI's envelope.
    #[must_use]
    pub fn status(self) -> StatusCode {
        StatusCode::from_u16(self.facts().1).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// Status and `error_type` in TGI's shape.
    fn tgi(self) -> (StatusCode, &'static str) {
        match self {
            Self::ModelNotFound => (self.status(), "model_not_found"),
            Self::RateLimited | Self::Overloaded => (StatusCode::TOO_MANY_REQUESTS, "overloaded"),
            Self::DeadlineExceeded => (StatusCode::INTERNAL_SERVER_ERROR, "incomplete_generation"),
            _ if self.status() == StatusCode::BAD_REQUEST => (StatusCode::UNPROCESSABLE_ENTITY, "validation"),
            _ if self.status().is_client_error() => (self.status(), "validation"),
            _ => (StatusCode::FAILED_DEPENDENCY, "generation"),
        }
    }
}

/// What a client is told; an inside cause goes to the log only.
#[derive(Debug, thiserror::Error)]
#[error("{}: {}", .0.code.as_str(), .0.message)]
pub struct ApiError(Box<Fields>);

// Behind one pointer, so that results stay small.
#[derive(Debug)]
struct Fields {
    code: Code,
    message: String,
    param: Option<String>,
    retry_after: Option<Duration>,
    cause: Option<String>,
    current_head: Option<String>,
}

impl ApiError {
    /// An error with a message for the client.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let mut message: String = message.into();
        if let Some((end, _)) = message.char_indices().nth(MAX_MESSAGE_CHARS) {
            message.truncate(end);
            message.push_str("...");
        }
        Self(Box::new(Fields {
            code,
            message,
            param: None,
            retry_after: None,
            cause: None,
            current_head: None,
        }))
    }

    /// A value is of the wrong type or out of range: `"{param} {problem}"`.
    pub fn invalid(param: impl Into<String>, problem: impl Display) -> Self {
        let param: String = param.into();
        Self::new(Code::InvalidValue, format!("{param} {problem}")).param(param)
    }

    /// A fault of the server, of which the client learns no more than that.
    pub fn internal(cause: impl Display) -> Self {
        Self::new(Code::Internal, "the server failed; the request id names this failure in its log")
            .cause(cause)
    }

    /// Names the field that is wrong.
    #[must_use]
    pub fn param(mut self, param: impl Into<String>) -> Self {
        self.0.param = Some(param.into());
        self
    }

    /// Tells when to try again.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.0.retry_after = Some(wait);
        self
    }

    /// What is behind it, for the log.
    #[must_use]
    pub fn cause(mut self, cause: impl Display) -> Self {
        self.0.cause = Some(cause.to_string());
        self
    }

    /// Names the head as it is: a generation, or `none`.
    #[must_use]
    pub fn current_head(mut self, head: Option<GenerationId>) -> Self {
        self.0.current_head = Some(head.map_or_else(|| "none".to_owned(), |head| head.to_string()));
        self
    }

    /// Its code.
    #[must_use]
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// The body in OpenAI's envelope.
    #[must_use]
    pub fn body(&self) -> ErrorBody {
        let (code, _, kind) = self.0.code.facts();
        let Fields { message, param, current_head, .. } = &*self.0;
        ErrorBody {
            error: ErrorDetail {
                message: message.clone(),
                kind: kind.to_owned(),
                param: param.clone(),
                code: code.to_owned(),
                current_head: current_head.clone(),
            },
        }
    }

    /// The body in TGI's shape.
    #[must_use]
    pub fn tgi_body(&self) -> TgiErrorBody {
        TgiErrorBody { error: self.0.message.clone(), error_type: self.0.code.tgi().1.to_owned() }
    }

    /// As a response of the routes that speak TGI.
    #[must_use]
    pub fn into_tgi_response(self) -> Response {
        self.respond(self.0.code.tgi().0, Json(self.tgi_body()))
    }

    /// Logs what the client is not told.
    pub fn log(&self) {
        let Fields { code, message, cause, .. } = &*self.0;
        let (code, cause) = (code.as_str(), cause.as_deref().unwrap_or("none"));
        if self.0.code.status().is_server_error() {
            tracing::error!(code, cause, "{message}");
        } else {
            tracing::debug!(code, cause, "{message}");
        }
    }

    fn respond(&self, status: StatusCode, body: impl IntoResponse) -> Response {
        self.log();
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        if let Some(wait) = self.0.retry_after {
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if self.0.code == Code::InvalidApiKey {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.respond(self.0.code.status(), Json(self.body()))
    }
}

/// OpenAI's error envelope; its four keys are always there.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// For people.
    pub message: String,
    /// OpenAI's class of error.
    #[serde(rename = "type")]
    #[schema(example = "invalid_request_error")]
    pub kind: String,
    /// The field that is wrong.
    #[schema(required)]
    pub param: Option<String>,
    /// For programs; does not change.
    #[schema(example = "invalid_value")]
    pub code: String,
    /// With `head_moved`: the generation that is head, or `none`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current_head: Option<String>,
}

/// TGI's error shape.
#[derive(Debug, Serialize, ToSchema)]
pub struct TgiErrorBody {
    /// For people.
    pub error: String,
    /// `validation`, `overloaded`, `generation`, `incomplete_generation` or `model_not_found`.
    #[schema(example = "validation")]
    pub error_type: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_input_is_cut_at_a_character() {
        let error = ApiError::invalid("stop", "é".repeat(10_000));
        let message = error.body().error.message;
        assert!(message.ends_with("é...") && message.chars().count() == MAX_MESSAGE_CHARS + 3, "{message}");
    }

    #[test]
    fn causes_stay_inside() {
        let error = ApiError::internal("table generations is gone");
        let text = serde_json::to_string(&error.body()).expect("serialises");
        assert!(!text.contains("generations"), "{text}");
        assert!(text.contains(r#""param":null"#), "{text}");
    }

    #[test]
    fn waits_are_rounded_up() {
        let error = ApiError::new(Code::RateLimited, "slow down").retry_after(Duration::from_millis(1200));
        let response = error.into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
    }
}
