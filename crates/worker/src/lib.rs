//! The background role: claims jobs, trains adapters on histories, gates and publishes them.
//!
//! What it is not: it serves nobody, and writes nothing but what the store's fencing lets through.

mod error;
mod gate;
mod run;
mod work;

pub use error::WorkerError;
pub use gate::{Measured, judge};
pub use run::{Announce, Worker};
pub use work::Settings;
