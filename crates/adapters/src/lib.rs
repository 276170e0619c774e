//! Residency of adapters: from the blob store into a bounded part of memory, one load per adapter at a time.
//!
//! What it is not: it decides neither who may use an adapter nor which generation is head (the store
//! does); it runs no model.

mod cache;
mod error;

pub use cache::{AdapterCache, Residency};
pub use error::AcquireError;
