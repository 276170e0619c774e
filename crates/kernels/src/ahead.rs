//! What comes out of memory while frozen products are computed: the rows' B, and what the call after this one begins with.
//!
//! Rows of one batch have different adapters, which no hardware prefetcher foresees. Each thread asks for what it will read
//! itself, a few lines at a time between its products, so that the requests never queue up.

use std::ops::Range;

use crate::lanes::Lanes;
use crate::linear::LAYERS;
use crate::low_rank::PREFETCHED;
use crate::memory::LINE;

/// Memory that will be read soon.
#[derive(Debug, Clone, Copy)]
struct Lines {
    start: *const u8,
    count: usize,
}

// SAFETY: the address is asked for and never read through.
unsafe impl Send for Lines {}
// SAFETY: as above.
unsafe impl Sync for Lines {}

/// What the call after the next one begins with.
#[derive(Debug, Default)]
pub(crate) struct Announced {
    lines: Vec<Lines>,
    total: usize,
    /// By thread, how many lines it and those before it have.
    ends: Vec<usize>,
    /// By site, where the thread's last row's begins.
    last: [usize; LAYERS],
}

impl Announced {
    /// Makes room for a call's rows and layers, once for all.
    pub(crate) fn reserve(&mut self, threads: usize) {
        self.lines.reserve((2 * LAYERS * PREFETCHED).saturating_sub(self.lines.len()));
        self.ends.reserve(threads.saturating_sub(self.ends.len()));
    }

    /// What follows is for the next thread.
    pub(crate) fn end_thread(&mut self) {
        self.ends.push(self.total);
        self.last = [0; LAYERS];
    }

    /// What a row reads at a site, a row's first part being enough to know it by.
    pub(crate) fn push(&mut self, site: usize, parts: [(*const u8, usize); 2]) {
        let first = parts[0].0.addr();
        // Rows of one adapter follow each other.
        if std::mem::replace(&mut self.last[site], first) != first {
            for (start, bytes) in parts.into_iter().filter(|(_, bytes)| *bytes > 0) {
                let count = bytes.div_ceil(LINE);
                self.lines.push(Lines { start, count });
                self.total += count;
            }
        }
    }

    pub(crate) fn clear(&mut self) {
        self.lines.clear();
        self.ends.clear();
        self.total = 0;
        self.last = [0; LAYERS];
    }

    /// Some of so many equal parts of what a thread has, in order.
    pub(crate) fn some(&self, thread: usize, parts: Range<usize>, of: usize) -> Soon<'_> {
        let [first, end] = [thread.wrapping_sub(1), thread].map(|at| self.ends.get(at).copied().unwrap_or(0));
        let (own, of) = (end.saturating_sub(first), of.max(1));
        let [line, end] = [parts.start, parts.end].map(|part| first + own * part / of);
        let mut soon = Soon { rest: &self.lines, line, left: end - line, share: own.div_ceil(of) };
        soon.settle();
        soon
    }
}

/// A place in what was announced.
#[derive(Clone, Copy)]
pub(crate) struct Soon<'a> {
    rest: &'a [Lines],
    /// In the first of the rest.
    line: usize,
    /// Lines that are still to be asked for.
    left: usize,
    /// Lines to ask for at a time.
    share: usize,
}

