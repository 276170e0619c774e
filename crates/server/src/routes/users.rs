//! `/v1/users`: who there is, how they stand, and erasing them.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use store::UserRecord;
use types::{AdapterId, UserId};
use utoipa::ToSchema;

use crate::app::App;
use crate::auth::Principal;
use crate::error::{ApiError, Code, ErrorBody};
use crate::fault::invalid_id;
use crate::routes::items::seconds;
use crate::routes::jobs::WireJob;
use crate::routes::{PageQuery, Paged, PathUser};

/// A user at a glance.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WireUser {
    id: String,
    /// `user`.
    object: &'static str,
    /// Unix seconds.
    created_at: f64,
    /// History items.
    items: u64,
    /// Bytes of their texts.
    bytes: u64,
    /// The generation that answers new requests; null for the base.
    #[schema(required)]
    head: Option<String>,
    /// The latest job.
    #[schema(required)]
    job: Option<WireJob>,
}

impl From<UserRecord> for WireUser {
    fn from(record: UserRecord) -> Self {
        Self {
            id: record.id.owner.to_string(),
            object: "user",
            created_at: seconds(record.created_at),
            items: record.history.items,
            bytes: record.history.bytes,
            head: record.head.map(|head| head.id.to_string()),
            job: record.job.map(WireJob::from),
        }
    }
}

/// A page of users, by id.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct UserPage {
    /// `list`.
    object: &'static str,
    data: Vec<WireUser>,
    has_more: bool,
    /// Where the next page begins: the query's `after`.
    #[schema(required)]
    next: Option<String>,
}

/// A user who is no more.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DeletedUser {
    id: String,
    /// `user.deleted`.
    object: &'static str,
    /// `true`.
    deleted: bool,
}

/// No such user; a user of another tenant gets the same answer.
pub(crate) fn unknown_user(id: &AdapterId) -> ApiError {
    ApiError::new(Code::UserNotFound, format!("there is no user {}", id.owner)).param("user")
}

/// Lists the users.
#[utoipa::path(
    get,
    path = "/v1/users",
    tag = "users",
    params(PageQuery),
    responses(
        (status = 200, description = "A page", body = UserPage),
        (status = 400, description = "The query is wrong", body = ErrorBody),
    )
)]
pub(crate) async fn list(
    State(app): State<App>,
    principal: Principal,
    Paged(query): Paged,
) -> Result<Json<UserPage>, ApiError> {
    let after = query.after.as_deref().map(str::parse::<UserId>).transpose();
    let after = after.map_err(|error| invalid_id("after", &error))?;
    let page = app.store.users(&principal.tenant, after.as_ref(), query.limit(&app)?).await?;
    Ok(Json(UserPage {
        object: "list",
        has_more: page.next.is_some(),
        next: page.next.map(String::from),
        data: page.entries.into_iter().map(WireUser::from).collect(),
    }))
}

/// Looks at a user.
#[utoipa::path(
    get,
    path = "/v1/users/{user}",
    tag = "users",
    params(("user" = String, Path)),
    responses(
        (status = 200, description = "The user", body = WireUser),
        (status = 404, description = "No such user", body = ErrorBody),
    )
)]
pub(crate) async fn read(State(app): State<App>, PathUser(id): PathUser) -> Result<Json<WireUser>, ApiError> {
    let record = app.store.user(&id).await?.ok_or_else(|| unknown_user(&id))?;
    Ok(Json(record.into()))
}

/// Erases everything of a user: history, jobs, every generation. A job under way cannot bring it back.
#[utoipa::path(
    delete,
    path = "/v1/users/{user}",
    tag = "users",
    params(("user" = String, Path)),
    responses(
        (status = 200, description = "Erased", body = DeletedUser),
        (status = 404, description = "No such user", body = ErrorBody),
    )
)]
pub(crate) async fn erase(
    State(app): State<App>,
    PathUser(id): PathUser,
) -> Result<Json<DeletedUser>, ApiError> {
    let erased = app.store.erase_user(&id).await;
    // Also when the erasure failed half-way: what is resident is loaded again if it is still there.
    app.adapters.forget(&id);
    if !erased? {
        return Err(unknown_user(&id));
    }
    Ok(Json(DeletedUser { id: id.owner.to_string(), object: "user.deleted", deleted: true }))
}
