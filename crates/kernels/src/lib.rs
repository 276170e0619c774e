//! The maths of a decoder on plain buffers, and the only unsafe code of the workspace.
//!
//! Matrices are row-major `f32` slices; weights keep the numbers of their file, packed for the kernels
//! ([`Weight`]). Every output row is summed in one fixed order, so a row's result does not
//! depend on how many other rows are computed with it, nor on the number of threads.
//! Work is spread over [`Workers`]: a rayon pool, or a [`Team`] for short phases.
//!
//! What it is not: it knows no models, no adapters' files, no tensors and no devices.
#![expect(clippy::needless_range_loop, reason = "rows and lanes run through several arrays at once")]

mod ahead;
mod apart;
mod attention;
#[cfg(target_arch = "x86_64")]
mod bf16_x86;
mod buffer;
mod cut;
mod format;
mod input;
mod isa;
mod lanes;
#[cfg(target_arch = "x86_64")]
mod lanes_avx2;
#[cfg(target_arch = "x86_64")]
mod lanes_avx512;
#[cfg(target_arch = "aarch64")]
mod lanes_neon;
mod layout;
mod linear;
mod lines;
mod low_rank;
mod low_rank_codes;
mod many_rows;
mod many_rows_bf16;
#[cfg(test)]
mod many_rows_bf16_tests;
mod matrices;
mod memory;
mod norms;
mod paging;
mod panel;
mod parallel;
mod pointwise;
pub mod reference;
mod rotary;
mod rotary_attention;
mod routing;
mod row_maxima;
mod sequence_attention;
mod team;
mod transpose;
mod updates;
mod vectors;
mod weight;

pub use attention::{KvStore, paged_attention};
pub use buffer::{PageBuffer, at_a_line, first_at_a_line};
pub use format::{Format, WeightError};
pub use input::Input;
pub use isa::{Isa, VARIABLE as ISA_VARIABLE, isa, isas};
pub use lanes::{brain_to_f32 as from_bf16, f32_to_brain as to_bf16};
pub use linear::{Layer, Means, Precision, Scratch, fused_linear, linear};
pub use low_rank::{LowRank, Numbers, adapt, codes_stride, pack_b};
pub use low_rank_codes::quantise_low_rank;
pub use many_rows::{Products, linear_many, linear_transposed};
pub use matrices::{Left, Right, multiply};
pub use norms::row_norms;
pub use paging::{BLOCK as BLOCK_LEN, KvElement, KvLayout, PagedSequence, Pages};
pub use pointwise::{
    Thinning, largest, rms_norm, rms_norm_grad, softmax_loss, softmax_weights, swiglu, swiglu_grad, thin_out,
};
pub use rotary::{KvStoreMut, RopeTable, Rotary, rope, rotate_and_store};
pub use rotary_attention::rotate_and_attend;
pub use routing::{Listing, NoAdapters, RouteTable, Routing};
pub use row_maxima::RowMaxima;
pub use sequence_attention::{Group, Span, SpanAttention, span_attention, span_attention_grad};
pub use team::{Rayon, Team, Workers};
pub use vectors::Vectors;
pub use weight::Weight;
