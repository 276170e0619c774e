//! Causal attention of new rows over their sequences' paged keys and values (blocks as in vLLM's
//! PagedAttention, Kwon et al. 2023), with grouped heads and an optional sliding window.

use std::cell::Cell;

use rayon::prelude::*;

use crate::lanes::{Lanes, isa, multiversion};
use crate::linear::block;
use crate::parallel::Shared;

/// The shape of one layer's key or value store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Key/value heads.
    pub kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Positions per block.
    pub block_len: usize,
}

impl KvLayout {
    /// Values in one block: (kv_heads, block_len, head_dim).
    #[must_use]
    pub const fn block_values(&self) -> usize {
        self.kv_heads * self.block_len * self.head_dim
    }

    /// Where head `head` of position `position` of a sequence with these blocks begins.
    #[inline(always)]
    fn offset(&self, blocks: &[u32], head: usize, position: usize) -> usize {
        let block = blocks[position / self.block_len] as usize;
        block * self.block_values() + (head * self.block_len + position % self.block_len) * self.head_dim
    }

    /// Stores a row of (kv_heads, head_dim) as `position` of a sequence.
    ///
    /// # Panics
    /// When the sequence's blocks do not reach the position.
    pub fn store(&self, pool: &mut [f32], blocks: &[u32], position: usize, row: &[f32]) {
        assert_eq!(row.len(), self.kv_heads * self.head_dim);
        for (head, values) in row.chunks_exact(self.head_dim).enumerate() {
            let at = self.offset(blocks, head, position);
            pool[at..at + self.head_dim].copy_from_slice(values);
        }
    }
}

/// One layer's keys and values.
#[derive(Debug, Clone, Copy)]
pub struct KvView<'a> {
    /// Shape of both.
    pub layout: KvLayout,
    /// Keys, (blocks, kv_heads, block_len, head_dim).
    pub keys: &'a [f32],
    /// Values, the same shape.
    pub values: &'a [f32],
    /// How many positions back a row sees, itself included; `None` sees all.
    pub window: Option<usize>,
}

/// The rows of one sequence in a step.
#[derive(Debug, Clone, Copy)]
pub struct PagedSequence<'a> {
    /// Its blocks, in order.
    pub blocks: &'a [u32],
    /// Its first row in the batch.
    pub first_row: usize,
    /// Number of rows in the batch.
    pub rows: usize,
    /// Position of the first row.
    pub start: usize,
}

thread_local! {
    static SCORES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// `softmax(q Kᵀ / sqrt(head_dim)) V` for every row and head; keys and values of the rows themselves are
/// stored already. `q` and `out` are (rows, heads, head_dim); heads share key heads in equal groups.
///
/// # Panics
/// When a length does not fit, or a sequence's blocks do not reach its last row.
pub fn paged_attention(
    kv: &KvView<'_>,
    sequences: &[PagedSequence<'_>],
    heads: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let dim = kv.layout.head_dim;
    let width = heads * dim;
    assert!(heads.is_multiple_of(kv.layout.kv_heads), "heads do not divide into groups");
    assert_eq!(q.len(), out.len());
    let rows: usize = sequences.iter().map(|s| s.rows).sum();
    assert_eq!(q.len(), rows * width, "q is not {rows} x {width}");
    let places: Vec<(&PagedSequence<'_>, usize)> =
        sequences.iter().flat_map(|s| (0..s.rows).map(move |row| (s, row))).collect();
    let shared = Shared::new(out);
    (0..rows * heads).into_par_iter().with_min_len(4).for_each(|task| {
        let (sequence, row) = places[task / heads];
        let head = task % heads;
        let at = (sequence.first_row + row) * width + head * dim;
        // SAFETY: every task has its own row and head.
        let out = unsafe { shared.part(at, dim) };
        one(
            isa(),
            kv,
            sequence.blocks,
            sequence.start + row,
            head / (heads / kv.layout.kv_heads),
            &q[at..][..dim],
            out,
        );
    });
}

multiversion! {
    /// One row and head: attends to the positions up to `position`.
    fn one(
        kv: &KvView<'_>, blocks: &[u32], position: usize, kv_head: usize, q: &[f32], out: &mut [f32],
    ) = one_body<Lanes>
}

#[inline(always)]
fn one_body<L: Lanes>(
    kv: &KvView<'_>,
    blocks: &[u32],
    position: usize,
    kv_head: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let dim = q.len();
    let scale = 1.0 / (dim as f32).sqrt();
    let first = kv.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let mut scores = SCORES.take();
    scores.clear();
    for p in first..=position {
        let key = &kv.keys[kv.layout.offset(blocks, kv_head, p)..][..dim];
        scores.push(block::<L, 1, 1>([q], [key])[0][0] * scale);
    }
    softmax(&mut scores);
    out.fill(0.0);
    for (p, &weight) in (first..=position).zip(scores.iter()) {
        let value = &kv.values[kv.layout.offset(blocks, kv_head, p)..][..dim];
        for i in 0..dim {
            out[i] += weight * value[i];
        }
    }
    SCORES.set(scores);
}

/// In place, in the order of the values.
#[inline(always)]
pub(crate) fn softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += *score;
    }
    let scale = 1.0 / sum;
    scores.iter_mut().for_each(|score| *score *= scale);
}
