//! Moving an adapter's head back to an earlier generation, or to the base.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Deserializer, Serialize};
use store::Expected;
use types::GenerationId;
use utoipa::ToSchema;

use super::{PathAdapter, unknown_adapter};
use crate::app::App;
use crate::body::JsonBody;
use crate::error::{ApiError, ErrorBody};
use crate::fault::{other_base, unknown_generation};
use crate::json::{fields_of, missing};

/// Where the head is to go.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct Rollback {
    /// A generation of this adapter; null for the base.
    #[serde(default, deserialize_with = "given")]
    #[schema(required, value_type = Option<String>)]
    generation: Option<Option<GenerationId>>,
    /// The generation that must be the head now (null: none); absent: whatever it is.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<String>)]
    expected_head: Option<Option<GenerationId>>,
}

/// Tells null from absent.
fn given<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Option<GenerationId>>, D::Error> {
    Option::deserialize(value).map(Some)
}

/// Where the head is now.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct WireHead {
    /// `adapter.head`.
    object: &'static str,
    /// The generation that answers new requests; null: the base does.
    #[schema(required)]
    generation: Option<String>,
}

/// Makes an earlier generation the head again, or none. The next request gets it; answers under way are not touched.
///
/// A shared adapter without a head is not found when it is named; a user without one is answered by the base.
#[utoipa::path(
    post,
    path = "/rollback",
    tag = "adapters",
    request_body = Rollback,
    responses(
        (status = 200, description = "The head has moved", body = WireHead),
        (status = 400, description = "The body is wrong; `param` names the field", body = ErrorBody),
        (status = 404, description = "No such adapter or generation", body = ErrorBody),
        (status = 409, description = "The head is not the expected one (`current_head` says which it is), or the generation belongs to another base", body = ErrorBody),
    )
)]
pub(super) async fn rollback(
    State(app): State<App>,
    PathAdapter(id): PathAdapter,
    JsonBody(body): JsonBody,
) -> Result<Json<WireHead>, ApiError> {
    body.refuse_others(&[fields_of::<Rollback>()], &[], &[])?;
    let asked: Rollback = body.read()?;
    let to = asked.generation.ok_or_else(|| missing("generation"))?;
    let expected = asked.expected_head.map_or(Expected::Any, Expected::Is);
    match &to {
        Some(generation) => {
            let record = app.store.generation(&id, generation).await?;
            let record = record.ok_or_else(|| unknown_generation(&generation.to_string()))?;
            if record.base != app.base.hash() {
                return Err(other_base("generation", &record.base, &app.base.hash()));
            }
        }
        None if app.store.generations_page(&id, None, 1).await?.is_none() => {
            return Err(unknown_adapter(&id));
        }
        None => {}
    }
    let at = app.clone();
    app.to_the_end(async move {
        let moved = at.store.set_head(&id, to, expected).await;
        match &to {
            Some(head) if moved.is_ok() => at.adapters.announce(&id, head, None),
            _ => at.adapters.forget(&id),
        }
        Ok(moved?)
    })
    .await?;
    Ok(Json(WireHead { object: "adapter.head", generation: to.map(|to| to.to_string()) }))
}
