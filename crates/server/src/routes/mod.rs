//! The endpoints, a file each.

pub(crate) mod adapter;
pub(crate) mod adapters;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod history;
pub(crate) mod items;
pub(crate) mod jobs;
pub(crate) mod metrics;
pub(crate) mod models;
pub(crate) mod operation;
pub(crate) mod pauses;
pub(crate) mod progress;
pub(crate) mod tgi;
pub(crate) mod training;
pub(crate) mod users;

use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;
use types::{AdapterId, ItemId, UserId};

use crate::app::App;
use crate::auth::Principal;
use crate::error::ApiError;
use crate::fault::invalid_id;

/// The user of a path, within the caller's tenant.
pub(crate) struct PathUser(pub(crate) AdapterId);

impl FromRequestParts<App> for PathUser {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let principal = Principal::from_request_parts(parts, app).await?;
        let path = Path::<UserPath>::from_request_parts(parts, app).await;
        let Path(UserPath { user }) = path.map_err(|error| ApiError::invalid("user", error))?;
        let user: UserId = user.parse().map_err(|error| invalid_id("user", &error))?;
        Ok(Self(AdapterId::new(principal.tenant, user)))
    }
}

#[derive(serde::Deserialize)]
struct UserPath {
    user: String,
}

/// The history item of a path.
pub(crate) struct PathItem(pub(crate) ItemId);

impl FromRequestParts<App> for PathItem {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let path = Path::<ItemPath>::from_request_parts(parts, app).await;
        let Path(ItemPath { item }) = path.map_err(|error| ApiError::invalid("item", error))?;
        item.parse().map(Self).map_err(|error| invalid_id("item", &error))
    }
}

#[derive(serde::Deserialize)]
struct ItemPath {
    item: String,
}

/// An id in a path, whatever it names; what is no text is a 400 in the envelope.
pub(crate) struct PathId(pub(crate) String);

impl FromRequestParts<App> for PathId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let id = Path::<String>::from_request_parts(parts, app).await;
        id.map(|Path(id)| Self(id)).map_err(|error| ApiError::invalid("id", error))
    }
}

/// A page of a list, as asked for in the query.
#[derive(Debug, Default, serde::Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct PageQuery {
    /// Where to go on: `next` of the page before.
    pub(crate) after: Option<String>,
    /// Entries of the page.
    // Parsed here and not by serde, so that the error names it.
    #[param(minimum = 1, value_type = Option<u32>)]
    pub(crate) limit: Option<String>,
}

impl PageQuery {
    /// The number of entries, within the limit.
    pub(crate) fn limit(&self, app: &App) -> Result<u32, ApiError> {
        let most = app.limits.page;
        let Some(limit) = &self.limit else { return Ok(most.min(100)) };
        match limit.parse() {
            Ok(limit) if (1..=most).contains(&limit) => Ok(limit),
            _ => Err(ApiError::invalid("limit", format!("must be from 1 to {most}"))),
        }
    }
}

/// The query of a list; what does not parse is a 400 in the envelope.
pub(crate) struct Paged(pub(crate) PageQuery);

impl FromRequestParts<App> for Paged {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        let query = axum::extract::Query::<PageQuery>::try_from_uri(&parts.uri);
        let query = query.map_err(|error| ApiError::invalid("query", error.to_string()))?;
        Ok(Self(query.0))
    }
}
