//! Examples as rows of a pass: whole examples one after another without padding, those with a common beginning below
//! it.
//!
//! A job's examples are cut into chunks by its own recipe alone; a pass takes chunks of several jobs. So what a job
//! computes, to the bit, does not depend on the company it has.

use std::collections::VecDeque;
use std::ops::Range;

use kernels::{Group, Products, Span};
use model::ModelError;
use types::Example;

/// Examples whose first rows are computed once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bundle {
    /// Indices among the job's examples.
    pub(crate) examples: Vec<usize>,
    /// Tokens that all of them begin with, none of which predicts an answer token; 0 for a single example.
    pub(crate) common: usize,
}

/// What goes through the model together at least.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Chunk {
    pub(crate) bundles: Vec<Bundle>,
    pub(crate) rows: usize,
}

/// How a job's examples are cut.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    /// Tokens of an example; the rest is cut off on the right.
    pub(crate) max_tokens: usize,
    /// Rows of a chunk, unless a single example has more.
    pub(crate) limit: usize,
    /// Rows of virtual tokens before each example.
    pub(crate) virtual_tokens: usize,
    /// Whether examples share the rows of a common beginning.
    pub(crate) share: bool,
}

impl Cut {
    /// Tokens of an example within the limit.
    pub(crate) fn tokens<'a>(&self, example: &'a Example) -> &'a [u32] {
        &example.tokens[..example.tokens.len().min(self.max_tokens)]
    }

    /// Whether an example, cut, still has an answer token to predict.
    pub(crate) fn is_useful(&self, example: &Example) -> bool {
        self.tokens(example).len() > example.answer_start.max(1)
    }

    /// Which examples are useful.
    ///
    /// # Errors
    /// When a token of one is beyond a vocabulary of `vocab`.
    pub(crate) fn useful(&self, examples: &[Example], vocab: usize) -> Result<Vec<usize>, ModelError> {
        let useful: Vec<usize> = (0..examples.len()).filter(|&at| self.is_useful(&examples[at])).collect();
        let mut tokens = useful.iter().flat_map(|&at| self.tokens(&examples[at]));
        match tokens.find(|token| **token as usize >= vocab) {
            Some(token) => {
                let problem = format!("token id {token} is beyond the vocabulary of {vocab}");
                Err(ModelError::Batch(problem))
            }
            None => Ok(useful),
        }
    }

    /// Answer tokens of an example, cut.
    pub(crate) fn answers(&self, example: &Example) -> usize {
        self.tokens(example).len() - example.answer_start.max(1)
    }

    /// Cuts a batch, given as indices of useful examples, into chunks.
    ///
    /// Which examples share rows follows from their tokens: in the order of these, all that begin alike stand together,
    /// whatever was between them in the batch.
    pub(crate) fn chunks(&self, examples: &[Example], batch: &[usize]) -> Vec<Chunk> {
        let mut order = batch.to_vec();
        if self.share {
            order.sort_by_key(|&index| (self.tokens(&examples[index]), index));
        }
        let mut chunks: Vec<Chunk> = Vec::new();
        for (bundle, rows) in self.bundles(examples, &order) {
            match chunks.last_mut() {
                Some(chunk) if chunk.rows + rows <= self.limit => {
                    chunk.bundles.push(bundle);
                    chunk.rows += rows;
                }
                _ => chunks.push(Chunk { bundles: vec![bundle], rows }),
            }
        }
        chunks
    }

    /// The bundles of successive examples that have the fewest rows, each with its number of rows: within the limit, unless
    /// it is a single example's.
    fn bundles(&self, examples: &[Example], order: &[usize]) -> Vec<(Bundle, usize)> {
        /// The last bundle of the examples so far, and the rows of them all.
        struct Last {
            total: usize,
            first: usize,
            common: usize,
            rows: usize,
        }
        // The last token has no prediction to make, so it takes no row.
        let rows = |at: usize| self.virtual_tokens + self.tokens(&examples[order[at]]).len() - 1;
        // Tokens before those that predict.
        let bound = |at: usize| examples[order[at]].answer_start.max(1) - 1;
        let alike = |at: usize| {
            let [left, right] = [at, at + 1].map(|at| self.tokens(&examples[order[at]]));
            left.iter().zip(right).take_while(|(a, b)| a == b).count()
        };
        let alike: Vec<usize> = (1..order.len()).map(|at| alike(at - 1)).collect();
        let mut best = vec![Last { total: 0, first: 0, common: 0, rows: 0 }];
        for last in 0..order.len() {
            let own = rows(last);
            let mut found = Last { total: best[last].total + own, first: last, common: 0, rows: own };
            let (mut apart, mut common) = (own, bound(last));
            for first in (0..last).rev().filter(|_| self.share) {
                apart += rows(first);
                common = common.min(bound(first)).min(alike[first]);
                let rows = apart - (last - first) * (self.virtual_tokens + common);
                // With more examples it can only grow.
                if rows > self.limit {
                    break;
                }
                let total = best[first].total + rows;
                if total < found.total {
                    found = Last { total, first, common, rows };
                }
            }
            best.push(found);
        }
        let mut bundles = Vec::new();
        let mut end = order.len();
        while end > 0 {
            let Last { first, common, rows, .. } = best[end];
            bundles.push((Bundle { examples: order[first..end].to_vec(), common }, rows));
            end = first;
        }
        bundles.reverse();
        bundles
    }
}

