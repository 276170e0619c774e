//! A long training gives way to others that wait, and goes on after them to the same weights.
#![expect(clippy::disallowed_methods, reason = "training that takes its time")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use model::BaseModel;
use train::{Control, TrainError, TrainJob, Trained};
use types::GenerationId;
use worker::Trainer;

use crate::rig::{Rig, done, settings, user, watched};

/// Steps of either user's training.
const STEPS: u32 = 24;

/// Trains slowly, and counts the steps and the claims.
#[derive(Default)]
struct Slow {
    steps: AtomicU32,
    claims: AtomicU32,
}

impl Trainer for Slow {
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        self.claims.fetch_add(1, Ordering::Relaxed);
        watched(base, jobs, control, &mut |job, report, inner| {
            self.steps.fetch_add(1, Ordering::Relaxed);
            // There are several looks at who waits in these.
            std::thread::sleep(Duration::from_millis(50));
            inner.step(job, report)
        })
    }
}

/// Who was published, and the steps and claims that it took, where Bob comes when Ada's training has begun.
async fn published(turn_millis: i64) -> (BTreeMap<String, GenerationId>, [u32; 2]) {
    let rig = Rig::new().await;
    let mut settings = settings();
    settings.lease_millis = 1_200;
    // Nothing is written down but where it gives way.
    settings.checkpoint_millis = 1 << 40;
    settings.policy.turn_millis = turn_millis;
    let slow = Arc::new(Slow::default());
    let (worker, stop) = rig.start_with(settings, slow.clone());
    let ada = rig.upload(&user("ada"), 0..20, |_| "ahoy and welcome aboard".into()).await;
    while slow.steps.load(Ordering::Relaxed) < 3 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let bob = rig.upload(&user("bob"), 0..20, |_| "mind the rope, dear friend".into()).await;
    for job in [&ada, &bob] {
        let job = rig.until(job, done).await;
        assert_eq!(job.attempts, 1, "to give way is no failure");
    }
    stop.cancel();
    worker.await.unwrap().unwrap();
    let announced = rig.announced.lock().unwrap().clone();
    let published =
        announced.into_iter().map(|(id, generation)| (id.owner.to_string(), generation)).collect();
    (published, [&slow.steps, &slow.claims].map(|count| count.load(Ordering::Relaxed)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_training_gives_way_and_goes_on_to_the_same_weights() {
    let (in_turns, [steps, claims]) = published(0).await;
    let (one_by_one, alone) = published(1 << 40).await;
    assert_eq!(alone, [2 * STEPS, 2], "without turns each is trained in one go");
    // Ada gives way as soon as Bob waits, and he to her.
    assert!(claims > 3, "{claims} claims");
    assert_eq!(steps, 2 * STEPS, "no step is done twice");
    assert_eq!(in_turns.len(), 2);
    assert_eq!(in_turns, one_by_one, "the same weights");
}
