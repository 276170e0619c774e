//! Examples to adapter weights: forward and backward through the shared frozen base on plain buffers, and the
//! measurement of losses.
//!
//! What it is not: no I/O, no users and no clock. It is given jobs of token sequences and gives weights.

#[cfg(test)]
mod budget_tests;
mod buffers;
mod checkpoint;
mod error;
mod evaluate;
mod head;
#[cfg(test)]
mod joint_tests;
mod optimiser;
mod pack;
mod params;
mod pass;
mod random;
mod recipe;
#[cfg(test)]
mod reference_tests;
mod run;
mod site;
mod trainer;

pub use error::TrainError;
pub use evaluate::{Loss, evaluate};
pub use kernels::Products;
pub use optimiser::Adam;
pub use params::row_squares;
pub use recipe::{Recipe, learning_rate};
pub use trainer::{Control, StepReport, TrainJob, Trained, Verdict, train, train_jointly};
