//! The loss of examples under the base or an adapter, without gradients.

use std::sync::Arc;

use kernels::Span;
use model::{BaseModel, PackedPass};
use peft::{Adapter, AdapterBatch};
use types::Example;

use crate::error::TrainError;
use crate::loss::CrossEntropy;
use crate::pack::{Pack, is_useful};

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

/// The loss of every example's answer, in order; examples without an answer within `max_tokens` give none.
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
    let mut losses = Vec::with_capacity(examples.len());
    let useful = examples.iter().filter(|example| is_useful(example, max_tokens));
    for pack in Pack::all(useful, max_tokens, micro_batch_tokens) {
        let adapters = AdapterBatch::new(pack.tokens.iter().map(|_| adapter));
        let spans: &[Span] = &pack.spans;
        let mut pass = PackedPass { spans, adapters: &adapters, config: base.config() };
        let hidden = base.hidden(&pack.tokens, &pack.positions, &mut pass)?;
        let width = base.config().hidden;
        let rows: Vec<f32> = {
            let hidden: Vec<f32> = hidden.flatten_all()?.to_vec1()?;
            pack.rows.iter().flat_map(|&row| &hidden[row as usize * width..][..width]).copied().collect()
        };
        let per_row = CrossEntropy { head: base.head().clone(), targets: pack.targets }.losses(&rows);
        let mut rest = per_row.as_slice();
        for tokens in pack.counts {
            let (mine, others) = rest.split_at(tokens);
            losses.push(Loss { nats: mine.iter().map(|loss| f64::from(*loss)).sum(), tokens });
            rest = others;
        }
    }
    Ok(losses)
}
