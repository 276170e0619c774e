//! A training example as token ids.

/// One sequence to learn from: the loss counts on the answer only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Prompt and answer, end-of-sequence token included.
    pub tokens: Vec<u32>,
    /// Index of the first answer token; at least 1, as the first token has no prediction.
    pub answer_start: usize,
}

impl Example {
    /// Number of tokens the loss counts.
    #[must_use]
    pub fn answer_len(&self) -> usize {
        self.tokens.len().saturating_sub(self.answer_start.max(1))
    }
}
