//! The engine's handle: checks and queues requests, and starts the model thread.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use model::{BLOCK_LEN, BaseModel, BatchInput, KvPool, Logits, ModelError, Precision, Runtime};
use peft::AdapterBatch;

use crate::blocks::BlockPool;
use crate::guest::{Guest, Host};
use crate::post::{Outbox, Post};
use crate::request::{Engine, EngineStats, Generate, Limits, SubmitError, TokenSink, TokenStream, channel};
use crate::runner::Runner;
use crate::sampler::Scratch;
use crate::scheduler::{Scheduler, Step};

/// The engine's sizes.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Sequences in one batch.
    pub batch: usize,
    /// Sequences that may wait.
    pub queue: usize,
    /// Tokens in one step, prompts cut into chunks to fit.
    pub step_tokens: usize,
    /// Bytes of the KV pool.
    pub kv_bytes: usize,
    /// Whether a sequence takes over the keys and values of an earlier one that begins alike.
    pub prefix_cache: bool,
    /// Threads of the model's arithmetic.
    pub threads: usize,
    /// Share of the threads' time, from 0 to 0.9, that a [`Guest`] gets while requests run.
    pub guest_floor: f64,
    /// Whether quantised weights meet activations in 8 bits and KV is bfloat16, or all is float32.
    pub precision: Precision,
    /// Tokens that end a sequence.
    pub eos: Vec<u32>,
}

/// What handle and thread share.
pub(crate) struct Shared {
    /// Sequences that wait: handed in, or in the scheduler's queue as of the last step. One counter, so that a place can be
    /// looked for and taken in one go.
    waiting: AtomicUsize,
    stats: Mutex<EngineStats>,
    /// Why the thread has stopped, if it has.
    stopped: OnceLock<String>,
}

impl Shared {
    /// The numbers as of now.
    pub(crate) fn snapshot(&self) -> EngineStats {
        let mut stats = *self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.waiting = self.waiting.load(Ordering::Acquire);
        stats
    }

    /// Why the thread has stopped, if it has.
    pub(crate) fn stopped(&self) -> Option<String> {
        self.stopped.get().cloned()
    }

    /// Says that the thread has stopped, and why: nothing runs or waits any more.
    pub(crate) fn stop(&self, reason: String) {
        self.count(|stats| (stats.running, stats.kv_blocks_used, stats.adapters_running) = (0, 0, 0));
        // It stops once only.
        let _first = self.stopped.set(reason);
    }

    /// Takes a place among the `most` sequences that may wait.
    fn enter(&self, most: usize) -> Result<(), SubmitError> {
        let next = |waiting: usize| (waiting < most).then_some(waiting + 1);
        let entered = self.waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        entered.map(|_| ()).map_err(|waiting| SubmitError::Busy { waiting })
    }

    /// Of the sequences that have taken a place, `before` are now `after`.
    pub(crate) fn moved(&self, before: usize, after: usize) {
        if after >= before {
            self.waiting.fetch_add(after - before, Ordering::AcqRel);
        } else {
            self.waiting.fetch_sub(before - after, Ordering::AcqRel);
        }
    }

