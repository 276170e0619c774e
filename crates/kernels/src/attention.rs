//! Causal attention of new rows over their sequences' paged keys and values (blocks as in vLLM's
//! PagedAttention, Kwon et al. 2023), with grouped heads and an optional sliding window.
//!
//! Keys lie with sixteen positions side by side and values with sixteen dimensions side by side, so that neither the
//! scores nor the outputs are ever summed across lanes. Query rows and heads that share a key head are computed
//! together; each is summed in the order of the positions, whoever is beside it.

use std::cell::Cell;

use crate::lanes::{Lanes, brain_to_f32, multiversion};
use crate::linear::Means;
use crate::paging::{BLOCK, KvElement, KvLayout, Pages};
use crate::parallel::Shared;
use crate::pointwise::exp_with;

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
    let KvLayout { kv_heads, head_dim, .. } = kv.layout;
    let width = heads * head_dim;
    let rows = pages.check(kv.layout, kv.numbers.len());
    kv.layout.check(kv.layer, heads);
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
            next: (&[], 0),
        };
        attend_tile(means.isa, kv.raw(), rows, (kv_head, heads), q.as_ptr(), shared);
    };
    let tasks = tiles * kv_heads;
    if products < ALONE {
        (0..tasks).for_each(task);
    } else {
        means.workers.run(tasks, &task);
    }
}

impl<E: KvElement> KvStore<'_, E> {
    fn raw(&self) -> Raw {
        Raw::new(self.numbers.as_ptr(), self.layout, self.layer, self.window)
    }
}

/// Some consecutive rows of a sequence.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) blocks: &'a [u32],
    /// In the batch.
    pub(crate) first: usize,
    /// Position of the first.
    pub(crate) start: usize,
    pub(crate) count: usize,
    /// Blocks and key head of what the thread computes next: their keys come out of memory meanwhile.
    pub(crate) next: (&'a [u32], usize),
}

/// A [`KvStore`] of either precision.
#[derive(Clone, Copy)]
pub(crate) struct Raw {
    numbers: *const u8,
    brain: bool,
    layout: KvLayout,
    layer: usize,
    window: Option<usize>,
}

impl Raw {
    pub(crate) fn new<E: KvElement>(
        numbers: *const E,
        layout: KvLayout,
        layer: usize,
        window: Option<usize>,
    ) -> Self {
        Self { numbers: numbers.cast(), brain: E::BRAIN, layout, layer, window }
    }

    #[inline(always)]
    fn keys(&self, block: u32, head: usize) -> usize {
        self.layout.keys(self.layer, block, head)
    }

    #[inline(always)]
    fn values(&self, block: u32, head: usize) -> usize {
        self.layout.values(self.layer, block, head)
    }

    /// Thirty-two numbers: two dimensions of sixteen positions' keys, or of a value sixteen dimensions and those after
    /// them.
    ///
    /// # Safety
    /// `at` and thirty-one more lie in the store.
    #[inline(always)]
    unsafe fn load_two<L: Lanes>(&self, at: usize) -> [L; 2] {
        // SAFETY: the caller vouches for the place.
        unsafe {
            if self.brain {
                L::load_brain_pairs(self.numbers.add(at * 2))
            } else {
                let at = self.numbers.cast::<f32>().add(at);
                [L::load(at), L::load(at.add(16))]
            }
        }
    }

