//! The upload of an adapter as a form: its two files, and the hash of the base it was made for.

use axum::body::BodyDataStream;
use axum::extract::Request;
use axum::http::header::CONTENT_TYPE;
use multer::{Constraints, Multipart, SizeLimit};

use super::wire::{CONFIG, WEIGHTS};
use crate::app::App;
use crate::body::{self, media_type, too_large, unsupported};
use crate::error::{ApiError, Code};
use crate::json::missing;
use crate::limits::Limits;

const FORM: &str = "multipart/form-data";
const BASE_HASH: &str = "base_hash";

/// Bytes of the form that are neither file: boundaries, headers, the hash.
const OVERHEAD: usize = 16 * 1024;

/// What was uploaded.
pub(super) struct Form {
    pub(super) config: Vec<u8>,
    pub(super) weights: Vec<u8>,
    pub(super) base_hash: Option<[u8; 32]>,
}

/// Reads the form within the limits of each part. A part that is unknown, missing or there twice is named.
pub(super) async fn read(request: Request, app: &App) -> Result<Form, ApiError> {
    match media_type(request.headers()).as_deref() {
        Some(FORM) => {}
        other => return Err(unsupported(other, FORM)),
    }
    let header = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let boundary = multer::parse_boundary(header.unwrap_or_default()).map_err(|error| broken(&error))?;
    let limit = app.limits.adapter_config_bytes + app.limits.adapter_weights_bytes + OVERHEAD;
    let mut chunks = body::open(request, limit).await?;
    let form = body::in_time(app, parts(&mut chunks, boundary, &app.limits, limit)).await;
    if form.is_err() {
        body::drain(&mut chunks).await;
    }
    form
}

async fn parts(
    chunks: &mut BodyDataStream,
    boundary: String,
    limits: &Limits,
    limit: usize,
) -> Result<Form, ApiError> {
    let sizes = Constraints::new().size_limit(SizeLimit::new().whole_stream(limit as u64));
    let mut form = Multipart::with_constraints(chunks, boundary, sizes);
    let (mut config, mut weights, mut base_hash) = (None, None, None);
    let told = |error: multer::Error| match error {
        multer::Error::StreamSizeExceeded { .. } => too_large(limit),
        error => broken(&error),
    };
    while let Some(mut part) = form.next_field().await.map_err(told)? {
        let name = part.name().unwrap_or_default().to_owned();
        let (place, most) = match name.as_str() {
            CONFIG | "config" => (&mut config, limits.adapter_config_bytes),
            WEIGHTS | "weights" => (&mut weights, limits.adapter_weights_bytes),
            BASE_HASH => (&mut base_hash, 64),
            _ => {
                let message = format!(
                    "the form has a part {name:?}: it may have {CONFIG} (or config), {WEIGHTS} (or weights) and \
                     {BASE_HASH}"
                );
                return Err(ApiError::new(Code::UnknownParameter, message).param(name));
            }
        };
        if place.is_some() {
            let message = format!("the form has the part {name} twice, under one name or two");
            return Err(ApiError::new(Code::InvalidMultipart, message).param(name));
        }
        let bytes: &mut Vec<u8> = place.insert(Vec::new());
        while let Some(chunk) = part.chunk().await.map_err(told)? {
            if bytes.len() + chunk.len() > most {
                let message = format!("the part {name} is larger than {most} bytes");
                return Err(ApiError::new(Code::BodyTooLarge, message).param(name));
            }
            bytes.extend_from_slice(&chunk);
        }
    }
    let base_hash = base_hash.map(|hash| super::import::base_hash(BASE_HASH, &hash)).transpose()?;
    Ok(Form {
        config: config.ok_or_else(|| missing(CONFIG))?,
        weights: weights.ok_or_else(|| missing(WEIGHTS))?,
        base_hash,
    })
}

fn broken(error: &multer::Error) -> ApiError {
    ApiError::new(Code::InvalidMultipart, format!("the body is not a whole form: {error}"))
}
