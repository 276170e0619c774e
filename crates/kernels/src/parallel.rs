//! Sharing an output buffer between threads that write disjoint parts of it.

use std::marker::PhantomData;

/// A mutable slice whose disjoint parts are written from several threads.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: all access goes through `part`, whose callers promise disjoint ranges.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// Shares `slice` for its lifetime.
    pub(crate) fn new(slice: &'a mut [f32]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    /// Where it begins, for code that computes its own places; the promise of [`Shared::part`] holds there too.
    #[inline(always)]
    pub(crate) fn start(self) -> *mut f32 {
        self.start
    }

    /// The part `at..at + len`.
    ///
    /// # Safety
    /// No two parts that overlap are alive at the same time.
    ///
    /// # Panics
    /// When the part lies outside the slice.
    #[inline(always)]
    pub(crate) unsafe fn part(self, at: usize, len: usize) -> &'a mut [f32] {
        assert!(at <= self.len && len <= self.len - at, "part {at}+{len} of {}", self.len);
        // SAFETY: inside the slice (asserted), and disjoint from other parts (the caller's promise).
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}
