//! Memory for frozen weights: blocks that the system may map in huge pages.
//!
//! Every step reads all weights once. In pages of 4 KiB that is tens of thousands of address translations a step, and
//! hardware prefetchers stop at every page's end.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::buffer::LINE;

/// A cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; LINE]);

/// Bytes of a huge page, at which shared blocks begin and end.
const HUGE_PAGE: usize = 2 << 20;

/// Lines from which on a matrix lies in a block with others: a smaller one costs no more than itself.
const SHARED_LINES: usize = (64 << 10) / LINE;

/// Lines of a block that several matrices share.
const BLOCK_LINES: usize = (32 << 20) / LINE;

/// Lines of its own in a block. A block is given back when nobody has lines in it.
#[derive(Debug)]
pub(crate) struct Lines {
    block: Arc<Block>,
    first: usize,
    count: usize,
}

impl Lines {
    pub(crate) fn zeroed(count: usize) -> Self {
        let lines = if count < SHARED_LINES { Self::alone(count) } else { Self::shared(count) };
        // SAFETY: the lines lie in the block and are nobody else's.
        unsafe { lines.start().write_bytes(0, count) };
        lines
    }

    fn alone(count: usize) -> Self {
        Self { block: Arc::new(Block::of(count.max(1), LINE)), first: 0, count }
    }

    fn shared(count: usize) -> Self {
        /// The block that is being filled, and how many of its lines are somebody's.
        static CURRENT: Mutex<(Weak<Block>, usize)> = Mutex::new((Weak::new(), 0));
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let (current, used) = &mut *current;
        let there = current.upgrade().filter(|block| block.lines() - *used >= count);
        let block = there.unwrap_or_else(|| {
            let new = Arc::new(Block::of(count.max(BLOCK_LINES), HUGE_PAGE));
            new.ask_for_huge_pages();
            (*current, *used) = (Arc::downgrade(&new), 0);
            new
        });
        let first = *used;
        *used += count;
        Self { block, first, count }
    }

    fn start(&self) -> *mut Line {
        self.block.start.as_ptr().wrapping_add(self.first)
    }
}

impl Deref for Lines {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        // SAFETY: the lines lie in the block, were zeroed, and are nobody else's.
        unsafe { std::slice::from_raw_parts(self.start(), self.count) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [Line] {
        // SAFETY: as for reading; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.count) }
    }
}

/// Uninitialised memory. What nobody has written to takes none.
#[derive(Debug)]
struct Block {
    start: NonNull<Line>,
    layout: Layout,
}

// SAFETY: the block is plain memory; who may read or write which of its lines is for `Lines` to say.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// At least so many lines, above none; it begins and ends at multiples of `align`.
    fn of(lines: usize, align: usize) -> Self {
        let bytes = lines.checked_mul(LINE).and_then(|bytes| bytes.checked_next_multiple_of(align));
        let layout = bytes.and_then(|bytes| Layout::from_size_align(bytes, align).ok());
        let layout = layout.expect("matrices fit the address space");
        // SAFETY: the layout has a size.
        let start = unsafe { alloc(layout) };
        let Some(start) = NonNull::new(start.cast()) else { handle_alloc_error(layout) };
        Self { start, layout }
    }

    fn lines(&self) -> usize {
        self.layout.size() / LINE
    }

    #[cfg(target_os = "linux")]
    fn ask_for_huge_pages(&self) {
        use rustix::mm::{Advice, madvise};
        let (start, bytes) = (self.start.as_ptr().cast(), self.layout.size());
        // A system without huge pages serves as well, if slower.
        // SAFETY: the advice changes what the block's pages are, not what is in them.
        let _refused = unsafe { madvise(start, bytes, Advice::LinuxHugepage) };
    }

    #[cfg(not(target_os = "linux"))]
    fn ask_for_huge_pages(&self) {}
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout, and nobody has lines in it.
        unsafe { dealloc(self.start.as_ptr().cast(), self.layout) };
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
        // Twice, so that the second time the memory is one that was written to.
        for _ in 0..2 {
            let sizes =
                [1, 3, 0, 700, HUGE_PAGE / LINE, BLOCK_LINES + 1, BLOCK_LINES / 2 + 1, BLOCK_LINES / 2, 5];
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
        assert_eq!(first.block.start.as_ptr().addr() % HUGE_PAGE, 0);
        let second = Lines { block: Arc::clone(&first.block), first: 7, count: 1 };
        drop(first);
        assert!(block.upgrade().is_some());
        drop(second);
        assert!(block.upgrade().is_none());
    }
}
