//! The pool of key/value blocks all sequences share, sized once at the start.

use kernels::{KvElement, KvLayout, KvStore, KvStoreMut, Means, Pages, Precision, Rotary};

use crate::config::ModelConfig;
use crate::error::ModelError;

pub use kernels::BLOCK_LEN;

/// Keys and values of all layers in blocks of [`BLOCK_LEN`] positions; a block holds the same positions in
/// every layer. Which sequence may use which block is the caller's to decide.
#[derive(Debug)]
pub struct KvPool {
    layout: KvLayout,
    windows: Vec<Option<usize>>,
    numbers: Numbers,
    blocks: usize,
}

/// By layer, keys and values.
#[derive(Debug)]
enum Numbers {
    F32(Vec<[Vec<f32>; 2]>),
    Bf16(Vec<[Vec<u16>; 2]>),
}

impl KvPool {
    /// A pool of `blocks` blocks: bfloat16 in fast precision, float32 in exact.
    ///
    /// # Errors
    /// When it would not fit the address space.
    pub fn new(config: &ModelConfig, blocks: usize, precision: Precision) -> Result<Self, ModelError> {
        let layout = KvLayout { kv_heads: config.kv_heads, head_dim: config.head_dim };
        let values = layout.block_values().checked_mul(blocks).filter(|_| u32::try_from(blocks).is_ok());
        let values =
            values.ok_or_else(|| ModelError::Batch(format!("a pool of {blocks} KV blocks is too large")))?;
        let numbers = match precision {
            Precision::Fast => Numbers::Bf16(zeros(config.layers, values)),
            Precision::Exact => Numbers::F32(zeros(config.layers, values)),
        };
        Ok(Self { layout, windows: config.windows.clone(), numbers, blocks })
    }

    /// Bytes of one block over all layers.
    #[must_use]
    pub fn block_bytes(config: &ModelConfig, precision: Precision) -> usize {
        let number = match precision {
            Precision::Fast => size_of::<u16>(),
            Precision::Exact => size_of::<f32>(),
        };
        2 * config.layers * config.kv_heads * config.head_dim * BLOCK_LEN * number
    }

    /// Blocks in all.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Makes block `to` a copy of block `from` in every layer.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn copy(&mut self, from: u32, to: u32) {
        let values = self.layout.block_values();
        match &mut self.numbers {
            Numbers::F32(layers) => copy(layers, values, from, to),
            Numbers::Bf16(layers) => copy(layers, values, from, to),
        }
    }

    /// Norms and rotates a layer's queries and keys, stores keys and values, and attends.
    pub(crate) fn attend(
        &mut self,
        means: Means<'_>,
        layer: usize,
        rotary: Rotary<'_>,
        pages: Pages<'_>,
        heads: usize,
        [q, k, v, out]: [&mut [f32]; 4],
    ) {
        let (layout, window) = (self.layout, self.windows[layer]);
        match &mut self.numbers {
            Numbers::F32(layers) => {
                attend(means, layout, window, &mut layers[layer], rotary, pages, heads, [q, k, v, out]);
            }
            Numbers::Bf16(layers) => {
                attend(means, layout, window, &mut layers[layer], rotary, pages, heads, [q, k, v, out]);
            }
        }
    }
}

/// Each made afresh, not cloned: zeroed memory costs nothing until it is used.
fn zeros<E: KvElement>(layers: usize, values: usize) -> Vec<[Vec<E>; 2]> {
    (0..layers).map(|_| [vec![E::default(); values], vec![E::default(); values]]).collect()
}

fn copy<E: KvElement>(layers: &mut [[Vec<E>; 2]], values: usize, from: u32, to: u32) {
    let (from, to) = (from as usize * values, to as usize * values);
    layers.iter_mut().flatten().for_each(|numbers| numbers.copy_within(from..from + values, to));
}

fn attend<E: KvElement>(
    means: Means<'_>,
    layout: KvLayout,
    window: Option<usize>,
    [keys, values]: &mut [Vec<E>; 2],
    rotary: Rotary<'_>,
    pages: Pages<'_>,
    heads: usize,
    [q, k, v, out]: [&mut [f32]; 4],
) {
    let mut store = KvStoreMut { layout, keys, values };
    kernels::rotate_and_store(means, rotary, &mut store, pages, q, k, v);
    kernels::paged_attention(means, &KvStore { layout, keys, values, window }, pages, heads, q, out);
}
