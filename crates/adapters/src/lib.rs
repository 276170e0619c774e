//! Residency of adapters in three tiers: from the blob store through host memory into the slots that requests lease.
//!
//! What it is not: it decides neither who may use an adapter nor which generation is head (the store
//! does); it runs no model.

mod cache;
mod error;
mod flight;
mod loads;
mod pace;
mod residency;
mod source;
mod tiers;
mod verdict;

pub use cache::AdapterCache;
pub use error::AcquireError;
pub use pace::Busy;
pub use residency::{CacheSettings, Residency, Tier, TierResidency};
pub use source::{Answer, Head, Source};
