//! `GET /v1/adapters`: which adapters there are, and how near to the model each one is.

use adapters::Tier;
use axum::Json;
use axum::extract::State;
use serde::Serialize;
use types::UserId;
use utoipa::ToSchema;

use crate::app::App;
use crate::auth::Principal;
use crate::error::{ApiError, ErrorBody};
use crate::fault::invalid_id;
use crate::routes::items::seconds;
use crate::routes::{PageQuery, Paged};

/// A user's adapter at a glance.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WireResident {
    /// The user it belongs to.
    user: String,
    /// `adapter`.
    object: &'static str,
    /// The generation that answers new requests.
    generation: String,
    /// Bytes of its two files.
    bytes: u64,
    /// Unix seconds.
    created_at: f64,
    /// `device` (the next request starts at once), `host` or `store`.
    tier: &'static str,
}

/// A page of adapters, by user. It may hold fewer than asked for before the last one: users without an adapter are
/// passed over.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ResidentPage {
    /// `list`.
    object: &'static str,
    data: Vec<WireResident>,
    has_more: bool,
    /// Where the next page begins: the query's `after`.
    #[schema(required)]
    next: Option<String>,
}

/// Lists the users' adapters with the tier that each is in.
#[utoipa::path(
    get,
    path = "/v1/adapters",
    tag = "users",
    params(PageQuery),
    responses(
        (status = 200, description = "A page", body = ResidentPage),
        (status = 400, description = "The query is wrong", body = ErrorBody),
    )
)]
pub(crate) async fn list(
    State(app): State<App>,
    principal: Principal,
    Paged(query): Paged,
) -> Result<Json<ResidentPage>, ApiError> {
    let after = query.after.as_deref().map(str::parse::<UserId>).transpose();
    let after = after.map_err(|error| invalid_id("after", &error))?;
    let page = app.store.users(&principal.tenant, after.as_ref(), query.limit(&app)?).await?;
    let resident = |record: store::UserRecord| {
        let head = record.head?;
        let tier = match app.adapters.tier(&record.id) {
            Tier::Device => "device",
            Tier::Host => "host",
            Tier::Store => "store",
        };
        Some(WireResident {
            user: record.id.user.into(),
            object: "adapter",
            generation: head.id.to_string(),
            bytes: head.bytes,
            created_at: seconds(head.created_at),
            tier,
        })
    };
    Ok(Json(ResidentPage {
        object: "list",
        has_more: page.next.is_some(),
        next: page.next.map(String::from),
        data: page.entries.into_iter().filter_map(resident).collect(),
    }))
}
