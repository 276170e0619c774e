//! The two files of an adapter, of its head or of one generation, as HF peft reads them.

use axum::extract::State;
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use store::{AdapterFile, GenerationRecord};
use types::{AdapterId, GenerationId};

use super::wire::{CONFIG, WEIGHTS, made_for, named};
use super::{PathAdapter, PathGeneration, unknown_adapter};
use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::fault::unknown_generation;

/// The answer with a file of a generation.
async fn download(
    app: &App,
    id: &AdapterId,
    generation: &GenerationRecord,
    file: AdapterFile,
) -> Result<Response, ApiError> {
    let content = app.store.fetch_file(id, &generation.id, file).await?;
    let (name, media) = match file {
        AdapterFile::Config => (CONFIG, "application/json"),
        AdapterFile::Weights => (WEIGHTS, "application/octet-stream"),
    };
    let headers =
        [(CONTENT_TYPE, media.to_owned()), (CONTENT_DISPOSITION, format!("attachment; filename=\"{name}\""))];
    Ok((named(&generation.id), made_for(generation), headers, content).into_response())
}

async fn download_head(app: &App, id: &AdapterId, file: AdapterFile) -> Result<Response, ApiError> {
    let record = app.store.head(id).await?.ok_or_else(|| unknown_adapter(id))?;
    download(app, id, &record, file).await
}

async fn download_generation(
    app: &App,
    id: &AdapterId,
    generation: &GenerationId,
    file: AdapterFile,
) -> Result<Response, ApiError> {
    let record = app.store.generation(id, generation).await?;
    let record = record.ok_or_else(|| unknown_generation(&generation.to_string()))?;
    download(app, id, &record, file).await
}

/// Downloads the adapter's config. The header `x-atelier-generation` says of which generation.
#[utoipa::path(
    get,
    path = "/adapter_config.json",
    tag = "adapters",
    responses(
        (
            status = 200,
            description = "As HF peft reads it",
            content_type = "application/json",
            headers(
                ("x-atelier-generation" = String, description = "The generation it is of"),
                ("x-atelier-base" = String, description = "SHA-256 of the base it was made for, as an upload takes it"),
            ),
        ),
        (status = 404, description = "No such adapter", body = ErrorBody),
    )
)]
pub(super) async fn config(
    State(app): State<App>,
    PathAdapter(id): PathAdapter,
) -> Result<Response, ApiError> {
    download_head(&app, &id, AdapterFile::Config).await
}

/// Downloads the adapter's weights. The header `x-atelier-generation` says of which generation.
#[utoipa::path(
    get,
    path = "/adapter_model.safetensors",
    tag = "adapters",
    responses(
        (
            status = 200,
            description = "As HF peft reads it",
            content_type = "application/octet-stream",
            headers(
                ("x-atelier-generation" = String, description = "The generation it is of"),
                ("x-atelier-base" = String, description = "SHA-256 of the base it was made for, as an upload takes it"),
            ),
        ),
        (status = 404, description = "No such adapter", body = ErrorBody),
    )
)]
pub(super) async fn weights(
    State(app): State<App>,
    PathAdapter(id): PathAdapter,
) -> Result<Response, ApiError> {
    download_head(&app, &id, AdapterFile::Weights).await
}

/// Downloads a generation's config.
#[utoipa::path(
    get,
    path = "/generations/{generation}/adapter_config.json",
    tag = "adapters",
    params(("generation" = String, Path)),
    responses(
        (
            status = 200,
            description = "As HF peft reads it",
            content_type = "application/json",
            headers(
                ("x-atelier-generation" = String, description = "The generation it is of"),
                ("x-atelier-base" = String, description = "SHA-256 of the base it was made for, as an upload takes it"),
            ),
        ),
        (status = 404, description = "No such generation", body = ErrorBody),
    )
)]
pub(super) async fn generation_config(
    State(app): State<App>,
    PathGeneration(id, generation): PathGeneration,
) -> Result<Response, ApiError> {
    download_generation(&app, &id, &generation, AdapterFile::Config).await
}

/// Downloads a generation's weights.
#[utoipa::path(
    get,
    path = "/generations/{generation}/adapter_model.safetensors",
    tag = "adapters",
    params(("generation" = String, Path)),
    responses(
        (
            status = 200,
            description = "As HF peft reads it",
            content_type = "application/octet-stream",
            headers(
                ("x-atelier-generation" = String, description = "The generation it is of"),
                ("x-atelier-base" = String, description = "SHA-256 of the base it was made for, as an upload takes it"),
            ),
        ),
        (status = 404, description = "No such generation", body = ErrorBody),
    )
)]
pub(super) async fn generation_weights(
    State(app): State<App>,
    PathGeneration(id, generation): PathGeneration,
) -> Result<Response, ApiError> {
    download_generation(&app, &id, &generation, AdapterFile::Weights).await
}
