//! One sequence inside the model thread.

use std::sync::Arc;
use std::time::Instant;

use peft::{Adapter, Lease};
use types::{FinishReason, SamplingParams, Usage};

use crate::blocks::{BlockPool, BlockTable, Reused, Scope};
use crate::post::Outbox;
use crate::request::{Event, Generate, SampledToken, TokenSink};
use crate::sampler::{Sampler, Scratch};

/// A request with its state: tokens, blocks, sampler and the way back to its reader.
pub(crate) struct Sequence {
    /// The adapter's virtual tokens, prompt and answer.
    pub(crate) tokens: Vec<u32>,
    virtual_tokens: usize,
    /// Tokens before the answer, virtual ones among them.
    prompt: usize,
    /// Tokens whose keys and values are stored.
    pub(crate) computed: usize,
    /// Tokens of the prompt whose keys and values were there at the first admission, once there was one.
    cached: Option<usize>,
    pub(crate) blocks: BlockTable,
    scope: Arc<Scope>,
    lease: Option<Lease>,
    sampler: Sampler,
    /// Tokens that would end the answer before it has its least length.
    banned: Vec<u32>,
    pub(crate) deadline: Option<Instant>,
    /// The mark of the sequences that share its prompt, where blocks are shared.
    pub(crate) group: Option<u64>,
    pub(crate) sink: TokenSink,
}

impl Sequence {
    /// A sequence over a vocabulary of this size: ids from there on are its adapter's virtual tokens. It has a group only
    /// where blocks are `shared`.
    pub(crate) fn new(job: Generate, vocabulary: usize, eos: &[u32], shared: bool, sink: TokenSink) -> Self {
        let scope = Arc::new(job.scope());
        let virtual_tokens = job.virtual_tokens();
        let (prompt, answer) = (virtual_tokens + job.prompt.len(), job.params.max_tokens as usize);
        let banned = banned(&job.params, eos);
        let sampler = Sampler::new(job.params, &job.prompt);
        // All it can grow to, so that no step has to allocate.
        let mut tokens = Vec::with_capacity(prompt + answer);
        tokens.extend((vocabulary..vocabulary + virtual_tokens).map(|id| id as u32));
        tokens.extend(job.prompt);
        Self {
            scope,
            virtual_tokens,
            prompt,
            sampler,
            banned,
            tokens,
            computed: 0,
            cached: None,
            blocks: BlockTable::default(),
            lease: job.adapter,
            deadline: job.deadline,
            group: job.group.filter(|_| shared),
            sink,
        }
    }

    pub(crate) fn adapter(&self) -> Option<&Arc<Adapter>> {
        self.lease.as_ref().map(|lease| &lease.adapter)
    }

    /// Tokens before the answer, virtual ones among them.
    pub(crate) fn prompt(&self) -> usize {
        self.prompt
    }

    fn answered(&self) -> u32 {
        (self.tokens.len() - self.prompt) as u32
    }

    pub(crate) fn usage(&self) -> Usage {
        let prompt_tokens = (self.prompt - self.virtual_tokens) as u32;
        let completion_tokens = self.answered();
        Usage { prompt_tokens, cached_tokens: self.cached.unwrap_or(0) as u32, completion_tokens }
    }

    /// Takes the blocks that hold the beginning of its tokens already, if the rest has room; see [`BlockPool::reuse`].
    pub(crate) fn reuse(&mut self, pool: &mut BlockPool) -> Option<Reused> {
        let reused = pool.reuse(&mut self.blocks, &self.scope, &self.tokens)?;
        self.computed = reused.tokens;
        self.blocks.reserve(self.tokens.capacity());
        Some(reused)
    }

    /// Notes an admission: the tokens of the prompt that were there already, the first time.
    pub(crate) fn admitted(&mut self) -> Option<usize> {
        if self.cached.is_some() {
            return None;
        }
        let cached = self.computed.saturating_sub(self.virtual_tokens);
        self.cached = Some(cached);
        self.sink.set_cached_tokens(cached as u32);
        self.cached
    }

    /// Gives all blocks back, to start again.
    pub(crate) fn release(&mut self, pool: &mut BlockPool) {
        pool.release(&mut self.blocks);
        self.computed = 0;
    }

    /// Leaves its blocks to a pool that is given up with all of them, to start again.
    pub(crate) fn forget_blocks(&mut self) {
        self.blocks = BlockTable::default();
        self.computed = 0;
    }

    /// Records that `tokens` more are computed; returns how many of them are virtual, and how many the prompt's.
    pub(crate) fn compute(&mut self, tokens: usize) -> (usize, usize) {
        let before = self.computed;
        self.computed += tokens;
        let between = |from: usize, to: usize| self.computed.clamp(from, to) - before.clamp(from, to);
        (between(0, self.virtual_tokens), between(self.virtual_tokens, self.prompt))
    }

    /// Lets others share what is computed.
    pub(crate) fn publish(&mut self, pool: &mut BlockPool) {
        pool.publish(&mut self.blocks, &self.scope, &self.tokens[..self.computed]);
    }

    /// Chooses the next token, leaves it for the reader, and says whether the sequence goes on.
    pub(crate) fn advance(
        &mut self,
        (logits, largest): (&[f32], Option<(u32, f32)>),
        eos: &[u32],
        context: usize,
        scratch: &mut Scratch,
        outbox: &mut Outbox,
    ) -> Progress {
        let position = self.answered();
        let SamplingParams { min_tokens, max_tokens, .. } = *self.sampler.params();
        let banned = if position < min_tokens { &self.banned[..] } else { &[] };
        let Some(choice) = self.sampler.choose(logits, largest, position, banned, scratch) else {
            return Progress::Failed("the model gave no finite logits".into());
        };
        let params = self.sampler.params();
        let stop = is_stop(params, eos, choice.id);
        self.tokens.push(choice.id);
        let token = SampledToken { id: choice.id, logprob: choice.logprob, top: choice.top, stop };
        if self.sink.is_cancelled() {
            return Progress::Cancelled;
        }
        outbox.push(self.sink.letter(Event::Token(token)));
        if stop {
            Progress::Finished(FinishReason::EndOfSequence)
        } else if self.answered() >= max_tokens || self.tokens.len() >= context {
            Progress::Finished(FinishReason::Length)
        } else {
            Progress::Goes
        }
    }
}

/// The tokens that end an answer, if it has a least length.
fn banned(params: &SamplingParams, eos: &[u32]) -> Vec<u32> {
    let ends = eos.iter().chain(&params.stop_token_ids).copied();
    ends.filter(|id| params.min_tokens > 0 && is_stop(params, eos, *id)).collect()
}

/// Whether a token ends the answer.
fn is_stop(params: &SamplingParams, eos: &[u32], id: u32) -> bool {
    params.stop_token_ids.contains(&id) || (!params.ignore_eos && eos.contains(&id))
}

/// How a sequence stands after a step.
pub(crate) enum Progress {
    Goes,
    Finished(FinishReason),
    Cancelled,
    Failed(String),
}
