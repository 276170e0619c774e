//! The generations of an adapter: listed with where they come from, pinned, deleted.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use store::GenerationCursor;
use utoipa::ToSchema;

use super::wire::WireGeneration;
use super::{PathAdapter, PathGeneration, unknown_adapter};
use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::fault::unknown_generation;
use crate::routes::{PageQuery, Paged};

/// A page of generations, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct GenerationPage {
    /// `list`.
    object: &'static str,
    data: Vec<WireGeneration>,
    has_more: bool,
    /// Where the next page begins: the query's `after`.
    #[schema(required)]
    next: Option<String>,
}

/// A generation that is no more.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DeletedGeneration {
    id: String,
    /// `generation.deleted`.
    object: &'static str,
    /// `true`.
    deleted: bool,
}

/// Lists the generations, newest first.
#[utoipa::path(
    get,
    path = "/generations",
    tag = "adapters",
    params(PageQuery),
    responses(
        (status = 200, description = "A page", body = GenerationPage),
        (status = 400, description = "The query is wrong", body = ErrorBody),
        (status = 404, description = "No such user or shared adapter", body = ErrorBody),
    )
)]
pub(super) async fn list(
    State(app): State<App>,
    PathAdapter(id): PathAdapter,
    Paged(query): Paged,
) -> Result<Json<GenerationPage>, ApiError> {
    let after = query.after.as_deref().map(str::parse::<GenerationCursor>).transpose();
    let after = after.map_err(|error| ApiError::from(error).param("after"))?;
    let page = app.store.generations_page(&id, after, query.limit(&app)?).await?;
    let page = page.ok_or_else(|| unknown_adapter(&id))?;
    Ok(Json(GenerationPage {
        object: "list",
        has_more: page.next.is_some(),
        next: page.next.map(|next| next.to_string()),
        data: page.entries.into_iter().map(|record| WireGeneration::new(&id, record)).collect(),
    }))
}

/// Looks at a generation.
#[utoipa::path(
    get,
    path = "/generations/{generation}",
    tag = "adapters",
    params(("generation" = String, Path)),
    responses(
        (status = 200, description = "The generation", body = WireGeneration),
        (status = 404, description = "No such generation", body = ErrorBody),
    )
)]
pub(super) async fn read(
    State(app): State<App>,
    PathGeneration(id, generation): PathGeneration,
) -> Result<Json<WireGeneration>, ApiError> {
    let record = app.store.generation(&id, &generation).await?;
    let record = record.ok_or_else(|| unknown_generation(&generation.to_string()))?;
    Ok(Json(WireGeneration::new(&id, record)))
}

/// Deletes a generation that is neither the head nor pinned.
#[utoipa::path(
    delete,
    path = "/generations/{generation}",
    tag = "adapters",
    params(("generation" = String, Path)),
    responses(
        (status = 200, description = "Deleted", body = DeletedGeneration),
        (status = 404, description = "No such generation", body = ErrorBody),
        (status = 409, description = "It is the head, or pinned", body = ErrorBody),
    )
)]
pub(super) async fn erase(
    State(app): State<App>,
    PathGeneration(id, generation): PathGeneration,
) -> Result<Json<DeletedGeneration>, ApiError> {
    app.store.delete_generation(&id, &generation).await?;
    Ok(Json(DeletedGeneration { id: generation.to_string(), object: "generation.deleted", deleted: true }))
}

/// Pins a generation: it stays however many follow, until it is unpinned or its adapter is deleted.
#[utoipa::path(
    post,
    path = "/generations/{generation}/pin",
    tag = "adapters",
    params(("generation" = String, Path)),
    responses(
        (status = 200, description = "Pinned", body = WireGeneration),
        (status = 404, description = "No such generation", body = ErrorBody),
    )
)]
pub(super) async fn pin(
    State(app): State<App>,
    PathGeneration(id, generation): PathGeneration,
) -> Result<Json<WireGeneration>, ApiError> {
    Ok(Json(WireGeneration::new(&id, app.store.pin(&id, &generation, true).await?)))
}

/// Unpins a generation.
#[utoipa::path(
    delete,
    path = "/generations/{generation}/pin",
    tag = "adapters",
    params(("generation" = String, Path)),
    responses(
        (status = 200, description = "Not pinned any more", body = WireGeneration),
        (status = 404, description = "No such generation", body = ErrorBody),
    )
)]
pub(super) async fn unpin(
    State(app): State<App>,
    PathGeneration(id, generation): PathGeneration,
) -> Result<Json<WireGeneration>, ApiError> {
    Ok(Json(WireGeneration::new(&id, app.store.pin(&id, &generation, false).await?)))
}
