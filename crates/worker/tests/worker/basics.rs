//! The loop from history to head.

use types::JobState;

use crate::rig::{Rig, done, settings, slow, user};

#[tokio::test]
async fn history_becomes_a_better_head_and_only_a_better_one() {
    let fixture = Rig::new().await;
    let (worker, stop) = fixture.start(settings());
    let ada = user("ada");
    let job = fixture.upload(&ada, 0..20, |_| "ahoy and welcome aboard".into()).await;
    let job = fixture.until(&job, done).await;
    let outcome = job.outcome.unwrap();
    assert_eq!(job.state, JobState::Succeeded);
    assert!(outcome.published, "{}", outcome.reason);
    let gate = outcome.gate.unwrap();
    assert!(gate.new_bits < gate.base_bits && gate.head_bits.is_none());
    assert!(gate.p_base.unwrap() <= 0.05 && gate.p_head.is_none());
    assert_eq!((gate.train_items, gate.heldout_items), (15, 5));
    let head = fixture.store.head(&ada).await.unwrap().unwrap();
    assert_eq!(Some(head.id), outcome.generation);
    stop.cancel();
    worker.await.unwrap().unwrap();
    // A head is announced after its job has ended: the count holds when the worker has stopped.
    assert_eq!(fixture.announced.lock().unwrap().as_slice(), [(ada.clone(), head.id)]);

    // More of the same, hardly learnt: it is no better than the head, which stays.
    let mut hasty = settings();
    hasty.growth.full_every = 0;
    hasty.recipe.epochs = 1;
    hasty.recipe.learning_rate = 1e-5;
    let (worker, stop) = fixture.start(hasty);
    let job = fixture.upload(&ada, 20..22, |_| "ahoy and welcome aboard".into()).await;
    let outcome = fixture.until(&job, done).await.outcome.unwrap();
    assert!(!outcome.published, "{}", outcome.reason);
    assert!(outcome.reason.contains("the current adapter"), "{}", outcome.reason);
    assert_eq!(fixture.store.head(&ada).await.unwrap().unwrap().id, head.id);
    stop.cancel();
    worker.await.unwrap().unwrap();
}

#[tokio::test]
async fn too_little_history_is_said_so() {
    let fixture = Rig::new().await;
    let (worker, stop) = fixture.start(settings());
    let job = fixture.upload(&user("bob"), 0..5, |_| "hello".into()).await;
    let outcome = fixture.until(&job, done).await.outcome.unwrap();
    assert!(!outcome.published);
    assert_eq!(outcome.reason, "not trained: 5 items, at least 6 are needed");
    stop.cancel();
    worker.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_stopped_worker_hands_its_job_back() {
    let fixture = Rig::new().await;
    let (worker, stop) = fixture.start(slow());
    let job = fixture.upload(&user("eve"), 0..200, |at| format!("welcome number {at}")).await;
    fixture.until(&job, |job| job.progress.is_some()).await;
    stop.cancel();
    worker.await.unwrap().unwrap();
    let handed_back = fixture.store.job(&job.adapter.tenant, &job.id).await.unwrap().unwrap();
    assert_eq!(handed_back.state, JobState::Queued);
    let (worker, stop) = fixture.start(settings());
    let job = fixture.until(&job, done).await;
    assert_eq!(job.state, JobState::Succeeded);
    stop.cancel();
    worker.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_user_erased_during_training_does_not_come_back() {
    let fixture = Rig::new().await;
    let (worker, stop) = fixture.start(slow());
    let eve = user("eve");
    let job = fixture.upload(&eve, 0..200, |at| format!("welcome number {at}")).await;
    fixture.until(&job, |job| job.progress.is_some()).await;
    assert!(fixture.store.erase_user(&eve).await.unwrap());
    // The next job shows that the worker has given the first one up.
    let other = fixture.upload(&user("bob"), 0..3, |_| "hi".into()).await;
    fixture.until(&other, done).await;
    assert!(fixture.store.user(&eve).await.unwrap().is_none());
    assert!(fixture.announced.lock().unwrap().is_empty());
    stop.cancel();
    worker.await.unwrap().unwrap();
}
