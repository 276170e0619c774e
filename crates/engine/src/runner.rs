//! The loop of the model thread: plan, run, sample, report.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use model::{BaseModel, BatchInput, KvPool, Logits, Runtime};
use peft::AdapterBatch;

use crate::arrange::arrange;
use crate::blocks::BlockPool;
#[cfg(test)]
use crate::faults::{Fault, strike};
use crate::guest::{Guest, Host, Rows};
use crate::post::Outbox;
use crate::recovery::caught;
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
    /// Of the sequences that [`Shared`] has waiting, those taken in: they were in the queue when it was last looked at.
    pub(crate) taken_in: usize,
    pub(crate) shared: Arc<Shared>,
    pub(crate) sequences: HashMap<u64, Sequence>,
    pub(crate) next_id: u64,
    pub(crate) scratch: Scratch,
    pub(crate) outbox: Outbox,
    pub(crate) guest: Guest,
    pub(crate) host: Host,
    #[cfg(test)]
    pub(crate) faults: Vec<Fault>,
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
    /// Runs until the inbox is closed and the last sequence has ended, or a fault leaves nothing to go on with.
    pub(crate) fn run(mut self) {
        loop {
            match caught(|| self.turn()) {
                Ok(true) => {}
                Ok(false) => return,
                Err(reason) => {
                    if !matches!(caught(|| self.recover(&reason)), Ok(true)) {
                        return self.give_up(reason);
                    }
                }
            }
        }
    }

    /// Takes in who has come, and runs a step. False when all is done.
    fn turn(&mut self) -> bool {
        if !self.receive() {
            return false;
        }
        self.sweep(Instant::now());
        let pause = if self.sequences.is_empty() { None } else { self.step() };
        self.publish_stats();
        if let Some(pause) = pause {
            self.pause(pause);
        }
        true
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
        self.taken_in += 1;
        let (vocabulary, sharing) = (self.model.config().vocab, self.blocks.is_sharing());
        let sequence = caught(|| {
            #[cfg(test)]
            strike(&self.faults, Fault::Taking(id));
            Sequence::new(job, vocabulary, &self.eos, sharing, sink)
        });
        match sequence {
            Ok(sequence) => {
                self.scheduler.push(id, sequence.prompt(), sequence.group);
                self.sequences.insert(id, sequence);
            }
            Err(reason) => {
                // Its sink is gone, so its reader finds an end.
                tracing::error!(sequence = id, %reason, "sequence could not be taken in");
                self.shared.count(|stats| stats.failed += 1);
            }
        }
    }

    /// Ends sequences whose reader has gone or whose deadline has passed by `now`, queued or running.
    fn sweep(&mut self, now: Instant) {
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
        self.outbox.send();
    }

    /// One step; the pause after it, if a guest is there and it is due.
    fn step(&mut self) -> Option<Duration> {
        let mut step = std::mem::take(&mut self.step);
        let mut held = Held { pool: &mut self.blocks, kv: &mut self.kv, sequences: &mut self.sequences };
        self.scheduler.plan(&mut held, &mut step);
        #[cfg(test)]
        for work in &step.work {
            strike(&self.faults, Fault::Planning(work.id));
        }
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
        self.outbox.send();
        let seconds = begun.elapsed().as_secs_f64();
        self.host.measured(rows, threads, seconds);
        if threads == self.runtime.threads() {
            self.scheduler.measured(&step, seconds);
        }
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
            Ok(()) => {
                self.settle(&step.work);
            }
            // One of the sequences is at fault: run each alone, so that only that one ends.
            Err(_) if step.work.len() > 1 => {
                // Until one leaves no blocks to go on with.
                let _all = step.work.iter().all(|work| self.alone(work));
            }
            Err(reason) => self.fail(step.work[0].id, reason),
        }
    }

    /// As [`Self::settle`], of one sequence's work after a pass of its own.
    fn alone(&mut self, work: &Work) -> bool {
        match self.forward(std::slice::from_ref(work)) {
            Ok(()) => self.settle(std::slice::from_ref(work)),
            Err(reason) => {
                self.fail(work.id, reason);
                true
            }
        }
    }

    /// One forward pass over the work's rows; leaves the logits of those that sample, in order.
    fn forward(&mut self, work: &[Work]) -> Result<(), String> {
        let Self { model, runtime, input, kv, adapters, logits, sequences, .. } = self;
        let result = caught(|| {
            input.clear();
            adapters.clear();
            for work in work {
                let sequence = sequences.get(&work.id).ok_or("the sequence is gone")?;
                let tokens = &sequence.tokens[sequence.computed..sequence.computed + work.tokens];
                input.push(tokens, sequence.computed, sequence.blocks.blocks(), work.sample);
                adapters.push(sequence.adapter(), work.tokens);
            }
            model.forward(runtime, input, kv, adapters, logits).map_err(|error| error.to_string())
        });
        self.shared.count(|stats| {
            stats.steps += 1;
            stats.adapters_running = self.adapters.adapters();
        });
        // An idle engine must not keep an adapter whose sequence has ended.
        self.adapters.clear();
        result.unwrap_or_else(|reason| Err(format!("the forward pass panicked: {reason}")))
    }

    /// Records a pass's work, samples and tells the readers. False when the blocks had to be given up, so that nothing of
    /// the step can be gone on with.
    fn settle(&mut self, work: &[Work]) -> bool {
        let all = std::mem::take(&mut self.logits);
        let mut rows = all.rows().enumerate().map(|(at, logits)| (logits, all.largest(at)));
        let (mut own, mut prompt, mut generated) = (0, 0, 0);
        let mut kept = true;
        for work in work {
            let row = if work.sample { rows.next() } else { None };
            let Some(sequence) = self.sequences.get_mut(&work.id) else { continue };
            let computed = sequence.compute(work.tokens);
            own += computed.0 as u64;
            prompt += computed.1 as u64;
            generated += u64::from(row.is_some());
            let progress = match row {
                None => Progress::Goes,
                Some(row) => caught(|| {
                    #[cfg(test)]
                    if sequence.usage().completion_tokens >= 2 {
                        strike(&self.faults, Fault::Sampling(work.id));
                    }
                    sequence.advance(row, &self.eos, self.context, &mut self.scratch, &mut self.outbox)
                })
                .unwrap_or_else(|panic| Progress::Failed(format!("the choice of a token panicked: {panic}"))),
            };
            if !matches!(progress, Progress::Failed(_)) {
                let published = caught(|| {
                    sequence.publish(&mut self.blocks);
                    #[cfg(test)]
                    strike(&self.faults, Fault::Publishing(work.id));
                });
                if let Err(panic) = published {
                    self.start_over();
                    self.fail(work.id, format!("the publishing of its blocks panicked: {panic}"));
                    kept = false;
                    break;
                }
            }
            let usage = sequence.usage();
            match progress {
                Progress::Goes => self.scheduler.settle(work, row.is_some()),
                Progress::Finished(reason) => {
                    self.end(work.id, End::Event(Event::Finished { reason, usage }))
                }
                Progress::Cancelled => self.end(work.id, End::Cancelled),
                Progress::Failed(reason) => self.fail(work.id, reason),
            }
        }
        drop(rows);
        self.logits = all;
        self.shared.count(|stats| {
            stats.virtual_tokens += own;
            stats.prompt_tokens += prompt;
            stats.generated_tokens += generated;
        });
        kept
    }

    pub(crate) fn fail(&mut self, id: u64, reason: String) {
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
            self.outbox.push(sequence.sink.letter(event));
        }
        sequence.release(&mut self.blocks);
    }

    pub(crate) fn publish_stats(&mut self) {
        let (waiting, running) = (self.scheduler.waiting(), self.scheduler.running());
        self.shared.moved(std::mem::replace(&mut self.taken_in, waiting), waiting);
        let pool = &self.blocks;
        self.shared.count(|stats| {
            stats.running = running;
            stats.kv_blocks = pool.blocks();
            stats.kv_blocks_used = pool.blocks() - pool.available();
            stats.kv_blocks_idle = pool.idle();
            stats.prefix_evictions = pool.evictions();
        });
    }
}

#[cfg(test)]
#[path = "runner_tests.rs"]
mod tests;
