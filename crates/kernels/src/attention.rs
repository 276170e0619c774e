//! Causal attention of new rows over their sequences' paged keys and values (blocks as in vLLM's
//! PagedAttention, Kwon et al. 2023), with grouped heads and an optional sliding window.
//!
//! Keys lie with sixteen positions side by side and values with sixteen dimensions side by side, so that neither the
//! scores nor the outputs are ever summed across lanes. Query rows and heads that share a key head are computed
//! together; each is summed in the order of the positions, whoever is beside it.

use std::cell::Cell;

use crate::isa::Isa;
use crate::lanes::{Lanes, brain_to_f32, multiversion};
use crate::linear::Means;
use crate::paging::{BLOCK, KvElement, KvLayout, Pages};
use crate::parallel::Shared;
use crate::pointwise::exp;

/// Keys and values, to read one layer's.
#[derive(Debug, Clone, Copy)]
pub struct KvStore<'a, E> {
    /// The store's shape.
    pub layout: KvLayout,
    /// All keys and values, in this layout.
    pub numbers: &'a [E],
    /// The layer that is read.
    pub layer: usize,
    /// How many positions back a row sees, itself included; `None` sees all.
    pub window: Option<usize>,
}

/// Rows of a sequence that one task computes.
const TILE_ROWS: usize = 16;
/// Fewer products than this are not worth waking others for.
const ALONE: usize = 1 << 17;

thread_local! {
    static SCORES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// `softmax(q Kᵀ / sqrt(head_dim)) V` for every row and head; keys and values of the rows themselves are
/// stored already. `q` and `out` are (rows, heads, head_dim); heads share key heads in equal groups.
///
/// # Panics
/// When a length does not fit, or a sequence's blocks do not reach its last row.
pub fn paged_attention<E: KvElement>(
    means: Means<'_>,
    kv: &KvStore<'_, E>,
    pages: Pages<'_>,
    heads: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let KvLayout { layers, kv_heads, head_dim } = kv.layout;
    let width = heads * head_dim;
    let rows = pages.check(kv.layout, kv.numbers.len());
    assert!(kv.layer < layers, "layer {} of {layers}", kv.layer);
    assert!(heads.is_multiple_of(kv_heads), "heads do not divide into groups");
    assert_eq!(q.len(), rows * width, "q is not {rows} x {width}");
    assert_eq!(q.len(), out.len());
    let (mut tiles, mut products) = (0, 0);
    for sequence in pages.sequences() {
        tiles += sequence.rows.div_ceil(TILE_ROWS);
        products += sequence.rows * (sequence.start + sequence.rows) * width;
    }
    let shared = Shared::new(out);
    let task = |index: usize| {
        // A thread's first tasks are of the rows whose keys it has stored.
        let (mut tile, kv_head) = (index / kv_heads, index % kv_heads);
        if tiles > pages.sequences().len() {
            // Late rows have most to do and go first.
            tile = tiles - 1 - tile;
        }
        let mut places = pages.with_rows();
        let place = places.find(|(_, sequence)| {
            let own = sequence.rows.div_ceil(TILE_ROWS);
            let here = tile < own;
            tile -= if here { 0 } else { own };
            here
        });
        let Some((first_row, sequence)) = place else { return };
        let from = tile * TILE_ROWS;
        let rows = Rows {
            blocks: pages.of(sequence),
            first: first_row + from,
            start: sequence.start + from,
            count: TILE_ROWS.min(sequence.rows - from),
        };
        attend_tile(means.isa, kv, rows, (kv_head, heads), q, shared);
    };
    let tasks = tiles * kv_heads;
    if products < ALONE {
        (0..tasks).for_each(task);
    } else {
        means.workers.run(tasks, &task);
    }
}

/// Some consecutive rows of a sequence.
#[derive(Clone, Copy)]
struct Rows<'a> {
    blocks: &'a [u32],
    /// In the batch.
    first: usize,
    /// Position of the first.
    start: usize,
    count: usize,
}

fn attend_tile<E: KvElement>(
    isa: Isa,
    kv: &KvStore<'_, E>,
    rows: Rows<'_>,
    heads: (usize, usize),
    q: &[f32],
    out: Shared<'_>,
) {
    let raw = Raw {
        numbers: kv.numbers.as_ptr().cast(),
        brain: E::BRAIN,
        layout: kv.layout,
        layer: kv.layer,
        window: kv.window,
    };
    tile(isa, raw, rows, heads, q, out);
}

/// A [`KvStore`] of either precision.
#[derive(Clone, Copy)]
struct Raw {
    numbers: *const u8,
    brain: bool,
    layout: KvLayout,
    layer: usize,
    window: Option<usize>,
}

impl Raw {
    #[inline(always)]
    fn keys(&self, block: u32, head: usize) -> usize {
        self.layout.keys(self.layer, block, head)
    }

    #[inline(always)]
    fn values(&self, block: u32, head: usize) -> usize {
        self.layout.values(self.layer, block, head)
    }

