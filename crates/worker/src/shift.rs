//! The jobs that are trained at once, from claim to report, on the training thread.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use store::{Claimed, Spent, Store, StoreError};
use tokio::runtime::Handle;
use train::{Control, StepReport, TrainError};
use types::{GenerationId, HistoryItem, Job, JobOutcome, Provenance};

use crate::error::WorkerError;
use crate::heartbeat::{Claim, Halt, Pulse};
use crate::patience::Patience;
use crate::plan::Head;
use crate::run::{Announce, OnStep};
use crate::work::{Bench, Prepared, Verdict};

/// What the training thread works with.
pub(crate) struct Shift {
    pub(crate) store: Store,
    pub(crate) bench: Arc<Bench>,
    pub(crate) announce: Announce,
    /// Where calls to the store run.
    pub(crate) runtime: Handle,
    pub(crate) pulse: Arc<Pulse>,
    pub(crate) patience: Patience,
}

/// A job on its way.
struct Task {
    job: Job,
    claim: Arc<Claim>,
    started: Instant,
    /// What earlier claims have cost.
    spent: Spent,
    head: Option<GenerationId>,
    prepared: Prepared,
    /// Its checkpoint is of no use.
    anew: bool,
}

impl Task {
    /// What it comes to, with all that it has cost by now.
    fn outcome(&self, reason: String) -> JobOutcome {
        JobOutcome {
            published: false,
            generation: None,
            gate: None,
            reason,
            trained_tokens: self.spent.tokens + self.claim.progress().map_or(0, |progress| progress.tokens),
            seconds: self.spent.seconds + self.started.elapsed().as_secs_f64(),
        }
    }
}

impl Shift {
    /// Does the jobs; every one is reported, unless it is somebody else's by then.
    pub(crate) fn work(mut self, claimed: Vec<Claimed>, pool: &rayon::ThreadPool) {
        let claims = self.pulse.claims.clone();
        let mut round = Vec::new();
        for (Claimed { job, spent, .. }, claim) in claimed.into_iter().zip(claims) {
            tracing::info!(job = %job.id, adapter = %job.adapter, attempt = job.attempts, "job claimed");
            match self.begin(&job, &claim, spent, pool) {
                Ok(Some(task)) => round.push(task),
                Ok(None) => claim.end(),
                Err(error) => self.report(&job, &claim, error),
            }
            self.pulse.alive();
        }
        while !round.is_empty() {
            round = self.train(round, pool);
        }
        self.pulse.over.cancel();
    }

    /// Reads what a job needs; `None` if it is done already, for want of items.
    fn begin(
        &mut self,
        job: &Job,
        claim: &Arc<Claim>,
        spent: Spent,
        pool: &rayon::ThreadPool,
    ) -> Result<Option<Task>, WorkerError> {
        let started = Instant::now();
        let (items, head, current) = self.runtime.block_on(async {
            let items = self.store.history_of(&claim.fence).await?;
            let record = self.store.head(&job.adapter).await?;
            let current = record.as_ref().map(|record| record.id);
            // A head for another base is no measure; it is replaced.
            let record = record.filter(|record| record.base == *self.bench.base.hash());
            let Some(record) = record else { return Ok((items, Ok(None), current)) };
            let files = match self.store.fetch(&job.adapter, &record.id).await {
                Err(damage @ StoreError::Corrupt { .. }) => {
                    return Ok((items, Err(damage.to_string()), current));
                }
                files => files?,
            };
            let head = Head {
                id: record.id,
                files,
                manifest: self.store.manifest(&job.adapter, &record.id).await?,
                updates: serde_json::from_value::<Provenance>(record.meta)
                    .map_or(0, |provenance| provenance.training.updates),
                baseline: self.store.baseline(&job.adapter, &record.id).await?,
                since_full: self.store.updates_since_full(&job.adapter).await?,
            };
            Ok::<_, StoreError>((items, Ok(Some(head)), current))
        })?;
        let least = self.bench.settings.min_items;
        if items.len() < least {
            let reason = format!("not trained: {} items, at least {least} are needed", items.len());
            let outcome = JobOutcome {
                published: false,
                generation: None,
                gate: None,
                reason,
                trained_tokens: spent.tokens,
                seconds: spent.seconds + started.elapsed().as_secs_f64(),
            };
            self.runtime.block_on(self.store.finish(&claim.fence, &outcome))?;
            return Ok(None);
        }
        let prepared = self.prepare(job, items, head, pool)?;
        self.runtime.block_on(self.store.begin_lesson(&claim.fence, prepared.lesson()))?;
        Ok(Some(Task {
            job: job.clone(),
            claim: Arc::clone(claim),
            started,
            spent,
            head: current,
            prepared,
            anew: false,
        }))
    }

