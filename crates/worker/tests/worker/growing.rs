//! Histories that grow and shrink: updates, full trainings, forgetting.

use store::{Demand, Manifest, Selection, item_hash};
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

/// Whoever forgets an item has, to the bit, the adapter of one who never had it.
async fn forgets(selection: Selection, kept: impl Fn(usize) -> bool) {
    let rig = Rig::new().await;
    let (worker, stop) = rig.start(settings());
    let output = |at: usize| format!("ahoy guest {at} and welcome aboard");
    let (ada, bob) = (user("ada"), user("bob"));
    let job = rig.upload(&ada, 0..30, output).await;
    let before = rig.until(&job, done).await.outcome.unwrap();
    assert!(before.published, "{}", before.reason);
    let old = rig.head(&ada).await.unwrap();

    let forgotten = rig.store.forget_items(&ada, &selection).await.unwrap().unwrap();
    assert_eq!((forgotten.head, forgotten.generations.as_slice()), (None, &[old][..]));
    assert_eq!(rig.head(&ada).await, None, "what has learnt from it does not serve");
    rig.wake.notify_one();
    let after = rig.until(&forgotten.job.unwrap(), done).await.outcome.unwrap();
    assert!(after.published, "{}", after.reason);

    let items = (0..30).filter(|at| kept(*at)).map(|at| crate::rig::item(at, output(at))).collect();
    let job = rig.upload_items(&bob, items).await;
    assert!(rig.until(&job, done).await.outcome.unwrap().published);
    let (hers, his) = (rig.head(&ada).await.unwrap(), rig.head(&bob).await.unwrap());
    assert_eq!(hers, his, "the id is a hash of the weights");
    let files = async |id| rig.store.fetch(id, &hers).await.unwrap();
    assert_eq!(files(&ada).await, files(&bob).await);
    // Negative control: with the item it is another adapter.
    assert_ne!(hers, old);
    assert!(rig.store.fetch(&ada, &old).await.is_err());
    let Some(Manifest::Items(hashes)) = rig.store.manifest(&ada, &hers).await.unwrap() else { panic!() };
    let left = rig.store.all_history(&ada).await.unwrap();
    assert!(hashes.iter().all(|hash| left.iter().any(|item| item_hash(item) == *hash)));
    stop.cancel();
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forgotten_item_was_never_there() {
    forgets(Selection::Item("i7".parse().unwrap()), |at| at != 7).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forgotten_range_was_never_there() {
    let selection = Selection::Items(Some("i3".parse().unwrap()), Some("i6".parse().unwrap()));
    forgets(selection, |at| !(3..=6).contains(&at)).await;
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
