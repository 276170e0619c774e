//! Training on hold: it stops at its next step, and comes to the same bits in the end.
#![expect(clippy::disallowed_methods, reason = "a training thread that waits to be stopped")]

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use model::BaseModel;
use store::{PauseScope, Store};
use tokio::runtime::Handle;
use train::{Control, TrainError, TrainJob, Trained};
use types::{GenerationId, JobState};
use worker::Trainer;

use crate::rig::{Rig, done, settings, user, watched};

/// Steps of the training: six epochs of fifteen items in batches of four.
const STEPS: u32 = 24;

/// Trains, and sets one pause after the other, each at its step, from within.
struct Paused {
    store: Store,
    runtime: Handle,
    pauses: Vec<(u32, PauseScope)>,
    set: AtomicU32,
    steps: AtomicU32,
}

impl Trainer for Paused {
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        watched(base, jobs, control, &mut |job, report, inner| {
            self.steps.fetch_add(1, Ordering::Relaxed);
            let next = self.pauses.get(self.set.load(Ordering::Relaxed) as usize);
            let Some((_, scope)) = next.filter(|(step, _)| *step == report.step) else {
                return inner.step(job, report);
            };
            self.set.fetch_add(1, Ordering::Relaxed);
            let by = user("ada").tenant;
            self.runtime.block_on(self.store.pause(scope, &by, None)).unwrap();
            // The word comes by the heartbeat.
            while inner.step(job, report).is_continue() {
                std::thread::sleep(Duration::from_millis(2));
            }
            ControlFlow::Break(())
        })
    }
}

/// What a training comes to that is paused at these steps, and the steps it took in all.
async fn trained(pauses: Vec<(u32, PauseScope)>) -> (GenerationId, u32) {
    let rig = Rig::new().await;
    let trainer = Arc::new(Paused {
        store: rig.store.clone(),
        runtime: Handle::current(),
        pauses: pauses.clone(),
        set: AtomicU32::new(0),
        steps: AtomicU32::new(0),
    });
    let (worker, stop) = rig.start_with(settings(), trainer.clone());
    let ada = user("ada");
    let job = rig.upload(&ada, 0..20, |_| "ahoy and welcome aboard".into()).await;
    for (at, (_, scope)) in pauses.iter().enumerate() {
        let begun = || trainer.set.load(Ordering::Relaxed) as usize > at;
        let waits = rig.until(&job, |job| begun() && job.state == JobState::Queued).await;
        assert!(waits.paused && waits.attempts == 0, "a pause is no attempt: {waits:?}");
        // The worker has its chance to take it up all the same.
        rig.wake.notify_one();
        let other = rig.store.claim("another", 1000, 9).await.unwrap();
        assert_eq!(other, None, "{scope:?}");
        rig.store.resume(scope).await.unwrap();
        rig.wake.notify_one();
    }
    let outcome = rig.until(&job, done).await.outcome.unwrap();
    assert!(outcome.published, "{}", outcome.reason);
    stop.cancel();
    worker.await.unwrap().unwrap();
    (outcome.generation.unwrap(), trainer.steps.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_changes_no_bit() {
    let (whole, steps) = trained(Vec::new()).await;
    assert_eq!(steps, STEPS);
    let ada = user("ada");
    let scopes = [
        (1, PauseScope::Server),
        (7, PauseScope::Tenant(ada.tenant.clone())),
        (8, PauseScope::User(ada.tenant.clone(), ada.user().unwrap().clone())),
        (23, PauseScope::Server),
    ];
    let (paused, steps) = trained(scopes.to_vec()).await;
    assert_eq!(paused, whole, "the id is a hash of the weights");
    assert_eq!(steps, STEPS, "no step is done twice: each goes on from its checkpoint");
}
