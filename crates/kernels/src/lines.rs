//! Memory for frozen weights: matrices lie side by side in blocks large enough for huge pages ([`crate::memory`]).

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::memory::{LINE, Memory};

/// A cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; LINE]);

/// Lines from which on a matrix lies in a block with others: a smaller one costs no more than itself.
const SHARED_LINES: usize = (64 << 10) / LINE;

/// Lines of a block that several matrices share.
const BLOCK_LINES: usize = (32 << 20) / LINE;

/// Lines of its own in a block. A block is given back when nobody has lines in it.
#[derive(Debug)]
pub(crate) struct Lines {
    block: Arc<Memory>,
    first: usize,
    count: usize,
}

impl Lines {
    pub(crate) fn zeroed(count: usize) -> Self {
        /// The block that is being filled, and how many of its lines are somebody's.
        static CURRENT: Mutex<(Weak<Memory>, usize)> = Mutex::new((Weak::new(), 0));
        if count < SHARED_LINES {
            return Self { block: Arc::new(Memory::zeroed(count * LINE)), first: 0, count };
        }
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let (current, used) = &mut *current;
        let there = current.upgrade().filter(|block| block.bytes() / LINE - *used >= count);
        let block = there.unwrap_or_else(|| {
            let new = Arc::new(Memory::zeroed(count.max(BLOCK_LINES).saturating_mul(LINE)));
            (*current, *used) = (Arc::downgrade(&new), 0);
            new
        });
        let first = *used;
        *used += count;
        Self { block, first, count }
    }

    fn start(&self) -> *mut Line {
        self.block.start().cast::<Line>().wrapping_add(self.first)
    }
}

impl Deref for Lines {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        // SAFETY: the lines lie in the block and are nobody else's.
        unsafe { std::slice::from_raw_parts(self.start(), self.count) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [Line] {
        // SAFETY: as for reading; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_all(lines: &Lines, byte: u8) -> bool {
        lines.iter().all(|line| line.0 == [byte; LINE])
    }

    #[test]
    fn everybody_has_lines_of_their_own_and_they_begin_as_zeros() {
        // Twice, so that the second time the memory may be one that was written to.
        for _ in 0..2 {
            let sizes = [1, 3, 0, 700, 1 << 15, BLOCK_LINES + 1, BLOCK_LINES / 2 + 1, BLOCK_LINES / 2, 5];
            let mut all: Vec<Lines> = sizes.into_iter().map(Lines::zeroed).collect();
            for (at, lines) in all.iter_mut().enumerate() {
                assert!(lines.len() == sizes[at] && is_all(lines, 0), "{at}");
                lines.fill(Line([at as u8 + 1; LINE]));
            }
            for (at, lines) in all.iter().enumerate() {
                assert!(is_all(lines, at as u8 + 1), "{at}");
                assert!(lines.as_ptr().addr().is_multiple_of(LINE));
            }
        }
    }

    #[test]
    fn a_block_goes_with_the_last_of_its_lines() {
        // All of a block, which no block of another test has room for.
        let first = Lines::zeroed(2 * BLOCK_LINES);
        let block = Arc::downgrade(&first.block);
        let second = Lines { block: Arc::clone(&first.block), first: 7, count: 1 };
        drop(first);
        assert!(block.upgrade().is_some());
        drop(second);
        assert!(block.upgrade().is_none());
    }
}
