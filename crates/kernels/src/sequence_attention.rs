//! Causal attention within whole sequences packed one after another, forward and backward, for training.
//!
//! Sequences that begin alike may share the rows of their beginning. Nothing is kept between the two passes: the
//! backward pass computes the probabilities again. Queries go in blocks, so that every step is a matrix product.

use rayon::prelude::*;

use crate::isa::isa;
use crate::lanes::{Lanes, multiversion};
use crate::low_rank::dot;
use crate::matrices::Product;
use crate::parallel::Shared;
use crate::pointwise::{exp, lane_max, lane_sum};

/// Successive rows of a packed batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First row.
    pub first: usize,
    /// Number of rows.
    pub len: usize,
}

/// A sequence, or several with the same beginning: each tail goes on where the head ends and does not see the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The whole sequence, or what the tails have in common; may be empty then.
    pub head: Span,
    /// The rest of each sequence.
    pub tails: Vec<Span>,
}

impl Group {
    /// Rows of head and tails.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.head.len + self.tails.iter().map(|tail| tail.len).sum::<usize>()
    }
}

impl From<Span> for Group {
    fn from(head: Span) -> Self {
        Self { head, tails: Vec::new() }
    }
}

/// The shape of the attention over a packed batch.
#[derive(Debug, Clone)]
pub struct SpanAttention {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; `heads` is a multiple of it.
    pub kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// How many positions back a row sees, itself included; `None` sees all.
    pub window: Option<usize>,
    /// The sequences; they cover all rows without overlap.
    pub groups: Vec<Group>,
}

/// Query rows of a block.
const BLOCK: usize = 24;

impl SpanAttention {
    fn check(&self, q: usize, k: usize, v: usize) {
        assert!(self.heads.is_multiple_of(self.kv_heads), "heads do not divide into groups");
        let rows: usize = self.groups.iter().map(Group::rows).sum();
        let spans = self.groups.iter().flat_map(|group| std::iter::once(&group.head).chain(&group.tails));
        assert!(spans.clone().all(|span| span.first + span.len <= rows), "a span lies outside the rows");
        assert_eq!(q, rows * self.heads * self.head_dim, "q does not fit the spans");
        assert!(k == v && k == rows * self.kv_heads * self.head_dim, "k and v do not fit the spans");
    }

    /// First position that the row at `position` sees.
    #[inline(always)]
    fn from(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// The longest sequence of a group, as it is padded: an odd number of vectors, so that the columns of a transposed
    /// matrix do not fall on the same few sets of the cache.
    fn room(group: &Group) -> usize {
        let longest = group.tails.iter().map(|tail| tail.len).max().unwrap_or(0);
        ((group.head.len + longest).div_ceil(16) | 1) * 16
    }

    /// Calls `run` for every group and key head.
    fn tasks(&self, run: impl Fn(&Group, usize) + Sync) {
        (0..self.groups.len() * self.kv_heads)
            .into_par_iter()
            .for_each(|task| run(&self.groups[task / self.kv_heads], task % self.kv_heads));
    }
}

/// `softmax(q Kᵀ / sqrt(head_dim)) V`; `q` and `out` are (rows, heads, head_dim), `k` and `v` (rows,
/// kv_heads, head_dim).
///
/// # Panics
/// When a length does not fit.
pub fn span_attention(shape: &SpanAttention, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) {
    shape.check(q.len(), k.len(), v.len());
    assert_eq!(q.len(), out.len());
    let out = Shared::new(out);
    shape.tasks(|group, kv_head| forward(shape, group, kv_head, q, k, v, out));
}

/// The gradients of [`span_attention`]: `dq`, `dk` and `dv` are overwritten.
///
/// # Panics
/// When a length does not fit.
pub fn span_attention_grad(
    shape: &SpanAttention,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    dout: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    shape.check(q.len(), k.len(), v.len());
    assert!(dout.len() == q.len() && dq.len() == q.len() && dk.len() == k.len() && dv.len() == v.len());
    let grads = [Shared::new(dq), Shared::new(dk), Shared::new(dv)];
    shape.tasks(|group, kv_head| backward(isa(), shape, group, kv_head, [q, k, v, dout], grads));
}

/// Keys and values of one head, of the sequence at hand.
struct Keys {
    dim: usize,
    room: usize,
    /// (head_dim, room).
    k_columns: Vec<f32>,
    v_columns: Vec<f32>,
    /// (room, head_dim).
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Keys {
    #[inline(always)]
    fn new(dim: usize, room: usize) -> Self {
        let empty = || vec![0.0; dim * room];
        Self { dim, room, k_columns: empty(), v_columns: empty(), k: empty(), v: empty() }
    }

    /// Takes the rows of a span as the positions from `at` on.
    #[inline(always)]
    fn take(&mut self, shape: &SpanAttention, kv_head: usize, span: Span, at: usize, k: &[f32], v: &[f32]) {
        let dim = self.dim;
        for row in 0..span.len {
            let from = ((span.first + row) * shape.kv_heads + kv_head) * dim;
            let (k, v) = (&k[from..][..dim], &v[from..][..dim]);
            let position = at + row;
            self.k[position * dim..][..dim].copy_from_slice(k);
            self.v[position * dim..][..dim].copy_from_slice(v);
            for i in 0..dim {
                self.k_columns[i * self.room + position] = k[i];
                self.v_columns[i * self.room + position] = v[i];
            }
        }
    }
}

/// Some query rows of one head and the positions they see.
#[derive(Clone, Copy)]
struct Block {
    /// Place of the first row's head in `q`, and the number of rows.
    query: usize,
    rows: usize,
    /// From a row to the next.
    stride: usize,
    /// Position of the first row.
    position: usize,
    /// First position in the buffer of scores, and their number.
    from: usize,
    width: usize,
}

impl Block {
    /// The blocks of a span whose first row is at position `at`.
    #[inline(always)]
    fn all(shape: &SpanAttention, span: Span, at: usize, head: usize) -> impl Iterator<Item = Self> {
        let (dim, stride) = (shape.head_dim, shape.heads * shape.head_dim);
        (0..span.len).step_by(BLOCK).map(move |row| {
            let rows = BLOCK.min(span.len - row);
            let from = shape.from(at + row) / 16 * 16;
            let width = (at + row + rows - from).next_multiple_of(16);
            let query = (span.first + row) * stride + head * dim;
            Self { query, rows, stride, position: at + row, from, width }
        })
    }

