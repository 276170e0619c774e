//! `GET /v1/models`: the base, and the adapters of the users and of the tenant as models.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use store::GenerationRecord;
use types::{AdapterId, Owner, TenantId, Timestamp};
use utoipa::ToSchema;

use crate::app::App;
use crate::auth::Principal;
use crate::error::{ApiError, ErrorBody};
use crate::routes::PathId;
use crate::wanted::{by_model, model_of, unknown_model};

/// The models.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    /// `list`.
    object: &'static str,
    data: Vec<ModelCard>,
}

/// A model: the base, or an adapter on it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelCard {
    id: String,
    /// `model`.
    object: &'static str,
    /// Unix time.
    created: i64,
    owned_by: &'static str,
    /// The base's name.
    root: String,
    /// For an adapter, the base it acts on.
    #[schema(required)]
    parent: Option<String>,
}

impl ModelCard {
    fn base(app: &App) -> Self {
        Self::new(app, app.model_name.clone(), app.started(), None)
    }

    fn new(app: &App, id: String, created: Timestamp, parent: Option<String>) -> Self {
        let root = app.model_name.clone();
        Self { id, object: "model", created: created.seconds(), owned_by: "atelier", root, parent }
    }
}

/// Lists the models: the base first, then the shared adapters, then the users who have an adapter.
#[utoipa::path(
    get,
    path = "/v1/models",
    tag = "models",
    responses(
        (status = 200, description = "The models", body = ModelList),
        (status = 401, description = "The API key is missing or wrong", body = ErrorBody),
    )
)]
pub(crate) async fn list(State(app): State<App>, principal: Principal) -> Result<Json<ModelList>, ApiError> {
    let mut data = vec![ModelCard::base(&app)];
    data.extend(adapters(&app, &principal.tenant).await?);
    Ok(Json(ModelList { object: "list", data }))
}

/// The adapters of the tenant and of its users; no more than one page of each.
async fn adapters(app: &App, tenant: &TenantId) -> Result<Vec<ModelCard>, ApiError> {
    let shared = app.store.shared_adapters(tenant, None, app.limits.page).await?.entries;
    let users = app.store.users(tenant, None, app.limits.page).await?.entries;
    let shared = shared.into_iter().map(|record| (Owner::Shared(record.name), record.head));
    let users = users.into_iter().map(|record| (record.id.owner, record.head));
    let card = |(owner, head): (Owner, Option<GenerationRecord>)| {
        let id = model_of(&app.model_name, &owner);
        Some(ModelCard::new(app, id, head?.created_at, Some(app.model_name.clone())))
    };
    Ok(shared.chain(users).filter_map(card).collect())
}

/// Looks at a model.
#[utoipa::path(
    get,
    path = "/v1/models/{*id}",
    tag = "models",
    params(("id" = String, Path, description = "`<base>`, `<base>:<user>` or `<base>:@<shared adapter>`")),
    responses(
        (status = 200, description = "The model", body = ModelCard),
        (status = 404, description = "No such model", body = ErrorBody),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    principal: Principal,
    PathId(id): PathId,
) -> Result<Json<ModelCard>, ApiError> {
    let Some(owner) = by_model(&app.model_name, &id)? else { return Ok(Json(ModelCard::base(&app))) };
    let adapter = AdapterId { tenant: principal.tenant, owner };
    let head = app.store.head(&adapter).await?.ok_or_else(|| unknown_model(&id))?;
    Ok(Json(ModelCard::new(&app, id, head.created_at, Some(app.model_name.clone()))))
}
