//! Killed at any step and gone on from the checkpoint, a training comes to the same weights.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use model::BaseModel;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use store::Store;
use train::{Control, TrainError, TrainJob, Trained};
use types::{Clock, JobState, ManualClock, Timestamp};
use worker::{Jointly, Trainer};

use crate::rig::{Rig, done, settings, user, watched};

/// Steps of the training: six epochs of fifteen items in batches of four.
const STEPS: u32 = 24;

/// Trains, but dies at the steps in `deaths`, one after the other, before their checkpoint is written.
struct Mortal {
    deaths: Vec<u32>,
    died: AtomicU32,
    steps: AtomicU32,
}

impl Trainer for Mortal {
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        watched(base, jobs, control, &mut |job, report, inner| {
            self.steps.fetch_add(1, Ordering::Relaxed);
            let next = self.deaths.get(self.died.load(Ordering::Relaxed) as usize);
            if next == Some(&report.step) {
                self.died.fetch_add(1, Ordering::Relaxed);
                panic!("killed at step {}", report.step);
            }
            inner.step(job, report)
        })
    }
}

/// Moves the store's clock on, so that nobody has to wait for a retry.
async fn hurry(clock: Arc<ManualClock>) {
    loop {
        clock.advance_millis(10_000);
        tokio::time::sleep(std::time::Duration::from_millis(3)).await;
    }
}

/// Attempts without getting on after which these jobs are given up.
const CAP: u32 = 9;

async fn trained(trainer: Arc<dyn Trainer>) -> types::GenerationId {
    let folder = tempfile::tempdir().unwrap();
    let clock = Arc::new(ManualClock::new(Timestamp(1_790_000_000_000)));
    let shared: Arc<dyn Clock> = clock.clone();
    let rig = Rig::over(Store::open(folder.path(), shared).await.unwrap());
    let hurry = tokio::spawn(hurry(clock));
    let mut settings = settings();
    settings.checkpoint_millis = 0;
    settings.lease_millis = 1 << 40;
    settings.max_attempts = CAP;
    let (worker, stop) = rig.start_with(settings, trainer);
    let job = rig.upload(&user("ada"), 0..20, |_| "ahoy and welcome aboard".into()).await;
    let job = rig.until(&job, done).await;
    let outcome = job.outcome.unwrap_or_else(|| panic!("{:?}", job.error));
    stop.cancel();
    worker.await.unwrap().unwrap();
    hurry.abort();
    let left = walk(&folder.path().join("adapters"));
    assert_eq!(left, 2, "the published files, and no checkpoint");
    outcome.generation.unwrap()
}

fn walk(folder: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { walk(&path) } else { 1 }).sum()
}