    pub(crate) fn count(&self, change: impl FnOnce(&mut EngineStats)) {
        change(&mut self.stats.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// The real engine: a handle to the model thread. The thread ends when the last handle is dropped and its
/// sequences have ended.
#[derive(Clone)]
pub struct ModelEngine {
    inbox: SyncSender<(Generate, TokenSink)>,
    shared: Arc<Shared>,
    limits: Limits,
    guest: Guest,
    post: Arc<Post>,
}

impl ModelEngine {
    /// Reserves the KV pool and starts the thread.
    ///
    /// # Errors
    /// When the KV budget does not hold one block, or the threads cannot be started.
    pub fn start(model: Arc<BaseModel>, settings: Settings) -> Result<Self, ModelError> {
        let (engine, runner) = Self::assemble(model, settings)?;
        std::thread::Builder::new().name("model".into()).spawn(move || runner.run()).map_err(no_thread)?;
        Ok(engine)
    }

    /// The handle, and what the thread is to run.
    pub(crate) fn assemble(model: Arc<BaseModel>, settings: Settings) -> Result<(Self, Runner), ModelError> {
        let config = model.config();
        let blocks = settings.kv_bytes / KvPool::block_bytes(config, settings.precision);
        if blocks == 0 {
            let problem =
                format!("a KV budget of {} bytes holds no block of {BLOCK_LEN} tokens", settings.kv_bytes);
            return Err(ModelError::Batch(problem));
        }
        let limits = Limits {
            context: config.context.min(blocks * BLOCK_LEN),
            vocabulary: config.vocab,
            queue: settings.queue,
            batch: settings.batch,
        };
        let (inbox, arrivals) = sync_channel(settings.queue.max(1));
        let stats = EngineStats { kv_blocks: blocks, ..EngineStats::default() };
        let (waiting, stopped) = (AtomicUsize::new(0), OnceLock::new());
        let shared = Arc::new(Shared { waiting, stats: Mutex::new(stats), stopped });
        let (guest, post) = (Guest::default(), Arc::<Post>::default());
        let parity = model.attention_parity(settings.precision);
        let runner = Runner {
            guest: guest.clone(),
            host: Host::new(settings.threads, settings.guest_floor),
            kv: KvPool::new(config, blocks, settings.precision)?,
            runtime: Runtime::new(settings.threads, settings.precision).map_err(no_thread)?,
            input: BatchInput::with_capacity(settings.batch, settings.step_tokens, blocks),
            adapters: AdapterBatch::default(),
            logits: Logits::default(),
            step: Step::default(),
            arranged: Vec::new(),
            blocks: BlockPool::new(blocks as u32, settings.prefix_cache),
            scheduler: Scheduler::new(settings.batch, settings.step_tokens, BLOCK_LEN, parity),
            eos: settings.eos,
            context: limits.context,
            inbox: arrivals,
            taken_in: 0,
            shared: Arc::clone(&shared),
            sequences: HashMap::new(),
            next_id: 0,
            scratch: Scratch::default(),
            outbox: Outbox::new(Arc::clone(&post)),
            #[cfg(test)]
            faults: Vec::new(),
            model,
        };
        Ok((Self { inbox, shared, limits, guest, post }, runner))
    }

    /// Who is to say when work of low priority runs beside this engine.
    #[must_use]
    pub fn guest(&self) -> Guest {
        self.guest.clone()
    }

    /// Carries events from the model thread to their readers, all of a step's at once; ends with the thread. Spawned on
    /// the runtime of the readers, it spares them and the model thread a change of context for each token; without it
    /// the model thread hands out each event itself.
    pub fn carry(&self) -> impl Future<Output = ()> + Send + 'static {
        Arc::clone(&self.post).carry()
    }

    fn check(&self, job: &Generate) -> Result<(), SubmitError> {
        let Limits { context, vocabulary, .. } = self.limits;
        if job.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        let (prompt, max_tokens) = (job.prompt.len(), job.params.max_tokens);
        let context = context.saturating_sub(job.virtual_tokens());
        let whole = prompt.checked_add(max_tokens as usize);
        if whole.is_none_or(|whole| whole > context) {
            return Err(SubmitError::TooLong { prompt, max_tokens, context });
        }
        if let Some(&id) = job.prompt.iter().find(|id| **id as usize >= vocabulary) {
            return Err(SubmitError::TokenOutOfRange { id, vocabulary });
        }
        Ok(())
    }
}

fn no_thread(error: std::io::Error) -> ModelError {
    ModelError::Batch(format!("the model thread cannot start: {error}"))
}

impl Engine for ModelEngine {
    fn submit(&self, job: Generate) -> Result<TokenStream, SubmitError> {
        self.check(&job)?;
        self.shared.enter(self.limits.queue)?;
        let (sink, stream) = channel(job.params.max_tokens);
        let refused = match self.inbox.try_send((job, sink)) {
            Ok(()) => return Ok(stream),
            Err(TrySendError::Full(_)) => SubmitError::Busy { waiting: self.limits.queue },
            Err(TrySendError::Disconnected(_)) => SubmitError::Stopped,
        };
        self.shared.moved(1, 0);
        Err(refused)
    }

    fn stats(&self) -> EngineStats {
        self.shared.snapshot()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn stopped(&self) -> Option<String> {
        self.shared.stopped()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    /// An engine without a thread: `waiting` sequences have been taken in, and nobody takes in more.
    fn still(
        queue: usize,
        waiting: usize,
    ) -> (ModelEngine, std::sync::mpsc::Receiver<(Generate, TokenSink)>) {
        let (inbox, arrivals) = sync_channel(queue);
        let (stats, stopped) = (Mutex::default(), OnceLock::new());
        let shared = Arc::new(Shared { waiting: AtomicUsize::new(waiting), stats, stopped });
        let limits = Limits { context: 64, vocabulary: 320, queue, batch: 4 };
        (ModelEngine { inbox, shared, limits, guest: Guest::default(), post: Arc::default() }, arrivals)
    }

    fn job() -> Generate {
        let params = types::SamplingParams { max_tokens: 8, ..Default::default() };
        let tenant = "t".parse().expect("an id");
        Generate { prompt: vec![1], tenant, adapter: None, params, deadline: None, group: None }
    }

    #[test]
    fn as_many_may_wait_as_the_queue_is_long_however_many_come_at_once() {
        const CROWD: usize = 32;
        for waiting in 0..40 {
            let queue = 40;
            let (engine, arrivals) = still(queue, waiting);
            let start = Barrier::new(CROWD);
            let come = || {
                start.wait();
                (0..4).filter(|_| matches!(engine.submit(job()), Ok(_stream))).count()
            };
            let taken: usize = std::thread::scope(|scope| {
                let crowd: Vec<_> = (0..CROWD).map(|_| scope.spawn(come)).collect();
                crowd.into_iter().map(|one| one.join().expect("no panic")).sum()
            });
            assert_eq!((taken, arrivals.try_iter().count()), (queue - waiting, queue - waiting));
            assert_eq!(engine.stats().waiting, queue);
            let refused = engine.submit(job()).map(|_stream| ()).expect_err("the queue is full");
            assert_eq!(refused, SubmitError::Busy { waiting: queue });
        }
    }

    #[test]
    fn nobody_gets_a_place_between_anothers_look_and_step() {
        let (engine, _arrivals) = still(1, 0);
        let (start, inside) = (Barrier::new(4), AtomicUsize::new(0));
        let come_and_go = || {
            start.wait();
            for _ in 0..1_000_000 {
                if engine.shared.enter(1).is_ok() {
                    assert_eq!(inside.fetch_add(1, Ordering::AcqRel), 0, "two have the one place");
                    inside.fetch_sub(1, Ordering::AcqRel);
                    engine.shared.moved(1, 0);
                }
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(come_and_go))));
        assert_eq!(engine.stats().waiting, 0);
    }

    #[test]
    fn who_is_refused_by_a_stopped_engine_leaves_no_place_taken() {
        let (engine, arrivals) = still(2, 0);
        drop(arrivals);
        for _ in 0..5 {
            assert!(matches!(engine.submit(job()), Err(SubmitError::Stopped)));
        }
        assert_eq!(engine.stats().waiting, 0);
    }
}
