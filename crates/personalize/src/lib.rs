//! From a user's history to training examples.
//!
//! What it is not: pure, so no I/O, no model and no store.

mod example;
mod split;

pub use example::example;
pub use split::{Holdout, Split, split};
