//! `/v1/server/training/pause`, `/v1/training/pause`, `/v1/users/{user}/training/pause`: training on hold.

use axum::Json;
use axum::extract::{Request, State};
use serde::{Deserialize, Serialize};
use store::{Pause, PauseScope};
use types::{AdapterId, TenantId, UserId};
use utoipa::ToSchema;

use crate::app::App;
use crate::auth::{Operator, Principal};
use crate::body;
use crate::error::{ApiError, ErrorBody};
use crate::routes::PathUser;
use crate::routes::items::seconds;
use crate::routes::users::unknown_user;

/// Bytes of a reason.
const MAX_REASON: usize = 500;

/// Why training is put on hold.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PauseRequest {
    /// For those who look at it later; at most 500 bytes.
    reason: Option<String>,
}

/// Whether training is on hold.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WirePauses {
    /// `training.pause`.
    object: &'static str,
    /// Nobody on this server is trained.
    server_paused: bool,
    /// Nobody of this tenant is trained.
    tenant_paused: bool,
    /// This user is not trained; null where no user is asked for.
    #[schema(required)]
    user_paused: Option<bool>,
    /// The pauses that hold, the widest first. Training goes on when there is none.
    pauses: Vec<WirePause>,
}

/// A pause that holds.
#[derive(Debug, Serialize, ToSchema)]
struct WirePause {
    /// `server`, `tenant` or `user`.
    scope: &'static str,
    /// Unix seconds; null if an older version set it.
    #[schema(required)]
    since: Option<f64>,
    /// The tenant whose key set it; null if that is another one, or an older version set it.
    #[schema(required)]
    by: Option<String>,
    #[schema(required)]
    reason: Option<String>,
}

async fn pauses(app: &App, who: &Principal, user: Option<&UserId>) -> Result<Json<WirePauses>, ApiError> {
    let found = app.store.pauses(&who.tenant, user).await?;
    let shown = |by: &TenantId| who.operator || *by == who.tenant;
    let wire = |scope: &'static str, pause: &Option<Pause>| {
        pause.clone().map(|Pause { since, by, reason }| WirePause {
            scope,
            since: since.map(seconds),
            by: by.filter(shown).map(String::from),
            reason,
        })
    };
    let all = [wire("server", &found.server), wire("tenant", &found.tenant), wire("user", &found.user)];
    Ok(Json(WirePauses {
        object: "training.pause",
        server_paused: found.server.is_some(),
        tenant_paused: found.tenant.is_some(),
        user_paused: user.map(|_| found.user.is_some()),
        pauses: all.into_iter().flatten().collect(),
    }))
}

/// The reason in a request's body, which may be left out.
async fn reason(app: &App, request: Request) -> Result<Option<String>, ApiError> {
    let wanted: PauseRequest = body::read_or_default(request, app).await?;
    if wanted.reason.as_ref().is_some_and(|reason| reason.len() > MAX_REASON) {
        return Err(ApiError::invalid("reason", format!("is longer than {MAX_REASON} bytes")));
    }
    Ok(wanted.reason)
}

async fn set(
    app: &App,
    who: &Principal,
    scope: &PauseScope,
    request: Request,
) -> Result<Json<WirePauses>, ApiError> {
    let reason = reason(app, request).await?;
    app.store.pause(scope, &who.tenant, reason.as_deref()).await?;
    pauses(app, who, user_of(scope)).await
}

async fn lift(app: &App, who: &Principal, scope: &PauseScope) -> Result<Json<WirePauses>, ApiError> {
    app.store.resume(scope).await?;
    app.on_upload.notify_one();
    pauses(app, who, user_of(scope)).await
}

fn user_of(scope: &PauseScope) -> Option<&UserId> {
    match scope {
        PauseScope::User(_, user) => Some(user),
        PauseScope::Server | PauseScope::Tenant(_) => None,
    }
}

/// The scope of a user that there is.
async fn known(app: &App, id: &AdapterId) -> Result<PauseScope, ApiError> {
    let user = app.store.user(id).await?.and_then(|_| id.user().cloned());
    user.map(|user| PauseScope::User(id.tenant.clone(), user)).ok_or_else(|| unknown_user(id))
}

/// Whether training is on hold on the whole server, or for the tenant.
#[utoipa::path(
    get,
    path = "/v1/server/training/pause",
    operation_id = "server_pause",
    tag = "learn",
    responses((status = 200, description = "How it stands", body = WirePauses))
)]
pub(crate) async fn read_server(
    State(app): State<App>,
    principal: Principal,
) -> Result<Json<WirePauses>, ApiError> {
    pauses(&app, &principal, None).await
}