impl Soon<'_> {
    #[inline(always)]
    fn settle(&mut self) {
        while let Some((first, rest)) = self.rest.split_first()
            && self.line >= first.count
        {
            self.line -= first.count;
            self.rest = rest;
        }
    }

    #[inline(always)]
    pub(crate) fn any(&self) -> bool {
        self.left > 0
    }

    /// The next four lines, if any are left; behind the last of a run lie some that nobody has announced.
    #[inline(always)]
    pub(crate) fn four(&mut self) -> *const u8 {
        match self.rest.split_first() {
            Some((first, rest)) if self.left > 0 => {
                let start = first.start.wrapping_add(self.line * LINE);
                self.left = self.left.saturating_sub((first.count - self.line).min(4));
                self.line += 4;
                if self.line >= first.count {
                    (self.rest, self.line) = (rest, 0);
                }
                start
            }
            _ => std::ptr::null(),
        }
    }

    /// Asks for a share.
    #[inline(always)]
    pub(crate) fn ask<L: Lanes>(&mut self) {
        self.take(L::prefetch);
    }

    /// The lines of a share.
    #[inline(always)]
    fn take(&mut self, mut line_at: impl FnMut(*const u8)) {
        let mut now = self.share.min(self.left);
        self.left -= now;
        while now > 0
            && let Some((first, rest)) = self.rest.split_first()
        {
            let these = now.min(first.count - self.line);
            for line in self.line..self.line + these {
                line_at(first.start.wrapping_add(line * LINE));
            }
            now -= these;
            self.line += these;
            if self.line == first.count {
                (self.rest, self.line) = (rest, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(from: &[u8], bytes: usize) -> [(*const u8, usize); 2] {
        [(from.as_ptr(), bytes), (std::ptr::null(), 0)]
    }

    /// Lines that come before.
    fn before(announced: &Announced, soon: &Soon<'_>) -> usize {
        announced.total + soon.line - soon.rest.iter().map(|lines| lines.count).sum::<usize>()
    }

    /// Every part begins where the one before ends, and all of a thread's lines are in one of them.
    #[test]
    fn parts_cover_what_was_announced() {
        let memory = [0u8; 4096];
        let mut announced = Announced::default();
        for (at, bytes) in [(0, 640), (0, 640), (700, 64), (900, 1), (1000, 1500)] {
            announced.push(0, whole(&memory[at..], bytes));
        }
        announced.end_thread();
        // What both threads read, each of them asks for.
        announced.push(0, whole(&memory[1000..], 1500));
        announced.end_thread();
        assert_eq!((announced.lines.len(), announced.total), (5, 10 + 1 + 1 + 24 + 24));
        for parts in [1, 5, 36, 100] {
            let mut next = 0;
            for (thread, end) in [(0, 36), (1, 60)] {
                for part in 0..parts {
                    let soon = announced.some(thread, part..part + 1, parts);
                    assert_eq!(before(&announced, &soon), next, "{part} of {parts}");
                    assert!(soon.left <= soon.share, "{part} of {parts}");
                    next += soon.left;
                }
                assert_eq!(next, end);
                assert!(!announced.some(thread, parts..parts, parts).any());
            }
            assert!(!announced.some(2, 0..parts, parts).any());
        }
        announced.clear();
        assert!(!announced.some(0, 0..3, 3).any());
    }

    /// By shares, every line of the part comes once, whatever runs they are in.
    #[test]
    fn shares_cover_a_part() {
        let memory = [0u8; 4096];
        let mut announced = Announced::default();
        for (at, bytes) in [(0, 640), (1024, 64), (2048, 64), (3000, 512)] {
            announced.push(0, whole(&memory[at..], bytes));
        }
        announced.end_thread();
        let runs = [(0, 10), (1024, 1), (2048, 1), (3000, 8)];
        let lines = runs.into_iter().flat_map(|(at, count)| (0..count).map(move |line| at + line * LINE));
        let lines: Vec<usize> = lines.collect();
        for parts in [1, 3, 7, 20] {
            let mut soon = announced.some(0, 0..parts, parts);
            let mut taken = Vec::new();
            while soon.any() {
                soon.take(|line| taken.push(line.addr() - memory.as_ptr().addr()));
            }
            assert_eq!(taken, lines, "{parts}");
        }
    }

    /// A row's parts come one after the other, once for all rows that have the same first one.
    #[test]
    fn parts_of_a_row_go_together() {
        let memory = [0u8; 4096];
        let mut announced = Announced::default();
        let parts = |at: usize| [(memory[at..].as_ptr(), 200), (memory[3000..].as_ptr(), 32)];
        for at in [0, 0, 1000, 0] {
            announced.push(1, parts(at));
        }
        announced.end_thread();
        let starts =
            announced.lines.iter().map(|lines| (lines.start.addr() - memory.as_ptr().addr(), lines.count));
        let each = |at: usize| [(at, 4), (3000, 1)];
        assert_eq!(starts.collect::<Vec<_>>(), [each(0), each(1000), each(0)].concat());
        assert_eq!(announced.total, 15);
    }

    /// By fours, every line of the part comes, none of a run that has ended, and then nothing more.
    #[test]
    fn fours_cover_a_part() {
        let memory = [0u8; 4096];
        let mut announced = Announced::default();
        for (at, bytes) in [(0, 640), (1024, 64), (2048, 512)] {
            announced.push(0, whole(&memory[at..], bytes));
        }
        announced.end_thread();
        let all = |mut soon: Soon<'_>| -> Vec<usize> {
            let mut starts = Vec::new();
            while soon.any() {
                starts.push(soon.four().addr() - memory.as_ptr().addr());
            }
            assert!(soon.four().is_null());
            starts
        };
        assert_eq!(all(announced.some(0, 0..1, 1)), [0, 256, 512, 1024, 2048, 2304]);
        // Lines 9 to 13 of 19: the last of the first run, the second, three of the third.
        assert_eq!(all(announced.some(0, 9..14, 19)), [576, 1024, 2048]);
    }
}
