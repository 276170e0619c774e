//! The two files of an adapter, of its head or of one generation, as HF peft reads them.

use axum::extract::State;
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use store::AdapterFiles;
use types::{AdapterId, GenerationId};

use super::wire::{CONFIG, WEIGHTS, named};
use super::{PathAdapter, PathGeneration, unknown_adapter};
use crate::app::App;
use crate::error::{ApiError, ErrorBody};

async fn head(app: &App, id: &AdapterId) -> Result<(GenerationId, AdapterFiles), ApiError> {
    let record = app.store.head(id).await?.ok_or_else(|| unknown_adapter(id))?;
    Ok((record.id, app.store.fetch(id, &record.id).await?))
}

fn download(name: &str, media: &'static str, generation: &GenerationId, content: Vec<u8>) -> Response {
    let headers =
        [(CONTENT_TYPE, media.to_owned()), (CONTENT_DISPOSITION, format!("attachment; filename=\"{name}\""))];
    (named(generation), headers, content).into_response()
}

fn config_file(generation: &GenerationId, files: AdapterFiles) -> Response {
    download(CONFIG, "application/json", generation, files.config)
}

fn weights_file(generation: &GenerationId, files: AdapterFiles) -> Response {
    download(WEIGHTS, "application/octet-stream", generation, files.weights)
}

/// Downloads the adapter's config. The header `x-atelier-generation` says of which generation.
#[utoipa::path(
    get,
    path = "/adapter_config.json",
    tag = "adapters",
    responses(
        (status = 200, description = "As HF peft reads it", content_type = "application/json"),
        (status = 404, description = "No such adapter", body = ErrorBody),
    )
)]
pub(super) async fn config(
    State(app): State<App>,
    PathAdapter(id): PathAdapter,
) -> Result<Response, ApiError> {
    let (generation, files) = head(&app, &id).await?;
    Ok(config_file(&generation, files))
}

/// Downloads the adapter's weights. The header `x-atelier-generation` says of which generation.
#[utoipa::path(
    get,
    path = "/adapter_model.safetensors",
    tag = "adapters",
    responses(
        (status = 200, description = "As HF peft reads it", content_type = "application/octet-stream"),
        (status = 404, description = "No such adapter", body = ErrorBody),
    )
)]
pub(super) async fn weights(
    State(app): State<App>,
    PathAdapter(id): PathAdapter,
) -> Result<Response, ApiError> {
    let (generation, files) = head(&app, &id).await?;
    Ok(weights_file(&generation, files))
}

/// Downloads a generation's config.
#[utoipa::path(
    get,
    path = "/generations/{generation}/adapter_config.json",
    tag = "adapters",
    params(("generation" = String, Path)),
    responses(
        (status = 200, description = "As HF peft reads it", content_type = "application/json"),
        (status = 404, description = "No such generation", body = ErrorBody),
    )
)]
pub(super) async fn generation_config(
    State(app): State<App>,
    PathGeneration(id, generation): PathGeneration,
) -> Result<Response, ApiError> {
    Ok(config_file(&generation, app.store.fetch(&id, &generation).await?))
}

/// Downloads a generation's weights.
#[utoipa::path(
    get,
    path = "/generations/{generation}/adapter_model.safetensors",
    tag = "adapters",
    params(("generation" = String, Path)),
    responses(
        (status = 200, description = "As HF peft reads it", content_type = "application/octet-stream"),
        (status = 404, description = "No such generation", body = ErrorBody),
    )
)]
pub(super) async fn generation_weights(
    State(app): State<App>,
    PathGeneration(id, generation): PathGeneration,
) -> Result<Response, ApiError> {
    Ok(weights_file(&generation, app.store.fetch(&id, &generation).await?))
}
