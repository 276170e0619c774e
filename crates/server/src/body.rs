//! Reading a request's body: its media type, its size, the time it takes.

use std::time::Duration;

use axum::body::{BodyDataStream, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use futures::{Stream, StreamExt as _};
use serde::de::DeserializeOwned;

use crate::app::App;
use crate::error::{ApiError, Code};
use crate::json::Object;

/// How much of a body that is too large is taken in and dropped, and for how long. A client that still writes when
/// the connection is closed gets a reset instead of the answer.
const DRAIN_BYTES: u64 = 16 * 1024 * 1024;
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// A JSON object as a body, no longer than [`crate::Limits::body_bytes`].
#[derive(Debug)]
pub(crate) struct JsonBody(pub(crate) Object);

impl FromRequest<App> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        match media_type(request.headers()).as_deref() {
            Some(media) if is_json(media) => {}
            other => return Err(unsupported(other, "application/json")),
        }
        let bytes = read(request, app, app.limits.body_bytes).await?;
        Ok(Self(Object::parse(&bytes, app.limits.json_depth)?))
    }
}

/// A small JSON object as a body that may be left out.
pub(crate) async fn read_or_default<T: Default + DeserializeOwned>(
    request: Request,
    app: &App,
) -> Result<T, ApiError> {
    let media = media_type(request.headers());
    let bytes = read(request, app, app.limits.body_bytes).await?;
    match (bytes.is_empty(), media.as_deref()) {
        (true, _) => Ok(T::default()),
        (false, Some(media)) if is_json(media) => Object::parse(&bytes, app.limits.json_depth)?.read(),
        (false, other) => Err(unsupported(other, "application/json")),
    }
}

/// The media type without its parameters, in lower case.
pub(crate) fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next()?.trim().to_ascii_lowercase())
}

/// Whether a media type is JSON. Others are refused, so that a web page of another origin cannot post to a server on
/// loopback without the browser's asking first.
pub(crate) fn is_json(media: &str) -> bool {
    media == "application/json" || (media.starts_with("application/") && media.ends_with("+json"))
}

/// The body is of another media type.
pub(crate) fn unsupported(found: Option<&str>, wanted: &str) -> ApiError {
    let found = found.unwrap_or("missing");
    let message = format!("the content type must be {wanted}, but is {found}");
    ApiError::new(Code::UnsupportedMediaType, message).param("Content-Type")
}

/// The body is too large.
pub(crate) fn too_large(limit: usize) -> ApiError {
    ApiError::new(Code::BodyTooLarge, format!("the body is larger than {limit} bytes"))
}

/// The body as it comes, unless it is announced to have more than `limit` bytes.
pub(crate) async fn open(request: Request, limit: usize) -> Result<BodyDataStream, ApiError> {
    let announced =
        request.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    // Who expects to be asked on has not begun to write.
    let waits = request.headers().contains_key(EXPECT);
    let mut chunks = request.into_body().into_data_stream();
    if announced.is_some_and(|length: u64| length > limit as u64) {
        if !waits && announced.is_some_and(|length| length <= limit as u64 + DRAIN_BYTES) {
            drain(&mut chunks).await;
        }
        return Err(too_large(limit));
    }
    Ok(chunks)
}

/// The whole body, if it has at most `limit` bytes and comes in time.
pub(crate) async fn read(request: Request, app: &App, limit: usize) -> Result<Bytes, ApiError> {
    let mut chunks = open(request, limit).await?;
    in_time(app, async {
        let mut bytes = Vec::new();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| {
                ApiError::new(Code::InvalidJson, "the body did not arrive whole").cause(error)
            })?;
            if bytes.len() + chunk.len() > limit {
                drain(&mut chunks).await;
                return Err(too_large(limit));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Bytes::from(bytes))
    })
    .await
}

/// What is made of a body, if it comes in time.
pub(crate) async fn in_time<T>(
    app: &App,
    reading: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    let timeout = app.limits.body_timeout;
    match tokio::time::timeout(timeout, reading).await {
        Ok(result) => result,
        Err(_) => {
            let message = format!("the body did not arrive within {} seconds", timeout.as_secs());
            Err(ApiError::new(Code::RequestTimeout, message))
        }
    }
}

/// Takes in what a client is still writing.
pub(crate) async fn drain<E>(chunks: &mut (impl Stream<Item = Result<Bytes, E>> + Unpin)) {
    let rest = async {
        let mut left = DRAIN_BYTES;
        while let Some(Ok(chunk)) = chunks.next().await {
            let Some(less) = left.checked_sub(chunk.len() as u64) else { break };
            left = less;
        }
    };
    // Out of time or not, the answer is the same.
    let _ = tokio::time::timeout(DRAIN_TIME, rest).await;
}
