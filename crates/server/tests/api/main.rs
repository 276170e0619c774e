//! The HTTP role over a tiny random model and a store in memory.
#![expect(clippy::unwrap_used, reason = "tests")]

mod adapters;
mod bad_input;
mod failures;
mod faults;
mod form;
mod generate;
mod import;
mod learn;
mod lineage;
mod openapi;
mod shared;
mod training;

use std::sync::Arc;

use ::adapters::{AdapterCache, CacheSettings, Source};
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use engine::{Engine, ModelEngine, Settings};
use peft::Precision;
use serde_json::{Value, json};
use server::{ApiKey, App, AppState, Auth, Limits};
use sha2::{Digest as _, Sha256};
use store::{Lesson, NewGeneration, Store, item_hash};
use telemetry::Metrics;
use testkit::tiny_model;
use tokio::sync::Notify;
use tower::ServiceExt as _;
use types::{AdapterId, GenerationId, JobOutcome, SystemClock};

/// A server without a socket.
struct Server {
    app: App,
    store: Store,
    base: [u8; 32],
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The data of server-sent events.
    fn events(&self) -> Vec<String> {
        self.text().split("\n\n").filter_map(|event| Some(event.strip_prefix("data: ")?.to_owned())).collect()
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
    }
}

impl Server {
    async fn new() -> Self {
        Self::with(Auth::Open, Limits::default(), None).await
    }

    /// A server; the engine is a real one on the tiny model unless another is given.
    async fn with(auth: Auth, limits: Limits, engine: Option<Arc<dyn Engine>>) -> Self {
        Self::over(auth, limits, engine, |store| Arc::new(store)).await
    }

    /// As [`Server::with`], with adapters from a source over the store.
    async fn over(
        auth: Auth,
        limits: Limits,
        engine: Option<Arc<dyn Engine>>,
        source: impl FnOnce(Store) -> Arc<dyn Source>,
    ) -> Self {
        let (model, tokenizer) = tiny_model();
        let settings = Settings {
            batch: 4,
            queue: 32,
            step_tokens: 64,
            kv_bytes: 1 << 20,
            prefix_cache: true,
            guest_floor: 0.2,
            threads: 1,
            precision: Precision::Fast,
            eos: tokenizer.eos_ids().to_vec(),
        };
        let engine = engine.unwrap_or_else(|| {
            let engine = ModelEngine::start(Arc::clone(&model), settings).unwrap();
            tokio::spawn(engine.carry());
            Arc::new(engine)
        });
        let store = Store::in_memory(Arc::new(SystemClock)).await.unwrap();
        let base = *model.hash();
        let app = App::new(AppState {
            engine,
            tokenizer,
            store: store.clone(),
            adapters: AdapterCache::over(
                source(store.clone()),
                model.clone(),
                CacheSettings::new(Precision::Fast, 4 << 20),
            ),
            model_name: "base".into(),
            base: model.clone(),
            limits,
            auth,
            clock: Arc::new(SystemClock),
            metrics: Metrics::default(),
            on_upload: Arc::new(Notify::new()),
        });
        Self { app, store, base }
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.app.router().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = to_bytes(body, usize::MAX).await.unwrap().to_vec();
        Answer { status: parts.status, headers: parts.headers, body }
    }

    async fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        let request = Request::builder().method(method).uri(path);
        let request = match body {
            Some(body) => {
                request.header("content-type", "application/json").body(Body::from(body.to_string()))
            }
            None => request.body(Body::empty()),
        };
        self.send(request.unwrap()).await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        self.call("POST", path, Some(&body)).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.call("GET", path, None).await
    }

    /// Gives a user the fixture's adapter.
    async fn adopt(&self, tenant: &str, user: &str) -> String {
        self.adopt_as(&adapter(tenant, user)).await
    }

    /// Publishes the fixture's adapter under an id.
    async fn adopt_as(&self, adapter: &AdapterId) -> String {
        self.store.publish(adapter, self.fixture(), None, None).await.unwrap().id.to_string()
    }

    /// Gives a user of the open tenant the fixture's adapter as what the waiting job has learnt from all items.
    async fn learn(&self, user: &str) -> String {
        let claimed = self.store.claim("worker", 60_000, 3).await.unwrap().unwrap();
        let items = self.store.history_of(&claimed.fence).await.unwrap();
        let lesson = Lesson { manifest: items.iter().map(item_hash).collect(), ..Lesson::default() };
        let new = self.fixture();
        let outcome = outcome(Some(new.id));
        let (owner, finish) = (adapter("default", user), (claimed.fence, outcome));
        self.store.publish_lesson(&owner, new, None, finish, lesson).await.unwrap().id.to_string()
    }

    fn fixture(&self) -> NewGeneration {
        let (config, weights) = form::files("tiny-llama/lora-all");
        let id = peft::generation_id(&self.base, &config, &weights);
        NewGeneration {
            id,
            parent: None,
            base: self.base,
            config: config.into(),
            weights: weights.into(),
            meta: json!({ "gate": null }),
        }
    }
}

/// That of a job that published a generation, or nothing.
fn outcome(generation: Option<GenerationId>) -> JobOutcome {
    JobOutcome {
        published: generation.is_some(),
        generation,
        gate: None,
        reason: if generation.is_some() { "published" } else { "not published" }.into(),
        trained_tokens: 7,
        seconds: 0.5,
    }
}

fn adapter(tenant: &str, user: &str) -> AdapterId {
    AdapterId::new(tenant.parse().unwrap(), user.parse().unwrap())
}

fn key(text: &str, tenant: &str) -> ApiKey {
    let operator = text.contains("operator");
    ApiKey { sha256: Sha256::digest(text).into(), tenant: tenant.parse().unwrap(), operator }
}

/// The text of a chat's answer.
fn text_of(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

/// A chat request that the tiny model answers.
fn chat() -> Value {
    json!({
        "model": "base",
        "messages": [{ "role": "user", "content": "hello" }],
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": true,
    })
}

/// `body` with a field set.
fn with(mut body: Value, field: &str, value: Value) -> Value {
    body[field] = value;
    body
}
