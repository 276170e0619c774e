//! Examples as rows of a pass: whole examples one after another without padding, those with a common beginning below
//! it.
//!
//! A job's examples are cut into chunks by its own recipe alone; a pass takes chunks of several jobs. So what a job
//! computes, to the bit, does not depend on the company it has.

use std::collections::VecDeque;
use std::ops::Range;

use kernels::{Group, Span};
use model::ModelError;
use types::Example;

/// Successive examples whose first rows are computed once.
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
    pub(crate) fn chunks(&self, examples: &[Example], batch: &[usize]) -> Vec<Chunk> {
        let mut chunks: Vec<Chunk> = Vec::new();
        for &index in batch {
            // The last token has no prediction to make, so it takes no row.
            let rows = self.virtual_tokens + self.tokens(&examples[index]).len() - 1;
            if let Some(chunk) = chunks.last_mut() {
                let joined = chunk.bundles.last().and_then(|bundle| self.joined(examples, bundle, index));
                if let (Some(bundle), Some(common)) = (chunk.bundles.last_mut(), joined) {
                    let count = bundle.examples.len();
                    // What was common is computed again where it is no more.
                    let before =
                        if count == 1 { 0 } else { (count - 1) * (self.virtual_tokens + bundle.common) };
                    let after = chunk.rows + before + rows - count * (self.virtual_tokens + common);
                    if after <= self.limit {
                        bundle.examples.push(index);
                        bundle.common = common;
                        chunk.rows = after;
                        continue;
                    }
                } else if chunk.rows + rows <= self.limit {
                    chunk.bundles.push(Bundle { examples: vec![index], common: 0 });
                    chunk.rows += rows;
                    continue;
                }
            }
            chunks.push(Chunk { bundles: vec![Bundle { examples: vec![index], common: 0 }], rows });
        }
        chunks
    }

    /// How many tokens a bundle with one more example has in common, if that saves rows.
    fn joined(&self, examples: &[Example], bundle: &Bundle, index: usize) -> Option<usize> {
        let first = &examples[*bundle.examples.first()?];
        let count = bundle.examples.len();
        let bound = |example: &Example| example.answer_start.max(1) - 1;
        let most = if count == 1 { bound(first) } else { bundle.common }.min(bound(&examples[index]));
        let pairs = self.tokens(first).iter().zip(self.tokens(&examples[index])).take(most);
        let common = pairs.take_while(|(a, b)| a == b).count();
        let saved = |common: usize, times: usize| times * (self.virtual_tokens + common);
        let before = if count == 1 { 0 } else { saved(bundle.common, count - 1) };
        (self.share && saved(common, count) > before).then_some(common)
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
}

impl Pack {
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
        // The fourth shares the virtual token alone, for which the others would give up two more tokens each.
        let tokens = [3, 4, 9, 7, 6, 4, 4].map(Source::Token);
        let virtual_token = Source::Virtual(0);
        let head = [virtual_token, Source::Token(1), Source::Token(2)];
        assert_eq!(pack.sources[..3], head);
        assert_eq!(pack.sources[3..8], tokens[..5]);
        assert_eq!(pack.sources[8..], [virtual_token, tokens[5], tokens[6]]);
        assert_eq!(pack.positions, [0, 1, 2, 3, 4, 3, 3, 4, 0, 1, 2]);
        assert_eq!(pack.segments[0].targets, [(4, 5), (5, 8), (7, 5), (10, 4)]);
        let unshared = Cut { share: false, ..cut }.chunks(&examples, &[0, 1, 2, 3]);
        assert_eq!(unshared[0].rows, 5 + 4 + 5 + 3);
    }
}
