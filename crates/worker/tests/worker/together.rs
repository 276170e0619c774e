//! Jobs of several users trained at once: what each comes to is what it comes to alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use model::BaseModel;
use train::{Control, TrainError, TrainJob, Trained};
use types::{AdapterKind, GenerationId, JobState, TrainingOptions};
use worker::{Jointly, Trainer};

use crate::rig::{Rig, done, item, settings, user};

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
