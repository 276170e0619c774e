//! Keys and values in blocks of sixteen positions (PagedAttention, Kwon et al. 2023): number formats, layout, and where
//! the rows of a step lie.

use std::ops::Range;

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
///
/// In bfloat16 two numbers share each 32 bits, from which either is a float32 by one operation: keys are (kv_heads,
/// head_dim / 2, 16 positions, 2), and of values every 32 dimensions are (16, 2), the second being 16 dimensions after the
/// first; what is left of a head that does not divide by 32 is as in float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers.
    pub layers: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Values per head, an even number.
    pub head_dim: usize,
}

impl KvLayout {
    /// Checks a layer and a number of query heads against it.
    ///
    /// # Panics
    /// When there is no such layer, the heads do not divide into groups, or a head has an odd number of values.
    pub(crate) fn check(self, layer: usize, heads: usize) {
        let Self { layers, kv_heads, head_dim } = self;
        assert!(layer < layers, "layer {layer} of {layers}");
        assert!(heads.is_multiple_of(kv_heads), "heads do not divide into groups");
        assert!(head_dim.is_multiple_of(2), "heads of an odd number of values");
    }

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

/// Where the rows of a step lie in the store: sequence after sequence, no two rows at one place.
#[derive(Debug, Clone, Copy)]
pub struct Pages<'a> {
    /// Blocks of all sequences, each sequence's in order.
    blocks: &'a [u32],
    /// In the order of their rows.
    sequences: &'a [PagedSequence],
    /// Every sequence has one row, in a block that no other sequence has.
    single: bool,
}

impl<'a> Pages<'a> {
    /// The sequences in the order of their rows, and the blocks of all of them. Sequences may share blocks that none of
    /// them has new rows in.
    ///
    /// # Panics
    /// When a sequence's blocks do not reach its last row, or two rows lie at one place.
    #[must_use]
    pub fn new(blocks: &'a [u32], sequences: &'a [PagedSequence]) -> Self {
        let mut pages = Self { blocks, sequences, single: false };
        for sequence in sequences {
            let (end, own) = (sequence.start.checked_add(sequence.rows), pages.of(sequence).len());
            assert!(
                end.is_some_and(|end| end <= own * BLOCK),
                "rows from {} on in {own} blocks",
                sequence.start
            );
        }
        for (at, sequence) in sequences.iter().enumerate() {
            for (block, rows) in pages.written(sequence) {
                let meets = |(other, others): (u32, Range<usize>)| {
                    other == block && others.start < rows.end && rows.start < others.end
                };
                let others = sequences[at + 1..].iter().flat_map(|other| pages.written(other));
                let own = pages.written(sequence).filter(|(other, _)| *other == block).count();
                assert!(own == 1 && !others.into_iter().any(meets), "two rows at one place of block {block}");
            }
        }
        pages.single = sequences.iter().all(|sequence| sequence.rows == 1 && pages.is_alone(sequence));
        pages
    }

    /// Whether no other sequence has the block of this one's first row.
    fn is_alone(self, sequence: &PagedSequence) -> bool {
        let own = self.of(sequence)[sequence.start / BLOCK];
        let others = self.sequences.iter().filter(|other| !std::ptr::eq(*other, sequence));
        !others.into_iter().any(|other| self.of(other).contains(&own))
    }

    /// Whether every sequence has one row, and none reads what another one's stores.
    pub(crate) fn is_single(self) -> bool {
        self.single
    }

    /// The sequences.
    pub(crate) fn sequences(self) -> &'a [PagedSequence] {
        self.sequences
    }

    /// The blocks that a sequence's new rows lie in, and their places there.
    fn written(self, sequence: &'a PagedSequence) -> impl Iterator<Item = (u32, Range<usize>)> {
        let (start, end) = (sequence.start, sequence.start + sequence.rows);
        let blocks = start / BLOCK..end.div_ceil(BLOCK);
        blocks.map(move |at| {
            let within = start.max(at * BLOCK)..end.min((at + 1) * BLOCK);
            (self.of(sequence)[at], within.start % BLOCK..within.end - at * BLOCK)
        })
    }

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

    /// Checks every block against a store of `values` numbers; returns the number of rows.
    ///
    /// # Panics
    /// When a block lies beyond the store.
    pub(crate) fn check(self, layout: KvLayout, values: usize) -> usize {
        for sequence in self.sequences {
            let known = |block: &u32| (*block as usize) < values / layout.block_values();
            assert!(self.of(sequence).iter().all(known), "a block beyond the store");
        }
        self.sequences.iter().map(|sequence| sequence.rows).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sequences of (first block, blocks, rows, start).
    fn sequences(sequences: &[[usize; 4]]) -> Vec<PagedSequence> {
        let sequence = |&[first_block, blocks, rows, start]: &[usize; 4]| PagedSequence {
            first_block,
            blocks,
            rows,
            start,
        };
        sequences.iter().map(sequence).collect()
    }

    /// Whether they are taken.
    fn takes(blocks: &[u32], of: &[[usize; 4]]) -> bool {
        std::panic::catch_unwind(|| Pages::new(blocks, &sequences(of)).sequences().len()).is_ok()
    }

    #[test]
    fn rows_that_read_nothing_of_each_others_are_single() {
        let single = |blocks: &[u32], of: &[[usize; 4]]| Pages::new(blocks, &sequences(of)).is_single();
        assert!(single(&[1, 2, 3], &[[0, 2, 1, 20], [2, 1, 1, 0]]));
        assert!(single(&[9, 2, 9, 3], &[[0, 2, 1, 20], [2, 2, 1, 31]]), "a common beginning");
        assert!(!single(&[1, 2, 3], &[[0, 2, 1, 20], [2, 1, 2, 0]]), "two rows");
        assert!(!single(&[2, 2], &[[0, 1, 1, 4], [1, 1, 1, 5]]), "two in one block");
        assert!(!single(&[2, 2, 3], &[[0, 1, 1, 15], [1, 2, 1, 16]]), "one reads where the other stores");
        assert!(!single(&[2, 3, 2], &[[0, 2, 1, 16], [2, 1, 1, 15]]), "the other way round");
    }

    #[test]
    fn no_two_rows_lie_at_one_place() {
        // Shared blocks that nobody writes to, and different places of one block.
        assert!(takes(&[4, 5, 4, 6], &[[0, 2, 3, 16], [2, 2, 16, 16]]));
        assert!(takes(&[4, 4], &[[0, 1, 3, 0], [1, 1, 2, 3]]));
        assert!(takes(&[9, 8, 7], &[[0, 3, 40, 5]]));
        // The same place, in other sequences and in one.
        assert!(!takes(&[4, 4], &[[0, 1, 3, 0], [1, 1, 2, 2]]));
        assert!(!takes(&[4, 5, 6, 5], &[[0, 2, 17, 15], [2, 2, 1, 16]]));
        assert!(!takes(&[4, 4], &[[0, 2, 32, 0]]));
        // Rows beyond the blocks, even where the sum of positions does not fit.
        assert!(!takes(&[4], &[[0, 1, 2, 15]]));
        assert!(!takes(&[4], &[[0, 1, 1, usize::MAX]]));
    }
}