    /// `rows` of `values` times the columns of keys or values.
    #[inline(always)]
    fn against_columns(&self, values: &[f32], columns: &[f32], keys: &Keys, out: &mut [f32]) {
        assert!(self.from + self.width <= keys.room && out.len() >= self.rows * self.width);
        let product = Product {
            left: values[self.query..].as_ptr(),
            row: self.stride,
            step: 1,
            right: columns[self.from..].as_ptr(),
            stride: keys.room,
            len: keys.dim,
            out: out.as_mut_ptr(),
            out_stride: self.width,
            add: false,
        };
        // SAFETY: the block's rows lie in `values` (checked by `SpanAttention::check`), the rest is asserted.
        unsafe { product.run(self.rows, self.width) }
    }

    /// The probabilities of all rows, zero where a row does not look.
    #[inline(always)]
    fn probabilities(&self, shape: &SpanAttention, q: &[f32], keys: &Keys, out: &mut [f32]) {
        self.against_columns(q, &keys.k_columns, keys, out);
        let scale = 1.0 / (keys.dim as f32).sqrt();
        for (row, scores) in out.chunks_exact_mut(self.width).take(self.rows).enumerate() {
            let position = self.position + row;
            let (first, last) = (shape.from(position) - self.from, position - self.from);
            scores[..first].fill(0.0);
            scores[last + 1..].fill(0.0);
            let seen = &mut scores[first..=last];
            let max = lane_max(seen);
            seen.iter_mut().for_each(|score| *score = exp((*score - max) * scale));
            let share = 1.0 / lane_sum(seen, |_, power| power);
            seen.iter_mut().for_each(|score| *score *= share);
        }
    }

    /// `scores` times keys or values (room, head_dim): one row of a head for every query row.
    ///
    /// # Safety
    /// The head of the block's rows is this task's own in `out`.
    #[inline(always)]
    unsafe fn times_rows(&self, scores: &[f32], rows: &[f32], dim: usize, out: Shared<'_>) {
        assert!(scores.len() >= self.rows * self.width && rows.len() >= (self.from + self.width) * dim);
        let product = Product {
            left: scores.as_ptr(),
            row: self.width,
            step: 1,
            right: rows[self.from * dim..].as_ptr(),
            stride: dim,
            len: self.width,
            out: out.start().wrapping_add(self.query),
            out_stride: self.stride,
            add: false,
        };
        // SAFETY: asserted, and the caller's promise.
        unsafe { product.run(self.rows, dim) }
    }

