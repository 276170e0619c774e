//! The loss of examples under the base or an adapter, without gradients.

use std::sync::Arc;

use kernels::Span;
use model::{BaseModel, ModelError, PackedPass};
use peft::{Adapter, AdapterBatch};
use types::Example;

use crate::error::TrainError;
use crate::head::losses as losses_of;
use crate::pack::Cut;

/// The loss of one example's answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// Sum over the answer's tokens, in nats.
    pub nats: f64,
    /// Tokens of the answer.
    pub tokens: usize,
}

impl Loss {
    /// Bits per token over several examples; NaN if they have no token.
    #[must_use]
    pub fn bits_per_token(losses: &[Self]) -> f64 {
        let nats: f64 = losses.iter().map(|loss| loss.nats).sum();
        let tokens: usize = losses.iter().map(|loss| loss.tokens).sum();
        nats / tokens as f64 / std::f64::consts::LN_2
    }
}

/// The loss of every example's answer, in order; examples without an answer within `max_tokens` give none. The adapter's
/// virtual tokens go before every example and shorten what is left of the context.
///
/// # Errors
/// When an example does not fit the model.
pub fn evaluate(
    base: &BaseModel,
    adapter: Option<&Arc<Adapter>>,
    examples: &[Example],
    max_tokens: usize,
    micro_batch_tokens: usize,
) -> Result<Vec<Loss>, TrainError> {
    let config = base.config();
    let virtual_tokens = adapter.map_or(0, |adapter| adapter.virtual_tokens());
    let max_tokens = max_tokens.min(config.context.saturating_sub(virtual_tokens));
    let cut = Cut { max_tokens, limit: micro_batch_tokens, virtual_tokens, share: false };
    let useful: Vec<usize> = (0..examples.len()).filter(|&at| cut.is_useful(&examples[at])).collect();
    let mut losses = Vec::with_capacity(useful.len());
    for chunk in cut.chunks(examples, &useful) {
        let indices = chunk.bundles.iter().flat_map(|bundle| &bundle.examples);
        let adapters = AdapterBatch::new((0..chunk.rows).map(|_| adapter));
        let (mut tokens, mut positions, mut spans) = (Vec::new(), Vec::new(), Vec::new());
        let (mut rows, mut targets, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        for &index in indices {
            let example = cut.tokens(&examples[index]);
            let (first, len) = (tokens.len(), virtual_tokens + example.len() - 1);
            spans.push(Span { first, len });
            // Ids from the size of the vocabulary on are the adapter's own.
            tokens.extend((config.vocab..config.vocab + virtual_tokens).map(|id| id as u32));
            tokens.extend(&example[..example.len() - 1]);
            positions.extend(0..len as u32);
            let answer = examples[index].answer_start.max(1);
            rows.extend(first + virtual_tokens + answer - 1..first + len);
            targets.extend(&example[answer..]);
            counts.push(example.len() - answer);
        }
        let mut pass = PackedPass { spans: &spans, adapters: &adapters, config };
        let hidden = base.hidden(&tokens, &positions, &mut pass)?;
        let width = config.hidden;
        let hidden: Vec<f32> =
            hidden.flatten_all().and_then(|hidden| hidden.to_vec1()).map_err(ModelError::from)?;
        let last: Vec<f32> = rows.iter().flat_map(|row| &hidden[row * width..][..width]).copied().collect();
        let per_row = losses_of(base, &last, &targets);
        let mut rest = per_row.as_slice();
        for tokens in counts {
            let (mine, others) = rest.split_at(tokens);
            losses.push(Loss { nats: mine.iter().map(|loss| f64::from(*loss)).sum(), tokens });
            rest = others;
        }
    }
    Ok(losses)
}
