//! The background role: claims jobs, trains adapters on histories, gates and publishes them.
//!
//! What it is not: it serves nobody, and writes nothing but what the store's fencing lets through.

mod drift;
mod error;
mod gate;
mod heartbeat;
mod norm;
mod options;
mod paired;
mod patience;
mod plan;
mod run;
mod settings;
mod shift;
mod trainer;
mod work;

pub use error::WorkerError;
pub use gate::{HeadMeasured, Judgement, Measured, judge};
pub use paired::chance;
pub use patience::Load;
pub use run::{Announce, OnStep, Worker};
pub use settings::{GateRules, Growth, Settings};
pub use trainer::{Jointly, Trainer};
