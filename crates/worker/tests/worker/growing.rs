//! Histories that grow: updates, full trainings, hyper-parameters.

use store::{Demand, Manifest};
use types::{AdapterId, JobState, Provenance, TrainingOptions};

use crate::rig::{Rig, done, settings, user};

async fn manifest_size(rig: &Rig, id: &AdapterId) -> usize {
    let head = rig.head(id).await.unwrap();
    match rig.store.manifest(id, &head).await.unwrap().unwrap() {
        Manifest::Items(hashes) => hashes.len(),
        Manifest::Unknown => panic!("unknown"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_history_that_grows_updates_its_adapter() {
    let rig = Rig::new().await;
    let mut settings = settings();
    settings.growth.full_every = 1;
    settings.growth.min_replay = 4;
    settings.growth.max_drift = 1.0;
    let (worker, stop) = rig.start(settings);
    let ada = user("ada");
    let words = |_| "ahoy and welcome aboard".to_owned();
    let mut published = 0;
    for end in [20, 40, 60] {
        let begin = end - 20;
        let job = rig.upload(&ada, begin..end, words).await;
        let outcome = rig.until(&job, done).await.outcome.unwrap();
        published += usize::from(outcome.published);
        if end == 20 {
            assert!(outcome.published, "{}", outcome.reason);
            assert_eq!(manifest_size(&rig, &ada).await, 15);
        }
    }
    let progress = rig.store.progress(&ada, None, 10).await.unwrap().unwrap();
    let points = &progress.points.entries;
    assert_eq!(points.iter().map(|point| point.items).collect::<Vec<_>>(), [20, 40, 60]);
    assert_eq!((points[0].from_scratch, points[0].new_items), (true, 15));
    // 40 items, 8 held out, 15 known: 17 new ones, and as many old ones as there are.
    assert_eq!((points[1].from_scratch, points[1].new_items, points[1].replayed_items), (false, 17, 15));
    assert!(points[1].tokens > 0 && points[1].seconds > 0.0 && points[1].new_bits.is_some());
    // One update at most: if it was published, the whole history is next.
    assert_eq!(points[2].from_scratch, points[1].generation.is_some());
    assert_eq!(points.iter().filter(|point| point.generation.is_some()).count(), published);
    assert_eq!(progress.updates.trainings + progress.from_scratch.trainings, 3);
    stop.cancel();
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_that_drifts_learns_everything() {
    let rig = Rig::new().await;
    let mut settings = settings();
    // Any change on old items is too much.
    settings.growth.max_drift = -1.0;
    let (worker, stop) = rig.start(settings);
    let job = rig.upload(&user("ada"), 0..20, |_| "ahoy and welcome aboard".into()).await;
    let first = rig.until(&job, done).await.outcome.unwrap();
    let job = rig.upload(&user("ada"), 20..40, |_| "ahoy and welcome aboard".into()).await;
    let second = rig.until(&job, done).await.outcome.unwrap();
    let progress = rig.store.progress(&user("ada"), None, 10).await.unwrap().unwrap();
    assert!(progress.points.entries[1].from_scratch, "it was an update first");
    let gate = second.gate.unwrap();
    assert_eq!(gate.train_items, 32);
    assert!(second.trained_tokens > 3 * first.trained_tokens, "both trainings count");
    stop.cancel();
    worker.await.unwrap().unwrap();
}

/// Items that come late with an early time push what the head has learnt into the newest slice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_is_not_judged_by_what_it_has_learnt() {
    let rig = Rig::new().await;
    let (worker, stop) = rig.start(settings());
    let ada = user("ada");
    let job = rig.upload(&ada, 100..120, |_| "ahoy and welcome aboard".into()).await;
    let first = rig.until(&job, done).await.outcome.unwrap();
    assert!(first.published, "{}", first.reason);
    let job = rig.upload(&ada, 0..20, |_| "ahoy and welcome aboard".into()).await;
    let outcome = rig.until(&job, done).await.outcome.unwrap();
    let gate = outcome.gate.unwrap();
    // The newest eight of forty, of which the head has learnt three.
    assert_eq!((gate.heldout_items, gate.head_items), (8, Some(5)));
    assert!(outcome.reason.contains("on the 5 items that it has not learnt"), "{}", outcome.reason);
    stop.cancel();
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hyper_parameters_come_from_job_tenant_and_server() {
    let rig = Rig::new().await;
    let mut settings = settings();
    let tenant = TrainingOptions { rank: Some(4), epochs: Some(7), ..TrainingOptions::default() };
    settings.tenants.insert(user("ada").tenant, tenant);
    let seed = settings.recipe.seed;
    let (worker, stop) = rig.start(settings);
    let ada = user("ada");
    let job = rig.upload(&ada, 0..30, |_| "ahoy and welcome aboard".into()).await;
    let outcome = rig.until(&job, done).await.outcome.unwrap();
    assert!(outcome.published, "{}", outcome.reason);
    let recipe = async || {
        let record = rig.store.head(&ada).await.unwrap().unwrap();
        serde_json::from_value::<Provenance>(record.meta).unwrap()
    };
    let used = recipe().await;
    assert_eq!((used.recipe.rank, used.recipe.alpha, used.recipe.epochs), (Some(4), Some(4.0), Some(7)));
    assert_eq!((used.seed, used.gate), (seed, outcome.gate));
    let learnt = used.history.unwrap();
    assert_eq!(
        (learnt.first.as_str(), learnt.last.as_str(), learnt.items),
        ("i0", "i23", 24),
        "six are held out"
    );
    assert_eq!((used.training.from_scratch, used.training.new_items), (true, 24));

    let job = async |options: TrainingOptions| {
        let demand =
            Demand { urgent: true, from_scratch: true, training: Some(options), ..Demand::default() };
        let job = rig.store.enqueue(&ada, &demand).await.unwrap().unwrap();
        rig.wake.notify_one();
        rig.until(&job, done).await
    };
    // One that is beaten by the head would not show its recipe: this one starts without a head.
    rig.store.set_head(&ada, None, rig.head(&ada).await).await.unwrap();
    let asked = TrainingOptions { rank: Some(2), learning_rate: Some(2e-2), ..TrainingOptions::default() };
    let ended = job(asked).await;
    assert!(ended.outcome.as_ref().unwrap().published, "{ended:?}");
    let used = recipe().await;
    assert_eq!((used.recipe.rank, used.recipe.epochs), (Some(2), Some(7)));
    assert_eq!(used.recipe.learning_rate, Some(2e-2));
    stop.cancel();
    worker.await.unwrap().unwrap();
    assert_eq!(ended.state, JobState::Succeeded);
}
