//! The loop of the model thread: plan, run, sample, report.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use model::{BaseModel, BatchInput, KvPool, Logits, Runtime};
use peft::AdapterBatch;

use crate::arrange::arrange;
use crate::blocks::BlockPool;
use crate::guest::{Guest, Host, Rows};
use crate::request::{Event, Generate, TokenSink};
use crate::sampler::Scratch;
use crate::scheduler::{Blocks, Scheduler, Step, Work};
use crate::sequence::{Progress, Sequence};
use crate::thread::Shared;

/// Everything the thread owns.
pub(crate) struct Runner {
    pub(crate) model: Arc<BaseModel>,
    pub(crate) kv: KvPool,
    pub(crate) runtime: Runtime,
    /// What one step leaves to the next: its buffers.
    pub(crate) input: BatchInput,
    pub(crate) adapters: AdapterBatch,
    pub(crate) logits: Logits,
    pub(crate) step: Step,
    /// For [`arrange`].
    pub(crate) arranged: Vec<(usize, Work)>,
    pub(crate) blocks: BlockPool,
    pub(crate) scheduler: Scheduler,
    pub(crate) eos: Vec<u32>,
    pub(crate) context: usize,
    pub(crate) inbox: Receiver<(Generate, TokenSink)>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) sequences: HashMap<u64, Sequence>,
    pub(crate) next_id: u64,
    pub(crate) scratch: Scratch,
    pub(crate) guest: Guest,
    pub(crate) host: Host,
}

/// The sequences' blocks, as the scheduler moves them.
struct Held<'a> {
    pool: &'a mut BlockPool,
    kv: &'a mut KvPool,
    sequences: &'a mut HashMap<u64, Sequence>,
}

impl Blocks for Held<'_> {
    fn available(&self) -> usize {
        self.pool.available()
    }

    fn reuse(&mut self, id: u64) -> Option<usize> {
        let reused = self.sequences.get_mut(&id)?.reuse(self.pool)?;
        if let Some(copy) = reused.copy {
            self.kv.copy(copy.from, copy.to);
        }
        Some(reused.tokens)
    }

    fn grow(&mut self, id: u64, count: usize) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            self.pool.grow(&mut sequence.blocks, count);
        }
    }

    fn release(&mut self, id: u64) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.release(self.pool);
        }
    }
}

/// How a sequence leaves the thread.
enum End {
    Event(Event),
    Cancelled,
}

impl Runner {
    /// Runs until the inbox is closed and the last sequence has ended.
    pub(crate) fn run(mut self) {
        while self.receive() {
            self.sweep();
            let pause = if self.sequences.is_empty() { None } else { self.step() };
            self.publish_stats();
            if let Some(pause) = pause {
                self.pause(pause);
            }
        }
    }

    /// Takes in what has arrived; waits when there is nothing to do. False when all is done.
    fn receive(&mut self) -> bool {
        if self.sequences.is_empty() {
            let begun = Instant::now();
            let mut arrival = self.inbox.try_recv();
            while matches!(arrival, Err(TryRecvError::Empty)) && self.kv.take_ahead(self.blocks.untouched()) {
                arrival = self.inbox.try_recv();
            }
            match arrival.or_else(|_| self.inbox.recv()) {
                Ok(arrival) => self.add(arrival),
                Err(_) => return false,
            }
            self.host.idle(begun.elapsed().as_secs_f64());
        }
        loop {
            match self.inbox.try_recv() {
                Ok(arrival) => self.add(arrival),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return !self.sequences.is_empty(),
            }
        }
    }

    fn add(&mut self, (job, sink): (Generate, TokenSink)) {
        let id = self.next_id;
        self.next_id += 1;
        let group = job.group.filter(|_| self.blocks.is_sharing());
        let sequence = Sequence::new(job, self.model.config().vocab, sink);
        self.scheduler.push(id, sequence.prompt(), group);
        self.sequences.insert(id, sequence);
        self.shared.waiting.store(self.scheduler.waiting(), Ordering::Release);
        self.shared.handed_in.fetch_sub(1, Ordering::AcqRel);
    }

    /// Ends sequences whose reader has gone or whose deadline has passed, queued or running.
    fn sweep(&mut self) {
        let now = Instant::now();
        let mut ended = Vec::new();
        for (&id, sequence) in &self.sequences {
            if sequence.sink.is_cancelled() {
                ended.push((id, End::Cancelled));
            } else if sequence.deadline.is_some_and(|deadline| deadline <= now) {
                let reason = "the request's deadline has passed".to_owned();
                ended.push((id, End::Event(Event::Failed { deadline: true, reason })));
            }
        }
        for (id, end) in ended {
            self.end(id, end);
        }
    }

    /// One step; the pause after it, if a guest is there and it is due.
    fn step(&mut self) -> Option<Duration> {
        let mut step = std::mem::take(&mut self.step);
        let mut held = Held { pool: &mut self.blocks, kv: &mut self.kv, sequences: &mut self.sequences };
        self.scheduler.plan(&mut held, &mut step);
        arrange(&mut step.work, &mut self.arranged, |work| {
            let adapter = self.sequences.get(&work.id).and_then(Sequence::adapter);
            adapter.map_or(0, |adapter| Arc::as_ptr(adapter).addr())
        });
        let guest = self.guest.is_there();
        let rows = Rows {
            all: step.work.iter().map(|work| work.tokens).sum(),
            tokens: step.work.iter().filter(|work| work.sample).count(),
        };
        let threads = if guest { self.host.threads(rows) } else { self.runtime.threads() };
        self.runtime.keep(threads);
        let begun = Instant::now();
        self.carry_out(&step);
        let seconds = begun.elapsed().as_secs_f64();
        self.host.measured(rows, threads, seconds);
        let pause = if guest { self.host.pause(threads, seconds) } else { None };
        self.step = step;
        pause
    }

