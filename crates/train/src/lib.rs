//! Examples to adapter weights: forward and backward through the shared frozen base, and the measurement of
//! losses.
//!
//! What it is not: no I/O, no jobs, no users. It is given token sequences and gives weights.

mod adapted;
mod error;
mod evaluate;
mod loss;
mod pack;
mod pass;
mod recipe;
#[cfg(test)]
mod reference_tests;
mod trainer;

pub use error::TrainError;
pub use evaluate::{Loss, evaluate};
pub use recipe::{Recipe, learning_rate};
pub use trainer::{StepReport, Trained, Verdict, train};
