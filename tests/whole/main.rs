//! The whole program on the real default model: numbers, the loop over HTTP, restarts, bad files.
#![expect(clippy::unwrap_used, reason = "tests")]

mod bad_models;
mod default_model;
mod program;
mod task_adapter;
mod tenants;
mod the_loop;
