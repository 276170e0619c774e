//! An adapter's routes, the same for a user's (`/v1/users/{user}/adapter`) and a shared one (`/v1/adapters/{name}`).

mod files;
mod form;
mod generations;
mod import;
mod rollback;
pub(crate) mod wire;

use axum::Json;
use axum::extract::{FromRequestParts, MatchedPath, Path, State};
use axum::http::HeaderMap;
use axum::http::request::Parts;
use types::{AdapterId, GenerationId, Owner};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::wire::{DeletedAdapter, WireAdapter, answer};
use crate::app::App;
use crate::auth::Principal;
use crate::error::{ApiError, Code, ErrorBody};
use crate::fault::{invalid_id, unknown_generation};

/// Where the routes are, for a user's adapter and for a shared one.
pub(crate) const ROOTS: [&str; 2] = ["/v1/users/{user}/adapter", "/v1/adapters/{name}"];

/// The routes below one of the roots.
pub(crate) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(import::import, read, erase))
        .routes(routes!(files::config))
        .routes(routes!(files::weights))
        .routes(routes!(rollback::rollback))
        .routes(routes!(generations::list))
        .routes(routes!(generations::read, generations::erase))
        .routes(routes!(generations::pin, generations::unpin))
        .routes(routes!(files::generation_config))
        .routes(routes!(files::generation_weights))
}

#[derive(serde::Deserialize)]
struct AdapterPath {
    user: Option<String>,
    name: Option<String>,
    generation: Option<String>,
}

async fn adapter_path(parts: &mut Parts, app: &App) -> Result<(AdapterId, Option<String>), ApiError> {
    let Principal { tenant, .. } = Principal::from_request_parts(parts, app).await?;
    let route = parts.extensions.get::<MatchedPath>().map(MatchedPath::as_str).unwrap_or_default();
    let param = if route.contains("{user}") { "user" } else { "name" };
    let path = Path::<AdapterPath>::from_request_parts(parts, app).await;
    let Path(path) = path.map_err(|error| ApiError::invalid(param, error))?;
    let owner = match (&path.user, &path.name) {
        (Some(user), _) => user.parse().map(Owner::User),
        (None, name) => name.as_deref().unwrap_or_default().parse().map(Owner::Shared),
    };
    let owner = owner.map_err(|error| invalid_id(param, &error))?;
    Ok((AdapterId { tenant, owner }, path.generation))
}

/// The adapter of a path, within the caller's tenant.
struct PathAdapter(AdapterId);

impl FromRequestParts<App> for PathAdapter {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        adapter_path(parts, app).await.map(|(id, _)| Self(id))
    }
}

/// A generation of a path with its adapter. What is no generation's name is the name of none.
struct PathGeneration(AdapterId, GenerationId);

impl FromRequestParts<App> for PathGeneration {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let (id, generation) = adapter_path(parts, app).await?;
        let generation = generation.unwrap_or_default();
        let parsed = generation.parse().map_err(|_| unknown_generation(&generation))?;
        Ok(Self(id, parsed))
    }
}

/// No such adapter; one of another tenant gets the same answer.
fn unknown_adapter(id: &AdapterId) -> ApiError {
    let (message, param) = match &id.owner {
        Owner::User(user) => (format!("the user {user} has no adapter"), "user"),
        Owner::Shared(name) => (format!("there is no shared adapter {name}"), "name"),
    };
    ApiError::new(Code::AdapterNotFound, message).param(param)
}

/// Looks at an adapter. The addresses of its files are those of the generation, so that both are of the same one.
#[utoipa::path(
    get,
    path = "/",
    tag = "adapters",
    responses(
        (status = 200, description = "The adapter; the ETag is its generation", body = WireAdapter),
        (status = 404, description = "No such adapter", body = ErrorBody),
    )
)]
async fn read(
    State(app): State<App>,
    PathAdapter(id): PathAdapter,
) -> Result<(HeaderMap, Json<WireAdapter>), ApiError> {
    let record = app.store.head(&id).await?.ok_or_else(|| unknown_adapter(&id))?;
    Ok(answer(&app, &id, record))
}

/// Deletes an adapter with all its generations, pinned ones too. The user and the history stay: the next upload of
/// history trains a new adapter.
#[utoipa::path(
    delete,
    path = "/",
    tag = "adapters",
    responses(
        (status = 200, description = "Deleted", body = DeletedAdapter),
        (status = 404, description = "No such adapter", body = ErrorBody),
    )
)]
async fn erase(
    State(app): State<App>,
    PathAdapter(id): PathAdapter,
) -> Result<Json<DeletedAdapter>, ApiError> {
    let (adapter, at) = (id.clone(), app.clone());
    app.to_the_end(async move {
        let erased = at.store.erase_adapter(&adapter).await;
        // Also when it failed half-way: what is resident is loaded again if it is still there.
        at.adapters.forget(&adapter);
        match erased? {
            true => Ok(()),
            false => Err(unknown_adapter(&adapter)),
        }
    })
    .await?;
    Ok(Json(DeletedAdapter::of(&app, &id)))
}
