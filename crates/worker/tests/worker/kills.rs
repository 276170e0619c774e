//! Killed at any step and gone on from the checkpoint, a training comes to the same weights.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use model::BaseModel;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use store::Store;
use train::{Control, StepReport, TrainError, TrainJob, Trained};
use types::{Clock, ManualClock, Timestamp};
use worker::{Jointly, Trainer};

use crate::rig::{Rig, done, settings, user};

const STEPS: u32 = 40;

/// Training of whose every step the result depends, with checkpoints: the number that its steps come to is the seed of
/// the real training. Dies at the steps in `deaths`, one after the other.
struct Mortal {
    deaths: Vec<u32>,
    died: AtomicU32,
    steps: AtomicU32,
}

impl Mortal {
    fn new(deaths: Vec<u32>) -> Self {
        Self { deaths, died: AtomicU32::new(0), steps: AtomicU32::new(0) }
    }
}

impl Trainer for Mortal {
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        let read = |bytes: &[u8]| (u32::from(bytes[0]), u64::from_le_bytes(bytes[1..9].try_into().unwrap()));
        let (mut step, mut state) = jobs[0].resume.map_or((0, 1), read);
        let death = self.deaths.get(self.died.load(Ordering::Relaxed) as usize).copied();
        while step < STEPS {
            step += 1;
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(u64::from(step));
            self.steps.fetch_add(1, Ordering::Relaxed);
            if death == Some(step) {
                self.died.fetch_add(1, Ordering::Relaxed);
                panic!("killed at step {step}");
            }
            control.checkpoint(0, step, &mut || [&[step as u8][..], &state.to_le_bytes()].concat());
            let report = StepReport { step, steps: STEPS, loss: 1.0 };
            if let ControlFlow::Break(()) = control.step(0, report) {
                return vec![Err(TrainError::Stopped)];
            }
        }
        let recipe = train::Recipe { seed: state, ..jobs[0].recipe.clone() };
        Jointly.train(base, &[TrainJob { recipe: &recipe, ..jobs[0] }], control)
    }
}

/// Moves the store's clock on, so that nobody has to wait for a retry.
async fn hurry(clock: Arc<ManualClock>) {
    loop {
        clock.advance_millis(10_000);
        tokio::time::sleep(std::time::Duration::from_millis(3)).await;
    }
}

async fn trained(deaths: Vec<u32>) -> (types::GenerationId, u32, u32) {
    let folder = tempfile::tempdir().unwrap();
    let clock = Arc::new(ManualClock::new(Timestamp(1_790_000_000_000)));
    let shared: Arc<dyn Clock> = clock.clone();
    let rig = Rig::over(Store::open(folder.path(), shared).await.unwrap());
    let hurry = tokio::spawn(hurry(clock));
    let mut settings = settings();
    settings.checkpoint_millis = 0;
    settings.lease_millis = 1 << 40;
    settings.max_attempts = 1000;
    let trainer = Arc::new(Mortal::new(deaths));
    let (worker, stop) = rig.start_with(settings, trainer.clone());
    let job = rig.upload(&user("ada"), 0..20, |_| "ahoy and welcome aboard".into()).await;
    let job = rig.until(&job, done).await;
    let outcome = job.outcome.unwrap_or_else(|| panic!("{:?}", job.error));
    stop.cancel();
    worker.await.unwrap().unwrap();
    hurry.abort();
    let left = walk(&folder.path().join("adapters"));
    assert_eq!(left, 2, "the published files, and no checkpoint");
    (outcome.generation.unwrap(), trainer.steps.load(Ordering::Relaxed), job.attempts)
}

fn walk(folder: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { walk(&path) } else { 1 }).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_kills_change_no_bit() {
    let (whole, steps, attempts) = trained(Vec::new()).await;
    assert_eq!((steps, attempts), (STEPS, 1));
    // Every death comes after the checkpoint before it, so that all fifty are reached.
    let mut random = StdRng::seed_from_u64(5);
    let mut deaths: Vec<u32> = (0..50).map(|_| random.random_range(1..=STEPS)).collect();
    deaths.sort_unstable();
    let (killed, steps, attempts) = trained(deaths).await;
    assert_eq!(attempts, 51);
    assert_eq!(killed, whole);
    assert_eq!(steps, STEPS + 50, "no step but the one it died in is done twice");
}
