//! `/v1/users/{user}/history`: upload, read, erase.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use store::{Forgotten, HistoryCursor, Selection};
use types::{AdapterId, ItemId};
use utoipa::{IntoParams, ToSchema};

use crate::app::App;
use crate::body::{self, is_json, media_type, unsupported};
use crate::error::{ApiError, Code, ErrorBody};
use crate::fault::invalid_id;
use crate::routes::items::{self, StoredItem, Upload};
use crate::routes::jobs::WireJob;
use crate::routes::users::unknown_user;
use crate::routes::{PageQuery, Paged, PathItem, PathUser};

/// Longest idempotency key.
const MAX_KEY: usize = 255;

/// The answer to an upload.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Uploaded {
    /// Items that are new.
    accepted: u64,
    /// Items that were there already.
    duplicates: u64,
    /// Items of the user now.
    total_items: u64,
    /// The job that trains on them; if nothing was new, the user's latest.
    #[schema(required)]
    job: Option<WireJob>,
    /// The same idempotency key was answered before: these are that answer's counts.
    replayed: bool,
}

/// A page of a history, oldest first.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct HistoryPage {
    /// `list`.
    object: &'static str,
    data: Vec<StoredItem>,
    has_more: bool,
    /// Where the next page begins: the query's `after`.
    #[schema(required)]
    next: Option<String>,
}

/// What was erased.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Erased {
    user: String,
    /// Items that are gone.
    deleted_items: u64,
    /// Generations that are gone, because they had learnt from one of them or were judged by one.
    deleted_generations: Vec<String>,
    /// The generation that answers new requests now; null for the base.
    #[schema(required)]
    head: Option<String>,
    /// The job that learns what is left; null if there is none.
    #[schema(required)]
    job: Option<WireJob>,
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    let key = key.to_str().ok().filter(|key| (1..=MAX_KEY).contains(&key.len()));
    let problem = || ApiError::invalid("Idempotency-Key", format!("must be 1 to {MAX_KEY} ASCII characters"));
    key.map(Some).ok_or_else(problem)
}

/// Takes in history and starts learning from it.
///
/// JSON, or an item per line with the content type `application/x-ndjson`; there, the first line may be
/// `{"training": {...}}` with the hyper-parameters that `training` has in JSON. The answer comes when everything is on
/// disk together with the job.
#[utoipa::path(
    post,
    path = "/v1/users/{user}/history",
    tag = "learn",
    params(
        ("user" = String, Path, description = "The user; made at the first upload"),
        ("Idempotency-Key" = Option<String>, Header, description = "The same key with the same body is answered once"),
    ),
    request_body(content((Upload = "application/json"), (String = "application/x-ndjson"))),
    responses(
        (status = 202, description = "On disk; the job will train", body = Uploaded),
        (status = 400, description = "An item is wrong; `param` names the field", body = ErrorBody),
        (status = 401, description = "The API key is missing or wrong", body = ErrorBody),
        (status = 409, description = "An item with this id and other content exists", body = ErrorBody),
        (status = 413, description = "The body or the user's history is too large", body = ErrorBody),
        (status = 415, description = "Neither JSON nor NDJSON", body = ErrorBody),
        (status = 422, description = "The idempotency key was used with another body", body = ErrorBody),
        (status = 429, description = "Too many bytes in a minute; see Retry-After", body = ErrorBody),
    )
)]
pub(crate) async fn upload(
    State(app): State<App>,
    PathUser(id): PathUser,
    request: Request,
) -> Result<(StatusCode, Json<Uploaded>), ApiError> {
    let key = idempotency_key(request.headers())?.map(str::to_owned);
    let ndjson = match media_type(request.headers()).as_deref() {
        Some("application/x-ndjson" | "application/ndjson" | "application/jsonl") => true,
        Some(media) if is_json(media) => false,
        other => return Err(unsupported(other, "application/json or application/x-ndjson")),
    };
    let bytes = body::read(request, &app, app.limits.upload_bytes).await?;
    app.uploads().take(&id, bytes.len() as u64, app.clock.now())?;
    let hash: [u8; 32] = Sha256::digest(&bytes).into();
    let size = bytes.len() as u64;
    let read =
        move |app: &App| if ndjson { items::from_ndjson(app, &bytes) } else { items::from_json(app, &bytes) };
    let (items, training) = app.blocking(read).await??;
    let most = app.limits.history_bytes_per_user;
    if app.store.history_stats(&id).await?.bytes.saturating_add(size) > most {
        let message = format!("a user's history may have {most} bytes: erase some first");
        return Err(ApiError::new(Code::HistoryFull, message));
    }
    let appended = app.store.append_for(&id, key.as_deref(), hash, items, training).await?;
    if !appended.replayed {
        app.metrics.history(appended.accepted, appended.duplicates);
    }
    app.on_upload.notify_one();
    let uploaded = Uploaded {
        accepted: appended.accepted,
        duplicates: appended.duplicates,
        total_items: appended.total_items,
        job: appended.job.map(WireJob::from),
        replayed: appended.replayed,
    };
    Ok((StatusCode::ACCEPTED, Json(uploaded)))
}

