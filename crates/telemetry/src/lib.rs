//! Metrics and logs: the typed metrics of the server, their names, and the set-up of tracing.
//!
//! What it is not: it measures nothing itself and knows no engine, cache or store. Callers hand in what they counted
//! ([`Metrics`]) and, at a scrape, how things stand ([`Snapshot`]).
//!
//! Architecture invariant: no label holds a user's or tenant's name, so the number of series is bounded and a scrape
//! tells nothing about people.

mod error;
mod histogram;
mod logging;
mod metrics;
mod snapshot;

pub use error::TelemetryError;
pub use histogram::Histogram;
pub use logging::init_tracing;
pub use metrics::{GenerationOutcome, Metrics};
pub use snapshot::{CacheSnapshot, EngineSnapshot, QueueSnapshot, Snapshot, TierSnapshot};
