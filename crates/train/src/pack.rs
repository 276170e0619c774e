//! Examples packed one after another into one pass, without padding.

use kernels::Span;
use types::Example;

/// Some examples as one pass: rows, positions, and which rows are scored against which token.
#[derive(Debug, Default)]
pub(crate) struct Pack {
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) spans: Vec<Span>,
    /// Rows whose prediction counts.
    pub(crate) rows: Vec<u32>,
    /// The token each of them should predict.
    pub(crate) targets: Vec<u32>,
    /// How many targets each example has.
    pub(crate) counts: Vec<usize>,
}

impl Pack {
    /// Appends an example, cut to `max_tokens` on the right. The last token has no prediction to make, so it
    /// takes no row.
    fn push(&mut self, example: &Example, max_tokens: usize) {
        let tokens = &example.tokens[..example.tokens.len().min(max_tokens)];
        let first = self.tokens.len();
        let rows = tokens.len().saturating_sub(1);
        self.spans.push(Span { first, len: rows });
        self.tokens.extend(&tokens[..rows]);
        self.positions.extend(0..rows as u32);
        let start = example.answer_start.max(1).min(tokens.len());
        self.rows.extend((start..tokens.len()).map(|at| (first + at - 1) as u32));
        self.targets.extend(&tokens[start..]);
        self.counts.push(tokens.len() - start);
    }

    /// Packs of at most `limit` rows, or of one example that is longer.
    pub(crate) fn all<'a>(
        examples: impl IntoIterator<Item = &'a Example>,
        max_tokens: usize,
        limit: usize,
    ) -> Vec<Self> {
        let mut packs: Vec<Self> = Vec::new();
        for example in examples {
            let rows = example.tokens.len().min(max_tokens);
            match packs.last_mut() {
                Some(pack) if pack.tokens.len() + rows <= limit => pack.push(example, max_tokens),
                _ => {
                    packs.push(Self::default());
                    if let Some(pack) = packs.last_mut() {
                        pack.push(example, max_tokens);
                    }
                }
            }
        }
        packs.retain(|pack| !pack.tokens.is_empty());
        packs
    }
}

/// Whether an example, cut to `max_tokens`, still has an answer token to predict.
pub(crate) fn is_useful(example: &Example, max_tokens: usize) -> bool {
    example.tokens.len().min(max_tokens) > example.answer_start.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_predict_the_next_token() {
        let example = |tokens: &[u32], answer_start| Example { tokens: tokens.to_vec(), answer_start };
        let examples = [example(&[1, 2, 3, 4], 2), example(&[5, 6], 0), example(&[7, 8, 9], 1)];
        let packs = Pack::all(&examples, 100, 6);
        assert_eq!(packs.len(), 2);
        assert_eq!(packs[0].tokens, [1, 2, 3, 5]);
        assert_eq!(packs[0].positions, [0, 1, 2, 0]);
        assert_eq!(packs[0].rows, [1, 2, 3]);
        assert_eq!(packs[0].targets, [3, 4, 6]);
        assert_eq!(packs[0].counts, [2, 1]);
        assert_eq!(packs[1].targets, [8, 9]);
        assert!(!is_useful(&examples[0], 2));
        assert!(is_useful(&examples[0], 3));
    }
}