/// Reads a user's history, oldest first.
#[utoipa::path(
    get,
    path = "/v1/users/{user}/history",
    tag = "learn",
    params(("user" = String, Path), PageQuery),
    responses(
        (status = 200, description = "A page", body = HistoryPage),
        (status = 400, description = "The query is wrong", body = ErrorBody),
        (status = 404, description = "No such user", body = ErrorBody),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    PathUser(id): PathUser,
    Paged(query): Paged,
) -> Result<Json<HistoryPage>, ApiError> {
    let after = query.after.as_deref().map(str::parse::<HistoryCursor>).transpose();
    let after = after.map_err(|error| ApiError::from(error).param("after"))?;
    let page = app.store.history(&id, after, query.limit(&app)?).await?.ok_or_else(|| unknown_user(&id))?;
    Ok(Json(HistoryPage {
        object: "list",
        has_more: page.next.is_some(),
        next: page.next.map(|next| next.to_string()),
        data: page.entries.into_iter().map(StoredItem::from).collect(),
    }))
}

/// Which items to erase; all of them if nothing is given. Both ends are included, and either may be left out.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct RangeQuery {
    /// From this time on: Unix seconds, or an RFC 3339 text.
    from: Option<String>,
    /// Up to this time.
    to: Option<String>,
    /// From this item on, in the history's order; not together with times.
    from_item: Option<String>,
    /// Up to this item.
    to_item: Option<String>,
}

impl RangeQuery {
    /// The selection.
    fn read(&self) -> Result<Selection, ApiError> {
        let time = |field: &str, text: &Option<String>| {
            text.as_deref().map(|text| items::time(text, field)).transpose()
        };
        let item = |field: &str, id: &Option<String>| {
            let parse = |id: &String| id.parse::<ItemId>().map_err(|error| invalid_id(field, &error));
            id.as_ref().map(parse).transpose()
        };
        let times = (time("from", &self.from)?, time("to", &self.to)?);
        let items = (item("from_item", &self.from_item)?, item("to_item", &self.to_item)?);
        match (times, items) {
            ((None, None), (None, None)) => Ok(Selection::All),
            ((from, to), (None, None)) => Ok(Selection::Times(from, to)),
            ((None, None), (from, to)) => Ok(Selection::Items(from, to)),
            _ => Err(ApiError::invalid("from_item", "and to_item do not go with from and to")),
        }
    }
}

fn forgotten(id: AdapterId, forgotten: Forgotten) -> Erased {
    Erased {
        user: id.owner.to_string(),
        deleted_items: forgotten.items,
        deleted_generations: forgotten.generations.into_iter().map(|id| id.to_string()).collect(),
        head: forgotten.head.map(|id| id.to_string()),
        job: forgotten.job.map(WireJob::from),
    }
}

async fn forget_selected(app: &App, id: &AdapterId, selection: &Selection) -> Result<Forgotten, ApiError> {
    let forgotten = app.store.forget_items(id, selection).await;
    // What is resident may have learnt from the items: it is loaded again if it is still the head.
    app.adapters.forget(id);
    app.on_upload.notify_one();
    forgotten?.ok_or_else(|| unknown_user(id))
}

/// Erases a user's history, or a range of it.
///
/// Without a query: all items, every generation that training has made, pinned ones too, and the jobs that wait or run;
/// an uploaded generation serves if there is one, or the base. With a range: the items, and every generation that has
/// learnt from one of them or was judged by one; the newest that was not serves, or the base, until the job has learnt
/// what is left from fresh weights, as if the items had never been. The answer comes when all this is on disk.
#[utoipa::path(
    delete,
    path = "/v1/users/{user}/history",
    tag = "learn",
    params(("user" = String, Path), RangeQuery),
    responses(
        (status = 200, description = "Erased", body = Erased),
        (status = 400, description = "The query is wrong; nothing is erased", body = ErrorBody),
        (status = 404, description = "No such user", body = ErrorBody),
    )
)]
pub(crate) async fn erase(
    State(app): State<App>,
    PathUser(id): PathUser,
    query: Result<Query<RangeQuery>, QueryRejection>,
) -> Result<Json<Erased>, ApiError> {
    let Query(query) = query.map_err(|error| ApiError::invalid("query", error.body_text()))?;
    let gone = forget_selected(&app, &id, &query.read()?).await?;
    Ok(Json(forgotten(id, gone)))
}

/// Erases an item, and every generation that has learnt from it or was judged by it. The newest that was not serves, or
/// the base, until the job has learnt what is left from fresh weights, as if the item had never been.
#[utoipa::path(
    delete,
    path = "/v1/users/{user}/history/{item}",
    tag = "learn",
    params(("user" = String, Path), ("item" = String, Path, description = "The item's id")),
    responses(
        (status = 200, description = "Erased", body = Erased),
        (status = 404, description = "No such user or item", body = ErrorBody),
    )
)]
pub(crate) async fn forget(
    State(app): State<App>,
    PathUser(id): PathUser,
    PathItem(item): PathItem,
) -> Result<Json<Erased>, ApiError> {
    let gone = forget_selected(&app, &id, &Selection::Item(item.clone())).await?;
    if gone.items == 0 {
        let message = format!("the user {} has no item {item}", id.owner);
        return Err(ApiError::new(Code::ItemNotFound, message).param("item"));
    }
    Ok(Json(forgotten(id, gone)))
}
