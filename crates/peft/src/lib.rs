//! Adapters: PEFT files to and from weights, their validation, and the routing of a batch's rows.
//!
//! What it is not: it knows no users' histories, no stores and no HTTP; it never touches a file system.

mod adapter;
mod base;
mod batch;
mod config;
mod error;
mod fields;
mod files;
mod kind;
mod modules;
mod packed;
mod pages;
mod shape;
mod site;
mod storage;
mod tensors;
mod weights;

pub use adapter::{Adapter, Lease};
pub use base::FrozenBase;
pub use batch::{AdapterBatch, SiteRouting};
pub use config::{LoraConfig, MAX_RANK};
pub use error::PeftError;
pub use files::generation_id;
pub use kernels::{Numbers, Precision};
pub use kind::{AdapterConfig, Ia3Config, MAX_VIRTUAL_TOKENS, PromptConfig};
pub use modules::TargetModules;
pub use packed::packing;
pub use pages::PagePool;
pub use shape::BaseShape;
pub use storage::Storage;
pub use weights::{AdapterWeights, Ia3Scale, Ia3Weights, LoraTensors, LoraWeights, PeftFiles, PromptWeights};
