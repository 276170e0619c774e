//! Adapters and generations as clients see them.

use axum::Json;
use axum::http::header::ETAG;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use serde::Serialize;
use store::{Fingerprint, GenerationRecord, Origin};
use types::{AdapterId, GenerationId, HistoryRange, Owner, Provenance, TrainingCourse};
use utoipa::ToSchema;

use crate::app::App;
use crate::generation::GENERATION;
use crate::routes::items::seconds;
use crate::routes::jobs::WireGate;
use crate::routes::training::WireTraining;
use crate::wanted::model_of;

/// SHA-256 of the base that an adapter was made for: checked when one comes in, told when one goes out.
pub(super) const BASE: HeaderName = HeaderName::from_static("x-atelier-base");

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";

/// An adapter: the generation that answers new requests.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct WireAdapter {
    /// `adapter`.
    object: &'static str,
    /// Whose it is; null for a shared adapter.
    #[schema(required)]
    user: Option<String>,
    /// The shared adapter's name; null for a user's.
    #[schema(required)]
    name: Option<String>,
    /// What to write in `model` to be answered by it.
    model: String,
    /// The head: hash of base, config and weights.
    generation: String,
    #[serde(flatten)]
    lineage: Lineage,
}

/// One version of an adapter; it never changes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct WireGeneration {
    /// Hash of base, config and weights.
    id: String,
    /// `generation`.
    object: &'static str,
    /// Whether it answers new requests.
    is_head: bool,
    #[serde(flatten)]
    lineage: Lineage,
}

/// Where a generation comes from and what it is made of.
#[derive(Debug, Serialize, ToSchema)]
struct Lineage {
    /// The generation before it, if there was one.
    #[schema(required)]
    parent: Option<String>,
    /// SHA-256 of the base it belongs to.
    base_hash: String,
    /// `trained` or `imported`.
    origin: &'static str,
    /// Unix seconds.
    created_at: f64,
    /// Not deleted until it is unpinned.
    pinned: bool,
    /// Bytes of both files.
    bytes: u64,
    /// The part of the history that has gone into it. This and what follows: null for an imported generation.
    #[schema(required)]
    history: Option<WireHistoryRange>,
    /// Every hyper-parameter it was trained with, the seed aside.
    #[schema(required)]
    recipe: Option<WireTraining>,
    /// Seed of initial weights, order and dropout.
    #[schema(required)]
    seed: Option<u64>,
    /// The comparison that it was published for.
    #[schema(required)]
    gate: Option<WireGate>,
    /// How the training went.
    #[schema(required)]
    training: Option<WireCourse>,
    files: Vec<WireFile>,
}

/// A part of a history, in its order: by time, then by arrival.
#[derive(Debug, Serialize, ToSchema)]
struct WireHistoryRange {
    /// Id of the oldest item.
    first_item: String,
    /// Id of the newest item.
    last_item: String,
    items: u64,
}

/// How a training went.
#[derive(Debug, Serialize, ToSchema)]
struct WireCourse {
    /// From fresh weights; otherwise on from the parent.
    from_scratch: bool,
    /// Trainings since fresh weights, this one included if it is none.
    updates: u32,
    /// Items that were learnt for the first time.
    new_items: u64,
    /// Items that the parent had learnt, learnt again.
    replayed_items: u64,
    /// Optimiser steps.
    steps: u64,
    /// Tokens that went through training, all epochs.
    trained_tokens: u64,
}

impl From<HistoryRange> for WireHistoryRange {
    fn from(HistoryRange { first, last, items }: HistoryRange) -> Self {
        Self { first_item: first.into(), last_item: last.into(), items }
    }
}

impl From<TrainingCourse> for WireCourse {
    fn from(course: TrainingCourse) -> Self {
        let TrainingCourse { from_scratch, updates, new_items, replayed_items, steps, trained_tokens } =
            course;
        Self { from_scratch, updates, new_items, replayed_items, steps, trained_tokens }
    }
}

/// A file to download.
#[derive(Debug, Serialize, ToSchema)]
struct WireFile {
    name: &'static str,
    bytes: u64,
    sha256: String,
    url: String,
}

/// An adapter that is no more.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DeletedAdapter {
    /// Its name in `model`.
    model: String,
    /// `adapter.deleted`.
    object: &'static str,
    /// `true`.
    deleted: bool,
}

impl DeletedAdapter {
    pub(super) fn of(app: &App, id: &AdapterId) -> Self {
        Self { model: model_of(&app.model_name, &id.owner), object: "adapter.deleted", deleted: true }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Lineage {
    fn new(id: &AdapterId, record: GenerationRecord) -> Self {
        let bytes = record.bytes();
        let root = match &id.owner {
            Owner::User(user) => format!("/v1/users/{user}/adapter"),
            Owner::Shared(name) => format!("/v1/adapters/{name}"),
        };
        let file = |name, print: Fingerprint| WireFile {
            name,
            bytes: print.bytes,
            sha256: hex(&print.sha256),
            url: format!("{root}/generations/{}/{name}", record.id),
        };
        let made = (record.origin == Origin::Trained)
            .then(|| serde_json::from_value::<Provenance>(record.meta).ok())
            .flatten();
        let (history, recipe, seed, gate, training) = match made {
            None => (None, None, None, None, None),
            Some(Provenance { history, recipe, seed, gate, training }) => {
                (history, Some(recipe), Some(seed), gate, Some(training))
            }
        };
        Self {
            parent: record.parent.map(|parent| parent.to_string()),
            base_hash: hex(&record.base),
            origin: record.origin.as_str(),
            created_at: seconds(record.created_at),
            pinned: record.pinned,
            bytes,
            files: vec![file(CONFIG, record.config), file(WEIGHTS, record.weights)],
            history: history.map(WireHistoryRange::from),
            recipe: recipe.map(WireTraining::from),
            seed,
            gate: gate.map(WireGate::from),
            training: training.map(WireCourse::from),
        }
    }
}

impl WireGeneration {
    pub(super) fn new(id: &AdapterId, record: GenerationRecord) -> Self {
        let (generation, is_head) = (record.id.to_string(), record.is_head);
        Self { id: generation, object: "generation", is_head, lineage: Lineage::new(id, record) }
    }
}

/// The headers that name a generation: its own, and the ETag that `If-Match` takes.
pub(super) fn named(generation: &GenerationId) -> HeaderMap {
    let value = |text: String| HeaderValue::try_from(text).ok();
    let plain = value(generation.to_string()).map(|value| (GENERATION, value));
    let tag = value(format!("\"{generation}\"")).map(|value| (ETAG, value));
    plain.into_iter().chain(tag).collect()
}

/// The header that names the base a generation belongs to, as an upload takes it.
pub(super) fn made_for(record: &GenerationRecord) -> HeaderMap {
    HeaderValue::try_from(hex(&record.base)).ok().map(|value| (BASE, value)).into_iter().collect()
}

/// The adapter with `record` as its head, as an answer.
pub(super) fn answer(app: &App, id: &AdapterId, record: GenerationRecord) -> (HeaderMap, Json<WireAdapter>) {
    let headers = named(&record.id);
    let (user, name) = match &id.owner {
        Owner::User(user) => (Some(user.to_string()), None),
        Owner::Shared(name) => (None, Some(name.to_string())),
    };
    let adapter = WireAdapter {
        object: "adapter",
        user,
        name,
        model: model_of(&app.model_name, &id.owner),
        generation: record.id.to_string(),
        lineage: Lineage::new(id, record),
    };
    (headers, Json(adapter))
}
