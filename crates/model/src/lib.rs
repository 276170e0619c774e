//! The frozen base: one configurable decoder definition, its weight files, and the paged KV pool.
//!
//! The same definition serves and trains: [`BaseModel::hidden`] runs the blocks, and a [`Pass`] says what a
//! linear layer and the attention are — over many users' adapters and paged KV in serving
//! ([`BaseModel::forward`]), differentiable in training.
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
mod serve;
mod tensors;

pub use config::{ModelConfig, RopeScaling};
pub use decoder::{BaseModel, Block, Linear, Pass};
pub use error::ModelError;
pub use gguf::{GgufFile, Value};
pub use gguf_model::site_name as gguf_site_name;
pub use kernels::{Precision, softmax_weights};
pub use kv::{BLOCK_LEN, KvPool};
pub use load::{LoadOptions, Loaded, load};
pub use ops::{FrozenLinear, SpanAttend, map, slice_of};
pub use packed::PackedPass;
pub use serve::{BatchInput, Logits, Runtime};
