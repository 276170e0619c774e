//! Tokens to text as they are generated.

use crate::Tokenizer;

/// Turns one sequence's tokens into text, piece by piece, so that the pieces joined are exactly what
/// [`Tokenizer::decode`] gives for the whole sequence. Each token costs its own length only.
///
/// A character may be spread over several tokens: its bytes are held back until it is complete.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    with_special: bool,
    /// The first blank is still to be dropped.
    drop_blank: bool,
    /// The beginning of a character, at most three bytes between calls.
    held: Vec<u8>,
    /// What the last call gave out.
    text: String,
}

impl Detokenizer {
    /// Decodes a sequence of its own, as [`Tokenizer::decode`] does.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer) -> Self {
        Self {
            tokenizer: tokenizer.clone(),
            with_special: false,
            drop_blank: tokenizer.leading_blank(),
            held: Vec::new(),
            text: String::new(),
        }
    }

    /// Decodes what continues an earlier text: a SentencePiece vocabulary's first blank is then part of the text, as in
    /// `The capital is` and ` Paris`. Other vocabularies make no difference.
    #[must_use]
    pub fn continuing(tokenizer: &Tokenizer) -> Self {
        Self { drop_blank: false, ..Self::new(tokenizer) }
    }

    /// Also gives out the texts of special tokens, as [`Tokenizer::decode_with_special`] does.
    #[must_use]
    pub fn with_special(mut self) -> Self {
        self.with_special = true;
        self
    }

    /// The text that `id` completes; empty while a character is incomplete, and for special tokens.
    pub fn push(&mut self, id: u32) -> &str {
        self.text.clear();
        if let Some(mut bytes) = self.tokenizer.token_bytes(id)
            && (self.with_special || !self.tokenizer.is_special(id))
        {
            if std::mem::take(&mut self.drop_blank) {
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            }
            self.held.extend_from_slice(bytes);
            self.give_out();
        }
        &self.text
    }

    /// The rest at the end of the sequence: U+FFFD if a character stayed incomplete, else nothing. The next sequence
    /// needs a new detokeniser.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        self.text.push_str(&String::from_utf8_lossy(&self.held));
        self.held.clear();
        &self.text
    }

    /// Moves everything but the beginning of a character from `held` to `text`.
    fn give_out(&mut self) {
        let mut open = 0;
        let mut chunks = self.held.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            self.text.push_str(chunk.valid());
            let broken = chunk.invalid();
            let may_go_on = str::from_utf8(broken).is_err_and(|error| error.error_len().is_none());
            if chunks.peek().is_none() && may_go_on {
                open = broken.len();
            } else if !broken.is_empty() {
                self.text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.held.drain(..self.held.len() - open);
    }
}
