//! What comes out of memory while frozen products are computed: the rows' B, and what the call after this one begins with.
//!
//! Rows of one batch have different adapters, which no hardware prefetcher foresees; a row at a time is asked for, so that
//! the requests never queue up.

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
    /// By site, where the last row's begins.
    last: [usize; LAYERS],
}

impl Announced {
    /// Makes room for a call's rows and layers, once for all.
    pub(crate) fn reserve(&mut self) {
        self.lines.reserve((LAYERS * PREFETCHED).saturating_sub(self.lines.len()));
    }

    pub(crate) fn push(&mut self, site: usize, (start, bytes): (*const u8, usize)) {
        // Rows of one adapter follow each other.
        if std::mem::replace(&mut self.last[site], start.addr()) != start.addr() {
            let count = bytes.div_ceil(LINE);
            self.lines.push(Lines { start, count });
            self.total += count;
        }
    }

    pub(crate) fn clear(&mut self) {
        self.lines.clear();
        self.total = 0;
        self.last = [0; LAYERS];
    }

    /// From the `part`th of `parts` equal parts on.
    pub(crate) fn from(&self, part: usize, parts: usize) -> Soon<'_> {
        let line = self.total * part / parts.max(1);
        let mut soon = Soon { rest: &self.lines, line, share: self.total.div_ceil(parts.max(1)) };
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
    pub(crate) fn ask<L: Lanes>(&mut self) {
        if let Some(first) = self.rest.first() {
            for line in self.line..self.line + self.share {
                L::prefetch(first.start.wrapping_add(line * LINE));
            }
            self.line += self.share;
            self.settle();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every part begins where the one before ends, and all lines are in one of them.
    #[test]
    fn parts_cover_what_was_announced() {
        let memory = [0u8; 4096];
        let mut announced = Announced::default();
        for (at, bytes) in [(0, 640), (0, 640), (700, 64), (900, 1), (1000, 1500)] {
            announced.push(0, (memory[at..].as_ptr(), bytes));
        }
        assert_eq!((announced.lines.len(), announced.total), (4, 10 + 1 + 1 + 24));
        let left = |soon: &Soon<'_>| soon.rest.iter().map(|lines| lines.count).sum::<usize>() - soon.line;
        for parts in [1, 5, 36, 100] {
            for part in 0..parts {
                let soon = announced.from(part, parts);
                let next = left(&announced.from(part + 1, parts));
                assert_eq!(left(&soon), announced.total - announced.total * part / parts);
                assert!(left(&soon) - next <= soon.share, "{part} of {parts}");
            }
            assert!(announced.from(parts, parts).rest.is_empty());
        }
        announced.clear();
        assert!(announced.from(0, 3).rest.is_empty());
    }
}
