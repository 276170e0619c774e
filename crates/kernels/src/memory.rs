//! Memory as the system gives it: zeroed, none of it taken before it is used, and in huge pages where there is enough.
//!
//! A step reads all weights, and with many users as much again of adapters and of keys and values. In pages of 4 KiB
//! that is tens of thousands of address translations a step, and hardware prefetchers stop at every page's end.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Bytes of a huge page.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// Some bytes that begin and end at a cache line, or at a huge page from so many on.
#[derive(Debug)]
pub(crate) struct Memory {
    start: NonNull<u8>,
    bytes: usize,
    allocated: (NonNull<u8>, Layout),
}

// SAFETY: it is plain memory; who may read or write which part of it is for its users to say.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// At least so many bytes.
    ///
    /// # Panics
    /// When they exceed the address space. Memory that the system has not ends the process.
    pub(crate) fn zeroed(bytes: usize) -> Self {
        Self::try_zeroed(bytes).unwrap_or_else(|layout| handle_alloc_error(layout))
    }

    /// As [`Self::zeroed`].
    ///
    /// # Errors
    /// When the system has not as much.
    pub(crate) fn try_zeroed(bytes: usize) -> Result<Self, Layout> {
        let align = if bytes < HUGE_PAGE { LINE } else { HUGE_PAGE };
        let bytes = bytes.checked_next_multiple_of(align);
        // Room to align in, not an aligned layout: the standard library clears one itself, which takes all of it.
        let layout = bytes
            .and_then(|bytes| Layout::from_size_align(bytes.checked_add(align)?, align_of::<usize>()).ok());
        let (bytes, layout) = bytes.zip(layout).expect("memory fits the address space");
        // SAFETY: the layout has a size.
        let first = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(layout)?;
        // SAFETY: the allocation has room for whole alignments.
        let start = unsafe { first.add(first.as_ptr().align_offset(align)) };
        let memory = Self { start, bytes, allocated: (first, layout) };
        if align == HUGE_PAGE {
            memory.ask_for_huge_pages();
        }
        Ok(memory)
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    #[cfg(target_os = "linux")]
    fn ask_for_huge_pages(&self) {
        use rustix::mm::{Advice, madvise};
        // A system without huge pages serves as well, if slower.
        // SAFETY: the advice changes what the memory's pages are, not what is in them.
        let _refused = unsafe { madvise(self.start().cast(), self.bytes, Advice::LinuxHugepage) };
    }

    #[cfg(not(target_os = "linux"))]
    fn ask_for_huge_pages(&self) {}
}

impl Drop for Memory {
    fn drop(&mut self) {
        let (first, layout) = self.allocated;
        // SAFETY: it was allocated with this layout, and nobody has any of it.
        unsafe { dealloc(first.as_ptr(), layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_zeroed_aligned_and_at_least_as_long_as_asked_for() {
        // Twice, so that the second time the memory may be one that was written to.
        for _ in 0..2 {
            for bytes in [0, 1, 64, 1000, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1] {
                let memory = Memory::zeroed(bytes);
                let align = if bytes < HUGE_PAGE { LINE } else { HUGE_PAGE };
                assert_eq!(memory.bytes(), bytes.next_multiple_of(align));
                assert!(memory.start().addr().is_multiple_of(align), "{bytes}");
                // SAFETY: nobody else has the memory.
                let all = unsafe { std::slice::from_raw_parts_mut(memory.start(), memory.bytes()) };
                assert!(all.iter().all(|&byte| byte == 0), "{bytes}");
                all.fill(7);
            }
        }
    }
}