/// The generation, the steps that were taken, and the deaths that were died.
async fn killed(deaths: Vec<u32>) -> (types::GenerationId, u32, u32) {
    let mortal = Arc::new(Mortal { deaths, died: AtomicU32::new(0), steps: AtomicU32::new(0) });
    let generation = trained(mortal.clone()).await;
    let [steps, died] = [&mortal.steps, &mortal.died].map(|count| count.load(Ordering::Relaxed));
    (generation, steps, died)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_kills_change_no_bit() {
    let (whole, steps, died) = killed(Vec::new()).await;
    assert_eq!((steps, died), (STEPS, 0));
    // Every death comes after the checkpoint before it, so that all fifty are reached.
    let mut random = StdRng::seed_from_u64(5);
    let mut deaths: Vec<u32> = (0..50).map(|_| random.random_range(1..=STEPS)).collect();
    deaths.sort_unstable();
    let (killed, steps, died) = killed(deaths).await;
    assert_eq!(died, 50, "more than {CAP} attempts, because it gets on between them");
    assert_eq!(killed, whole, "the id is a hash of the weights");
    assert_eq!(steps, STEPS + 50, "no step but the one it died in is done twice");
}

/// Steps of a history's second training, in which 21 items of 40 are learnt on from the head, and of the third, in which
/// all 32 are that are not held out.
const UPDATE: u32 = 36;
const WHOLE: u32 = 48;

/// Dies in an update and in the training of everything that takes its place; `deaths` are steps with those there are in
/// all. Returns the generation, the steps that were taken, and the tokens that went through them.
async fn killed_in_two_rounds(deaths: Vec<(u32, u32)>) -> (types::GenerationId, [u32; 2], u64) {
    struct Twice {
        deaths: Vec<(u32, u32)>,
        died: AtomicU32,
        /// Of the update, and of the whole.
        steps: [AtomicU32; 2],
        /// Without those of the steps that it died in, which nobody heard of.
        tokens: AtomicU64,
    }
    impl Trainer for Twice {
        fn train(
            &self,
            base: &BaseModel,
            jobs: &[TrainJob<'_>],
            control: &mut dyn Control,
        ) -> Vec<Result<Trained, TrainError>> {
            watched(base, jobs, control, &mut |job, report, inner| {
                let round = [UPDATE, WHOLE].iter().position(|steps| *steps == report.steps);
                if let Some(round) = round {
                    self.steps[round].fetch_add(1, Ordering::Relaxed);
                    let next = self.deaths.get(self.died.load(Ordering::Relaxed) as usize);
                    if next == Some(&(report.step, report.steps)) {
                        self.died.fetch_add(1, Ordering::Relaxed);
                        panic!("killed at step {} of {}", report.step, report.steps);
                    }
                    self.tokens.fetch_add(report.tokens, Ordering::Relaxed);
                }
                inner.step(job, report)
            })
        }
    }
    let clock = Arc::new(ManualClock::new(Timestamp(1_790_000_000_000)));
    let shared: Arc<dyn Clock> = clock.clone();
    let rig = Rig::over(Store::in_memory(shared).await.unwrap());
    let hurry = tokio::spawn(hurry(clock));
    let mut settings = settings();
    (settings.checkpoint_millis, settings.lease_millis, settings.max_attempts) = (0, 1 << 40, 1000);
    // Any change on old items is too much.
    (settings.growth.replay, settings.growth.min_replay, settings.growth.max_drift) = (0.1, 4, -1.0);
    let twice =
        Twice { deaths, died: AtomicU32::new(0), steps: Default::default(), tokens: AtomicU64::new(0) };
    let twice = Arc::new(twice);
    let (worker, stop) = rig.start_with(settings, twice.clone());
    let (ada, words) = (user("ada"), ["ahoy and welcome aboard", "farewell and mind the rope, dear friend"]);
    let job = rig.upload(&ada, 0..20, |_| words[0].into()).await;
    assert!(rig.until(&job, done).await.outcome.unwrap().published);
    let job = rig.upload(&ada, 20..40, |_| words[1].into()).await;
    let job = rig.until(&job, done).await;
    let outcome = job.outcome.unwrap_or_else(|| panic!("{:?}", job.error));
    assert!(outcome.published, "{}", outcome.reason);
    assert_eq!(twice.died.load(Ordering::Relaxed) as usize, twice.deaths.len());
    stop.cancel();
    worker.await.unwrap().unwrap();
    hurry.abort();
    assert_eq!(
        outcome.trained_tokens,
        twice.tokens.load(Ordering::Relaxed),
        "what was done before a death counts"
    );
    let progress = rig.store.progress(&ada, None, 9).await.unwrap().unwrap().points.entries;
    let course: Vec<_> = progress.iter().map(|point| point.from_scratch).collect();
    assert_eq!(course, [true, false, true]);
    assert_eq!(progress[1].tokens + progress[2].tokens, outcome.trained_tokens);
    let steps = [0, 1].map(|round: usize| twice.steps[round].load(Ordering::Relaxed));
    (outcome.generation.unwrap(), steps, progress[1].tokens)
}

/// Both rounds write their checkpoints to the same place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_in_the_second_round_change_no_bit_either() {
    let (whole, steps, tokens) = killed_in_two_rounds(Vec::new()).await;
    assert_eq!(steps, [UPDATE, WHOLE]);
    // Before the second round has a checkpoint, in its middle, and at its end.
    let deaths = [(20, UPDATE), (1, WHOLE), (2, WHOLE), (17, WHOLE), (WHOLE, WHOLE)];
    let (killed, steps, killed_tokens) = killed_in_two_rounds(deaths.to_vec()).await;
    assert_eq!(killed, whole, "the id is a hash of the weights");
    assert_eq!(
        steps,
        [UPDATE + 1, WHOLE + 4],
        "the update is not done again, nor is any step but those it died in"
    );
    assert_eq!(killed_tokens, tokens);
}

/// Without checkpoints every attempt begins anew, and what the others had done is counted all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_dead_attempts_have_cost_is_counted() {
    let cost = async |deaths: Vec<u32>| {
        let clock = Arc::new(ManualClock::new(Timestamp(1_790_000_000_000)));
        let shared: Arc<dyn Clock> = clock.clone();
        let rig = Rig::over(Store::in_memory(shared).await.unwrap());
        let hurry = tokio::spawn(hurry(clock));
        let mut settings = settings();
        (settings.checkpoint_millis, settings.lease_millis) = (u64::MAX, 1 << 40);
        let mortal = Arc::new(Mortal { deaths, died: AtomicU32::new(0), steps: AtomicU32::new(0) });
        let (worker, stop) = rig.start_with(settings, mortal);
        let job = rig.upload(&user("ada"), 0..20, |_| "ahoy and welcome aboard".into()).await;
        let outcome = rig.until(&job, done).await.outcome.unwrap();
        stop.cancel();
        worker.await.unwrap().unwrap();
        hurry.abort();
        let progress = rig.store.progress(&user("ada"), None, 9).await.unwrap().unwrap();
        assert_eq!(progress.from_scratch.tokens, outcome.trained_tokens);
        (outcome.trained_tokens, outcome.seconds, progress.from_scratch.seconds)
    };
    let (whole, ..) = cost(Vec::new()).await;
    let (more, seconds, booked) = cost(vec![STEPS]).await;
    assert!(more > whole * 19 / 10 && more < 2 * whole, "all but the last step twice: {more}, {whole} once");
    assert_eq!(seconds, booked);
}

