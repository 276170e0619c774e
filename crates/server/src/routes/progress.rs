//! `/v1/users/{user}/progress` and the manifest: what was learnt, at what cost, and how well.

use axum::Json;
use axum::extract::{Query, State};
use serde::{Deserialize, Serialize};
use store::{Cost, Manifest, ProgressPoint};
use types::GenerationId;
use utoipa::{IntoParams, ToSchema};

use crate::app::App;
use crate::error::{ApiError, Code, ErrorBody};
use crate::fault::invalid_id;
use crate::routes::adapter::wire::hex;
use crate::routes::items::seconds;
use crate::routes::users::unknown_user;
use crate::routes::{PageQuery, Paged, PathUser};

/// One training: its cost, and a point of the quality curve over the arrival of history.
///
/// The curve has one point per training, not one per item, and each is measured on the items that were the newest of the
/// history then and were held out of that training. This slice moves: base, head and new weights of one point are compared
/// on the same items, two points are not.
#[derive(Debug, Serialize, ToSchema)]
struct WirePoint {
    job: String,
    /// When it ended, Unix seconds.
    at: f64,
    /// From fresh weights on the whole history, rather than on from the head. A job whose update made old items worse has
    /// two points: the update, without bits and generation, and the training from fresh weights that took its place. One
    /// that failed or was called off has neither bits nor generation.
    from_scratch: bool,
    /// Items of the history by then.
    items: u64,
    /// Items learnt for the first time.
    new_items: u64,
    /// Items learnt again.
    replayed_items: u64,
    /// Tokens that went through training, those of attempts that came to no end among them.
    trained_tokens: u64,
    /// Seconds that workers had it, all attempts.
    seconds: f64,
    /// Bits per held-out answer token; null if the training came to no number.
    #[schema(required)]
    base_bits: Option<f64>,
    /// The same under the head before it.
    #[schema(required)]
    head_bits: Option<f64>,
    /// The same under the new weights.
    #[schema(required)]
    new_bits: Option<f64>,
    /// The generation, if it was published.
    #[schema(required)]
    generation: Option<String>,
}

impl From<ProgressPoint> for WirePoint {
    fn from(point: ProgressPoint) -> Self {
        Self {
            job: point.job.into(),
            at: seconds(point.at),
            from_scratch: point.from_scratch,
            items: point.items,
            new_items: point.new_items,
            replayed_items: point.replayed_items,
            trained_tokens: point.tokens,
            seconds: point.seconds,
            base_bits: point.base_bits,
            head_bits: point.head_bits,
            new_bits: point.new_bits,
            generation: point.generation.map(|id| id.to_string()),
        }
    }
}

/// What trainings of one sort have cost.
#[derive(Debug, Serialize, ToSchema)]
struct WireCost {
    trainings: u64,
    trained_tokens: u64,
    seconds: f64,
}

impl From<Cost> for WireCost {
    fn from(cost: Cost) -> Self {
        Self { trainings: cost.trainings, trained_tokens: cost.tokens, seconds: cost.seconds }
    }
}

/// How a user's trainings went, in the order in which they ended.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ProgressPage {
    /// `list`.
    object: &'static str,
    data: Vec<WirePoint>,
    has_more: bool,
    /// Where the next page begins: the query's `after`.
    #[schema(required)]
    next: Option<String>,
    /// What updates have cost in all.
    updates: WireCost,
    /// What trainings from fresh weights have cost in all.
    from_scratch: WireCost,
}

/// How a user's trainings went.
#[utoipa::path(
    get,
    path = "/v1/users/{user}/progress",
    tag = "users",
    params(("user" = String, Path), PageQuery),
    responses(
        (status = 200, description = "A page", body = ProgressPage),
        (status = 400, description = "The query is wrong", body = ErrorBody),
        (status = 404, description = "No such user", body = ErrorBody),
    )
)]
pub(crate) async fn progress(
    State(app): State<App>,
    PathUser(id): PathUser,
    Paged(query): Paged,
) -> Result<Json<ProgressPage>, ApiError> {
    let after = query.after.as_deref().map(str::parse::<i64>).transpose();
    let after = after.map_err(|_| ApiError::invalid("after", "is not one that this server gave out"))?;
    let progress = app.store.progress(&id, after, query.limit(&app)?).await?;
    let progress = progress.ok_or_else(|| unknown_user(&id))?;
    Ok(Json(ProgressPage {
        object: "list",
        has_more: progress.points.next.is_some(),
        next: progress.points.next.map(|next| next.to_string()),
        data: progress.points.entries.into_iter().map(WirePoint::from).collect(),
        updates: progress.updates.into(),
        from_scratch: progress.from_scratch.into(),
    }))
}

/// Which generation.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct ManifestQuery {
    /// The generation; the head if absent.
    generation: Option<String>,
}

/// Which items have gone into a generation's weights, those of the generations it grew from among them.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WireManifest {
    /// `adapter.manifest`.
    object: &'static str,
    generation: String,
    /// SHA-256 of each item's id, time and texts, ascending; null if they are not known, as for an imported adapter. Items
    /// that taught nothing, being unreadable or without an answer within `max_tokens`, are listed too: they had their place
    /// in the history that was split into what is learnt and what is held out, so whoever forgets them learns anew.
    #[schema(required)]
    items: Option<Vec<String>>,
}

/// Lists the hashes of the items that a generation has learnt.
#[utoipa::path(
    get,
    path = "/v1/users/{user}/adapter/manifest",
    tag = "users",
    params(("user" = String, Path), ManifestQuery),
    responses(
        (status = 200, description = "The manifest", body = WireManifest),
        (status = 400, description = "The query is wrong", body = ErrorBody),
        (status = 404, description = "No such generation", body = ErrorBody),
    )
)]
pub(crate) async fn manifest(
    State(app): State<App>,
    PathUser(id): PathUser,
    query: Result<Query<ManifestQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<WireManifest>, ApiError> {
    let Query(query) = query.map_err(|error| ApiError::invalid("query", error.body_text()))?;
    let wanted = query.generation.as_deref().map(str::parse::<GenerationId>).transpose();
    let record = match wanted.map_err(|error| invalid_id("generation", &error))? {
        Some(generation) => app.store.generation(&id, &generation).await?,
        None => app.store.head(&id).await?,
    };
    let none = || ApiError::new(Code::AdapterNotFound, format!("the user {} has no such adapter", id.owner));
    let generation = record.ok_or_else(none)?.id;
    let items = match app.store.manifest(&id, &generation).await? {
        Some(Manifest::Items(hashes)) => Some(hashes.iter().map(|hash| hex(hash)).collect()),
        Some(Manifest::Unknown) | None => None,
    };
    Ok(Json(WireManifest { object: "adapter.manifest", generation: generation.to_string(), items }))
}
