//! Who keeps a job and who loses it; calling off and pausing.
#![expect(clippy::disallowed_methods, reason = "threads that are slow, blocked or hang")]

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use model::BaseModel;
use store::{PauseScope, Store};
use train::{Control, StepReport, TrainError, TrainJob, Trained};
use types::{JobState, SystemClock};
use worker::{Jointly, Trainer};

use crate::rig::{Rig, Visits, done, settings, slow, user};

/// Takes `pause` before every one of `steps` steps, then trains; the first run may hang instead.
struct Sleepy {
    steps: u32,
    pause: Duration,
    hangs: bool,
    runs: AtomicU32,
}

impl Sleepy {
    fn new(steps: u32, pause: u64, hangs: bool) -> Self {
        Self { steps, pause: Duration::from_millis(pause), hangs, runs: AtomicU32::new(0) }
    }
}

impl Trainer for Sleepy {
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        if self.hangs && self.runs.fetch_add(1, Ordering::Relaxed) == 0 {
            std::thread::sleep(20 * self.pause);
            return jobs.iter().map(|_| Err(TrainError::Stopped)).collect();
        }
        for step in 1..=self.steps {
            std::thread::sleep(self.pause);
            let report = StepReport { step, steps: self.steps, loss: 1.0, tokens: 0 };
            if let ControlFlow::Break(()) = control.step(0, report) {
                return vec![Err(TrainError::Stopped)];
            }
        }
        Jointly.train(base, jobs, control)
    }
}

/// The server leaves some of the processor to training while there is any, and no longer: also where it fails.
#[tokio::test]
async fn the_server_knows_of_training_as_long_as_it_runs() {
    struct Looks(Arc<Visits>, AtomicU32);
    impl Trainer for Looks {
        fn train(
            &self,
            base: &BaseModel,
            jobs: &[TrainJob<'_>],
            control: &mut dyn Control,
        ) -> Vec<Result<Trained, TrainError>> {
            assert_eq!(self.0.now.load(Ordering::SeqCst), 1);
            assert!(self.1.fetch_add(1, Ordering::SeqCst) > 0, "a panic of the first run");
            Jointly.train(base, jobs, control)
        }
    }
    let rig = Rig::new().await;
    let looks = Arc::new(Looks(Arc::clone(&rig.visits), AtomicU32::new(0)));
    let (running, stop) = rig.start_with(settings(), looks);
    let job = rig.upload(&user("ada"), 0..12, |_| "good day".into()).await;
    assert_eq!(rig.until(&job, done).await.state, JobState::Succeeded);
    stop.cancel();
    running.await.unwrap().unwrap();
    assert_eq!((rig.visits.now.load(Ordering::SeqCst), rig.visits.all.load(Ordering::SeqCst)), (0, 2));
}

/// Healthy runs were reaped elsewhere, because what extended their lease was held up by the training itself
/// (openweights #82). Here the runtime that serves is blocked as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn who_is_slow_but_advances_keeps_the_job() {
    // On disk: a store in memory has one connection, which the blocked runtime may hold.
    let folder = tempfile::tempdir().unwrap();
    let rig = Rig::over(Store::open(folder.path(), Arc::new(SystemClock)).await.unwrap());
    let mut settings = settings();
    // Long enough for a busy machine, and half of what the job takes.
    settings.lease_millis = 1_500;
    let (worker, stop) = rig.start_with(settings, Arc::new(Sleepy::new(12, 300, false)));
    let job = rig.upload(&user("ada"), 0..20, |_| "ahoy and welcome aboard".into()).await;
    rig.until(&job, |job| job.state == JobState::Running).await;
    let blocked = tokio::spawn(async { std::thread::sleep(Duration::from_millis(2_500)) });
    // From another runtime, as another process would.
    let other = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (store, handle) = (rig.store.clone(), other.handle().clone());
    let thief = std::thread::spawn(move || {
        let mut stolen = 0;
        for _ in 0..80 {
            std::thread::sleep(Duration::from_millis(40));
            stolen += usize::from(handle.block_on(store.claim("thief", 1, 9)).unwrap().is_some());
        }
        stolen
    });
    blocked.await.unwrap();
    let job = rig.until(&job, done).await;
    assert_eq!(tokio::task::spawn_blocking(|| thief.join().unwrap()).await.unwrap(), 0);
    other.shutdown_background();
    assert_eq!((job.attempts, job.state), (1, JobState::Succeeded));
    stop.cancel();
    worker.await.unwrap().unwrap();
}

