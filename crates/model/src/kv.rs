//! The pool of key/value blocks all sequences share, sized once at the start.

use kernels::{KvLayout, KvStoreMut, Means, PageBuffer, Pages, Precision, Rotary};

use crate::config::ModelConfig;
use crate::error::ModelError;

pub use kernels::BLOCK_LEN;

/// Largest pool: what a machine of today can address, in bytes.
const MOST_BYTES: usize = 1 << 47;

/// Keys and values of all layers in blocks of [`BLOCK_LEN`] positions. Which sequence may use which block is the
/// caller's to decide. A block that nobody has used takes no memory.
#[derive(Debug)]
pub struct KvPool {
    layout: KvLayout,
    windows: Vec<Option<usize>>,
    precision: Precision,
    numbers: PageBuffer,
    blocks: usize,
    /// Bytes, from the first block on, that the system has given memory for.
    taken: usize,
}

/// Memory that is taken at a time, and the distance in which the system is asked for it again at the latest.
const PIECE: usize = 2 << 20;
const PAGE: usize = 4 << 10;
/// Memory that is taken ahead of what is used.
const AHEAD: usize = 64 << 20;

impl KvPool {
    /// A pool of `blocks` blocks: bfloat16 in fast precision, float32 in exact.
    ///
    /// # Errors
    /// When it would not fit the address space, or the system has not as much memory.
    pub fn new(config: &ModelConfig, blocks: usize, precision: Precision) -> Result<Self, ModelError> {
        let bytes = Self::block_bytes(config, precision).checked_mul(blocks);
        let bytes = bytes.filter(|&bytes| bytes <= MOST_BYTES && u32::try_from(blocks).is_ok());
        let too_large = || ModelError::Batch(format!("a pool of {blocks} KV blocks is too large"));
        let numbers = PageBuffer::try_zeroed(bytes.ok_or_else(too_large)?).ok_or_else(too_large)?;
        Ok(Self {
            layout: layout(config),
            windows: config.windows.clone(),
            precision,
            numbers,
            blocks,
            taken: 0,
        })
    }

    /// Bytes of one block over all layers.
    #[must_use]
    pub fn block_bytes(config: &ModelConfig, precision: Precision) -> usize {
        let number = match precision {
            Precision::Fast => size_of::<u16>(),
            Precision::Exact => size_of::<f32>(),
        };
        layout(config).block_values() * number
    }

    /// Blocks in all.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Takes some memory for the blocks from `untouched` on, none of which may ever have been used; false if there is enough
    /// of it for a while.
    ///
    /// The system gives memory when it is first written to, and clears it then: that takes longer than to compute the
    /// keys and values that go there, and is better done while there is nothing else to do.
    pub fn take_ahead(&mut self, untouched: usize) -> bool {
        let used = untouched * (self.numbers.bytes() / self.blocks);
        self.taken = self.taken.max(used);
        let end = self.numbers.bytes().min(used + AHEAD);
        let piece = self.taken..end.min(self.taken + PIECE);
        self.taken = piece.end.max(self.taken);
        let bytes = self.numbers.i8_mut();
        piece.clone().step_by(PAGE).for_each(|at| bytes[at] = 0);
        !piece.is_empty()
    }

    /// Makes block `to` a copy of block `from` in every layer.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn copy(&mut self, from: u32, to: u32) {
        let values = self.layout.block_values();
        let (from, to) = (from as usize * values, to as usize * values);
        match self.precision {
            Precision::Fast => self.numbers.bf16_mut().copy_within(from..from + values, to),
            Precision::Exact => self.numbers.f32_mut().copy_within(from..from + values, to),
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
        rows: [&mut [f32]; 4],
    ) {
        let (layout, window) = (self.layout, self.windows[layer]);
        match self.precision {
            Precision::Fast => {
                let store = KvStoreMut { layout, numbers: self.numbers.bf16_mut(), layer };
                kernels::rotate_and_attend(means, rotary, store, window, pages, heads, rows);
            }
            Precision::Exact => {
                let store = KvStoreMut { layout, numbers: self.numbers.f32_mut(), layer };
                kernels::rotate_and_attend(means, rotary, store, window, pages, heads, rows);
            }
        }
    }
}

fn layout(config: &ModelConfig) -> KvLayout {
    KvLayout { layers: config.layers, kv_heads: config.kv_heads, head_dim: config.head_dim }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RopeScaling;

    #[test]
    fn a_pool_that_no_system_has_memory_for_is_an_error() {
        let config = ModelConfig {
            hidden: 64,
            layers: 30,
            heads: 3,
            kv_heads: 3,
            head_dim: 64,
            feed_forward: 64,
            vocab: 8,
            context: 64,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            windows: vec![None; 30],
        };
        let each = KvPool::block_bytes(&config, Precision::Exact);
        // All that 47 bits address, which no process gets; more; and more than a block's number counts.
        for blocks in [MOST_BYTES / each, MOST_BYTES / each + 1, usize::MAX] {
            let refused = KvPool::new(&config, blocks, Precision::Exact).map(|pool| pool.blocks());
            assert!(
                matches!(&refused, Err(ModelError::Batch(problem)) if problem.contains("too large")),
                "{blocks}"
            );
        }
        assert!(KvPool::new(&config, 2, Precision::Exact).is_ok());
    }

    #[test]
    fn memory_is_taken_ahead_and_never_of_what_is_used() {
        let layout = KvLayout { layers: 30, kv_heads: 3, head_dim: 64 };
        let bytes = layout.block_values() * size_of::<u16>();
        let blocks = 3 * AHEAD / bytes;
        let (windows, numbers) = (vec![None; layout.layers], PageBuffer::zeroed(blocks * bytes));
        let mut pool = KvPool { layout, windows, precision: Precision::Fast, numbers, blocks, taken: 0 };
        let mut used = 0;
        for of_all in [0, blocks / 3, blocks / 2, blocks] {
            // What the blocks in use hold.
            pool.numbers.i8_mut()[used * bytes..of_all * bytes].fill(1);
            used = of_all;
            while pool.take_ahead(used) {}
            assert_eq!(pool.taken, (used * bytes + AHEAD).min(blocks * bytes));
            let (held, others) = pool.numbers.i8().split_at(used * bytes);
            assert!(held.iter().all(|byte| *byte == 1), "{used} of {blocks}");
            assert!(others.iter().all(|byte| *byte == 0), "{used} of {blocks}");
        }
    }
}