    /// Sixteen numbers.
    ///
    /// # Safety
    /// `at` and fifteen more lie in the store.
    #[inline(always)]
    unsafe fn load<L: Lanes>(&self, at: usize) -> L {
        // SAFETY: the caller vouches for the place.
        unsafe {
            if self.brain {
                L::load_brain(self.numbers.add(at * 2))
            } else {
                L::load(self.numbers.cast::<f32>().add(at))
            }
        }
    }

    #[inline(always)]
    fn prefetch<L: Lanes>(&self, at: usize) {
        L::prefetch(self.numbers.wrapping_add(at * if self.brain { 2 } else { 4 }));
    }
}

multiversion! {
    /// Some rows and the query heads of key head `heads.0` out of `heads.1` query heads in all.
    fn tile(
        kv: Raw, rows: Rows<'_>, heads: (usize, usize), q: &[f32], out: Shared<'_>,
    ) = tile_body<Lanes>
}

/// The part of the attention that one query row and head has.
#[derive(Clone, Copy)]
struct Query {
    /// Where it lies in `q` and in `out`.
    at: usize,
    position: usize,
    /// Where its scores lie.
    scores: usize,
}

/// Queries computed together.
const MOST: usize = 12;

#[inline(always)]
fn tile_body<L: Lanes>(
    kv: Raw,
    rows: Rows<'_>,
    (kv_head, heads): (usize, usize),
    q: &[f32],
    out: Shared<'_>,
) {
    let KvLayout { kv_heads, head_dim, .. } = kv.layout;
    let group = heads / kv_heads;
    let stride = (rows.start + rows.count).next_multiple_of(BLOCK);
    let mut scores = SCORES.take();
    if scores.len() < MOST * stride {
        // In large steps, so that a growing context seldom allocates.
        scores.resize(MOST * stride.next_power_of_two().max(4096), 0.0);
    }
    let mut queries = [Query { at: 0, position: 0, scores: 0 }; MOST];
    let mut waiting = 0;
    for index in 0..rows.count * group {
        let (row, head) = (index / group, kv_head * group + index % group);
        queries[waiting] = Query {
            at: ((rows.first + row) * heads + head) * head_dim,
            position: rows.start + row,
            scores: waiting * stride,
        };
        waiting += 1;
        if waiting < MOST && index + 1 < rows.count * group {
            continue;
        }
        let batch = &queries[..waiting];
        // SAFETY: the caller checked blocks and lengths; tasks own disjoint rows and heads.
        unsafe {
            if L::TALL && waiting == MOST {
                attend::<L, MOST>(kv, rows.blocks, kv_head, batch, q, &mut scores, out);
            } else {
                let mut rest = batch;
                while let Some((three, more)) = rest.split_first_chunk::<3>() {
                    attend::<L, 3>(kv, rows.blocks, kv_head, three, q, &mut scores, out);
                    rest = more;
                }
                for query in rest {
                    let one = std::slice::from_ref(query);
                    attend::<L, 1>(kv, rows.blocks, kv_head, one, q, &mut scores, out);
                }
            }
        }
        waiting = 0;
    }
    SCORES.set(scores);
}