    /// Sixteen dimensions of a value that are not among thirty-two.
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
    /// Some rows and the query heads of key head `heads.0` out of `heads.1` query heads in all. The store holds the rows'
    /// blocks, `q` and `out` the rows, and nobody else writes what is read or reads what is written.
    pub(crate) fn attend_tile(
        kv: Raw, rows: Rows<'_>, heads: (usize, usize), q: *const f32, out: Shared<'_>,
    ) = attend_tile_body<Lanes>
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
fn attend_tile_body<L: Lanes>(
    kv: Raw,
    rows: Rows<'_>,
    (kv_head, heads): (usize, usize),
    q: *const f32,
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
                attend::<L, MOST>(kv, rows, kv_head, batch, q, &mut scores, out);
            } else {
                let mut rest = batch;
                while let Some((three, more)) = rest.split_first_chunk::<3>() {
                    attend::<L, 3>(kv, rows, kv_head, three, q, &mut scores, out);
                    rest = more;
                }
                for query in rest {
                    let one = std::slice::from_ref(query);
                    attend::<L, 1>(kv, rows, kv_head, one, q, &mut scores, out);
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
    rows: Rows<'_>,
    kv_head: usize,
    queries: &[Query],
    q: *const f32,
    scores: &mut [f32],
    out: Shared<'_>,
) {
    let (dim, blocks) = (kv.layout.head_dim, rows.blocks);
    let scale = 1.0 / (dim as f32).sqrt();
    let seen = |position: usize| kv.window.map_or(0, |window| (position + 1).saturating_sub(window));
    // Queries are in the order of their positions.
    let first = seen(queries[0].position);
    let last = queries[N - 1].position;
    let (mut block, end) = (first / BLOCK, last / BLOCK + 1);
    // Few queries wait for their sums: so many blocks together as keep the unit busy.
    let together = if !L::TALL || N > 3 { 1 } else { 4 };
    while block < end {
        let count = together.min(end - block);
        // SAFETY: as for this function; there are so many blocks.
        unsafe {
            match count {
                4 => score::<L, N, 4>(kv, rows, kv_head, block, queries, q, scale, scores),
                3 => score::<L, N, 3>(kv, rows, kv_head, block, queries, q, scale, scores),
                2 => score::<L, N, 2>(kv, rows, kv_head, block, queries, q, scale, scores),
                _ => score::<L, N, 1>(kv, rows, kv_head, block, queries, q, scale, scores),
            }
        }
        block += count;
    }
    let factors = weights::<L, N>([first, last], queries, seen, scores);
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

/// The queries' scores of the positions in `B` blocks from `block` on.
///
/// # Safety
/// As for [`attend`]; there are so many blocks.
#[inline(always)]
unsafe fn score<L: Lanes, const N: usize, const B: usize>(
    kv: Raw,
    rows: Rows<'_>,
    kv_head: usize,
    block: usize,
    queries: &[Query],
    q: *const f32,
    scale: f32,
    scores: &mut [f32],
) {
    let own: [u32; B] = std::array::from_fn(|b| rows.blocks[block + b]);
    let keys = own.map(|block| kv.keys(block, kv_head));
    let values = own.map(|block| kv.values(block, kv_head));
    // Of this tile, or of the one that the thread comes to next.
    let rest = rows.blocks[block + B..].iter().map(|&block| kv.keys(block, kv_head));
    let mut rest = rest.chain(rows.next.0.iter().map(|&block| kv.keys(block, rows.next.1)));
    let next: [usize; B] = std::array::from_fn(|b| rest.next().unwrap_or(keys[b]));
    let mut sums = [[L::zero(); B]; N];
    for d in (0..kv.layout.head_dim).step_by(2) {
        let mut two = [[L::zero(); 2]; B];
        for b in 0..B {
            // The next keys and these blocks' values come out of memory meanwhile.
            kv.prefetch::<L>(next[b] + d * BLOCK);
            kv.prefetch::<L>(values[b] + d * BLOCK);
            // SAFETY: the block lies in the store (the caller's promise), and heads have even numbers of values.
            two[b] = unsafe { kv.load_two(keys[b] + d * BLOCK) };
        }
        for of in 0..2 {
            for i in 0..N {
                // SAFETY: a query has as many values as a head.
                let q = L::splat(unsafe { *q.add(queries[i].at + d + of) });
                for b in 0..B {
                    sums[i][b] = sums[i][b].fma(two[b][of], q);
                }
            }
        }
    }
    for i in 0..N {
        for b in 0..B {
            let to = &mut scores[queries[i].scores + (block + b) * BLOCK..][..BLOCK];
            // SAFETY: sixteen values.
            unsafe { sums[i][b].mul(L::splat(scale)).store(to.as_mut_ptr()) };
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

/// Replaces the queries' scores of whole blocks by `e^(score - max)`, what a query does not see by nothing, and returns
/// one over their sums, in sixteen lanes and a fixed tree. The queries take turns, so that none waits for itself.
#[inline(always)]
fn weights<L: Lanes, const N: usize>(
    [first, last]: [usize; 2],
    queries: &[Query],
    seen: impl Fn(usize) -> usize,
    scores: &mut [f32],
) -> [f32; N] {
    let (base, count) = (first / BLOCK * BLOCK, last / BLOCK + 1 - first / BLOCK);
    let mut max = [L::splat(f32::NEG_INFINITY); N];
    for i in 0..N {
        let Query { position, scores: at, .. } = queries[i];
        let row = &mut scores[at + base..][..count * BLOCK];
        row[..seen(position) - base].fill(f32::NEG_INFINITY);
        row[position + 1 - base..].fill(f32::NEG_INFINITY);
        for block in row.as_chunks::<BLOCK>().0 {
            // SAFETY: a block has sixteen values; this code is compiled for the unit.
            max[i] = max[i].max(unsafe { L::load(block.as_ptr()) });
        }
    }
    let max = max.map(L::max_lane);
    let mut sums = [L::zero(); N];
    for block in 0..count {
        for i in 0..N {
            let row = &mut scores[queries[i].scores + base + block * BLOCK..][..BLOCK];
            for score in &mut *row {
                let is_seen = *score != f32::NEG_INFINITY;
                let power = *score - max[i];
                let weight = if L::FUSED { exp_with::<true>(power) } else { exp_with::<false>(power) };
                *score = if is_seen { weight } else { 0.0 };
            }
            // SAFETY: as above.
            sums[i] = sums[i].add(unsafe { L::load(row.as_ptr()) });
        }
    }
    sums.map(|sums| 1.0 / sums.sum())
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
            for w in (0..W).step_by(2) {
                // SAFETY: the block lies in the store (the caller's promise).
                unsafe {
                    if w + 1 < W {
                        [value[w], value[w + 1]] = kv.load_two(at + w * 16);
                    } else {
                        value[w] = kv.load(at + w * 16);
                    }
                }
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
