//! `/v1/users/{user}/adapter`: the head, and its two files as HF peft reads them.

use axum::Json;
use axum::extract::State;
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use store::{AdapterFiles, GenerationRecord};
use utoipa::ToSchema;

use crate::app::App;
use crate::error::{ApiError, Code, ErrorBody};
use crate::routes::PathUser;
use crate::routes::items::seconds;
use types::AdapterId;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// The adapter that answers a user's new requests.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WireAdapter {
    user: String,
    /// `adapter`.
    object: &'static str,
    /// Hash of base, config and weights.
    generation: String,
    /// The generation before it, if there was one.
    #[schema(required)]
    parent: Option<String>,
    /// SHA-256 of the base it belongs to.
    base_hash: String,
    /// Unix seconds.
    created_at: f64,
    /// Recipe, gate report and step counts of the training.
    #[schema(value_type = Object)]
    training: Value,
    files: Vec<WireFile>,
}

/// A file to download.
#[derive(Debug, Serialize, ToSchema)]
struct WireFile {
    name: &'static str,
    bytes: usize,
    sha256: String,
    url: String,
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn head(app: &App, id: &AdapterId) -> Result<(GenerationRecord, AdapterFiles), ApiError> {
    let none =
        || ApiError::new(Code::AdapterNotFound, format!("the user {} has no adapter", id.user)).param("user");
    let record = app.store.head(id).await?.ok_or_else(none)?;
    let files = app.store.fetch(id, &record.id).await?;
    Ok((record, files))
}

/// Looks at a user's adapter.
#[utoipa::path(
    get,
    path = "/v1/users/{user}/adapter",
    tag = "users",
    params(("user" = String, Path)),
    responses(
        (status = 200, description = "The adapter", body = WireAdapter),
        (status = 404, description = "The user has no adapter", body = ErrorBody),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    PathUser(id): PathUser,
) -> Result<Json<WireAdapter>, ApiError> {
    let (record, files) = head(&app, &id).await?;
    let file = |name, content: &[u8]| WireFile {
        name,
        bytes: content.len(),
        sha256: hex(&Sha256::digest(content)),
        url: format!("/v1/users/{}/adapter/{name}", id.user),
    };
    Ok(Json(WireAdapter {
        object: "adapter",
        generation: record.id.to_string(),
        parent: record.parent.map(|parent| parent.to_string()),
        base_hash: hex(&record.base),
        created_at: seconds(record.created_at),
        training: record.meta,
        files: vec![file(CONFIG, &files.config), file(WEIGHTS, &files.weights)],
        user: id.user.into(),
    }))
}

fn download(name: &str, media: &'static str, generation: &GenerationRecord, content: Vec<u8>) -> Response {
    let headers = [
        (CONTENT_TYPE, media.to_owned()),
        (CONTENT_DISPOSITION, format!("attachment; filename=\"{name}\"")),
        ("x-atelier-generation".parse().unwrap_or(axum::http::header::ETAG), generation.id.to_string()),
    ];
    (headers, content).into_response()
}

/// Downloads the adapter's config.
#[utoipa::path(
    get,
    path = "/v1/users/{user}/adapter/adapter_config.json",
    tag = "users",
    params(("user" = String, Path)),
    responses(
        (status = 200, description = "As HF peft reads it", content_type = "application/json"),
        (status = 404, description = "The user has no adapter", body = ErrorBody),
    )
)]
pub(crate) async fn config(State(app): State<App>, PathUser(id): PathUser) -> Result<Response, ApiError> {
    let (record, files) = head(&app, &id).await?;
    Ok(download(CONFIG, "application/json", &record, files.config))
}

/// Downloads the adapter's weights.
#[utoipa::path(
    get,
    path = "/v1/users/{user}/adapter/adapter_model.safetensors",
    tag = "users",
    params(("user" = String, Path)),
    responses(
        (status = 200, description = "As HF peft reads it", content_type = "application/octet-stream"),
        (status = 404, description = "The user has no adapter", body = ErrorBody),
    )
)]
pub(crate) async fn weights(State(app): State<App>, PathUser(id): PathUser) -> Result<Response, ApiError> {
    let (record, files) = head(&app, &id).await?;
    Ok(download(WEIGHTS, "application/octet-stream", &record, files.weights))
}
