//! What the server counts, and the text that a scrape gets.

use std::fmt;
use std::sync::Arc;

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::{Histogram, Snapshot};

type Labels<const N: usize> = [(&'static str, String); N];

/// How a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationOutcome {
    /// All of its answers are complete.
    Completed,
    /// The client went away.
    Cancelled,
    /// A fault, or its deadline.
    Failed,
    /// It never got into the engine: no such adapter, or too much to do.
    Rejected,
}

impl GenerationOutcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
        }
    }
}

/// The server's metrics. Clones share them.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    requests: Family<Labels<3>, Counter>,
    request_seconds: Family<Labels<2>, Histogram>,
    generations: Family<[(&'static str, &'static str); 1], Counter>,
    first_token_seconds: Histogram,
    token_seconds: Histogram,
    adapter_load_seconds: Histogram,
    history_items: Counter,
    history_duplicates: Counter,
    training_steps: Counter,
    training_tokens: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut inner = Inner {
            registry: Registry::default(),
            requests: Family::default(),
            request_seconds: Family::default(),
            generations: Family::default(),
            first_token_seconds: Histogram::default(),
            token_seconds: Histogram::default(),
            adapter_load_seconds: Histogram::default(),
            history_items: Counter::default(),
            history_duplicates: Counter::default(),
            training_steps: Counter::default(),
            training_tokens: Counter::default(),
        };
        let registry = &mut inner.registry;
        registry.register(
            "atelier_requests",
            "HTTP requests; status 499: the client left",
            inner.requests.clone(),
        );
        registry.register(
            "atelier_request_seconds",
            "Seconds from a request to the head of its response",
            inner.request_seconds.clone(),
        );
        registry.register("atelier_generations", "Generation requests by outcome", inner.generations.clone());
        registry.register(
            "atelier_time_to_first_token_seconds",
            "Seconds from a generation request to its first token",
            inner.first_token_seconds.clone(),
        );
        registry.register(
            "atelier_time_per_output_token_seconds",
            "Mean seconds from token to token of an answer",
            inner.token_seconds.clone(),
        );
        registry.register(
            "atelier_adapter_load_seconds",
            "Seconds that an adapter's load from the store took",
            inner.adapter_load_seconds.clone(),
        );
        registry.register("atelier_history_items", "History items accepted", inner.history_items.clone());
        registry.register(
            "atelier_history_duplicates",
            "History items that were there already",
            inner.history_duplicates.clone(),
        );
        registry.register(
            "atelier_training_steps",
            "Optimiser steps done, of all jobs",
            inner.training_steps.clone(),
        );
        registry.register(
            "atelier_training_tokens",
            "Tokens that training has gone through",
            inner.training_tokens.clone(),
        );
        Self(Arc::new(inner))
    }

    /// A request has got the head of its response. `route` is the template (`/v1/users/{user}`), never the path.
    pub fn request(&self, method: &'static str, route: &str, status: u16, seconds: f64) {
        let method = ("method", method.to_owned());
        let route = ("route", route.to_owned());
        self.0.request_seconds.get_or_create(&[method.clone(), route.clone()]).observe(seconds);
        self.0.requests.get_or_create(&[method, route, ("status", status.to_string())]).inc();
    }

    /// A generation request is over.
    pub fn generation(&self, outcome: GenerationOutcome) {
        self.0.generations.get_or_create(&[("outcome", outcome.as_str())]).inc();
    }

    /// A generation request has got its first token.
    pub fn first_token(&self, seconds: f64) {
        self.0.first_token_seconds.observe(seconds);
    }

    /// An answer is complete: the mean time from token to token.
    pub fn per_token(&self, seconds: f64) {
        self.0.token_seconds.observe(seconds);
    }

    /// An adapter has been loaded from the store.
    pub fn adapter_load(&self, seconds: f64) {
        self.0.adapter_load_seconds.observe(seconds);
    }

    /// History has arrived.
    pub fn history(&self, accepted: u64, duplicates: u64) {
        self.0.history_items.inc_by(accepted);
        self.0.history_duplicates.inc_by(duplicates);
    }

    /// A training has done an optimiser step.
    pub fn training_step(&self, tokens: u64) {
        self.0.training_steps.inc();
        self.0.training_tokens.inc_by(tokens);
    }

    /// Everything in OpenMetrics text, media type [`Metrics::MEDIA_TYPE`].
    ///
    /// # Errors
    /// Never in practice: writing to a string does not fail.
    pub fn render(&self, snapshot: &Snapshot) -> Result<String, fmt::Error> {
        let mut standing = Registry::default();
        standing.register_collector(Box::new(*snapshot));
        let mut text = String::with_capacity(8 * 1024);
        encode_registry(&mut text, &standing)?;
        encode_registry(&mut text, &self.0.registry)?;
        encode_eof(&mut text)?;
        Ok(text)
    }

    /// Media type of [`Metrics::render`].
    pub const MEDIA_TYPE: &'static str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
}