/// Negative control of the one above: without progress the lease runs out, and the next attempt does the job.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_hangs_loses_the_job() {
    let rig = Rig::new().await;
    let mut settings = settings();
    settings.lease_millis = 200;
    let (worker, stop) = rig.start_with(settings, Arc::new(Sleepy::new(1, 600, true)));
    let job = rig.upload(&user("ada"), 0..20, |_| "ahoy and welcome aboard".into()).await;
    let job = rig.until(&job, done).await;
    assert!(job.attempts >= 2, "{job:?}");
    assert!(job.outcome.unwrap().published);
    stop.cancel();
    worker.await.unwrap().unwrap();
    assert_eq!(rig.announced.lock().unwrap().len(), 1);
}

/// A step that lasts three leases, with or without signs of life within it.
struct OneStep {
    lease: Duration,
    breathes: bool,
}

impl Trainer for OneStep {
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        for _ in 0..60 {
            std::thread::sleep(self.lease / 20);
            if self.breathes {
                control.breathe();
            }
        }
        Jointly.train(base, jobs, control)
    }
}

/// Whether another worker gets a job whose first step lasts three leases.
async fn is_stolen(breathes: bool) -> bool {
    let rig = Rig::new().await;
    let mut settings = settings();
    settings.lease_millis = 1_000;
    let trainer = OneStep { lease: Duration::from_secs(1), breathes };
    let (worker, stop) = rig.start_with(settings, Arc::new(trainer));
    let job = rig.upload(&user("ada"), 0..20, |_| "ahoy and welcome aboard".into()).await;
    rig.until(&job, |job| job.state == JobState::Running).await;
    let stolen = loop {
        if rig.store.claim("thief", 1 << 40, 9).await.unwrap().is_some() {
            break true;
        }
        let now = rig.store.job(&job.adapter.tenant, &job.id).await.unwrap().unwrap();
        if done(&now) {
            assert!(now.attempts == 1 && now.outcome.unwrap().published);
            break false;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    stop.cancel();
    worker.await.unwrap().unwrap();
    stolen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sign_of_life_within_a_step_keeps_the_job() {
    assert!(!is_stolen(true).await);
    // Negative control: a step that is as long but gives no sign loses it.
    assert!(is_stolen(false).await);
}

#[tokio::test]
async fn a_cancelled_job_stops_and_publishes_nothing() {
    let rig = Rig::new().await;
    let (worker, stop) = rig.start(slow());
    let ada = user("ada");
    let job = rig.upload(&ada, 0..200, |at| format!("welcome number {at}")).await;
    rig.until(&job, |job| job.progress.is_some()).await;
    let cancelled = rig.store.cancel(&ada.tenant, &job.id).await.unwrap().unwrap();
    assert_eq!(cancelled.state, JobState::Cancelled);
    // The next job shows that the worker has given the first one up.
    let other = rig.upload(&user("bob"), 0..3, |_| "hi".into()).await;
    rig.until(&other, done).await;
    assert_eq!(rig.head(&ada).await, None);
    let job = rig.store.job(&ada.tenant, &job.id).await.unwrap().unwrap();
    assert_eq!((job.state, job.outcome), (JobState::Cancelled, None));
    stop.cancel();
    worker.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_paused_user_waits() {
    let rig = Rig::new().await;
    let (worker, stop) = rig.start(slow());
    let ada = user("ada");
    let hers = PauseScope::User(ada.tenant.clone(), ada.user().unwrap().clone());
    let job = rig.upload(&ada, 0..200, |at| format!("welcome number {at}")).await;
    rig.until(&job, |job| job.progress.is_some()).await;
    rig.store.pause(&hers, &ada.tenant, None).await.unwrap();
    let waits = rig.until(&job, |job| job.state == JobState::Queued).await;
    assert_eq!(waits.attempts, 0, "being paused is no attempt");
    let other = rig.upload(&user("bob"), 0..3, |_| "hi".into()).await;
    rig.until(&other, done).await;
    let waits = rig.store.job(&ada.tenant, &job.id).await.unwrap().unwrap();
    assert_eq!(waits.state, JobState::Queued);
    rig.store.resume(&hers).await.unwrap();
    rig.wake.notify_one();
    rig.until(&job, |job| job.state == JobState::Running).await;
    stop.cancel();
    worker.await.unwrap().unwrap();
}
