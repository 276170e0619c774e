//! The losses of examples under the base and adapters, without gradients: the passes of training, of which nothing is
//! kept.

use std::collections::VecDeque;

use model::BaseModel;
use peft::AdapterWeights;
use types::Example;

use crate::buffers::Pool;
use crate::error::TrainError;
use crate::head::losses;
use crate::pack::{Chunk, Cut, Pack, next_pass};
use crate::params::Params;
use crate::pass::Pass;
use crate::site::Member;

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
    pub fn bits_per_token<'a>(losses: impl IntoIterator<Item = &'a Self>) -> f64 {
        let add = |(nats, tokens): (f64, usize), loss: &Self| (nats + loss.nats, tokens + loss.tokens);
        let (nats, tokens) = losses.into_iter().fold((0.0, 0), add);
        nats / tokens as f64 / std::f64::consts::LN_2
    }
}

/// Tokens of an example that there is room for: `max_tokens`, or what the context leaves beside the most virtual tokens of
/// one adapter.
fn room(base: &BaseModel, adapters: &[Option<&AdapterWeights>], max_tokens: usize) -> usize {
    let virtual_tokens = |adapter: &&AdapterWeights| match adapter {
        AdapterWeights::Prompt(prompt) => prompt.config.virtual_tokens,
        AdapterWeights::Lora(_) | AdapterWeights::Ia3(_) => 0,
    };
    let most = adapters.iter().flatten().map(virtual_tokens).max().unwrap_or(0);
    max_tokens.min(base.config().context.saturating_sub(most))
}

/// For each adapter, `None` being the base alone, the loss of every example's answer; `None` for an example without an
/// answer within `max_tokens`. An adapter's virtual tokens go before every example. All adapters see the same tokens of
/// the examples, and so have a loss of the same: what the context leaves beside the most virtual tokens of one.
///
/// The examples that begin alike compute their beginning once, and all adapters share the passes, of
/// `micro_batch_tokens` rows each. `breathe` is called between the blocks of a pass.
///
/// # Errors
/// When an adapter or a token does not fit the base.
pub fn evaluate(
    base: &BaseModel,
    adapters: &[Option<&AdapterWeights>],
    examples: &[Example],
    max_tokens: usize,
    micro_batch_tokens: usize,
    breathe: &mut dyn FnMut(),
) -> Result<Vec<Vec<Option<Loss>>>, TrainError> {
    let params = |adapter: &Option<&AdapterWeights>| match adapter {
        Some(weights) => Params::of(weights, base),
        None => Ok(Params::none(base)),
    };
    let mut params: Vec<Params> = adapters.iter().map(params).collect::<Result<_, _>>()?;
    params.iter_mut().for_each(|params| params.refresh(base));
    let config = base.config();
    let max_tokens = room(base, adapters, max_tokens);
    let cut = |params: &Params| Cut {
        max_tokens,
        limit: micro_batch_tokens,
        virtual_tokens: params.virtual_tokens,
        share: true,
    };
    let mut waiting: VecDeque<(usize, Chunk)> = VecDeque::new();
    for (at, params) in params.iter().enumerate() {
        let cut = cut(params);
        let useful = cut.useful(examples, config.vocab)?;
        waiting.extend(cut.chunks(examples, &useful).into_iter().map(|chunk| (at, chunk)));
    }
    let mut sums = vec![0.0; params.len()];
    let members = params.iter().zip(&mut sums);
    let members: Vec<Member<'_>> = members
        .map(|(params, loss)| Member { params, grads: &mut [], dropout: None, share: 0.0, loss })
        .collect();
    let mut pool = Pool::default();
    let mut measured = vec![vec![None; examples.len()]; params.len()];
    while !waiting.is_empty() {
        let chunks = next_pass(&mut waiting, micro_batch_tokens);
        let mut pack = Pack::default();
        chunks.iter().for_each(|(at, chunk)| pack.push(*at, &cut(&params[*at]), examples, chunk));
        let x = Pass::new(base, &pack, 0).hidden(&mut pool, &members, breathe);
        let per_token = losses(base, &mut pool, &pack, &x);
        pool.give(x);
        let mut rest = per_token.as_slice();
        for (at, chunk) in &chunks {
            for &index in chunk.bundles.iter().flat_map(|bundle| &bundle.examples) {
                let (own, others) = rest.split_at(cut(&params[*at]).answers(&examples[index]));
                let nats = own.iter().map(|loss| f64::from(*loss)).sum();
                measured[*at][index] = Some(Loss { nats, tokens: own.len() });
                rest = others;
            }
        }
    }
    Ok(measured)
}
