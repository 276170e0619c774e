//! History items on the wire, as JSON and as NDJSON.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use types::{HistoryItem, ItemId, NewItem, Timestamp, TrainingOptions};
use utoipa::ToSchema;

use crate::app::App;
use crate::error::{ApiError, Code};
use crate::fault::invalid_id;
use crate::json::Object;
use crate::routes::training::WireTraining;

/// An upload.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Upload {
    /// At least one item.
    items: Vec<WireItem>,
    /// Hyper-parameters for the job in place of the defaults.
    training: Option<WireTraining>,
}

/// One input/output pair, or output only.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct WireItem {
    /// Unique within the user; made up if absent. An item that is there already with the same content is skipped.
    id: Option<String>,
    /// What the user was given; absent for plain text.
    input: Option<String>,
    /// What the user wrote or chose.
    output: String,
    /// When: Unix seconds, or an RFC 3339 text. The time of arrival if absent.
    #[schema(value_type = Option<f64>, example = 1_700_000_000)]
    created_at: Option<When>,
    /// Your own data, returned as given.
    metadata: Option<serde_json::Map<String, Value>>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected Unix seconds or an RFC 3339 text")]
enum When {
    Seconds(f64),
    Text(String),
}

/// A stored item.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StoredItem {
    id: String,
    #[schema(required)]
    input: Option<String>,
    output: String,
    /// Unix seconds.
    created_at: f64,
    #[schema(required, value_type = Option<Object>)]
    metadata: Option<Value>,
}

impl From<HistoryItem> for StoredItem {
    fn from(item: HistoryItem) -> Self {
        let HistoryItem { id, input, output, created_at, metadata } = item;
        Self { id: id.into(), input, output, created_at: seconds(created_at), metadata }
    }
}

/// Unix seconds with milliseconds behind the point.
pub(crate) fn seconds(at: Timestamp) -> f64 {
    at.0 as f64 / 1000.0
}

/// Years 0 to 9999, which every client can show.
const EARLIEST: i64 = -62_167_219_200_000;
const LATEST: i64 = 253_402_300_799_999;

impl When {
    fn read(&self, param: &str) -> Result<Timestamp, ApiError> {
        let millis = match self {
            Self::Seconds(seconds) => (seconds * 1000.0).round() as i64,
            Self::Text(text) => {
                let time = OffsetDateTime::parse(text, &Rfc3339)
                    .map_err(|_| ApiError::invalid(param, format!("is no RFC 3339 time: {text:?}")))?;
                i64::try_from(time.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX)
            }
        };
        if (EARLIEST..=LATEST).contains(&millis) {
            Ok(Timestamp(millis))
        } else {
            Err(ApiError::invalid(param, "lies outside the years 0 to 9999"))
        }
    }
}

/// A time in a query: Unix seconds, or an RFC 3339 text.
pub(crate) fn time(text: &str, param: &str) -> Result<Timestamp, ApiError> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| seconds.is_finite());
    seconds.map_or_else(|| When::Text(text.to_owned()), When::Seconds).read(param)
}

impl WireItem {
    fn check(self, app: &App, at: usize) -> Result<NewItem, ApiError> {
        let param = |field: &str| format!("items[{at}].{field}");
        let limits = &app.limits;
        if self.output.trim().is_empty() {
            return Err(ApiError::invalid(param("output"), "holds no text"));
        }
        for (field, text) in [("output", Some(&self.output)), ("input", self.input.as_ref())] {
            if text.is_some_and(|text| text.len() > limits.item_bytes) {
                let problem = format!("is longer than {} bytes", limits.item_bytes);
                return Err(ApiError::invalid(param(field), problem));
            }
        }
        let metadata = self.metadata.map(Value::Object);
        if metadata.as_ref().is_some_and(|value| value.to_string().len() > limits.item_metadata_bytes) {
            let problem = format!("is longer than {} bytes", limits.item_metadata_bytes);
            return Err(ApiError::invalid(param("metadata"), problem));
        }
        let id = self.id.map(|id| id.parse::<ItemId>().map_err(|error| invalid_id(&param("id"), &error)));
        Ok(NewItem {
            id: id.transpose()?,
            input: self.input,
            output: self.output,
            created_at: self.created_at.map(|when| when.read(&param("created_at"))).transpose()?,
            metadata,
        })
    }
}

/// What an upload brings.
pub(crate) type Items = (Vec<NewItem>, Option<TrainingOptions>);

/// Reads a JSON upload: `{"items": [...], "training": {...}}`.
pub(crate) fn from_json(app: &App, bytes: &[u8]) -> Result<Items, ApiError> {
    let object = Object::parse(bytes, app.limits.json_depth)?;
    let Upload { items, training } = object.read()?;
    let training = training.map(|training| training.check(app)).transpose()?;
    Ok((check(app, items)?, training))
}

/// What may stand before the items of an NDJSON upload.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Heading {
    training: WireTraining,
}

/// Reads an NDJSON upload: an item per line, before them perhaps `{"training": {...}}`; blank lines are skipped.
pub(crate) fn from_ndjson(app: &App, bytes: &[u8]) -> Result<Items, ApiError> {
    let (mut items, mut training, mut is_first) = (Vec::new(), None, true);
    for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let at = |error| in_line(number, &error);
        let object = Object::parse(line, app.limits.json_depth).map_err(at)?;
        if object.has("training") {
            if !is_first {
                let error =
                    ApiError::invalid("training", "may only stand in the first line, before the items");
                return Err(at(error));
            }
            let heading: Heading = object.read().map_err(at)?;
            training = Some(heading.training.check(app).map_err(at)?);
        } else {
            items.push(object.read().map_err(at)?);
        }
        is_first = false;
    }
    Ok((check(app, items)?, training))
}

/// The error with the line that it is in.
fn in_line(number: usize, error: &ApiError) -> ApiError {
    let detail = error.body().error;
    let param = detail.param.map_or(String::new(), |param| format!(".{param}"));
    ApiError::new(error.code(), format!("line {number}: {}", detail.message))
        .param(format!("line {number}{param}"))
}

fn check(app: &App, items: Vec<WireItem>) -> Result<Vec<NewItem>, ApiError> {
    if items.is_empty() {
        return Err(ApiError::new(Code::EmptyHistory, "items holds no item").param("items"));
    }
    items.into_iter().enumerate().map(|(at, item)| item.check(app, at)).collect()
}