    /// Decides what a job learns, and reads it, on the threads of the arithmetic.
    fn prepare(
        &mut self,
        job: &Job,
        items: Vec<HistoryItem>,
        head: Result<Option<Head>, String>,
        pool: &rayon::ThreadPool,
    ) -> Result<Prepared, WorkerError> {
        let (bench, mut breath) = (&self.bench, Breath::new(&self.pulse, &mut self.patience));
        pool.install(|| bench.prepare(job, items, head, job.from_scratch, &mut || breath.take()))
    }

    /// Trains and judges all tasks; those that must learn everything after all come back, and those whose checkpoint is
    /// of no use.
    fn train(&mut self, tasks: Vec<Task>, pool: &rayon::ThreadPool) -> Vec<Task> {
        let resume = |task: &Task| {
            if task.anew {
                return None;
            }
            let saved = self.store.checkpoint(&task.claim.fence, task.prepared.work);
            self.runtime.block_on(saved).unwrap_or_else(|error| {
                tracing::warn!(job = %task.job.id, %error, "a checkpoint cannot be read: the job begins anew");
                None
            })
        };
        let resume: Vec<_> = tasks.iter().map(resume).collect();
        let results = {
            let prepared: Vec<_> = tasks.iter().map(|task| &task.prepared).collect();
            let mut control = Watch {
                store: &self.store,
                runtime: &self.runtime,
                breath: Breath::new(&self.pulse, &mut self.patience),
                on_step: &self.bench.on_step,
                every: Duration::from_millis(self.bench.settings.checkpoint_millis),
                saved: vec![Instant::now(); tasks.len()],
                tasks: &tasks,
            };
            pool.install(|| self.bench.learn(&prepared, &resume, &mut control))
        };
        let mut again = Vec::new();
        for (task, result) in tasks.into_iter().zip(results) {
            let (job, claim) = (task.job.clone(), Arc::clone(&task.claim));
            if let Err(TrainError::Checkpoint(problem)) = result
                && !task.anew
            {
                tracing::warn!(job = %job.id, problem, "a checkpoint is of no use: the job begins anew");
                again.push(Task { anew: true, ..task });
                continue;
            }
            match result.map_err(WorkerError::from).and_then(|trained| self.end(task, trained, pool)) {
                Ok(Some(task)) => again.push(task),
                Ok(None) => claim.end(),
                Err(error) => self.report(&job, &claim, error),
            }
        }
        again
    }

    /// Judges a trained task and reports it. Comes back with the task if an update has drifted too far.
    fn end(
        &mut self,
        task: Task,
        trained: train::Trained,
        pool: &rayon::ThreadPool,
    ) -> Result<Option<Task>, WorkerError> {
        let (bench, mut breath) = (&self.bench, Breath::new(&self.pulse, &mut self.patience));
        if pool.install(|| bench.drifted(&task.prepared, &trained, &mut || breath.take()))? {
            return self.learn_all(task, pool).map(Some);
        }
        let mut outcome = task.outcome(String::new());
        let Task { job, claim, started, spent, head, prepared, .. } = task;
        let tokens = outcome.trained_tokens;
        let verdict = pool.install(|| bench.conclude(prepared, trained, tokens, &mut || breath.take()))?;
        outcome.seconds = spent.seconds + started.elapsed().as_secs_f64();
        match verdict {
            Verdict::Publish { generation, gate, reason, lesson } => {
                let (id, files) = (generation.id, generation.files());
                outcome = JobOutcome {
                    published: true,
                    generation: Some(id),
                    gate,
                    reason: format!("published: {reason}"),
                    ..outcome
                };
                let reason = &outcome.reason;
                tracing::info!(job = %job.id, adapter = %job.adapter, generation = %id.short(), %reason, "job done");
                let finish = (claim.fence.clone(), outcome);
                let published = self.store.publish_lesson(&job.adapter, *generation, head, finish, lesson);
                self.runtime.block_on(published)?;
                (self.announce)(&job.adapter, &id, files);
                let keep = self.bench.settings.keep_generations;
                if let Err(error) = self.runtime.block_on(self.store.prune_generations(&job.adapter, keep)) {
                    tracing::warn!(adapter = %job.adapter, %error, "old generations were not removed");
                }
            }
            Verdict::Keep { gate, reason, lesson } => {
                outcome = JobOutcome { gate, reason: format!("not published: {reason}"), ..outcome };
                tracing::info!(job = %job.id, adapter = %job.adapter, reason = %outcome.reason, "job done");
                self.runtime.block_on(self.store.finish_lesson(&claim.fence, &outcome, &lesson))?;
            }
        }
        Ok(None)
    }

