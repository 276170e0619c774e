//! What tests of several crates share: the tiny models of `tests/fixtures`, and an engine that misbehaves on demand.
//!
//! What it is not: a dependency of anything but tests.

mod fake_engine;
mod small_base;
mod tiny;

pub use fake_engine::{FakeEngine, Mood};
pub use small_base::SmallBase;
pub use tiny::{fixture, tiny_model};
