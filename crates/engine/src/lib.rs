//! The model thread: it takes token sequences with adapters, runs them in one continuous batch and streams
//! tokens back.
//!
//! What it is not: it knows no store, no text and no HTTP. It gets tokens and a lease, and gives tokens.

mod allowance;
mod arrange;
mod blocks;
mod buckets;
mod draw;
#[cfg(test)]
mod faults;
mod guest;
mod links;
mod post;
mod recovery;
mod request;
mod runner;
mod sampler;
mod scheduler;
mod sequence;
mod thread;

pub use blocks::{BlockCopy, BlockPool, BlockTable, Reused, Scope};
pub use guest::{Guest, Visit};
pub use request::{
    Engine, EngineStats, Event, Generate, Limits, SampledToken, SubmitError, TokenSink, TokenStream, channel,
};
pub use sampler::{Choice, Sampler, Scratch};
pub use scheduler::{Blocks, Scheduler, Step, Work};
pub use thread::{ModelEngine, Settings};