    /// Makes a task of learning the whole history of one whose update has drifted.
    fn learn_all(&mut self, task: Task, pool: &rayon::ThreadPool) -> Result<Task, WorkerError> {
        tracing::info!(job = %task.job.id, "an update has drifted: the whole history is learnt");
        let outcome = task.outcome("the update has drifted".into());
        let Task { mut job, claim, prepared, .. } = task;
        let items = self.runtime.block_on(async {
            self.store.give_update_up(&claim.fence, &outcome, prepared.lesson()).await?;
            self.store.history_of(&claim.fence).await
        })?;
        job.from_scratch = true;
        let prepared = self.prepare(&job, items, Ok(prepared.into_head()), pool)?;
        self.runtime.block_on(self.store.begin_lesson(&claim.fence, prepared.lesson()))?;
        Ok(Task { job, claim, prepared, anew: false, ..task })
    }

    /// Reports a job that came to no end.
    fn report(&self, job: &Job, claim: &Claim, error: WorkerError) {
        let told = match error {
            WorkerError::Store(StoreError::Fenced { .. } | StoreError::NotFound { .. }) => {
                tracing::info!(job = %job.id, "the job was taken away");
                Ok(())
            }
            WorkerError::Train(TrainError::Stopped) if claim.halted() == Some(Halt::Lost) => {
                tracing::info!(job = %job.id, "the job was taken away");
                Ok(())
            }
            WorkerError::Train(TrainError::Stopped) => self.runtime.block_on(async {
                claim.settle(&self.store, self.bench.settings.lease_millis).await;
                self.store.release(&claim.fence).await.map(drop)
            }),
            error => {
                tracing::warn!(job = %job.id, %error, "job failed");
                let (reason, again) = error.report(claim.attempts(), self.bench.settings.max_attempts);
                self.runtime.block_on(async {
                    claim.settle(&self.store, self.bench.settings.lease_millis).await;
                    self.store.fail(&claim.fence, &reason, again).await.map(drop)
                })
            }
        };
        match told {
            Ok(()) | Err(StoreError::Fenced { .. }) => {}
            // The claim runs out and the job is taken up again.
            Err(error) => tracing::error!(job = %job.id, %error, "cannot report the job"),
        }
        claim.end();
    }
}

/// A pause between two pieces of work: a sign of life, and a wait for who comes first.
struct Breath<'a> {
    pulse: &'a Pulse,
    patience: &'a mut Patience,
}

impl<'a> Breath<'a> {
    fn new(pulse: &'a Pulse, patience: &'a mut Patience) -> Self {
        Self { pulse, patience }
    }

    fn take(&mut self) {
        self.pulse.alive();
        self.patience.wait();
    }
}

/// Watches over training from within.
struct Watch<'a> {
    store: &'a Store,
    runtime: &'a Handle,
    breath: Breath<'a>,
    on_step: &'a OnStep,
    tasks: &'a [Task],
    every: Duration,
    saved: Vec<Instant>,
}