/// Takes the chunks of the next pass, each with its job: those in front that `limit` rows have room for, one at least.
pub(crate) fn next_pass(waiting: &mut VecDeque<(usize, Chunk)>, limit: usize) -> Vec<(usize, Chunk)> {
    let mut taken = Vec::new();
    let mut rows = 0;
    while let Some((_, chunk)) = waiting.front() {
        rows += chunk.rows;
        if rows > limit && !taken.is_empty() {
            break;
        }
        taken.extend(waiting.pop_front());
    }
    taken
}

/// What a row begins as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Token(u32),
    /// A virtual token of the row's job.
    Virtual(usize),
}

/// The rows of one job in a pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Place among the pass's jobs.
    pub(crate) job: usize,
    pub(crate) rows: Range<usize>,
    /// Each answer token and the row that predicts it, in the order of the examples.
    pub(crate) targets: Vec<(usize, u32)>,
}

/// Everything about the rows of a pass but their values.
#[derive(Debug, Default)]
pub(crate) struct Pack {
    pub(crate) sources: Vec<Source>,
    /// Each row's place in its sequence, virtual tokens included.
    pub(crate) positions: Vec<u32>,
    /// Each row's example; that of a common beginning belongs to the first of those that have it.
    pub(crate) examples: Vec<u32>,
    pub(crate) groups: Vec<Group>,
    pub(crate) segments: Vec<Segment>,
    /// In what the frozen products are computed.
    pub(crate) products: Products,
}

impl Pack {
    pub(crate) fn new(products: Products) -> Self {
        Self { products, ..Self::default() }
    }

    /// Appends a chunk of the job at place `job`.
    pub(crate) fn push(&mut self, job: usize, cut: &Cut, examples: &[Example], chunk: &Chunk) {
        let from = self.sources.len();
        let mut targets = Vec::new();
        for bundle in &chunk.bundles {
            let alone = bundle.examples.len() == 1;
            let mut group = Group { head: Span { first: self.sources.len(), len: 0 }, tails: Vec::new() };
            for (place, &index) in bundle.examples.iter().enumerate() {
                let tokens = cut.tokens(&examples[index]);
                let start = if alone { 0 } else { bundle.common };
                if place == 0 {
                    (0..cut.virtual_tokens).for_each(|at| self.row(Source::Virtual(at), at, index));
                    for (at, &token) in tokens[..start].iter().enumerate() {
                        self.row(Source::Token(token), cut.virtual_tokens + at, index);
                    }
                    group.head.len = self.sources.len() - group.head.first;
                }
                let first = self.sources.len();
                for (at, &token) in tokens.iter().enumerate().take(tokens.len() - 1).skip(start) {
                    self.row(Source::Token(token), cut.virtual_tokens + at, index);
                }
                let len = self.sources.len() - first;
                if alone {
                    group.head.len += len;
                } else {
                    group.tails.push(Span { first, len });
                }
                let answer = examples[index].answer_start.max(1);
                targets.extend((answer..tokens.len()).map(|at| (first + at - 1 - start, tokens[at])));
            }
            self.groups.push(group);
        }
        self.segments.push(Segment { job, rows: from..self.sources.len(), targets });
    }