/// With the last attempt the job ends, and its user can read why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_attempt_says_why() {
    let clock = Arc::new(ManualClock::new(Timestamp(1_790_000_000_000)));
    let shared: Arc<dyn Clock> = clock.clone();
    let rig = Rig::over(Store::in_memory(shared).await.unwrap());
    let mut settings = settings();
    settings.lease_millis = 1 << 40;
    settings.max_attempts = 3;
    let mortal = Mortal { deaths: vec![1; 9], died: AtomicU32::new(0), steps: AtomicU32::new(0) };
    let (worker, stop) = rig.start_with(settings, Arc::new(mortal));
    let job = rig.upload(&user("ada"), 0..20, |_| "ahoy and welcome aboard".into()).await;
    for attempt in 1..3 {
        let waits = rig.until(&job, |job| job.attempts == attempt && job.state == JobState::Queued).await;
        assert_eq!(waits.error.as_deref(), Some("training panicked"));
        let wait = 5_000 << (attempt - 1);
        assert_eq!(waits.retry_at, Some(clock.now().plus_millis(wait)), "twice as late every time");
        clock.advance_millis(wait);
        rig.wake.notify_one();
    }
    // The clock stands still: the job ends with the attempt, not when the next would be due.
    let failed = rig.until(&job, done).await;
    assert_eq!((failed.state, failed.attempts), (JobState::Failed, 3));
    assert_eq!(failed.error.as_deref(), Some("gave up after 3 attempts; the last one: training panicked"));
    stop.cancel();
    worker.await.unwrap().unwrap();
}

/// Attempts that get no further than the one before count up to the cap, wherever they die; those that did get further
/// before do not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_get_on_is_given_up() {
    let clock = Arc::new(ManualClock::new(Timestamp(1_790_000_000_000)));
    let shared: Arc<dyn Clock> = clock.clone();
    let rig = Rig::over(Store::in_memory(shared).await.unwrap());
    let hurry = tokio::spawn(hurry(clock));
    let mut settings = settings();
    (settings.checkpoint_millis, settings.lease_millis, settings.max_attempts) = (0, 1 << 40, 3);
    let deaths = vec![2, 4, 6, 8, 9, 9, 9, 9, 9];
    let mortal = Arc::new(Mortal { deaths, died: AtomicU32::new(0), steps: AtomicU32::new(0) });
    let (worker, stop) = rig.start_with(settings, mortal.clone());
    let job = rig.upload(&user("ada"), 0..20, |_| "ahoy and welcome aboard".into()).await;
    let failed = rig.until(&job, done).await;
    assert_eq!((failed.state, failed.attempts), (JobState::Failed, 3));
    assert_eq!(mortal.died.load(Ordering::Relaxed), 4 + 3, "three times where it gets no further");
    stop.cancel();
    worker.await.unwrap().unwrap();
    hurry.abort();
}

/// Leaves a checkpoint of something else behind when it first dies.
#[derive(Default)]
struct Litters {
    given: std::sync::Mutex<Vec<Option<Vec<u8>>>>,
}

impl Trainer for Litters {
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        let resume = jobs[0].resume.map(<[u8]>::to_vec);
        let first = {
            let mut given = self.given.lock().unwrap();
            given.push(resume);
            given.len() == 1
        };
        if first {
            control.checkpoint(0, 1, &mut || b"another run's".to_vec());
            panic!("killed");
        }
        Jointly.train(base, jobs, control)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_of_another_run_is_left_aside() {
    let litters = Arc::new(Litters::default());
    let generation = trained(litters.clone()).await;
    let given = litters.given.lock().unwrap().clone();
    assert_eq!(given, [None, Some(b"another run's".to_vec()), None]);
    assert_eq!(generation, killed(Vec::new()).await.0);
}