    /// Adds the transposed `scores` times the block's rows of `values` to `out` (room, head_dim).
    #[inline(always)]
    fn transposed(&self, scores: &[f32], values: &[f32], dim: usize, out: &mut [f32]) {
        assert!(scores.len() >= self.rows * self.width && out.len() >= (self.from + self.width) * dim);
        let product = Product {
            left: scores.as_ptr(),
            row: 1,
            step: self.width,
            right: values[self.query..].as_ptr(),
            stride: self.stride,
            len: self.rows,
            out: out[self.from * dim..].as_mut_ptr(),
            out_stride: dim,
            add: true,
        };
        // SAFETY: asserted; the block's rows lie in `values`.
        unsafe { product.run(self.width, dim) }
    }
}

multiversion! {
    fn forward(
        shape: &SpanAttention, group: &Group, kv_head: usize, q: &[f32], k: &[f32], v: &[f32], out: Shared<'_>,
    ) = forward_body
}

#[inline(always)]
fn forward_body(
    shape: &SpanAttention,
    group: &Group,
    kv_head: usize,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: Shared<'_>,
) {
    let mut keys = Keys::new(shape.head_dim, SpanAttention::room(group));
    let mut scores = vec![0.0; BLOCK * keys.room];
    let of_head = shape.heads / shape.kv_heads;
    for (span, at) in sequences(group) {
        keys.take(shape, kv_head, span, at, k, v);
        for head in kv_head * of_head..(kv_head + 1) * of_head {
            for block in Block::all(shape, span, at, head) {
                block.probabilities(shape, q, &keys, &mut scores);
                // SAFETY: every task has its own sequences and heads.
                unsafe { block.times_rows(&scores, &keys.v, keys.dim, out) };
            }
        }
    }
}

/// The spans of a group and the position of each one's first row.
fn sequences(group: &Group) -> impl Iterator<Item = (Span, usize)> {
    let tails = group.tails.iter().map(|&tail| (tail, group.head.len));
    std::iter::once((group.head, 0)).chain(tails)
}

multiversion! {
    fn backward(
        shape: &SpanAttention, group: &Group, kv_head: usize, inputs: [&[f32]; 4], grads: [Shared<'_>; 3],
    ) = backward_body<Lanes>
}

/// With `p = softmax(s)`: `dv += p dout`, `ds = p (dout . v - sum(p (dout . v)))`, `dq = scale ds k`,
/// `dk += scale ds q`. The query heads of a group add to the same keys, so one task takes them all, in order.
#[inline(always)]
fn backward_body<L: Lanes>(
    shape: &SpanAttention,
    group: &Group,
    kv_head: usize,
    [q, k, v, dout]: [&[f32]; 4],
    [dq, dk, dv]: [Shared<'_>; 3],
) {
    let mut keys = Keys::new(shape.head_dim, SpanAttention::room(group));
    let (dim, room) = (keys.dim, keys.room);
    let (mut p, mut ds) = (vec![0.0; BLOCK * room], vec![0.0; BLOCK * room]);
    let (mut dk_sums, mut dv_sums) = (vec![0.0; room * dim], vec![0.0; room * dim]);
    let scale = 1.0 / (dim as f32).sqrt();
    let of_head = shape.heads / shape.kv_heads;
    let put = |span: Span, sums: &[f32], to: Shared<'_>| {
        for (row, sums) in sums.chunks_exact(dim).take(span.len).enumerate() {
            // SAFETY: every task has its own sequences and key head; one part is alive at a time.
            let to = unsafe { to.part(((span.first + row) * shape.kv_heads + kv_head) * dim, dim) };
            to.copy_from_slice(sums);
        }
    };
    for (span, at) in sequences(group) {
        keys.take(shape, kv_head, span, at, k, v);
        dk_sums[at * dim..].fill(0.0);
        dv_sums[at * dim..].fill(0.0);
        for head in kv_head * of_head..(kv_head + 1) * of_head {
            for block in Block::all(shape, span, at, head) {
                block.probabilities(shape, q, &keys, &mut p);
                block.against_columns(dout, &keys.v_columns, &keys, &mut ds);
                block.transposed(&p, dout, dim, &mut dv_sums);
                let rows = p.chunks_exact(block.width).zip(ds.chunks_exact_mut(block.width));
                for (p, ds) in rows.take(block.rows) {
                    let mean = dot::<L>(p, ds);
                    for (ds, p) in ds.iter_mut().zip(p) {
                        *ds = p * (*ds - mean) * scale;
                    }
                }
                block.transposed(&ds, q, dim, &mut dk_sums);
                // SAFETY: every task has its own sequences and heads.
                unsafe { block.times_rows(&ds, &keys.k, dim, dq) };
            }
        }
        // The head's sums are not complete before the last tail.
        if span != group.head {
            put(span, &dk_sums[at * dim..], dk);
            put(span, &dv_sums[at * dim..], dv);
        }
    }
    put(group.head, &dk_sums, dk);
    put(group.head, &dv_sums, dv);
}
