//! One sequence inside the model thread.

use std::sync::Arc;
use std::time::Instant;

use peft::{Adapter, Lease};
use types::{FinishReason, Usage};

use crate::request::{Event, Generate, SampledToken, TokenSink};
use crate::sampler::Sampler;

/// A request with its state: tokens, blocks, sampler and the way back to its reader.
pub(crate) struct Sequence {
    /// Prompt and answer.
    pub(crate) tokens: Vec<u32>,
    prompt: usize,
    /// Tokens whose keys and values are stored.
    pub(crate) computed: usize,
    pub(crate) blocks: Vec<u32>,
    lease: Option<Lease>,
    sampler: Sampler,
    pub(crate) deadline: Option<Instant>,
    pub(crate) sink: TokenSink,
}

impl Sequence {
    pub(crate) fn new(job: Generate, sink: TokenSink) -> Self {
        Self {
            prompt: job.prompt.len(),
            sampler: Sampler::new(job.params, &job.prompt),
            tokens: job.prompt,
            computed: 0,
            blocks: Vec::new(),
            lease: job.adapter,
            deadline: job.deadline,
            sink,
        }
    }

    pub(crate) fn adapter(&self) -> Option<&Arc<Adapter>> {
        self.lease.as_ref().map(|lease| &lease.adapter)
    }

    fn answered(&self) -> u32 {
        (self.tokens.len() - self.prompt) as u32
    }

    pub(crate) fn usage(&self) -> Usage {
        let (prompt_tokens, completion_tokens) = (self.prompt as u32, self.answered());
        Usage { prompt_tokens, cached_tokens: 0, completion_tokens }
    }

    /// Chooses the next token, tells the reader, and says whether the sequence goes on.
    pub(crate) fn advance(&mut self, logits: &[f32], eos: &[u32], context: usize) -> Progress {
        let position = self.answered();
        let params = self.sampler.params();
        let is_stop =
            |id: &u32| params.stop_token_ids.contains(id) || (!params.ignore_eos && eos.contains(id));
        let banned: Vec<u32> = if position < params.min_tokens {
            eos.iter().chain(&params.stop_token_ids).copied().filter(is_stop).collect()
        } else {
            Vec::new()
        };
        let max_tokens = params.max_tokens;
        let stops: Vec<u32> = eos.iter().chain(&params.stop_token_ids).copied().filter(is_stop).collect();
        let Some(choice) = self.sampler.choose(logits, position, &banned) else {
            return Progress::Failed("the model gave no finite logits".into());
        };
        let stop = stops.contains(&choice.id);
        self.tokens.push(choice.id);
        let token = SampledToken { id: choice.id, logprob: choice.logprob, top: choice.top, stop };
        if !self.sink.send(Event::Token(token)) {
            return Progress::Cancelled;
        }
        if stop {
            Progress::Finished(FinishReason::EndOfSequence)
        } else if self.answered() >= max_tokens || self.tokens.len() >= context {
            Progress::Finished(FinishReason::Length)
        } else {
            Progress::Goes
        }
    }
}

/// How a sequence stands after a step.
pub(crate) enum Progress {
    Goes,
    Finished(FinishReason),
    Cancelled,
    Failed(String),
}