/// # Safety
/// All blocks lie in the store and reach the last query's position; no one else uses the queries' outputs.
#[inline(always)]
unsafe fn attend<L: Lanes, const N: usize>(
    kv: Raw,
    blocks: &[u32],
    kv_head: usize,
    queries: &[Query],
    q: &[f32],
    scores: &mut [f32],
    out: Shared<'_>,
) {
    let dim = kv.layout.head_dim;
    let scale = 1.0 / (dim as f32).sqrt();
    let seen = |position: usize| kv.window.map_or(0, |window| (position + 1).saturating_sub(window));
    // Queries are in the order of their positions.
    let first = seen(queries[0].position);
    let last = queries[N - 1].position;
    for block in first / BLOCK..=last / BLOCK {
        let [keys, next] =
            [block, (block + 1).min(last / BLOCK)].map(|block| kv.keys(blocks[block], kv_head));
        let values = kv.values(blocks[block], kv_head);
        let mut sums = [L::zero(); N];
        for d in 0..dim {
            if d % 2 == 0 {
                // The next keys and this block's values come out of memory meanwhile.
                kv.prefetch::<L>(next + d * BLOCK);
                kv.prefetch::<L>(values + d * BLOCK);
            }
            // SAFETY: the block lies in the store (the caller's promise).
            let key: L = unsafe { kv.load(keys + d * BLOCK) };
            for i in 0..N {
                // SAFETY: a query has `dim` values.
                let q = unsafe { *q.get_unchecked(queries[i].at + d) };
                sums[i] = sums[i].fma(key, L::splat(q));
            }
        }
        for i in 0..N {
            let to = &mut scores[queries[i].scores + block * BLOCK..][..BLOCK];
            // SAFETY: sixteen values.
            unsafe { sums[i].mul(L::splat(scale)).store(to.as_mut_ptr()) };
        }
    }
    let mut factors = [0.0; N];
    for i in 0..N {
        let Query { position, scores: at, .. } = queries[i];
        let from = seen(position);
        // Whole blocks; what a query does not see weighs nothing.
        let row = &mut scores[at + first / BLOCK * BLOCK..at + (last / BLOCK + 1) * BLOCK];
        let base = first / BLOCK * BLOCK;
        row[..from - base].fill(f32::NEG_INFINITY);
        row[position + 1 - base..].fill(f32::NEG_INFINITY);
        factors[i] = 1.0 / exponentials(row, from / BLOCK - first / BLOCK);
    }
    let mut d = 0;
    while d < dim {
        if d + 4 * 16 <= dim && N <= 6 {
            // SAFETY: as for this function.
            unsafe { mix::<L, N, 4>(kv, blocks, kv_head, (first, last), d, queries, scores, &factors, out) };
            d += 64;
        } else if d + 2 * 16 <= dim {
            // SAFETY: as above.
            unsafe { mix::<L, N, 2>(kv, blocks, kv_head, (first, last), d, queries, scores, &factors, out) };
            d += 32;
        } else if d + 16 <= dim {
            // SAFETY: as above.
            unsafe { mix::<L, N, 1>(kv, blocks, kv_head, (first, last), d, queries, scores, &factors, out) };
            d += 16;
        } else {
            for i in 0..N {
                // SAFETY: this task's own row and head.
                let out = unsafe { out.part(queries[i].at + d, dim - d) };
                out.fill(0.0);
                for position in first..=last {
                    let weight = scores[queries[i].scores + position];
                    let at = kv.values(blocks[position / BLOCK], kv_head) + position % BLOCK * dim + d;
                    for (j, out) in out.iter_mut().enumerate() {
                        *out += weight * one(kv, at + j);
                    }
                }
                out.iter_mut().for_each(|out| *out *= factors[i]);
            }
            d = dim;
        }
    }
}

fn one(kv: Raw, at: usize) -> f32 {
    // SAFETY: `attend`'s caller vouches for the place.
    unsafe {
        if kv.brain {
            brain_to_f32(*kv.numbers.cast::<u16>().add(at))
        } else {
            *kv.numbers.cast::<f32>().add(at)
        }
    }
}

/// Replaces scores by `e^(score - max)` and returns their sum, in sixteen lanes and a fixed tree. The first `skip`
/// blocks, which the row does not see, are left out of the sum, so that its order is the row's own.
#[inline(always)]
fn exponentials(row: &mut [f32], skip: usize) -> f32 {
    let mut max = [f32::NEG_INFINITY; BLOCK];
    for block in row.as_chunks::<BLOCK>().0 {
        for i in 0..BLOCK {
            max[i] = if block[i] > max[i] { block[i] } else { max[i] };
        }
    }
    let max = max.iter().fold(f32::NEG_INFINITY, |max, &v| if v > max { v } else { max });
    let mut sums = [0.0f32; BLOCK];
    for (index, block) in row.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
        for i in 0..BLOCK {
            let seen = block[i] != f32::NEG_INFINITY;
            let value = exp(block[i] - max);
            block[i] = if seen { value } else { 0.0 };
        }
        if index >= skip {
            for i in 0..BLOCK {
                sums[i] += block[i];
            }
        }
    }
    let mut width = BLOCK / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

/// The dimensions `d..d + 16 * W` of the outputs: values weighted by the scores, position after position.
///
/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn mix<L: Lanes, const N: usize, const W: usize>(
    kv: Raw,
    blocks: &[u32],
    kv_head: usize,
    (first, last): (usize, usize),
    d: usize,
    queries: &[Query],
    scores: &[f32],
    factors: &[f32; N],
    out: Shared<'_>,
) {
    let dim = kv.layout.head_dim;
    let mut sums = [[L::zero(); W]; N];
    for block in first / BLOCK..=last / BLOCK {
        let values = kv.values(blocks[block], kv_head) + d;
        let from = first.max(block * BLOCK);
        for position in from..=last.min(block * BLOCK + BLOCK - 1) {
            let at = values + (position - block * BLOCK) * dim;
            let mut value = [L::zero(); W];
            for w in 0..W {
                // SAFETY: the block lies in the store (the caller's promise).
                value[w] = unsafe { kv.load(at + w * 16) };
            }
            for i in 0..N {
                // SAFETY: a query has scores up to the last position's block.
                let weight = L::splat(unsafe { *scores.get_unchecked(queries[i].scores + position) });
                for w in 0..W {
                    sums[i][w] = sums[i][w].fma(value[w], weight);
                }
            }
        }
    }
    for i in 0..N {
        // SAFETY: this task's own row and head.
        let out = unsafe { out.part(queries[i].at + d, 16 * W) };
        for w in 0..W {
            // SAFETY: sixteen values from `16 * w` on.
            unsafe { sums[i][w].mul(L::splat(factors[i])).store(out.as_mut_ptr().add(16 * w)) };
        }
    }
}
