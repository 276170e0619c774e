//! The application: settings and wiring. Everything that does work lives in the crates below.
//!
//! Architecture invariant: environment variables are read here (through the command line's definitions) and
//! nowhere else.

pub mod demo;
pub mod fetch;
mod keys;
mod model_path;
pub mod service;
pub mod settings;
mod task_adapter;
