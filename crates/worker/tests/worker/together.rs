//! Jobs of several users trained at once: what each comes to is what it comes to alone.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use model::BaseModel;
use store::Store;
use train::{Control, TrainError, TrainJob, Trained};
use types::{AdapterKind, Clock, GenerationId, Job, JobState, ManualClock, Timestamp, TrainingOptions};
use worker::{Jointly, Trainer};

use crate::rig::{Rig, done, item, settings, user, watched};

/// Trains, and notes how many jobs it was given at once, at most.
#[derive(Default)]
struct Counts(AtomicUsize);

impl Trainer for Counts {
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        self.0.fetch_max(jobs.len(), Ordering::Relaxed);
        Jointly.train(base, jobs, control)
    }
}

/// Heads of four users with different histories, kinds and lengths, trained `at_once`, and how many were together.
async fn heads(at_once: usize, seed: Option<u64>) -> (Vec<GenerationId>, usize) {
    let rig = Rig::new().await;
    let users = [("ada", 20), ("bob", 31), ("cem", 26), ("dot", 23)];
    let kinds = [AdapterKind::Lora, AdapterKind::Dora, AdapterKind::Rslora, AdapterKind::Lora];
    let mut jobs = Vec::new();
    for ((name, count), kind) in users.into_iter().zip(kinds) {
        let items = (0..count).map(|at| item(at, format!("ahoy {name} and welcome aboard"))).collect();
        let training = TrainingOptions { kind: Some(kind), seed, ..TrainingOptions::default() };
        let appended = rig.store.append_for(&user(name), None, [0; 32], items, Some(training)).await.unwrap();
        jobs.push(appended.job.unwrap());
    }
    // All wait before the worker looks.
    let (mut settings, counts) = (settings(), Arc::new(Counts::default()));
    settings.jobs_at_once = at_once;
    let (worker, stop) = rig.start_with(settings, counts.clone());
    let mut heads = Vec::new();
    for job in &jobs {
        let job = rig.until(job, done).await;
        assert_eq!(job.state, JobState::Succeeded, "{job:?}");
        let outcome = job.outcome.unwrap();
        assert!(outcome.published, "{}", outcome.reason);
        heads.push(rig.head(&job.adapter).await.unwrap());
    }
    stop.cancel();
    worker.await.unwrap().unwrap();
    (heads, counts.0.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_in_company_comes_to_the_same_bits_as_alone() {
    let (alone, one) = heads(1, None).await;
    let (together, four) = heads(4, None).await;
    assert_eq!((one, four), (1, 4));
    assert_eq!(together, alone, "an id is a hash of the weights");
    // Negative control: another seed shows.
    let (other, _) = heads(4, Some(7)).await;
    assert!(other.iter().zip(&alone).all(|(other, alone)| other != alone));
}

/// The seed of a job that the trainer cannot bear.
const UNBEARABLE: u64 = 666;

/// Panics at the third step of a shift that has one such job in it.
struct Touchy {
    /// How many jobs each shift had.
    shifts: Mutex<Vec<usize>>,
}

impl Trainer for Touchy {
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        self.shifts.lock().unwrap().push(jobs.len());
        let unbearable = jobs.iter().any(|job| job.recipe.seed == UNBEARABLE);
        watched(base, jobs, control, &mut |job, report, inner| {
            assert!(!unbearable || report.step < 3, "it cannot bear this job");
            inner.step(job, report)
        })
    }
}

/// A job that panics whenever it is tried loses its attempts alone: those that were beside it lose none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_panics_brings_nobody_down() {
    let clock = Arc::new(ManualClock::new(Timestamp(1_790_000_000_000)));
    let shared: Arc<dyn Clock> = clock.clone();
    let rig = Rig::over(Store::in_memory(shared).await.unwrap());
    let mut jobs = Vec::new();
    for (name, seed) in [("ada", None), ("bob", Some(UNBEARABLE)), ("cem", None)] {
        let items = (0..20).map(|at| item(at, format!("ahoy {name} and welcome aboard"))).collect();
        let training = TrainingOptions { seed, ..TrainingOptions::default() };
        let appended = rig.store.append_for(&user(name), None, [0; 32], items, Some(training)).await.unwrap();
        jobs.push(appended.job.unwrap());
    }
    let mut settings = settings();
    (settings.jobs_at_once, settings.max_attempts, settings.lease_millis) = (3, 2, 1 << 40);
    let touchy = Arc::new(Touchy { shifts: Mutex::default() });
    let (worker, stop) = rig.start_with(settings, touchy.clone());
    for good in [&jobs[0], &jobs[2]] {
        let job = rig.until(good, done).await;
        assert_eq!((job.state, job.attempts), (JobState::Succeeded, 1), "{job:?}");
        assert!(job.outcome.unwrap().published);
    }
    let failed_once = |job: &Job| job.error.is_some() && job.state == JobState::Queued;
    let waits = rig.until(&jobs[1], failed_once).await;
    assert_eq!((waits.attempts, waits.error.as_deref()), (1, Some("training panicked")));
    clock.advance_millis(5_000);
    rig.wake.notify_one();
    let failed = rig.until(&jobs[1], done).await;
    assert_eq!((failed.state, failed.attempts), (JobState::Failed, 2));
    stop.cancel();
    worker.await.unwrap().unwrap();
    let shifts = touchy.shifts.lock().unwrap();
    // The control is in the first: all three were in it.
    assert_eq!(shifts.as_slice(), [3, 1, 1, 1, 1]);
}