/// Puts training on hold on the whole server, for all tenants; needs an operator's key. Serving goes on, uploads are
/// kept; jobs under way stop at their next step, keep what they have done, and go on from there to the same result. It
/// holds across restarts. The body may be left out; a pause that holds already keeps its time and reason.
#[utoipa::path(
    put,
    path = "/v1/server/training/pause",
    operation_id = "pause_server",
    tag = "learn",
    request_body = Option<PauseRequest>,
    responses(
        (status = 200, description = "On hold", body = WirePauses),
        (status = 400, description = "A field is wrong; `param` names it", body = ErrorBody),
        (status = 403, description = "The key is not an operator's", body = ErrorBody),
    )
)]
pub(crate) async fn pause_server(
    State(app): State<App>,
    Operator(principal): Operator,
    request: Request,
) -> Result<Json<WirePauses>, ApiError> {
    set(&app, &principal, &PauseScope::Server, request).await
}

/// Lets training on the server go on; tenants and users who are on hold themselves stay so. Needs an operator's key.
#[utoipa::path(
    delete,
    path = "/v1/server/training/pause",
    operation_id = "resume_server",
    tag = "learn",
    responses(
        (status = 200, description = "Going on", body = WirePauses),
        (status = 403, description = "The key is not an operator's", body = ErrorBody),
    )
)]
pub(crate) async fn resume_server(
    State(app): State<App>,
    Operator(principal): Operator,
) -> Result<Json<WirePauses>, ApiError> {
    lift(&app, &principal, &PauseScope::Server).await
}

/// Whether training is on hold for all users of the tenant.
#[utoipa::path(get, path = "/v1/training/pause", tag = "learn", responses((status = 200, description = "How it stands", body = WirePauses)))]
pub(crate) async fn read(State(app): State<App>, principal: Principal) -> Result<Json<WirePauses>, ApiError> {
    pauses(&app, &principal, None).await
}

/// Puts training on hold for all users of the tenant. Uploads are kept; a job under way goes back to the queue and keeps
/// what it has done. The body may be left out.
#[utoipa::path(
    put,
    path = "/v1/training/pause",
    tag = "learn",
    request_body = Option<PauseRequest>,
    responses(
        (status = 200, description = "On hold", body = WirePauses),
        (status = 400, description = "A field is wrong; `param` names it", body = ErrorBody),
    )
)]
pub(crate) async fn pause(
    State(app): State<App>,
    principal: Principal,
    request: Request,
) -> Result<Json<WirePauses>, ApiError> {
    set(&app, &principal, &PauseScope::Tenant(principal.tenant.clone()), request).await
}

/// Lets training go on; users who are on hold themselves stay so.
#[utoipa::path(delete, path = "/v1/training/pause", tag = "learn", responses((status = 200, description = "Going on", body = WirePauses)))]
pub(crate) async fn resume(
    State(app): State<App>,
    principal: Principal,
) -> Result<Json<WirePauses>, ApiError> {
    lift(&app, &principal, &PauseScope::Tenant(principal.tenant.clone())).await
}

/// Whether a user's training is on hold.
#[utoipa::path(
    get,
    path = "/v1/users/{user}/training/pause",
    tag = "learn",
    params(("user" = String, Path)),
    responses(
        (status = 200, description = "How it stands", body = WirePauses),
        (status = 404, description = "No such user", body = ErrorBody),
    )
)]
pub(crate) async fn read_user(
    State(app): State<App>,
    principal: Principal,
    PathUser(id): PathUser,
) -> Result<Json<WirePauses>, ApiError> {
    known(&app, &id).await?;
    pauses(&app, &principal, id.user()).await
}

/// Puts a user's training on hold. The body may be left out.
#[utoipa::path(
    put,
    path = "/v1/users/{user}/training/pause",
    tag = "learn",
    params(("user" = String, Path)),
    request_body = Option<PauseRequest>,
    responses(
        (status = 200, description = "On hold", body = WirePauses),
        (status = 400, description = "A field is wrong; `param` names it", body = ErrorBody),
        (status = 404, description = "No such user", body = ErrorBody),
    )
)]
pub(crate) async fn pause_user(
    State(app): State<App>,
    principal: Principal,
    PathUser(id): PathUser,
    request: Request,
) -> Result<Json<WirePauses>, ApiError> {
    let scope = known(&app, &id).await?;
    set(&app, &principal, &scope, request).await
}

/// Lets a user's training go on.
#[utoipa::path(
    delete,
    path = "/v1/users/{user}/training/pause",
    tag = "learn",
    params(("user" = String, Path)),
    responses(
        (status = 200, description = "Going on", body = WirePauses),
        (status = 404, description = "No such user", body = ErrorBody),
    )
)]
pub(crate) async fn resume_user(
    State(app): State<App>,
    principal: Principal,
    PathUser(id): PathUser,
) -> Result<Json<WirePauses>, ApiError> {
    let scope = known(&app, &id).await?;
    lift(&app, &principal, &scope).await
}
