//! Rotary positions (Su et al. 2021), and what happens to queries, keys and values between their products and the
//! attention.

use crate::lanes::multiversion;
use crate::linear::Means;
use crate::paging::{BLOCK, KvElement, KvLayout, Pages};
use crate::parallel::Shared;
use crate::pointwise::norm_heads;

/// Cosines and sines of the rotary angles, by position.
#[derive(Debug, Clone)]
pub struct RopeTable {
    half: usize,
    /// (positions, 2, half): cosines, then sines.
    values: Box<[f32]>,
}

impl RopeTable {
    /// The table of `positions` positions for the given inverse frequencies (one per pair of values).
    #[must_use]
    pub fn new(inverse_frequencies: &[f32], positions: usize) -> Self {
        let half = inverse_frequencies.len();
        let mut values = Vec::with_capacity(positions * half * 2);
        for position in 0..positions {
            // The product is formed in float32, as Hugging Face transformers does.
            let angle = |f: &f32| position as f32 * f;
            values.extend(inverse_frequencies.iter().map(|f| angle(f).cos()));
            values.extend(inverse_frequencies.iter().map(|f| angle(f).sin()));
        }
        Self { half, values: values.into() }
    }

    /// Number of positions.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.values.len().checked_div(self.half * 2).unwrap_or(0)
    }

    fn at(&self, position: u32) -> (&[f32], &[f32]) {
        self.values[position as usize * self.half * 2..][..self.half * 2].split_at(self.half)
    }
}

/// Rotates the heads of each row in place: value `i` pairs with `i + half` ("half-split" layout).
/// `x` is (positions.len(), heads, 2 * half); `inverse` rotates back, which is also the gradient.
///
/// # Panics
/// When `x` does not divide into that shape or a position lies beyond the table.
pub fn rope(table: &RopeTable, positions: &[u32], inverse: bool, x: &mut [f32]) {
    let head = table.half * 2;
    assert!(!positions.is_empty() && x.len().is_multiple_of(positions.len() * head));
    let row = x.len() / positions.len();
    turn(table, positions, inverse, row, x);
}

multiversion! {
    fn turn(table: &RopeTable, positions: &[u32], inverse: bool, row: usize, x: &mut [f32]) = turn_body
}

#[inline(always)]
fn turn_body(table: &RopeTable, positions: &[u32], inverse: bool, row: usize, x: &mut [f32]) {
    let sign = if inverse { -1.0 } else { 1.0 };
    for (x, &position) in x.chunks_exact_mut(row).zip(positions) {
        turn_row(table, position, sign, x);
    }
}

/// Rotates the heads of one row; `sign` is that of the angle.
#[inline(always)]
fn turn_row(table: &RopeTable, position: u32, sign: f32, x: &mut [f32]) {
    let (cos, sin) = table.at(position);
    for head in x.chunks_exact_mut(2 * table.half) {
        let (low, high) = head.split_at_mut(table.half);
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (a, b, sin) = (*low, *high, sign * sin);
            *low = a * cos - b * sin;
            *high = b * cos + a * sin;
        }
    }
}

/// How queries and keys are made ready.
#[derive(Debug, Clone, Copy)]
pub struct Rotary<'a> {
    /// The angles.
    pub table: &'a RopeTable,
    /// Norm of each query head, where the model has it.
    pub query_norm: Option<&'a [f32]>,
    /// Norm of each key head.
    pub key_norm: Option<&'a [f32]>,
    /// Added to the mean square in norms.
    pub eps: f32,
}

/// Keys and values, to write one layer's.
#[derive(Debug)]
pub struct KvStoreMut<'a, E> {
    /// The store's shape.
    pub layout: KvLayout,
    /// All keys and values, in this layout.
    pub numbers: &'a mut [E],
    /// The layer that is written.
    pub layer: usize,
}

/// Rows of one task.
const TASK_ROWS: usize = 8;

/// Norms and rotates the rows of `q` (rows, heads, head_dim) in place, and stores those of `k` and `v` (rows, kv_heads,
/// head_dim) at their positions.
///
/// # Panics
/// When a length does not fit, or a sequence's blocks do not reach its last row.
pub fn rotate_and_store<E: KvElement>(
    means: Means<'_>,
    rotary: Rotary<'_>,
    kv: &mut KvStoreMut<'_, E>,
    pages: Pages<'_>,
    q: &mut [f32],
    k: &mut [f32],
    v: &[f32],
) {
    let layout = kv.layout;
    let rows = pages.check(layout, kv.numbers.len());
    let key_width = layout.kv_heads * layout.head_dim;
    let query_width = q.len() / rows.max(1);
    assert!(q.len() == rows * query_width && query_width.is_multiple_of(layout.head_dim));
    layout.check(kv.layer, query_width / layout.head_dim);
    assert!(k.len() == rows * key_width && v.len() == k.len());
    let (q, k) = (Shared::new(q), Shared::new(k));
    let store = Store::new(kv);
    let task = |task: usize| {
        for row in task * TASK_ROWS..(task * TASK_ROWS + TASK_ROWS).min(rows) {
            let Some((blocks, position)) = pages.locate(row) else { continue };
            let place = Place { block: blocks[position / BLOCK], within: position % BLOCK, head: 0 };
            // SAFETY: every row is one task's own, and so is its place in the store: positions of a step differ.
            unsafe {
                let q = q.part(row * query_width, query_width);
                let k = k.part(row * key_width, key_width);
                ready(rotary, position as u32, q, k);
                store.put(place, k, &v[row * key_width..][..key_width]);
            }
        }
    };
    if rows <= TASK_ROWS {
        task(0);
    } else {
        means.workers.run(rows.div_ceil(TASK_ROWS), &task);
    }
}