impl Control for Watch<'_> {
    fn step(&mut self, job: usize, report: StepReport) -> train::Verdict {
        self.breath.pulse.alive();
        let Some(task) = self.tasks.get(job) else { return ControlFlow::Break(()) };
        task.claim.advance(&report);
        (self.on_step)(&report);
        match task.claim.halted() {
            Some(_) => ControlFlow::Break(()),
            None => ControlFlow::Continue(()),
        }
    }

    fn checkpoint(&mut self, job: usize, step: u32, make: &mut dyn FnMut() -> Vec<u8>) {
        let Some((task, saved)) = self.tasks.get(job).zip(self.saved.get_mut(job)) else { return };
        let wanted = match task.claim.halted() {
            Some(Halt::GiveBack) => true,
            Some(Halt::Lost) => false,
            None => saved.elapsed() >= self.every,
        };
        if !wanted {
            return;
        }
        let (fence, work) = (&task.claim.fence, task.prepared.work);
        let save = self.store.save_checkpoint(&task.job.adapter, fence, work, step, make());
        match self.runtime.block_on(save) {
            Ok(true) => task.claim.got_on(),
            Ok(false) => {}
            Err(error) => tracing::warn!(job = %task.job.id, step, %error, "a checkpoint was not written"),
        }
        *saved = Instant::now();
        self.breath.pulse.alive();
    }

    fn breathe(&mut self) {
        self.breath.take();
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    use model::BaseModel;
    use testkit::tiny_model;
    use train::{TrainJob, Trained};
    use types::{AdapterId, JobState, NewItem, SystemClock, Timestamp};

    use super::*;
    use crate::heartbeat;
    use crate::settings::Settings;
    use crate::trainer::{Jointly, Trainer};

    /// Trains without a breath, and notes how many there were before and after.
    struct Breathless {
        breaths: Arc<AtomicU32>,
        noted: Mutex<Vec<u32>>,
    }

    impl Trainer for Breathless {
        fn train(
            &self,
            base: &BaseModel,
            jobs: &[TrainJob<'_>],
            _: &mut dyn Control,
        ) -> Vec<Result<Trained, TrainError>> {
            struct Alone;
            impl Control for Alone {
                fn step(&mut self, _: usize, _: StepReport) -> train::Verdict {
                    ControlFlow::Continue(())
                }
            }
            let note = || self.noted.lock().unwrap().push(self.breaths.load(Ordering::Relaxed));
            note();
            let results = Jointly.train(base, jobs, &mut Alone);
            note();
            results
        }
    }

    /// Where training has no idle priority it gives way also while it reads the history, and while it judges.
    #[test]
    fn reading_and_judging_give_way_too() {
        let runtime = heartbeat::runtime().unwrap();
        let ada = AdapterId::new("tenant".parse().unwrap(), "ada".parse().unwrap());
        let item = |at: i64| NewItem {
            id: None,
            input: Some(format!("greet guest {at}")),
            output: "ahoy".into(),
            created_at: Some(Timestamp(at)),
            metadata: None,
        };
        let (store, claimed) = runtime.block_on(async {
            let store = Store::in_memory(Arc::new(SystemClock)).await.unwrap();
            store.append(&ada, None, [0; 32], (0..20).map(item).collect()).await.unwrap();
            let claimed = store.claim("worker", 1 << 40, 1).await.unwrap().unwrap();
            (store, claimed)
        });
        let breaths = Arc::new(AtomicU32::new(0));
        let looks = Arc::clone(&breaths);
        let load = move || looks.fetch_add(1, Ordering::Relaxed) > 0;
        let trainer = Arc::new(Breathless { breaths: Arc::clone(&breaths), noted: Mutex::default() });
        let (base, tokenizer) = tiny_model();
        let (settings, on_step): (_, OnStep) = (Settings::default(), Arc::new(|_| ()));
        let bench = Bench { base, tokenizer, settings, trainer: trainer.clone(), on_step };
        let claim = Claim::new(claimed.fence.clone(), 1);
        let shift = Shift {
            store: store.clone(),
            bench: Arc::new(bench),
            announce: Arc::new(|_, _, _| ()),
            runtime: runtime.clone(),
            pulse: Arc::new(Pulse::new(vec![Arc::new(claim)])),
            // All of the time is its own, so that it looks and does not wait.
            patience: Patience::new(Some(Arc::new(load)), 1.0),
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        shift.work(vec![claimed], &pool);
        let job = runtime.block_on(store.latest_job(&ada)).unwrap().unwrap();
        assert_eq!(job.state, JobState::Succeeded, "{job:?}");
        let noted = trainer.noted.lock().unwrap().clone();
        let [before, after] = noted[..] else { panic!("{noted:?}") };
        assert!(before >= 20, "a breath for each item: {before}");
        assert_eq!(after, before, "the control: this trainer takes none");
        assert!(breaths.load(Ordering::Relaxed) > after, "while it judges");
    }
}
