//! Health, limits, the API's description, and the two vLLM routes that are deliberately not served.

use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use types::TrainingLimits;
use utoipa::ToSchema;

use crate::app::App;
use crate::error::{ApiError, Code, ErrorBody};
use crate::openapi::openapi_json;

/// How the server is.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Health {
    /// `ok`.
    status: &'static str,
}

/// The process is alive.
#[utoipa::path(get, path = "/health/live", tag = "operation", responses((status = 200, description = "Alive", body = Health)))]
pub(crate) async fn live() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// The server can take requests: the model is loaded, the engine runs and the store answers.
#[utoipa::path(
    get,
    path = "/health/ready",
    tag = "operation",
    responses(
        (status = 200, description = "Ready", body = Health),
        (status = 500, description = "The store does not answer", body = ErrorBody),
        (status = 503, description = "The engine has stopped", body = ErrorBody),
    )
)]
pub(crate) async fn ready(State(app): State<App>) -> Result<Json<Health>, ApiError> {
    if let Some(reason) = app.engine.stopped() {
        let message = "the engine has stopped after a fault: the server must be started again";
        return Err(ApiError::new(Code::Unavailable, message).cause(reason));
    }
    app.store.queue_stats().await?;
    Ok(Json(Health { status: "ok" }))
}

/// What a client may ask for.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WireLimits {
    /// Tokens of prompt and answer together.
    context_tokens: usize,
    body_bytes: usize,
    upload_bytes: usize,
    adapter_config_bytes: usize,
    adapter_weights_bytes: usize,
    json_depth: usize,
    /// `n` times the number of prompts.
    choices: usize,
    stop_strings: usize,
    stop_bytes: usize,
    stop_token_ids: usize,
    top_logprobs: u32,
    logit_bias: usize,
    in_flight_per_user: usize,
    queued_per_user: usize,
    queued: usize,
    upload_bytes_per_minute: u64,
    history_bytes_per_user: u64,
    item_bytes: usize,
    item_metadata_bytes: usize,
    page: u32,
    generation_seconds: u64,
    training: WireTrainingLimits,
}

/// The most that an upload's or a job's `training` may ask for.
#[derive(Debug, Serialize, ToSchema)]
struct WireTrainingLimits {
    rank: usize,
    virtual_tokens: usize,
    epochs: u32,
    batch: usize,
    learning_rate: f64,
    max_tokens: usize,
    /// Blocks of the base.
    layers: usize,
}

impl From<TrainingLimits> for WireTrainingLimits {
    fn from(limits: TrainingLimits) -> Self {
        let TrainingLimits { rank, virtual_tokens, epochs, batch, learning_rate, max_tokens, layers } =
            limits;
        Self { rank, virtual_tokens, epochs, batch, learning_rate, max_tokens, layers }
    }
}

/// The limits that requests are checked against.
#[utoipa::path(get, path = "/v1/limits", tag = "operation", responses((status = 200, description = "The limits", body = WireLimits)))]
pub(crate) async fn limits(State(app): State<App>) -> Json<WireLimits> {
    let limits = &app.limits;
    Json(WireLimits {
        context_tokens: app.engine.limits().context,
        body_bytes: limits.body_bytes,
        upload_bytes: limits.upload_bytes,
        adapter_config_bytes: limits.adapter_config_bytes,
        adapter_weights_bytes: limits.adapter_weights_bytes,
        json_depth: limits.json_depth,
        choices: limits.choices,
        stop_strings: limits.stop_strings,
        stop_bytes: limits.stop_bytes,
        stop_token_ids: limits.stop_tokens,
        top_logprobs: limits.top_logprobs,
        logit_bias: limits.logit_bias,
        in_flight_per_user: limits.in_flight_per_user,
        queued_per_user: limits.queued_per_user,
        queued: limits.queued,
        upload_bytes_per_minute: limits.upload_bytes_per_minute,
        history_bytes_per_user: limits.history_bytes_per_user,
        item_bytes: limits.item_bytes,
        item_metadata_bytes: limits.item_metadata_bytes,
        page: limits.page,
        generation_seconds: limits.generation_timeout.as_secs(),
        training: app.training_limits().into(),
    })
}

/// The description of this API.
#[utoipa::path(get, path = "/openapi.json", tag = "operation", responses((status = 200, description = "OpenAPI 3.1", content_type = "application/json")))]
pub(crate) async fn description() -> Response {
    ([(CONTENT_TYPE, "application/json")], openapi_json()).into_response()
}

fn no_loading() -> ApiError {
    let message = "adapters are not loaded by name or path here: upload the two files of one with PUT \
                   /v1/users/{user}/adapter or PUT /v1/adapters/{name}, or a history with POST \
                   /v1/users/{user}/history, and it is served from then on";
    ApiError::new(Code::AdapterLoadUnsupported, message)
}

/// vLLM's route; a path from a client is a hole, so it is refused.
#[utoipa::path(post, path = "/v1/load_lora_adapter", tag = "operation", responses((status = 400, description = "Always; says what to do instead", body = ErrorBody)))]
pub(crate) async fn load_lora_adapter() -> ApiError {
    no_loading()
}

/// vLLM's route; refused likewise.
#[utoipa::path(post, path = "/v1/unload_lora_adapter", tag = "operation", responses((status = 400, description = "Always; says what to do instead", body = ErrorBody)))]
pub(crate) async fn unload_lora_adapter() -> ApiError {
    no_loading()
}
