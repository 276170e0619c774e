//! What goes into the engine and what comes out of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use peft::Lease;
use tokio::sync::mpsc;
use types::{FinishReason, SamplingParams, TenantId, Usage};

use crate::blocks::Scope;

/// One sequence to generate.
#[derive(Debug, Clone)]
pub struct Generate {
    /// The prompt, at least one token.
    pub prompt: Vec<u32>,
    /// Whose request: keys and values are never shared with another tenant.
    pub tenant: TenantId,
    /// The adapter that answers; `None` is the base alone. It is pinned until the sequence ends.
    pub adapter: Option<Lease>,
    /// How tokens are chosen.
    pub params: SamplingParams,
    /// When the request is given up, queued or running.
    pub deadline: Option<Instant>,
    /// A mark of their own for sequences that are to share one prompt: the first computes it, the others wait for that
    /// and go on from there. Marks say who waits for whom, never whose keys and values are read.
    pub group: Option<u64>,
}

impl Generate {
    /// Tokens that its adapter puts before the prompt; they take context and KV, and are nobody's usage.
    #[must_use]
    pub fn virtual_tokens(&self) -> usize {
        self.adapter.as_ref().map_or(0, |lease| lease.adapter.virtual_tokens())
    }

    pub(crate) fn scope(&self) -> Scope {
        let adapter = self.adapter.as_ref().map(|lease| (lease.id.clone(), lease.generation));
        Scope { tenant: self.tenant.clone(), adapter }
    }
}

/// A token the engine chose.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// Its id.
    pub id: u32,
    /// Natural log of its probability under the model, before temperature and penalties; 0 unless
    /// [`SamplingParams::logprobs`] asks for it.
    pub logprob: f32,
    /// The most likely tokens with their log-probabilities, best first, as many as asked for.
    pub top: Vec<(u32, f32)>,
    /// Whether it is an end-of-sequence or stop token, which is not part of the text.
    pub stop: bool,
}

/// What a sequence's stream carries: tokens, then exactly one end.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The next token.
    Token(SampledToken),
    /// The answer is complete.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// What it cost.
        usage: Usage,
    },
    /// The sequence was given up; the text says why, for logs (the request's deadline, or a fault).
    Failed {
        /// True when the request's deadline passed.
        deadline: bool,
        /// Why.
        reason: String,
    },
}

/// Why a sequence is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The queue is full; try again later.
    #[error("the queue is full: {waiting} sequences wait")]
    Busy {
        /// How many wait.
        waiting: usize,
    },
    /// The prompt has no token.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// Prompt and answer do not fit the context.
    #[error(
        "prompt of {prompt} tokens plus max_tokens of {max_tokens} exceed the context of {context} tokens"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: u32,
        /// Tokens a sequence may have, without its adapter's virtual tokens.
        context: usize,
    },
    /// A token id is not in the vocabulary.
    #[error("token id {id} is not in the vocabulary of {vocabulary} tokens")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// The engine has stopped.
    #[error("the engine has stopped")]
    Stopped,
}

/// What the engine can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens a sequence may have, prompt and answer together.
    pub context: usize,
    /// Size of the vocabulary.
    pub vocabulary: usize,
    /// Sequences that may wait.
    pub queue: usize,
    /// Sequences that run in one batch.
    pub batch: usize,
}

/// A picture of the engine at one moment, and its counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineStats {
    /// Sequences that wait.
    pub waiting: usize,
    /// Sequences in the batch.
    pub running: usize,
    /// KV blocks that sequences hold.
    pub kv_blocks_used: usize,
    /// KV blocks that no sequence holds, kept for those to come; they make room when it is needed.
    pub kv_blocks_idle: usize,
    /// KV blocks in all.
    pub kv_blocks: usize,
    /// Steps done.
    pub steps: u64,
    /// Prompt tokens processed.
    pub prompt_tokens: u64,
    /// Sequences whose prompt began with blocks that were there already.
    pub prefix_hits: u64,
    /// Prompt tokens that were there already.
    pub prefix_tokens: u64,
    /// Blocks kept for sequences to come that had to make room.
    pub prefix_evictions: u64,
    /// Virtual tokens of adapters computed.
    pub virtual_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Sequences preempted for want of KV blocks.
    pub preemptions: u64,
    /// Sequences that ended because their reader went away.
    pub cancelled: u64,
    /// Sequences that ended by a fault.
    pub failed: u64,
    /// Different adapters in the last step.
    pub adapters_running: usize,
}

/// Where requests are sent. The server knows this trait only; the real engine and the tests' fake one
/// implement it.
pub trait Engine: Send + Sync + 'static {
    /// Queues a sequence.
    ///
    /// # Errors
    /// At once and without side effects, when the sequence cannot be taken.
    fn submit(&self, job: Generate) -> Result<TokenStream, SubmitError>;

    /// The state of queue, batch and KV.
    fn stats(&self) -> EngineStats;

    /// What a sequence may ask for.
    fn limits(&self) -> Limits;

    /// Why the engine has stopped, for logs, if a fault has ended it: it answers nobody any more.
    fn stopped(&self) -> Option<String>;
}

/// The reader's end of a sequence. Dropping it cancels the sequence within one step.
#[derive(Debug)]
pub struct TokenStream {
    events: mpsc::Receiver<Event>,
    state: Arc<State>,
}

/// What both ends of a sequence know besides its events.
#[derive(Debug, Default)]
struct State {
    cancelled: AtomicBool,
    cached_tokens: AtomicU32,
}

impl TokenStream {
    /// The next event; `None` after the end, and when a fault has cost the engine the sequence.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Tokens of the prompt whose keys and values were there already, as far as is known: it is with the first token.
    #[must_use]
    pub fn cached_tokens(&self) -> u32 {
        self.state.cached_tokens.load(Ordering::Acquire)
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        self.state.cancelled.store(true, Ordering::Release);
    }
}

/// The engine's end of a sequence.
#[derive(Debug)]
pub struct TokenSink {
    events: mpsc::Sender<Event>,
    state: Arc<State>,
}

impl TokenSink {
    /// Hands an event to the reader without waiting; false when the reader has gone away.
    #[must_use]
    pub fn send(&self, event: Event) -> bool {
        self.events.try_send(event).is_ok()
    }

    /// An event with the way to the reader.
    pub(crate) fn letter(&self, event: Event) -> Letter {
        Letter { to: self.events.clone(), event }
    }

    /// Whether the reader has gone away.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.state.cancelled.load(Ordering::Acquire)
    }

    /// Tells the reader how many tokens of the prompt were there already.
    pub fn set_cached_tokens(&self, tokens: u32) {
        self.state.cached_tokens.store(tokens, Ordering::Release);
    }
}

/// An event with the way to its reader.
pub(crate) struct Letter {
    to: mpsc::Sender<Event>,
    event: Event,
}

impl Letter {
    /// Hands the event over, if the reader is still there. The channel has room for all events of its sequence.
    pub(crate) fn deliver(self) {
        let _gone = self.to.try_send(self.event);
    }
}

/// Both ends of a sequence of at most `max_tokens` tokens. The channel holds them all, so that a slow reader
/// never holds up the batch.
#[must_use]
pub fn channel(max_tokens: u32) -> (TokenSink, TokenStream) {
    let (sender, events) = mpsc::channel(max_tokens as usize + 2);
    let state = Arc::new(State::default());
    (TokenSink { events: sender, state: Arc::clone(&state) }, TokenStream { events, state })
}
