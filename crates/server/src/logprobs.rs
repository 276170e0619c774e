//! Log-probabilities in OpenAI's two shapes, for chat and for text completions.

use std::collections::BTreeMap;

use serde::Serialize;
use text::Tokenizer;
use utoipa::ToSchema;

use crate::generation::Token;

/// What OpenAI sends for a token whose probability is zero: JSON has no infinity.
const LOWEST: f32 = -9999.0;

/// Log-probabilities of a chat answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    /// One entry per token of the text.
    content: Vec<TokenLogprob>,
    /// Always null.
    #[schema(value_type = Option<Vec<TokenLogprob>>)]
    refusal: Option<()>,
}

/// A token with its alternatives.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TokenLogprob {
    #[serde(flatten)]
    chosen: Alternative,
    /// The most likely tokens at this place, best first.
    top_logprobs: Vec<Alternative>,
}

/// A token.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Alternative {
    /// Its text, with U+FFFD for parts of characters.
    token: String,
    /// Natural log of its probability.
    logprob: f32,
    /// Its bytes.
    bytes: Vec<u8>,
}

/// Log-probabilities of a text completion.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TextLogprobs {
    /// The tokens' texts.
    tokens: Vec<String>,
    /// The tokens' log-probabilities.
    token_logprobs: Vec<f32>,
    /// Alternatives at each place, by text; null if none were asked for.
    #[schema(required)]
    top_logprobs: Option<Vec<BTreeMap<String, f32>>>,
    /// Where each token starts in the text, in characters.
    text_offset: Vec<usize>,
}

impl ChatLogprobs {
    /// Of the tokens that are part of the text.
    pub(crate) fn of(tokenizer: &Tokenizer, tokens: &[Token]) -> Self {
        let alternative = |id: u32, logprob: f32| Alternative {
            token: tokenizer.token_text(id).into_owned(),
            logprob: logprob.max(LOWEST),
            bytes: tokenizer.token_bytes(id).unwrap_or_default().to_vec(),
        };
        let entry = |token: &Token| TokenLogprob {
            chosen: alternative(token.id, token.logprob),
            top_logprobs: token.top.iter().map(|(id, logprob)| alternative(*id, *logprob)).collect(),
        };
        Self { content: tokens.iter().filter(|token| !token.stop).map(entry).collect(), refusal: None }
    }
}

impl TextLogprobs {
    /// Of the tokens that are part of the text, with `count` alternatives each.
    pub(crate) fn of(tokenizer: &Tokenizer, tokens: &[Token], count: u32) -> Self {
        let text = |id: u32| tokenizer.token_text(id).into_owned();
        let shown: Vec<&Token> = tokens.iter().filter(|token| !token.stop).collect();
        let alternatives = |token: &&Token| {
            let all = token.top.iter().copied().chain([(token.id, token.logprob)]);
            all.map(|(id, logprob)| (text(id), logprob.max(LOWEST))).collect()
        };
        Self {
            tokens: shown.iter().map(|token| text(token.id)).collect(),
            token_logprobs: shown.iter().map(|token| token.logprob.max(LOWEST)).collect(),
            top_logprobs: (count > 0).then(|| shown.iter().map(alternatives).collect()),
            text_offset: shown.iter().map(|token| token.offset).collect(),
        }
    }
}
