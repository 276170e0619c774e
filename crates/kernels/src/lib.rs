//! The maths of a decoder on plain buffers, and the only unsafe code of the workspace.
//!
//! Matrices are row-major `f32` slices; weights stay in the format of their file ([`Weight`]) and are
//! decoded tile by tile. Every output row is summed in one fixed order, so a row's result does not
//! depend on how many other rows are computed with it, nor on the number of threads.
//! Work is spread over the rayon pool the caller runs in.
//!
//! What it is not: it knows no models, no adapters' files, no tensors and no devices.

mod attention;
mod dequant;
mod format;
mod lanes;
mod linear;
mod linear_grad;
mod parallel;
mod pointwise;
pub mod reference;
mod sequence_attention;

pub use attention::{KvLayout, KvView, PagedSequence, paged_attention};
pub use format::{Format, Weight, WeightError};
pub use lanes::{Isa, isa, isas};
pub use linear::{AdapterRows, adapt, linear, linear_adapted, linear_adapted_with};
pub use linear_grad::linear_transposed;
pub use pointwise::{RopeTable, rms_norm, rms_norm_grad, rope, swiglu, swiglu_grad};
pub use sequence_attention::{Span, SpanAttention, span_attention, span_attention_grad};
