//! The worker's loop over the queue: claim, hand to a training thread, look after it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use model::BaseModel;
use store::{AdapterFiles, Claimed, Store, StoreError};
use text::Tokenizer;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use train::StepReport;
use types::{AdapterId, GenerationId, Job};

use crate::error::WorkerError;
use crate::heartbeat::{self, Claim, Pulse, Terms};
use crate::patience::{Load, Patience, Visits, run_when_idle};
use crate::settings::Settings;
use crate::shift::Shift;
use crate::trainer::{Jointly, Trainer};
use crate::work::Bench;

/// Called when a head has moved, with the new one and its files.
pub type Announce = Arc<dyn Fn(&AdapterId, &GenerationId, AdapterFiles) + Send + Sync>;

/// Called after each optimiser step.
pub type OnStep = Arc<dyn Fn(&StepReport) + Send + Sync>;

/// One worker: takes some jobs at a time.
pub struct Worker {
    store: Store,
    bench: Bench,
    announce: Announce,
    load: Option<Load>,
    visits: Option<Visits>,
}

impl Worker {
    /// A worker over a store and the shared base.
    #[must_use]
    pub fn new(
        store: Store,
        base: Arc<BaseModel>,
        tokenizer: Tokenizer,
        settings: Settings,
        announce: Announce,
    ) -> Self {
        let on_step: OnStep = Arc::new(|_| ());
        let bench = Bench { base, tokenizer, settings, trainer: Arc::new(Jointly), on_step };
        Self { store, bench, announce, load: None, visits: None }
    }

    /// The worker with another trainer.
    #[must_use]
    pub fn with_trainer(mut self, trainer: Arc<dyn Trainer>) -> Self {
        self.bench.trainer = trainer;
        self
    }

    /// The worker with somebody to tell of every optimiser step.
    #[must_use]
    pub fn reporting(mut self, on_step: OnStep) -> Self {
        self.bench.on_step = on_step;
        self
    }

    /// The worker beside a server. `visits` is called when training begins, and what it returns is dropped when
    /// training ends: meanwhile the server leaves it some of the processor. Where training cannot run at idle priority,
    /// it gives way while `load` says that requests run.
    #[must_use]
    pub fn beside(mut self, load: Load, visits: Visits) -> Self {
        self.load = Some(load);
        self.visits = Some(visits);
        self
    }

    /// Works until `stop`. `wake` is told when a job has been enqueued; others are found by looking now and then.
    /// Jobs under way at `stop` go back to the queue.
    ///
    /// # Errors
    /// When its threads cannot be started.
    pub async fn run(self, wake: Arc<Notify>, stop: CancellationToken) -> Result<(), WorkerError> {
        let Self { store, bench, announce, load, visits } = self;
        let bench = Arc::new(bench);
        let settings = &bench.settings;
        let (mut pool, mut idle) = threads(settings.threads)?;
        let poll = Duration::from_millis(settings.poll_millis);
        // A job that waits for more items is announced before it is ripe.
        let ripe = u64::try_from(settings.policy.debounce_millis).unwrap_or(0).max(50);
        let mut soon = false;
        let mut suspects = Vec::new();
        while !stop.is_cancelled() {
            let woken = wake.notified();
            suspects = still_open(&store, suspects).await;
            let at_once = if suspects.is_empty() { settings.jobs_at_once.max(1) } else { 1 };
            let claimed = match claim(&store, settings, at_once).await {
                Ok(claimed) => claimed,
                Err(error) => {
                    tracing::error!(%error, "cannot claim a job");
                    tokio::select! {
                        () = tokio::time::sleep(Duration::from_secs(1)) => {}
                        () = stop.cancelled() => {}
                    }
                    continue;
                }
            };
            if claimed.is_empty() {
                let wait = if soon { poll.min(Duration::from_millis(ripe)) } else { poll };
                tokio::select! {
                    () = woken => soon = true,
                    () = tokio::time::sleep(wait) => soon = false,
                    () = stop.cancelled() => {}
                }
                continue;
            }
            let claims =
                claimed.iter().map(|Claimed { job, fence, .. }| Claim::new(fence.clone(), job.attempts));
            let claims = claims.map(Arc::new);
            let pulse = Arc::new(Pulse::new(claims.collect()));
            let terms = Terms { lease_millis: settings.lease_millis, policy: settings.policy };
            heartbeat::start(store.clone(), Arc::clone(&pulse), terms, stop.clone())?;
            let shift = Shift {
                store: store.clone(),
                bench: Arc::clone(&bench),
                announce: Arc::clone(&announce),
                runtime: heartbeat::runtime()?,
                pulse: Arc::clone(&pulse),
                patience: Patience::new(load.clone().filter(|_| !idle), settings.floor),
            };
            let _visit = visits.as_ref().map(|visit| visit());
            suspects.retain(|suspect: &Job| claimed.iter().all(|claimed| claimed.job.id != suspect.id));
            match work(shift, claimed, &pool, &pulse).await? {
                End::Over => {}
                End::Panicked(jobs) => suspects.extend(jobs),
                // The threads of one that hangs are not to be had any more.
                End::Hung => (pool, idle) = threads(settings.threads)?,
            }
        }
        Ok(())
    }
}

