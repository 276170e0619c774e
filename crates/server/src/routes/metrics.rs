//! `GET /metrics`: everything counted, cheap enough to be scraped twenty times a second.

use std::sync::{Mutex, PoisonError};

use adapters::TierResidency;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use telemetry::{CacheSnapshot, EngineSnapshot, Metrics, QueueSnapshot, Snapshot, TierSnapshot};
use types::Timestamp;

use crate::app::App;
use crate::error::ApiError;

/// How long the figures of the job queue are good for: they come from the database.
const FRESH_MILLIS: i64 = 1_000;

/// The job queue's figures as of a moment ago.
#[derive(Default)]
pub(crate) struct QueueGauge(Mutex<Option<(Timestamp, QueueSnapshot)>>);

impl QueueGauge {
    async fn read(&self, app: &App, now: Timestamp) -> Result<QueueSnapshot, ApiError> {
        let known = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, snapshot)) = known
            && (at..at.plus_millis(FRESH_MILLIS)).contains(&now)
        {
            return Ok(snapshot);
        }
        let stats = app.store.queue_stats().await?;
        let snapshot = QueueSnapshot {
            queued: stats.queued,
            running: stats.running,
            oldest_queued: stats.oldest_queued,
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, snapshot));
        Ok(snapshot)
    }
}

fn tier(tier: &TierResidency) -> TierSnapshot {
    let TierResidency { adapters, bytes, budget, evictions } = *tier;
    TierSnapshot { adapters, bytes, budget, evictions }
}

/// All metrics, in OpenMetrics text.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "operation",
    responses((status = 200, description = "OpenMetrics text", content_type = "application/openmetrics-text"))
)]
pub(crate) async fn metrics(State(app): State<App>) -> Result<Response, ApiError> {
    let now = app.clock.now();
    let (engine, limits, cache) = (app.engine.stats(), app.engine.limits(), app.adapters.residency());
    let snapshot = Snapshot {
        now,
        engine: EngineSnapshot {
            waiting: engine.waiting + app.admission().waiting(),
            running: engine.running,
            batch: limits.batch,
            kv_blocks_used: engine.kv_blocks_used,
            kv_blocks_idle: engine.kv_blocks_idle,
            kv_blocks: engine.kv_blocks,
            adapters_running: engine.adapters_running,
            steps: engine.steps,
            prompt_tokens: engine.prompt_tokens,
            prefix_hits: engine.prefix_hits,
            prefix_tokens: engine.prefix_tokens,
            prefix_evictions: engine.prefix_evictions,
            generated_tokens: engine.generated_tokens,
            preemptions: engine.preemptions,
            cancelled: engine.cancelled,
            failed: engine.failed,
        },
        cache: CacheSnapshot {
            host: tier(&cache.host),
            device: tier(&cache.device),
            hits: cache.hits,
            host_hits: cache.host_hits,
            misses: cache.misses,
            loads: cache.loads,
            packed: cache.packed,
            uploads: cache.uploads,
            waiting: cache.waiting,
        },
        queue: app.queue().read(&app, now).await?,
    };
    let text = app.metrics.render(&snapshot).map_err(ApiError::internal)?;
    Ok(([(CONTENT_TYPE, Metrics::MEDIA_TYPE)], text).into_response())
}
