//! What happens between a layer's first products and its output: rotation, storing, attention.

use crate::attention::{KvStore, Raw, Rows, attend_tile, paged_attention};
use crate::linear::Means;
use crate::paging::{BLOCK, KvElement, KvLayout, Pages};
use crate::parallel::Shared;
use crate::rotary::{KvStoreMut, Place, Rotary, Store, ready, rotate_and_store};

/// Fewer products than this are not worth waking others for.
const ALONE: usize = 1 << 16;
/// What a row costs besides its positions, in positions.
const ROW: usize = 32;

/// [`rotate_and_store`] of the new rows, then [`paged_attention`]: `rows` are `q`, `k`, `v` and the output. Where every
/// sequence has one row, as when all decode, both are one round of work, each task having one row and key head.
///
/// # Panics
/// When a length does not fit, or a sequence's blocks do not reach its last row.
pub fn rotate_and_attend<E: KvElement>(
    means: Means<'_>,
    rotary: Rotary<'_>,
    mut kv: KvStoreMut<'_, E>,
    window: Option<usize>,
    pages: Pages<'_>,
    heads: usize,
    rows: [&mut [f32]; 4],
) {
    let [q, k, v, out] = rows;
    if !pages.is_single() {
        rotate_and_store(means, rotary, &mut kv, pages, q, k, v);
        let KvStoreMut { layout, numbers, layer } = kv;
        return paged_attention(means, &KvStore { layout, numbers, layer, window }, pages, heads, q, out);
    }
    let KvLayout { kv_heads, head_dim, .. } = kv.layout;
    let (width, key_width) = (heads * head_dim, kv_heads * head_dim);
    let rows = pages.check(kv.layout, kv.numbers.len());
    kv.layout.check(kv.layer, heads);
    assert!(q.len() == rows * width && out.len() == q.len(), "q and out are not {rows} x {width}");
    assert!(k.len() == rows * key_width && v.len() == k.len(), "k and v are not {rows} x {key_width}");
    let (group, layout, layer) = (heads / kv_heads, kv.layout, kv.layer);
    let (q, k, out) = (Shared::new(q), Shared::new(k), Shared::new(out));
    let v = &*v;
    let store = Store::new(&mut kv);
    let task = |index: usize| {
        let (row, kv_head) = (index / kv_heads, index % kv_heads);
        let sequence = &pages.sequences()[row];
        let (blocks, position) = (pages.of(sequence), sequence.start);
        let place = Place { block: blocks[position / BLOCK], within: position % BLOCK, head: kv_head };
        let own = row * key_width + kv_head * head_dim;
        // SAFETY: the row's heads are this task's own, and so is their place in the store: no other sequence has the block.
        unsafe {
            let queries = q.part(row * width + kv_head * group * head_dim, group * head_dim);
            let keys = k.part(own, head_dim);
            ready(rotary, position as u32, queries, keys);
            store.put(place, keys, &v[own..][..head_dim]);
        }
        let raw = Raw::new(store.start(), layout, layer, window);
        let (next, next_head) = ((index + 1) / kv_heads, (index + 1) % kv_heads);
        let next = pages.sequences().get(next).map_or(&[][..], |sequence| pages.of(sequence));
        let rows = Rows { blocks, first: row, start: position, count: 1, next: (next, next_head) };
        attend_tile(means.isa, raw, rows, (kv_head, heads), q.start(), out);
    };
    let work: usize = pages.sequences().iter().map(|sequence| (sequence.start + ROW) * width).sum();
    if work < ALONE {
        (0..rows * kv_heads).for_each(task);
    } else {
        means.workers.run(rows * kv_heads, &task);
    }
}
