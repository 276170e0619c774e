//! Keys and values in blocks of sixteen positions (PagedAttention, Kwon et al. 2023): number formats, layout, and where
//! the rows of a step lie.

use crate::lanes::{brain_to_f32, f32_to_brain};

/// Positions per block.
pub const BLOCK: usize = 16;

/// A number that keys and values are kept in: `f32`, or `u16` for bfloat16.
pub trait KvElement: Copy + Send + Sync + 'static {
    /// Rounds to it.
    fn from_f32(value: f32) -> Self;

    /// What it stands for.
    fn to_f32(self) -> f32;

    #[doc(hidden)]
    const BRAIN: bool;
}

impl KvElement for f32 {
    const BRAIN: bool = false;
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl KvElement for u16 {
    const BRAIN: bool = true;
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f32_to_brain(value)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        brain_to_f32(self)
    }
}

/// The shape of a store of keys and values. A block has all layers' keys and values of its positions side by side: (blocks,
/// layers, [keys, values]), keys being (kv_heads, head_dim, 16 positions) and values (kv_heads, 16 positions, head_dim).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers.
    pub layers: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
}

impl KvLayout {
    /// Numbers in one block of sixteen positions.
    #[must_use]
    pub const fn block_values(&self) -> usize {
        2 * self.layers * self.half()
    }

    /// Numbers that a layer's keys, or its values, have in a block.
    const fn half(&self) -> usize {
        self.kv_heads * BLOCK * self.head_dim
    }

    /// Where a head's keys begin in a block of a layer.
    #[inline(always)]
    pub(crate) const fn keys(&self, layer: usize, block: u32, head: usize) -> usize {
        (block as usize * self.layers + layer) * 2 * self.half() + head * BLOCK * self.head_dim
    }

    /// Where its values begin.
    #[inline(always)]
    pub(crate) const fn values(&self, layer: usize, block: u32, head: usize) -> usize {
        self.keys(layer, block, head) + self.half()
    }
}

/// The rows of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagedSequence {
    /// Where its blocks begin in the step's list.
    pub first_block: usize,
    /// Number of its blocks.
    pub blocks: usize,
    /// Number of rows in the batch, at least one.
    pub rows: usize,
    /// Position of the first row.
    pub start: usize,
}

/// Where the rows of a step lie in the store: sequence after sequence.
#[derive(Debug, Clone, Copy)]
pub struct Pages<'a> {
    /// Blocks of all sequences, each sequence's in order.
    pub blocks: &'a [u32],
    /// The sequences, in the order of their rows.
    pub sequences: &'a [PagedSequence],
}

impl<'a> Pages<'a> {
    /// The sequences with their first rows.
    pub(crate) fn with_rows(self) -> impl Iterator<Item = (usize, &'a PagedSequence)> {
        self.sequences.iter().scan(0, |row, sequence| {
            let first = *row;
            *row += sequence.rows;
            Some((first, sequence))
        })
    }

    pub(crate) fn of(self, sequence: &PagedSequence) -> &'a [u32] {
        &self.blocks[sequence.first_block..][..sequence.blocks]
    }

    /// The blocks and the position of a row.
    pub(crate) fn locate(self, row: usize) -> Option<(&'a [u32], usize)> {
        let (first, sequence) = self.with_rows().find(|(first, sequence)| row < first + sequence.rows)?;
        Some((self.of(sequence), sequence.start + row - first))
    }

    /// Checks every sequence against a store of `values` numbers; returns the number of rows.
    ///
    /// # Panics
    /// When a block lies beyond the store, or a sequence's blocks do not reach its last row.
    pub(crate) fn check(self, layout: KvLayout, values: usize) -> usize {
        for sequence in self.sequences {
            let (blocks, end) = (self.of(sequence), sequence.start + sequence.rows);
            assert!(end <= blocks.len() * BLOCK, "position {end} in {} blocks", blocks.len());
            let known = |block: &u32| (*block as usize + 1) * layout.block_values() <= values;
            assert!(blocks.iter().all(known), "a block beyond the store");
        }
        self.sequences.iter().map(|sequence| sequence.rows).sum()
    }
}
