//! Taking in an adapter that was made elsewhere: checked against this base, stored, and head from then on.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, Request, State};
use axum::http::header::{IF_MATCH, IF_NONE_MATCH};
use axum::http::{HeaderMap, Uri};
use peft::{Adapter, AdapterConfig, AdapterWeights, PeftError, Precision, generation_id};
use serde::Deserialize;
use serde_json::json;
use store::{Expected, NewGeneration, StoreError};
use types::GenerationId;
use utoipa::{IntoParams, ToSchema};

use super::form::{self, Form};
use super::wire::{BASE, WireAdapter, answer};
use super::{PathAdapter, unknown_adapter};
use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::fault::{invalid_adapter, other_base, overloaded};

/// The two files of an adapter, as HF peft saves them.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the form")]
struct AdapterForm {
    /// Or `config`.
    #[schema(rename = "adapter_config.json", content_media_type = "application/json")]
    adapter_config: String,
    /// Or `weights`.
    #[schema(rename = "adapter_model.safetensors", content_media_type = "application/octet-stream")]
    adapter_model: String,
    /// SHA-256 of the base it was made for, 64 hexadecimal digits: another base is refused.
    base_hash: Option<String>,
}

#[derive(Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ImportQuery {
    /// The generation that must be the head now, or `none`; absent: whatever it is. As the header `If-Match`, or
    /// `If-None-Match: *` for `none`.
    expected_head: Option<String>,
}

/// Takes in an adapter as HF peft saves it, and makes it the head.
///
/// The same files are the same generation, however often they come. A history that arrives later trains a new adapter,
/// which becomes head only if it is better than this one.
#[utoipa::path(
    put,
    path = "/",
    tag = "adapters",
    params(
        ImportQuery,
        ("If-Match" = Option<String>, Header, description = "The generation that must be the head now"),
        ("If-None-Match" = Option<String>, Header, description = "`*`: there must be no head"),
        ("x-atelier-base" = Option<String>, Header, description = "As the part `base_hash`"),
    ),
    request_body(content = AdapterForm, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "On disk, and head", body = WireAdapter),
        (status = 400, description = "A part, a field or a tensor is wrong; `param` names it", body = ErrorBody),
        (status = 409, description = "The head is not the expected one (`current_head` says which it is), or the adapter belongs to another base", body = ErrorBody),
        (status = 413, description = "A part is too large", body = ErrorBody),
        (status = 415, description = "Not a form", body = ErrorBody),
        (status = 503, description = "Others are being taken in; see Retry-After", body = ErrorBody),
    )
)]
pub(super) async fn import(
    State(app): State<App>,
    PathAdapter(id): PathAdapter,
    request: Request,
) -> Result<(HeaderMap, Json<WireAdapter>), ApiError> {
    let expected = expected_head(request.headers(), request.uri())?;
    let header = request.headers().get(BASE).map(|value| base_hash(BASE.as_str(), value.as_bytes()));
    let header = header.transpose()?;
    // Moved along with the work, which goes on when the client has left.
    let turn = Arc::clone(app.imports()).try_acquire_owned();
    let turn = turn.map_err(|_| overloaded("other adapters are being taken in: try again"))?;
    let form = form::read(request, &app).await?;
    let base = app.base.hash();
    for (param, given) in [(BASE.as_str(), header), ("base_hash", form.base_hash)] {
        if let Some(given) = given.filter(|given| *given != base) {
            return Err(other_base(param, &given, &base));
        }
    }
    let (at, adapter) = (app.clone(), id.clone());
    let record = app
        .to_the_end(async move {
            let _turn = turn;
            let generation = at.blocking(|app| examine(app, form)).await?;
            let generation = generation.map_err(|error| invalid_adapter(&error))?;
            let (name, files) = (generation.id, generation.files());
            match at.store.publish(&adapter, generation, expected, None).await {
                Ok(record) => {
                    at.adapters.announce(&adapter, &record.id, Some(files));
                    Ok(record)
                }
                // The answer to an earlier upload of the same files was lost on the way.
                Err(StoreError::HeadMoved { current }) if current == Some(name) => {
                    at.store.head(&adapter).await?.ok_or_else(|| unknown_adapter(&adapter))
                }
                Err(error) => Err(error.into()),
            }
        })
        .await?;
    Ok(answer(&app, &id, record))
}

/// Reads the files as they will be read to be served.
fn examine(app: &App, form: Form) -> Result<NewGeneration, PeftError> {
    let Form { config, weights, .. } = form;
    let shape = app.base.shape();
    let read = AdapterConfig::parse_within(&config, &shape, app.limits.training.rank)?;
    let parsed = AdapterWeights::read(read, &weights, &shape)?;
    Adapter::build(&parsed, &*app.base, Precision::Exact)?;
    let base = app.base.hash();
    let id = generation_id(&base, &config, &weights);
    let (config, weights) = (config.into(), weights.into());
    Ok(NewGeneration { id, parent: None, base, config, weights, meta: json!({}) })
}

/// A SHA-256 that a client wrote as 64 hexadecimal digits.
pub(super) fn base_hash(param: &str, text: &[u8]) -> Result<[u8; 32], ApiError> {
    // A generation is written the same way.
    let hash = std::str::from_utf8(text).ok().and_then(|text| text.trim().parse::<GenerationId>().ok());
    hash.map(|hash| *hash.as_bytes()).ok_or_else(|| ApiError::invalid(param, "must be 64 hexadecimal digits"))
}

/// The head that must be there: from the query, `If-Match` or `If-None-Match`, of which one may be given.
fn expected_head(headers: &HeaderMap, uri: &Uri) -> Result<Expected, ApiError> {
    let Query(query) = Query::<ImportQuery>::try_from_uri(uri)
        .map_err(|error| ApiError::invalid("query", error.to_string()))?;
    let header = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    let given = [
        ("expected_head", query.expected_head.as_deref()),
        ("If-Match", header(IF_MATCH)),
        ("If-None-Match", header(IF_NONE_MATCH)),
    ];
    let mut given = given.into_iter().filter_map(|(param, value)| Some((param, value?.trim())));
    let Some((param, value)) = given.next() else { return Ok(Expected::Any) };
    if let Some((second, _)) = given.next() {
        return Err(ApiError::invalid(second, format!("must not be given together with {param}")));
    }
    let named = || value.trim_matches('"').parse::<GenerationId>().ok().map(|head| Expected::Is(Some(head)));
    let expected = match (param, value) {
        ("expected_head", "none") | ("If-None-Match", "*") => Some(Expected::Is(None)),
        ("If-None-Match", _) => None,
        _ => named(),
    };
    let wanted = match param {
        "If-None-Match" => "must be *",
        "If-Match" => "must be one generation",
        _ => "must be a generation or none",
    };
    expected.ok_or_else(|| ApiError::invalid(param, wanted))
}