/// Those of the jobs that may still be claimed.
async fn still_open(store: &Store, jobs: Vec<Job>) -> Vec<Job> {
    let mut open = Vec::new();
    for job in jobs {
        // One that cannot be read is tried in company again.
        let now = store.job(&job.adapter.tenant, &job.id).await.unwrap_or_default();
        open.extend(now.filter(|now| now.state.is_open()));
    }
    open
}

/// As many jobs as there are, up to `at_once`.
async fn claim(store: &Store, settings: &Settings, at_once: usize) -> Result<Vec<Claimed>, StoreError> {
    let Settings { lease_millis, max_attempts, policy, .. } = settings;
    let mut all = Vec::new();
    while all.len() < at_once {
        match store.claim_ripe("worker", *lease_millis, *max_attempts, policy).await? {
            Some(claimed) => all.push(claimed),
            None => break,
        }
    }
    Ok(all)
}

/// How a shift came to its end.
enum End {
    /// Every job has been reported.
    Over,
    /// It panicked, for one of these jobs or for all. They are in the queue again, as if never tried: each is to be done
    /// alone next, so that the attempt counts against the one that is to blame.
    Panicked(Vec<Job>),
    /// It hung and was given up: its claims have run out, and what it does if it ever goes on is refused.
    Hung,
}

/// Has a thread of its own do the jobs.
async fn work(
    shift: Shift,
    claimed: Vec<Claimed>,
    pool: &Arc<rayon::ThreadPool>,
    pulse: &Arc<Pulse>,
) -> Result<End, WorkerError> {
    let (done, ended) = tokio::sync::oneshot::channel();
    let (pool, shared, store) = (Arc::clone(pool), Arc::clone(pulse), shift.store.clone());
    let Settings { max_attempts, lease_millis, .. } = shift.bench.settings;
    let body = move || {
        let result = catch_unwind(AssertUnwindSafe(|| shift.work(claimed, &pool)));
        shared.over.cancel();
        // Nobody listens if this thread was given up.
        let _ = done.send(result.is_ok());
    };
    std::thread::Builder::new().name("training".into()).spawn(body)?;
    pulse.over.cancelled().await;
    // Over by its own word: the thread is about to end. Given up: it may never.
    let grace = Duration::from_secs(5);
    match tokio::time::timeout(grace, ended).await {
        Ok(Ok(true)) => Ok(End::Over),
        Ok(_) => {
            // The others were reported before.
            let open: Vec<_> = pulse.claims.iter().filter(|claim| claim.is_open()).collect();
            let is_told = open.len() == 1;
            let mut suspects = Vec::new();
            for claim in open {
                claim.settle(&store, lease_millis).await;
                let ended = match is_told {
                    true => {
                        let (reason, again) = WorkerError::Panicked.report(claim.attempts(), max_attempts);
                        store.fail(&claim.fence, &reason, again).await
                    }
                    false => store.release(&claim.fence).await,
                };
                match ended {
                    Ok(job) if !is_told => suspects.push(job),
                    // Or it was taken away.
                    Ok(_) | Err(StoreError::Fenced { .. }) => {}
                    Err(error) => tracing::error!(%error, "cannot report the job"),
                }
            }
            if !is_told {
                tracing::error!(jobs = suspects.len(), "training panicked: each of its jobs is tried alone");
            }
            Ok(End::Panicked(suspects))
        }
        Err(_) => Ok(End::Hung),
    }
}

/// The threads of the arithmetic, and whether they run at idle priority.
fn threads(count: usize) -> Result<(Arc<rayon::ThreadPool>, bool), WorkerError> {
    let pool =
        rayon::ThreadPoolBuilder::new().num_threads(count).thread_name(|i| format!("train-{i}")).build()?;
    let idle = pool.broadcast(|_| run_when_idle()).into_iter().all(|idle| idle);
    Ok((Arc::new(pool), idle))
}