/// A layer of a store that tasks write disjoint places of.
pub(crate) struct Store<E> {
    numbers: *mut E,
    layout: KvLayout,
    layer: usize,
}

// SAFETY: see `Store::put`, which alone writes.
unsafe impl<E: Sync> Sync for Store<E> {}

/// Where keys and values of one position go.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) block: u32,
    /// The position in the block.
    pub(crate) within: usize,
    /// The first head.
    pub(crate) head: usize,
}

impl<E: KvElement> Store<E> {
    pub(crate) fn new(kv: &mut KvStoreMut<'_, E>) -> Self {
        Self { numbers: kv.numbers.as_mut_ptr(), layout: kv.layout, layer: kv.layer }
    }

    pub(crate) fn start(&self) -> *const E {
        self.numbers
    }

    /// # Safety
    /// The block lies in the store, and nobody else writes this position of these heads, nor reads it meanwhile; `k` and
    /// `v` have the values of some heads.
    pub(crate) unsafe fn put(&self, place: Place, k: &[f32], v: &[f32]) {
        let Self { numbers, layout, layer } = *self;
        if E::BRAIN {
            put_brains(numbers.cast(), layout, layer, place, k, v);
        } else {
            put_singles(numbers.cast(), layout, layer, place, k, v);
        }
    }
}

multiversion! {
    fn put_brains(
        numbers: *mut u16, layout: KvLayout, layer: usize, place: Place, k: &[f32], v: &[f32],
    ) = put_body
}

multiversion! {
    fn put_singles(
        numbers: *mut f32, layout: KvLayout, layer: usize, place: Place, k: &[f32], v: &[f32],
    ) = put_body
}

/// Values that are rounded at a time: keys lie apart, and what is rounded one by one is not rounded by a vector unit.
const ROUNDED: usize = 64;

#[inline(always)]
fn put_body<E: KvElement>(
    numbers: *mut E,
    layout: KvLayout,
    layer: usize,
    Place { block, within, head }: Place,
    k: &[f32],
    v: &[f32],
) {
    let dim = layout.head_dim;
    let mut rounded = [E::from_f32(0.0); ROUNDED];
    for (at, (k, v)) in k.chunks_exact(dim).zip(v.chunks_exact(dim)).enumerate() {
        let keys = layout.keys(layer, block, head + at);
        let values = layout.values(layer, block, head + at) + within * dim;
        for (part, k) in k.chunks(ROUNDED).enumerate() {
            rounded.iter_mut().zip(k).for_each(|(to, from)| *to = E::from_f32(*from));
            for (pair, two) in rounded[..k.len()].as_chunks::<2>().0.iter().enumerate() {
                let to = numbers.wrapping_add(keys + (part * ROUNDED + pair * 2) * BLOCK);
                // SAFETY: inside the block (the promise of `Store::put`'s caller).
                unsafe {
                    if E::BRAIN {
                        to.add(within * 2).cast::<[E; 2]>().write_unaligned(*two);
                    } else {
                        *to.add(within) = two[0];
                        *to.add(BLOCK + within) = two[1];
                    }
                }
            }
        }
        // SAFETY: as above.
        let to = unsafe { std::slice::from_raw_parts_mut(numbers.add(values), dim) };
        let (to_groups, to_rest) = to.as_chunks_mut::<32>();
        let (groups, rest) = v.as_chunks::<32>();
        for (to, from) in to_groups.iter_mut().zip(groups) {
            rounded.iter_mut().zip(from).for_each(|(to, from)| *to = E::from_f32(*from));
            for i in 0..16 {
                let [first, second] = if E::BRAIN { [2 * i, 2 * i + 1] } else { [i, 16 + i] };
                (to[first], to[second]) = (rounded[i], rounded[16 + i]);
            }
        }
        to_rest.iter_mut().zip(rest).for_each(|(to, from)| *to = E::from_f32(*from));
    }
}

multiversion! {
    pub(crate) fn ready(rotary: Rotary<'_>, position: u32, q: &mut [f32], k: &mut [f32]) = ready_body
}

/// Norms and rotates some heads of one row's queries and keys.
#[inline(always)]
fn ready_body(rotary: Rotary<'_>, position: u32, q: &mut [f32], k: &mut [f32]) {
    if let Some(weight) = rotary.query_norm {
        norm_heads(q, weight, rotary.eps);
    }
    if let Some(weight) = rotary.key_norm {
        norm_heads(k, weight, rotary.eps);
    }
    turn_row(rotary.table, position, 1.0, q);
    turn_row(rotary.table, position, 1.0, k);
}
