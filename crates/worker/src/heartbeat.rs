//! Keeps the claims of jobs under way alive as long as they advance, on an OS thread of its own.
//!
//! A lease is extended when the training thread has given a sign of life since it was extended last, and only then: who
//! is slow keeps the job, who hangs loses it. The thread has its own clock and runtime, so that neither a busy
//! server nor the training itself can hold it up.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join_all;
use store::{Fence, Policy, Standing, Store, StoreError};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::sync::CancellationToken;
use train::StepReport;
use types::JobProgress;

/// Why a job is to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Halt {
    /// The worker is told to stop, the job is paused, or it has had its turn: it goes back to the queue.
    GiveBack,
    /// It is somebody else's, or nobody's.
    Lost,
}

/// What the training thread and the heartbeat share of one job.
pub(crate) struct Claim {
    pub(crate) fence: Fence,
    attempts: AtomicU32,
    progress: Mutex<Option<JobProgress>>,
    halt: AtomicU8,
    ended: AtomicBool,
}

impl Claim {
    /// Of a job that has been claimed so many times since it last got on.
    pub(crate) fn new(fence: Fence, attempts: u32) -> Self {
        Self {
            fence,
            attempts: AtomicU32::new(attempts),
            progress: Mutex::default(),
            halt: AtomicU8::new(0),
            ended: AtomicBool::new(false),
        }
    }

    /// How often the job has been claimed since it last got on.
    pub(crate) fn attempts(&self) -> u32 {
        self.attempts.load(Ordering::Acquire)
    }

    /// The store has a checkpoint of more steps than ever.
    pub(crate) fn got_on(&self) {
        self.attempts.store(1, Ordering::Release);
    }

    /// A step is done, through which `tokens` went.
    pub(crate) fn advance(&self, report: &StepReport) {
        let StepReport { step, steps, loss, tokens } = *report;
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let tokens = tokens + progress.map_or(0, |before| before.tokens);
        *progress = Some(JobProgress { step, steps, loss, tokens });
    }

    /// How far it is; nothing before the first step.
    pub(crate) fn progress(&self) -> Option<JobProgress> {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn halted(&self) -> Option<Halt> {
        match self.halt.load(Ordering::Acquire) {
            0 => None,
            1 => Some(Halt::GiveBack),
            _ => Some(Halt::Lost),
        }
    }

    fn stop(&self, why: Halt) {
        // Who is lost stays lost.
        self.halt.fetch_max(if why == Halt::GiveBack { 1 } else { 2 }, Ordering::AcqRel);
    }

    /// The job has been reported: it is looked after no more.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Whether the job has not been reported yet.
    pub(crate) fn is_open(&self) -> bool {
        !self.ended.load(Ordering::Acquire)
    }

    /// Writes down what it has cost by now, which the last heartbeat did not know all of; for a job that is about to be
    /// given back.
    pub(crate) async fn settle(&self, store: &Store, lease_millis: i64) {
        match store.beat(&self.fence, self.progress(), lease_millis).await {
            Ok(()) | Err(StoreError::Fenced { .. }) => {}
            Err(error) => tracing::warn!(%error, "the last part of a job's cost was not written down"),
        }
    }
}

/// What the training thread and the heartbeat share of all jobs that are trained at once.
pub(crate) struct Pulse {
    pub(crate) claims: Vec<Arc<Claim>>,
    signs: AtomicU64,
    /// Training is over, or its thread is given up.
    pub(crate) over: CancellationToken,
}

impl Pulse {
    pub(crate) fn new(claims: Vec<Arc<Claim>>) -> Self {
        Self { claims, signs: AtomicU64::new(0), over: CancellationToken::new() }
    }

    /// A sign of life of the training thread.
    pub(crate) fn alive(&self) {
        self.signs.fetch_add(1, Ordering::Release);
    }
}

/// The runtime of everything here and of the training thread's calls to the store: one thread with its own timers, apart
/// from the server's. It lives as long as the process, because the store's connections find their way back on the runtime
/// that took them.
pub(crate) fn runtime() -> std::io::Result<Handle> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime.handle().clone());
    }
    let new =
        Builder::new_multi_thread().worker_threads(1).thread_name("worker-store").enable_all().build()?;
    if let Err(spare) = RUNTIME.set(new) {
        spare.shutdown_background();
    }
    RUNTIME.get().map(|runtime| runtime.handle().clone()).ok_or_else(|| std::io::Error::other("no runtime"))
}

/// On what terms jobs are held.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    /// How long a claim lasts without progress.
    pub(crate) lease_millis: i64,
    /// When jobs are worth doing, and how long is a turn.
    pub(crate) policy: Policy,
}

/// Starts the thread. It ends when [`Pulse::over`] is set, and sets it itself when the training thread has given no
/// sign for two leases: then every claim has run out, and the thread is given up.
pub(crate) fn start(
    store: Store,
    pulse: Arc<Pulse>,
    terms: Terms,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let runtime = runtime()?;
    let body = move || runtime.block_on(beat(&store, &pulse, terms, &stop));
    std::thread::Builder::new().name("heartbeat".into()).spawn(body).map(drop)
}

async fn beat(store: &Store, pulse: &Pulse, terms: Terms, stop: &CancellationToken) {
    let lease = Duration::from_millis(terms.lease_millis.max(1).unsigned_abs());
    let between = (lease / 6).clamp(Duration::from_millis(20), Duration::from_secs(2));
    let mut interrupts = store.interrupts();
    let (mut seen, mut last_sign) = (pulse.signs.load(Ordering::Acquire), Instant::now());
    let mut told = false;
    loop {
        tokio::select! {
            () = pulse.over.cancelled() => return,
            () = tokio::time::sleep(between) => {}
            Ok(()) = interrupts.changed() => {}
            () = stop.cancelled(), if !told => told = true,
        }
        let signs = pulse.signs.load(Ordering::Acquire);
        let alive = signs != seen;
        if alive {
            (seen, last_sign) = (signs, Instant::now());
        }
        let open = pulse.claims.iter().filter(|claim| claim.is_open());
        // All at once: none may run out while another waits for its turn at the store.
        let looks = open.map(|claim| {
            if told {
                claim.stop(Halt::GiveBack);
            }
            look_after(store, claim, alive, terms, between)
        });
        join_all(looks).await;
        if last_sign.elapsed() > 2 * lease {
            tracing::error!("the training thread hangs and is given up");
            pulse.over.cancel();
        }
    }
}

async fn look_after(store: &Store, claim: &Claim, alive: bool, terms: Terms, patience: Duration) {
    let beat = match alive {
        true => store.beat(&claim.fence, claim.progress(), terms.lease_millis).await,
        false => Ok(()),
    };
    let standing = match beat {
        // A busy store may not keep the next beat waiting.
        Ok(()) => match tokio::time::timeout(patience, store.standing(&claim.fence, &terms.policy)).await {
            Ok(standing) => standing,
            Err(_) => return,
        },
        Err(error) => Err(error),
    };
    match standing {
        Ok(Standing::Held) => {}
        Ok(Standing::Paused | Standing::Awaited) => claim.stop(Halt::GiveBack),
        Ok(Standing::Lost) | Err(StoreError::Fenced { .. }) => claim.stop(Halt::Lost),
        Err(error) => tracing::warn!(%error, "a heartbeat failed"),
    }
}
