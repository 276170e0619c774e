//! `GET /v1/adapters`: which adapters there are, and how near to the model each one is.

use adapters::Tier;
use axum::Json;
use axum::extract::State;
use serde::Serialize;
use store::GenerationRecord;
use types::{AdapterId, AdapterName, TenantId, UserId};
use utoipa::ToSchema;

use crate::app::App;
use crate::auth::Principal;
use crate::error::{ApiError, ErrorBody};
use crate::fault::invalid_id;
use crate::routes::items::seconds;
use crate::routes::{PageQuery, Paged};

/// What a shared adapter's name begins with.
const SHARED: &str = "@";

/// An adapter at a glance.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WireResident {
    /// The user it belongs to, or `@` and the name of a shared adapter.
    owner: String,
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

/// A page of adapters, first the users' by name, then the shared ones. It may hold fewer than asked for before the last
/// one: users without an adapter are passed over.
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

/// Lists all adapters with the tier that each is in.
#[utoipa::path(
    get,
    path = "/v1/adapters",
    tag = "adapters",
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
    let (tenant, limit) = (principal.tenant, query.limit(&app)?);
    let after = query.after.as_deref().filter(|after| !after.is_empty());
    let (data, next) = match after.and_then(|after| after.strip_prefix(SHARED)) {
        None => users(&app, &tenant, after, limit).await?,
        Some(after) => shared(&app, &tenant, after, limit).await?,
    };
    Ok(Json(ResidentPage { object: "list", data, has_more: next.is_some(), next }))
}

type Entries = (Vec<WireResident>, Option<String>);

/// Users' adapters, and where to go on: the shared ones begin a page of their own.
async fn users(app: &App, tenant: &TenantId, after: Option<&str>, limit: u32) -> Result<Entries, ApiError> {
    let after = after.map(str::parse::<UserId>).transpose().map_err(|error| invalid_id("after", &error))?;
    let page = app.store.users(tenant, after.as_ref(), limit).await?;
    let data = page.entries.into_iter().filter_map(|user| resident(app, user.id, user.head));
    Ok((data.collect(), Some(page.next.map_or_else(|| SHARED.to_owned(), String::from))))
}

/// Shared adapters, and where to go on.
async fn shared(app: &App, tenant: &TenantId, after: &str, limit: u32) -> Result<Entries, ApiError> {
    let after = Some(after).filter(|after| !after.is_empty()).map(str::parse::<AdapterName>).transpose();
    let after = after.map_err(|error| invalid_id("after", &error))?;
    let page = app.store.shared_adapters(tenant, after.as_ref(), limit).await?;
    let id = |name| AdapterId::shared(tenant.clone(), name);
    let data = page.entries.into_iter().filter_map(|shared| resident(app, id(shared.name), shared.head));
    Ok((data.collect(), page.next.map(|name| format!("{SHARED}{name}"))))
}

fn resident(app: &App, id: AdapterId, head: Option<GenerationRecord>) -> Option<WireResident> {
    let head = head?;
    let tier = match app.adapters.tier(&id) {
        Tier::Device => "device",
        Tier::Host => "host",
        Tier::Store => "store",
    };
    Some(WireResident {
        owner: id.owner.to_string(),
        object: "adapter",
        generation: head.id.to_string(),
        bytes: head.bytes(),
        created_at: seconds(head.created_at),
        tier,
    })
}
