//! The HTTP role: OpenAI's and TGI's generate endpoints, histories, users, adapters, jobs, operation.
//!
//! What it is not: it trains nothing and runs no model; it turns requests into tokens for an [`engine::Engine`] and
//! tokens into answers.
//!
//! Architecture invariant: wire JSON exists in this crate only, and the tenant comes from the API key, never from a
//! body or a path.

mod admission;
mod app;
mod auth;
mod body;
mod error;
mod fault;
mod generation;
mod json;
mod limits;
mod logprobs;
mod observe;
mod openapi;
mod routes;
mod sampling;
mod serve;
mod sse;
mod upload_rate;
mod usage;
mod wanted;

pub use app::{App, AppState};
pub use auth::{ApiKey, Auth};
pub use error::{ApiError, Code, ErrorBody, ErrorDetail, TgiErrorBody};
pub use limits::Limits;
pub use openapi::openapi_json;
pub use serve::serve;
