//! The pool of key/value blocks all sequences share, sized once at the start.

use kernels::{KvLayout, KvView};

use crate::config::ModelConfig;
use crate::error::ModelError;

/// Positions per block.
pub const BLOCK_LEN: usize = 16;

/// Keys and values of all layers in blocks of [`BLOCK_LEN`] positions; a block holds the same positions in
/// every layer. Which sequence may use which block is the caller's to decide.
#[derive(Debug)]
pub struct KvPool {
    layout: KvLayout,
    windows: Vec<Option<usize>>,
    /// By layer: (blocks, kv_heads, block_len, head_dim).
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    blocks: usize,
}

impl KvPool {
    /// A pool of `blocks` blocks.
    ///
    /// # Errors
    /// When it would not fit the address space.
    pub fn new(config: &ModelConfig, blocks: usize) -> Result<Self, ModelError> {
        let layout = KvLayout { kv_heads: config.kv_heads, head_dim: config.head_dim, block_len: BLOCK_LEN };
        let values = layout.block_values().checked_mul(blocks).filter(|_| u32::try_from(blocks).is_ok());
        let values =
            values.ok_or_else(|| ModelError::Batch(format!("a pool of {blocks} KV blocks is too large")))?;
        // Each made afresh, not cloned: zeroed memory costs nothing until it is used.
        let store = || (0..config.layers).map(|_| vec![0.0; values]).collect();
        Ok(Self { layout, windows: config.windows.clone(), keys: store(), values: store(), blocks })
    }

    /// Bytes of one block over all layers.
    #[must_use]
    pub fn block_bytes(config: &ModelConfig) -> usize {
        2 * config.layers * config.kv_heads * config.head_dim * BLOCK_LEN * size_of::<f32>()
    }

    /// Blocks in all.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Stores one position of a sequence in a layer; rows are (kv_heads, head_dim).
    pub(crate) fn store(
        &mut self,
        layer: usize,
        blocks: &[u32],
        position: usize,
        key: &[f32],
        value: &[f32],
    ) {
        self.layout.store(&mut self.keys[layer], blocks, position, key);
        self.layout.store(&mut self.values[layer], blocks, position, value);
    }

    pub(crate) fn view(&self, layer: usize) -> KvView<'_> {
        KvView {
            layout: self.layout,
            keys: &self.keys[layer],
            values: &self.values[layer],
            window: self.windows[layer],
        }
    }
}
