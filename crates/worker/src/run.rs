//! The worker's loop over the queue: claim, keep the claim alive, publish or say why not.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use model::BaseModel;
use store::{Claimed, Fence, Store, StoreError};
use text::Tokenizer;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use train::TrainError;
use types::{AdapterId, GenerationId, JobOutcome, JobProgress};

use crate::error::WorkerError;
use crate::work::{Bench, Head, Settings, Verdict};

/// Called when a head has moved.
pub type Announce = Arc<dyn Fn(&AdapterId, &GenerationId) + Send + Sync>;

/// One worker: takes one job at a time.
pub struct Worker {
    store: Store,
    bench: Arc<Bench>,
    pool: Arc<rayon::ThreadPool>,
    announce: Announce,
}

/// What the training thread and its heartbeat share.
#[derive(Default)]
struct Signals {
    stop: AtomicBool,
    progress: Mutex<Option<JobProgress>>,
}

impl Worker {
    /// A worker over a store and the shared base.
    ///
    /// # Errors
    /// When its threads cannot be started.
    pub fn new(
        store: Store,
        base: Arc<BaseModel>,
        tokenizer: Tokenizer,
        settings: Settings,
        announce: Announce,
    ) -> Result<Self, WorkerError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(settings.threads)
            .thread_name(|i| format!("train-{i}"))
            .build()?;
        let bench = Arc::new(Bench { base, tokenizer, settings });
        Ok(Self { store, bench, pool: Arc::new(pool), announce })
    }

    /// Works until `stop`. `wake` is told when a job has been enqueued; others are found by looking now and then.
    /// A job under way at `stop` goes back to the queue.
    pub async fn run(self, wake: Arc<Notify>, stop: CancellationToken) {
        let settings = &self.bench.settings;
        while !stop.is_cancelled() {
            let woken = wake.notified();
            match self.store.claim("worker", settings.lease_millis, settings.max_attempts).await {
                Ok(Some(claimed)) => self.take(claimed, &stop).await,
                Ok(None) => {
                    let poll = Duration::from_millis(settings.poll_millis);
                    tokio::select! {
                        () = woken => {}
                        () = tokio::time::sleep(poll) => {}
                        () = stop.cancelled() => {}
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "cannot claim a job");
                    tokio::select! {
                        () = tokio::time::sleep(Duration::from_secs(1)) => {}
                        () = stop.cancelled() => {}
                    }
                }
            }
        }
    }

    async fn take(&self, claimed: Claimed, stop: &CancellationToken) {
        let Claimed { job, fence } = claimed;
        tracing::info!(job = %job.id, adapter = %job.adapter, attempt = job.attempts, "job claimed");
        let started = Instant::now();
        let result = self.work(&job.adapter, &fence, started, stop).await;
        let told = match result {
            Ok(()) => Ok(()),
            Err(WorkerError::Store(StoreError::Fenced { .. } | StoreError::NotFound { .. })) => {
                tracing::info!(job = %job.id, "the job was taken away");
                Ok(())
            }
            Err(WorkerError::Train(TrainError::Stopped)) => self.store.release(&fence).await.map(|_| ()),
            Err(error) => {
                tracing::warn!(job = %job.id, %error, "job failed");
                self.store.fail(&fence, &error.to_string(), error.retry_after_millis()).await.map(|_| ())
            }
        };
        match told {
            Ok(()) | Err(StoreError::Fenced { .. }) => {}
            // The claim runs out and the job is taken up again.
            Err(error) => tracing::error!(job = %job.id, %error, "cannot report the job"),
        }
    }

    async fn work(
        &self,
        adapter: &AdapterId,
        fence: &Fence,
        started: Instant,
        stop: &CancellationToken,
    ) -> Result<(), WorkerError> {
        let record = self.store.head(adapter).await?;
        let expected = record.as_ref().map(|record| record.id);
        // A head for another base is no measure; it is replaced.
        let head = match record.filter(|record| record.base == *self.bench.base.hash()) {
            Some(record) => {
                let files = self.store.fetch(adapter, &record.id).await?;
                Some(Head { id: record.id, config: files.config, weights: files.weights })
            }
            None => None,
        };
        let items = self.store.all_history(adapter).await?;
        let verdict = self.train(items, head, fence, stop).await?;
        let outcome = |published, generation, gate, reason: String, trained_tokens| JobOutcome {
            published,
            generation,
            gate,
            reason,
            trained_tokens,
            seconds: started.elapsed().as_secs_f64(),
        };
        match verdict {
            Verdict::Publish { generation, gate, tokens } => {
                let id = generation.id;
                let reason = format!("published: {}", gate.verdict);
                tracing::info!(job = %fence.job, %adapter, generation = %id.short(), %reason, "job done");
                let outcome = outcome(true, Some(id), Some(gate), reason, tokens);
                self.store.publish(adapter, *generation, expected, Some((fence.clone(), outcome))).await?;
                (self.announce)(adapter, &id);
                let keep = self.bench.settings.keep_generations;
                if let Err(error) = self.store.prune_generations(adapter, keep).await {
                    tracing::warn!(%adapter, %error, "old generations were not removed");
                }
            }
            Verdict::Keep { gate, tokens } => {
                let reason = format!("not published: {}", gate.verdict);
                tracing::info!(job = %fence.job, %adapter, %reason, "job done");
                self.store.finish(fence, &outcome(false, None, Some(gate), reason, tokens)).await?;
            }
            Verdict::TooFew { items } => {
                let min = self.bench.settings.min_items;
                let reason = format!("not trained: {items} items, at least {min} are needed");
                self.store.finish(fence, &outcome(false, None, None, reason, 0)).await?;
            }
        }
        Ok(())
    }

    /// Computes on the training threads while the claim is kept alive from here.
    async fn train(
        &self,
        items: Vec<types::HistoryItem>,
        head: Option<Head>,
        fence: &Fence,
        stop: &CancellationToken,
    ) -> Result<Verdict, WorkerError> {
        let signals = Arc::new(Signals::default());
        let (bench, pool, shared) = (Arc::clone(&self.bench), Arc::clone(&self.pool), Arc::clone(&signals));
        let mut training = tokio::task::spawn_blocking(move || {
            pool.install(|| {
                bench.work(items, head.as_ref(), |report| {
                    let progress = JobProgress { step: report.step, steps: report.steps, loss: report.loss };
                    *shared.progress.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress);
                    if shared.stop.load(Ordering::Acquire) {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    }
                })
            })
        });
        let lease = self.bench.settings.lease_millis;
        let mut lost = None;
        loop {
            let beat = Duration::from_millis((lease / 6).clamp(50, 2_000).unsigned_abs());
            tokio::select! {
                done = &mut training => {
                    let verdict = done.map_err(|_| WorkerError::Panicked)?;
                    return lost.map_or(verdict, Err);
                }
                () = tokio::time::sleep(beat) => {}
                () = stop.cancelled(), if !signals.stop.load(Ordering::Acquire) => {
                    signals.stop.store(true, Ordering::Release);
                    continue;
                }
            }
            let progress = *signals.progress.lock().unwrap_or_else(PoisonError::into_inner);
            match self.store.beat(fence, progress, lease).await {
                Ok(()) => {}
                Err(error @ StoreError::Fenced { .. }) => {
                    lost.get_or_insert(WorkerError::Store(error));
                    signals.stop.store(true, Ordering::Release);
                }
                Err(error) => tracing::warn!(%error, "a heartbeat failed"),
            }
        }
    }
}
