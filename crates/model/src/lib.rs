//! The frozen base: one configurable decoder definition, its weight files, and the paged KV pool.
//!
//! [`BaseModel::forward`] serves many users' adapters over paged KV; [`BaseModel::hidden`] runs the same blocks for
//! measuring losses, a [`Pass`] saying what a linear layer and the attention are. Training walks [`BaseModel::blocks`]
//! by itself.
//!
//! What it is not: it knows no requests, no text and no optimiser. It reads files, and never writes.

mod config;
mod decoder;
mod error;
mod folder;
mod gguf;
mod gguf_model;
mod kv;
mod load;
mod ops;
mod packed;
mod profile;
mod serve;
mod task;
mod tensors;

pub use config::{ModelConfig, RopeScaling};
pub use decoder::{BaseModel, Block, Linear, Pass};
pub use error::ModelError;
pub use gguf::{GgufFile, Value};
pub use gguf_model::site_name as gguf_site_name;
pub use kernels::{Precision, largest, softmax_weights};
pub use kv::{BLOCK_LEN, KvPool};
pub use load::{LoadOptions, Loaded, load};
pub use packed::PackedPass;
pub use profile::{Phase, PhaseTime};
pub use serve::{BatchInput, Logits, Runtime};
pub use task::{TaskMode, Under};
