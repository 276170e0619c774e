//! Causal attention within whole sequences packed one after another, forward and backward, for training.
//!
//! Nothing is kept between the two passes: the backward pass computes the probabilities again.

use rayon::prelude::*;

use crate::attention::softmax;
use crate::lanes::{Lanes, isa, multiversion};
use crate::low_rank::dot;
use crate::parallel::Shared;

/// The rows of one sequence in a packed batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First row.
    pub first: usize,
    /// Number of rows.
    pub len: usize,
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
    pub spans: Vec<Span>,
}

impl SpanAttention {
    fn check(&self, q: usize, k: usize, v: usize) -> usize {
        assert!(self.heads.is_multiple_of(self.kv_heads), "heads do not divide into groups");
        let rows: usize = self.spans.iter().map(|s| s.len).sum();
        assert_eq!(q, rows * self.heads * self.head_dim, "q does not fit the spans");
        assert!(k == v && k == rows * self.kv_heads * self.head_dim, "k and v do not fit the spans");
        rows
    }

    /// First position that row `row` of a sequence sees.
    #[inline(always)]
    fn from(&self, row: usize) -> usize {
        self.window.map_or(0, |window| (row + 1).saturating_sub(window))
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
    let shared = Shared::new(out);
    let tasks = shape.spans.len() * shape.heads;
    (0..tasks).into_par_iter().for_each(|task| {
        forward(isa(), shape, shape.spans[task / shape.heads], task % shape.heads, q, k, v, shared);
    });
}

multiversion! {
    fn forward(
        shape: &SpanAttention, span: Span, head: usize, q: &[f32], k: &[f32], v: &[f32], out: Shared<'_>,
    ) = forward_body<Lanes>
}

#[inline(always)]
fn forward_body<L: Lanes>(
    shape: &SpanAttention,
    span: Span,
    head: usize,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: Shared<'_>,
) {
    let dim = shape.head_dim;
    let at = places(shape, span, head);
    let mut scores = Vec::with_capacity(span.len);
    for row in 0..span.len {
        probabilities::<L>(shape, &at, row, q, k, &mut scores);
        // SAFETY: every task has its own sequence and head, every row its own part.
        let out = unsafe { out.part(at.query(row), dim) };
        out.fill(0.0);
        for (position, &weight) in (shape.from(row)..=row).zip(&scores) {
            add_scaled(weight, &v[at.key(position)..][..dim], out);
        }
    }
}

/// Where a head's rows lie in `q` and in `k` and `v`.
#[derive(Clone, Copy)]
struct Places {
    first: usize,
    dim: usize,
    query: (usize, usize),
    key: (usize, usize),
}

impl Places {
    #[inline(always)]
    fn query(&self, row: usize) -> usize {
        ((self.first + row) * self.query.0 + self.query.1) * self.dim
    }
    #[inline(always)]
    fn key(&self, row: usize) -> usize {
        ((self.first + row) * self.key.0 + self.key.1) * self.dim
    }
}

#[inline(always)]
fn places(shape: &SpanAttention, span: Span, head: usize) -> Places {
    let group = shape.heads / shape.kv_heads;
    Places {
        first: span.first,
        dim: shape.head_dim,
        query: (shape.heads, head),
        key: (shape.kv_heads, head / group),
    }
}

#[inline(always)]
fn probabilities<L: Lanes>(
    shape: &SpanAttention,
    at: &Places,
    row: usize,
    q: &[f32],
    k: &[f32],
    scores: &mut Vec<f32>,
) {
    let dim = at.dim;
    let scale = 1.0 / (dim as f32).sqrt();
    let q = &q[at.query(row)..][..dim];
    scores.clear();
    for p in shape.from(row)..=row {
        scores.push(dot::<L>(q, &k[at.key(p)..][..dim]) * scale);
    }
    softmax(scores);
}

#[inline(always)]
fn add_scaled(scale: f32, from: &[f32], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += scale * from;
    }
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
    dk.fill(0.0);
    dv.fill(0.0);
    let (dq, dk, dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
    let tasks = shape.spans.len() * shape.kv_heads;
    (0..tasks).into_par_iter().for_each(|task| {
        // The query heads of a group add to the same keys, so one task takes them all, in order.
        let (span, kv_head) = (shape.spans[task / shape.kv_heads], task % shape.kv_heads);
        let group = shape.heads / shape.kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            backward(isa(), shape, span, head, [q, k, v, dout], [dq, dk, dv]);
        }
    });
}

multiversion! {
    fn backward(
        shape: &SpanAttention, span: Span, head: usize, inputs: [&[f32]; 4], grads: [Shared<'_>; 3],
    ) = backward_body<Lanes>
}

/// With `p = softmax(s)`: `dv += p dout`, `ds = p (dout . v - sum(p (dout . v)))`, `dq = scale ds k`,
/// `dk += scale ds q`.
#[inline(always)]
fn backward_body<L: Lanes>(
    shape: &SpanAttention,
    span: Span,
    head: usize,
    [q, k, v, dout]: [&[f32]; 4],
    [dq, dk, dv]: [Shared<'_>; 3],
) {
    let at = places(shape, span, head);
    let dim = at.dim;
    let scale = 1.0 / (dim as f32).sqrt();
    let (mut p, mut dp) = (Vec::with_capacity(span.len), Vec::with_capacity(span.len));
    for row in 0..span.len {
        let from = shape.from(row);
        probabilities::<L>(shape, &at, row, q, k, &mut p);
        let dout = &dout[at.query(row)..][..dim];
        dp.clear();
        for i in from..=row {
            dp.push(dot::<L>(dout, &v[at.key(i)..][..dim]));
        }
        let mean = dot::<L>(&p, &dp);
        // SAFETY: every task has its own sequence and key head; one part of a buffer is alive at a time.
        let dq = unsafe { dq.part(at.query(row), dim) };
        dq.fill(0.0);
        let q = &q[at.query(row)..][..dim];
        for (i, (&p, &dp)) in (from..=row).zip(p.iter().zip(&dp)) {
            let key = at.key(i);
            // SAFETY: as above.
            add_scaled(p, dout, unsafe { dv.part(key, dim) });
            let ds = p * (dp - mean) * scale;
            add_scaled(ds, &k[key..][..dim], dq);
            // SAFETY: as above.
            add_scaled(ds, q, unsafe { dk.part(key, dim) });
        }
    }
}