    /// Leaves all threads to the guest, until somebody arrives.
    fn pause(&mut self, pause: Duration) {
        self.runtime.keep(1);
        let begun = Instant::now();
        let arrival = self.inbox.recv_timeout(pause);
        self.host.paused(begun.elapsed().as_secs_f64());
        if let Ok(arrival) = arrival {
            self.add(arrival);
        }
    }

    fn carry_out(&mut self, step: &Step) {
        let admitted = step.admitted.iter().filter_map(|id| self.sequences.get_mut(id)?.admitted());
        let (hits, tokens) = admitted
            .filter(|tokens| *tokens > 0)
            .fold((0, 0), |(hits, sum), tokens| (hits + 1, sum + tokens as u64));
        self.shared.count(|stats| {
            stats.preemptions += step.preempted.len() as u64;
            stats.prefix_hits += hits;
            stats.prefix_tokens += tokens;
        });
        if step.work.is_empty() {
            return;
        }
        match self.forward(&step.work) {
            Ok(()) => self.settle(&step.work),
            // One of the sequences is at fault: run each alone, so that only that one ends.
            Err(_) if step.work.len() > 1 => {
                for work in &step.work {
                    self.alone(work);
                }
            }
            Err(reason) => self.fail(step.work[0].id, reason),
        }
    }

    fn alone(&mut self, work: &Work) {
        match self.forward(std::slice::from_ref(work)) {
            Ok(()) => self.settle(std::slice::from_ref(work)),
            Err(reason) => self.fail(work.id, reason),
        }
    }

    /// One forward pass over the work's rows; leaves the logits of those that sample, in order.
    fn forward(&mut self, work: &[Work]) -> Result<(), String> {
        self.input.clear();
        self.adapters.clear();
        for work in work {
            let sequence = self.sequences.get(&work.id).ok_or("the sequence is gone")?;
            let tokens = &sequence.tokens[sequence.computed..sequence.computed + work.tokens];
            self.input.push(tokens, sequence.computed, sequence.blocks.blocks(), work.sample);
            self.adapters.push(sequence.adapter(), work.tokens);
        }
        let Self { model, runtime, input, kv, adapters, logits, .. } = self;
        let result = catch_unwind(AssertUnwindSafe(|| model.forward(runtime, input, kv, adapters, logits)));
        self.shared.count(|stats| {
            stats.steps += 1;
            stats.adapters_running = self.adapters.adapters();
        });
        // An idle engine must not keep an adapter whose sequence has ended.
        self.adapters.clear();
        match result {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
                Err(format!("the forward pass panicked: {text}"))
            }
        }
    }

    fn settle(&mut self, work: &[Work]) {
        let all = std::mem::take(&mut self.logits);
        let mut logits = all.rows();
        let (mut own, mut prompt, mut generated) = (0, 0, 0);
        for work in work {
            let row = if work.sample { logits.next() } else { None };
            let Some(sequence) = self.sequences.get_mut(&work.id) else { continue };
            let computed = sequence.compute(work.tokens);
            own += computed.0 as u64;
            prompt += computed.1 as u64;
            let Some(row) = row else {
                sequence.publish(&mut self.blocks);
                self.scheduler.settle(work, false);
                continue;
            };
            generated += 1;
            let progress = sequence.advance(row, &self.eos, self.context, &mut self.scratch);
            if !matches!(progress, Progress::Failed(_)) {
                sequence.publish(&mut self.blocks);
            }
            let usage = sequence.usage();
            match progress {
                Progress::Goes => self.scheduler.settle(work, true),
                Progress::Finished(reason) => {
                    self.end(work.id, End::Event(Event::Finished { reason, usage }))
                }
                Progress::Cancelled => self.end(work.id, End::Cancelled),
                Progress::Failed(reason) => self.fail(work.id, reason),
            }
        }
        drop(logits);
        self.logits = all;
        self.shared.count(|stats| {
            stats.virtual_tokens += own;
            stats.prompt_tokens += prompt;
            stats.generated_tokens += generated;
        });
    }

    fn fail(&mut self, id: u64, reason: String) {
        tracing::error!(sequence = id, %reason, "sequence failed");
        self.end(id, End::Event(Event::Failed { deadline: false, reason }));
    }

    /// Takes a sequence out and frees what it held.
    fn end(&mut self, id: u64, end: End) {
        self.scheduler.remove(id);
        let Some(mut sequence) = self.sequences.remove(&id) else { return };
        self.shared.count(|stats| match &end {
            End::Cancelled => stats.cancelled += 1,
            End::Event(Event::Failed { .. }) => stats.failed += 1,
            End::Event(_) => {}
        });
        if let End::Event(event) = end {
            // A reader that went away just now needs no event.
            let _gone = sequence.sink.send(event);
        }
        sequence.release(&mut self.blocks);
    }

    fn publish_stats(&self) {
        let (waiting, running) = (self.scheduler.waiting(), self.scheduler.running());
        let pool = &self.blocks;
        self.shared.waiting.store(waiting, Ordering::Release);
        self.shared.count(|stats| {
            stats.running = running;
            stats.kv_blocks = pool.blocks();
            stats.kv_blocks_used = pool.blocks() - pool.available();
            stats.kv_blocks_idle = pool.idle();
            stats.prefix_evictions = pool.evictions();
        });
    }
}