    fn row(&mut self, source: Source, position: usize, example: usize) {
        self.sources.push(source);
        self.positions.push(position as u32);
        self.examples.push(example as u32);
    }

    pub(crate) fn rows(&self) -> usize {
        self.sources.len()
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const CUT: Cut = Cut { max_tokens: 100, limit: 7, virtual_tokens: 0, share: true };

    fn example(tokens: &[u32], answer_start: usize) -> Example {
        Example { tokens: tokens.to_vec(), answer_start }
    }

    #[test]
    fn rows_predict_the_next_token() {
        let examples = [example(&[1, 2, 3, 4], 2), example(&[5, 6], 0), example(&[7, 8, 9, 1], 1)];
        let chunks = CUT.chunks(&examples, &[0, 1, 2]);
        assert_eq!(chunks.iter().map(|chunk| chunk.rows).collect::<Vec<_>>(), [7]);
        let smaller = Cut { limit: 6, ..CUT }.chunks(&examples, &[0, 1, 2]);
        assert_eq!(smaller.iter().map(|chunk| chunk.rows).collect::<Vec<_>>(), [4, 3]);
        let mut pack = Pack::default();
        smaller.iter().for_each(|chunk| pack.push(3, &CUT, &examples, chunk));
        assert_eq!(pack.sources[..4], [1, 2, 3, 5].map(Source::Token));
        assert_eq!(pack.positions[..4], [0, 1, 2, 0]);
        assert_eq!(pack.segments[0].targets, [(1, 3), (2, 4), (3, 6)]);
        assert_eq!(pack.segments[1].targets, [(4, 8), (5, 9), (6, 1)]);
        assert!(!Cut { max_tokens: 2, ..CUT }.is_useful(&examples[0]));
        assert!(Cut { max_tokens: 3, ..CUT }.is_useful(&examples[0]));
    }

    #[test]
    fn common_beginnings_are_there_once() {
        let examples = [
            example(&[1, 2, 3, 4, 5], 4),
            example(&[1, 2, 9, 8], 3),
            example(&[1, 2, 7, 6, 5], 4),
            example(&[4, 4, 4], 2),
        ];
        let cut = Cut { limit: 100, virtual_tokens: 1, ..CUT };
        let chunks = cut.chunks(&examples, &[0, 1, 2, 3]);
        assert_eq!(chunks.len(), 1);
        let mut pack = Pack::default();
        pack.push(0, &cut, &examples, &chunks[0]);
        assert_eq!(pack.rows(), chunks[0].rows);
        // In the order of their tokens. The fourth shares the virtual token alone, for which the others would give up two
        // more tokens each.
        let tokens = [3, 4, 7, 6, 9, 4, 4].map(Source::Token);
        let virtual_token = Source::Virtual(0);
        let head = [virtual_token, Source::Token(1), Source::Token(2)];
        assert_eq!(pack.sources[..3], head);
        assert_eq!(pack.sources[3..8], tokens[..5]);
        assert_eq!(pack.sources[8..], [virtual_token, tokens[5], tokens[6]]);
        assert_eq!(pack.positions, [0, 1, 2, 3, 4, 3, 4, 3, 0, 1, 2]);
        assert_eq!(pack.segments[0].targets, [(4, 5), (6, 5), (7, 8), (10, 4)]);
        let unshared = Cut { share: false, ..cut }.chunks(&examples, &[0, 1, 2, 3]);
        assert_eq!(unshared[0].rows, 5 + 4 + 5 + 3);
    }

    #[test]
    fn templates_in_turns_are_shared_each() {
        let of =
            |template: u32, own: u32| example(&[&[1, 2], &[template; 20][..], &[own, own + 1]].concat(), 23);
        let turns = [of(3, 30), of(4, 40), of(3, 31), of(4, 41), of(3, 32)];
        let cut = Cut { limit: 110, ..CUT };
        let batch = [0, 1, 2, 3, 4];
        let chunks = cut.chunks(&turns, &batch);
        let shared: Vec<_> = chunks[0].bundles.iter().map(|b| (b.examples.clone(), b.common)).collect();
        assert_eq!(shared, [(vec![0, 2, 4], 22), (vec![1, 3], 22)]);
        assert_eq!(chunks[0].rows, 22 + 3 + 22 + 2);
        // Negative control: as they came, they would share the two tokens that all begin with.
        let as_they_came: usize = cut.bundles(&turns, &batch).iter().map(|(_, rows)| rows).sum();
        assert_eq!(as_they_came, 2 + 5 * 21);
        // One alone of its template does not cost the others theirs.
        let alone = cut.chunks(&[of(3, 30), of(4, 40), of(4, 41), of(4, 42)], &batch[..4]);
        assert_eq!(alone[0].rows, 23 + 22 + 3);
        // Over several chunks each computes it once.
        let chunks = Cut { limit: 25, ..cut }.chunks(&turns, &batch);
        assert_eq!(chunks.iter().map(|chunk| chunk.rows).collect::<Vec<_>>(), [25, 24]);
        let chunks = Cut { limit: 24, ..cut }.chunks(&turns, &batch);
        assert_eq!(chunks.iter().map(|chunk| chunk.rows).collect::<Vec<_>>(), [24, 23, 24]);
    }

    /// Rows of the best of all ways to cut examples, in the order of their tokens, into bundles.
    fn fewest(cut: &Cut, examples: &[Example]) -> usize {
        let mut order: Vec<&Example> = examples.iter().collect();
        order.sort_by(|a, b| cut.tokens(a).cmp(cut.tokens(b)));
        let rows = |bundle: &[&Example]| {
            let apart = |example: &&Example| cut.virtual_tokens + cut.tokens(example).len() - 1;
            let apart: usize = bundle.iter().map(apart).sum();
            let is_common = |at: usize| {
                let same = |example: &&Example| {
                    at + 1 < example.answer_start.max(1) && example.tokens[at] == bundle[0].tokens[at]
                };
                bundle.iter().all(same)
            };
            let common = (0..).take_while(|at| is_common(*at)).count();
            let rows = apart - (bundle.len() - 1) * (cut.virtual_tokens + common);
            (bundle.len() == 1 || rows <= cut.limit).then_some(rows)
        };
        let ways = (0..1u32 << (order.len() - 1)).filter_map(|ends| {
            let mut bundles = vec![vec![order[0]]];
            for (at, example) in order[1..].iter().enumerate() {
                match ends >> at & 1 {
                    0 => bundles.last_mut()?.push(example),
                    _ => bundles.push(vec![example]),
                }
            }
            bundles.iter().map(|bundle| rows(bundle)).sum::<Option<usize>>()
        });
        ways.min().unwrap_or(usize::MAX)
    }

    #[test]
    fn no_other_bundles_have_fewer_rows() {
        let mut rng = StdRng::seed_from_u64(9);
        for _ in 0..500 {
            let count = rng.random_range(1..9);
            let cut = Cut {
                max_tokens: rng.random_range(6..14),
                limit: rng.random_range(1..40),
                virtual_tokens: rng.random_range(0..3),
                share: true,
            };
            let random = |_| {
                // Two tokens, and the first more often: many begin alike.
                let tokens: Vec<u32> =
                    (0..rng.random_range(2..12)).map(|_| u32::from(rng.random_ratio(1, 6))).collect();
                let answer_start = rng.random_range(0..tokens.len().min(5));
                Example { tokens, answer_start }
            };
            let examples: Vec<Example> = (0..count).map(random).collect();
            let batch: Vec<usize> = (0..count).collect();
            let chunks = cut.chunks(&examples, &batch);
            assert_eq!(chunks.iter().map(|chunk| chunk.rows).sum::<usize>(), fewest(&cut, &examples));
            let mut seen: Vec<usize> = Vec::new();
            for chunk in &chunks {
                let of_chunk = chunk.bundles.iter().flat_map(|bundle| bundle.examples.iter().copied());
                let of_chunk: Vec<usize> = of_chunk.collect();
                assert!(chunk.rows <= cut.limit || of_chunk.len() == 1, "{chunk:?}");
                let mut pack = Pack::default();
                pack.push(0, &cut, &examples, chunk);
                assert_eq!(pack.rows(), chunk.rows);
                seen.extend(of_chunk);
            }
            seen.sort_unstable();
            assert_eq!(seen, batch, "each once");
        }
    }
}
