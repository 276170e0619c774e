//! Histories that shrink: whoever forgets has the adapter of one who never knew, or none.

use std::sync::Arc;

use store::{Manifest, Selection, Store, item_hash};
use types::{
    AdapterId, AdapterKind, GenerationId, Job, JobState, NewItem, Provenance, SystemClock, TrainingOptions,
};

use crate::rig::{Rig, done, item, settings, slow, user};

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

/// The item that was held out to judge the adapter, and that no weight has seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forgotten_judge_was_never_there() {
    forgets(Selection::Item("i29".parse().unwrap()), |at| at != 29).await;
}

/// What a job asks for: all that a tenant or server would have otherwise.
fn asked() -> TrainingOptions {
    TrainingOptions {
        kind: Some(AdapterKind::Dora),
        rank: Some(16),
        dropout: Some(0.1),
        seed: Some(7),
        ..TrainingOptions::default()
    }
}

/// Uploads items for a job with hyper-parameters of its own.
async fn upload(rig: &Rig, id: &AdapterId, items: Vec<NewItem>, training: &TrainingOptions) -> Job {
    let appended = rig.store.append_for(id, None, [0; 32], items, Some(training.clone())).await.unwrap();
    rig.wake.notify_one();
    appended.job.unwrap()
}

/// Uploads, and waits until that is the head.
async fn taught(rig: &Rig, id: &AdapterId, items: Vec<NewItem>, training: &TrainingOptions) -> GenerationId {
    let job = upload(rig, id, items, training).await;
    let outcome = rig.until(&job, done).await.outcome.unwrap();
    assert!(outcome.published, "{}", outcome.reason);
    outcome.generation.unwrap()
}

fn greetings(range: std::ops::Range<usize>, left_out: usize) -> Vec<NewItem> {
    let all = range.filter(|at| *at != left_out);
    all.map(|at| item(at, format!("ahoy guest {at} and welcome aboard"))).collect()
}

/// Forgets item 7, and returns the generation that is head when what is left has been learnt.
async fn relearnt(rig: &Rig, id: &AdapterId) -> GenerationId {
    let selection = Selection::Item("i7".parse().unwrap());
    let forgotten = rig.store.forget_items(id, &selection).await.unwrap().unwrap();
    rig.wake.notify_one();
    let outcome = rig.until(&forgotten.job.unwrap(), done).await.outcome.unwrap();
    assert!(outcome.published, "{}", outcome.reason);
    rig.head(id).await.unwrap()
}

/// An adapter that jobs have asked hyper-parameters for is learnt again with these, whatever tenant and server have: in
/// one training, after updates, and where the job that asked for them was still under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_learnt_again_is_learnt_as_before() {
    let rig = Rig::new().await;
    let (ada, bob, cem, dot, eve) = (user("ada"), user("bob"), user("cem"), user("dot"), user("eve"));
    // Taken by a worker that never says anything more.
    upload(&rig, &dot, greetings(0..30, 99), &asked()).await;
    assert!(rig.store.claim("another", 1 << 40, 9).await.unwrap().is_some());
    let mut settings = settings();
    settings.growth.max_drift = f64::INFINITY;
    let (worker, stop) = rig.start(settings);
    assert_eq!(rig.head(&dot).await, None);
    let under_way = relearnt(&rig, &dot).await;
    let never = taught(&rig, &bob, greetings(0..30, 7), &asked()).await;
    assert_eq!(under_way, never, "the id is a hash of the weights");
    taught(&rig, &ada, greetings(0..30, 99), &asked()).await;
    assert_eq!(relearnt(&rig, &ada).await, never);
    // Negative control: without the seed, or with nothing but the seed, it is another adapter.
    let other_seed = TrainingOptions { seed: None, ..asked() };
    let seed_alone = TrainingOptions { seed: Some(7), ..TrainingOptions::default() };
    for other in [other_seed, seed_alone] {
        assert!(rig.store.erase_user(&bob).await.unwrap());
        assert_ne!(taught(&rig, &bob, greetings(0..30, 7), &other).await, never);
    }

    // A chain: what its last link asked for counts.
    let changed = |at| item(at, "farewell and mind the rope, dear friend".into());
    let gentle = TrainingOptions { dropout: Some(0.0), ..asked() };
    let first = taught(&rig, &cem, greetings(0..20, 99), &gentle).await;
    let second = taught(&rig, &cem, (20..50).map(changed).collect(), &asked()).await;
    let record = rig.store.generation(&cem, &second).await.unwrap().unwrap();
    let course = serde_json::from_value::<Provenance>(record.meta).unwrap().training;
    assert_eq!((record.parent, course.from_scratch, course.updates), (Some(first), false, 1));
    let shorter = || greetings(0..20, 7).into_iter().chain((20..50).map(changed)).collect();
    let never = taught(&rig, &eve, shorter(), &asked()).await;
    assert_eq!(relearnt(&rig, &cem).await, never);
    assert!(rig.store.erase_user(&eve).await.unwrap());
    assert_ne!(taught(&rig, &eve, shorter(), &gentle).await, never);
    stop.cancel();
    worker.await.unwrap().unwrap();
}

/// With what is left nobody would be trained, so nobody has an adapter, whether its weights have seen what is gone or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_may_be_too_little() {
    let (learnt, judges) = (("i3", "i9"), ("i15", "i19"));
    for (from, to) in [learnt, judges] {
        let folder = tempfile::tempdir().unwrap();
        let open = async || Store::open(folder.path(), Arc::new(SystemClock)).await.unwrap();
        let rig = Rig::over(open().await);
        let mut settings = settings();
        settings.min_items = 16;
        let (worker, stop) = rig.start(settings.clone());
        let ada = user("ada");
        let job = rig.upload(&ada, 0..20, |_| "ahoy and welcome aboard".into()).await;
        assert!(rig.until(&job, done).await.outcome.unwrap().published);
        let selection = Selection::Items(Some(from.parse().unwrap()), Some(to.parse().unwrap()));
        let forgotten = rig.store.forget_items(&ada, &selection).await.unwrap().unwrap();
        assert_eq!(forgotten.head, None, "{from}");
        assert_eq!(rig.head(&ada).await, None, "from the answer on, not from the job on");
        rig.wake.notify_one();
        let outcome = rig.until(&forgotten.job.unwrap(), done).await.outcome.unwrap();
        assert!(outcome.reason.starts_with("not trained: "), "{}", outcome.reason);
        stop.cancel();
        worker.await.unwrap().unwrap();
        rig.store.close().await;
        drop(rig);
        let again = Rig::over(open().await);
        assert_eq!(again.head(&ada).await, None, "{from}");
        assert_eq!(again.store.generations(&ada).await.unwrap(), []);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forgotten_history_was_never_there() {
    let rig = Rig::new().await;
    let words = |_| "ahoy and welcome aboard".to_owned();
    let (ada, bob) = (user("ada"), user("bob"));
    let (worker, stop) = rig.start(settings());
    let job = rig.upload(&ada, 0..30, words).await;
    assert!(rig.until(&job, done).await.outcome.unwrap().published);
    let old = rig.head(&ada).await.unwrap();
    stop.cancel();
    worker.await.unwrap().unwrap();

    // In the middle of the next training.
    let (worker, stop) = rig.start(slow());
    let running = rig.upload(&ada, 30..200, |at| format!("welcome number {at}")).await;
    rig.until(&running, |job| job.progress.is_some()).await;
    let forgotten = rig.store.forget_items(&ada, &Selection::All).await.unwrap().unwrap();
    assert_eq!((forgotten.head, &forgotten.generations[..], forgotten.job), (None, &[old][..], None));
    let other = rig.upload(&user("cem"), 0..3, |_| "hi".into()).await;
    rig.until(&other, done).await;
    stop.cancel();
    worker.await.unwrap().unwrap();
    assert_eq!(rig.head(&ada).await, None);
    let ended = rig.store.job(&ada.tenant, &running.id).await.unwrap().unwrap();
    assert_eq!((ended.state, ended.outcome), (JobState::Cancelled, None));
    assert_eq!(rig.announced.lock().unwrap().len(), 1, "the first one only");

    // Another life begins as anybody's does.
    let (worker, stop) = rig.start(settings());
    for user in [&ada, &bob] {
        let items = (0..20).map(|at| item(at, format!("ahoy guest {at} and welcome aboard"))).collect();
        let job = rig.upload_items(user, items).await;
        let outcome = rig.until(&job, done).await.outcome.unwrap();
        assert!(outcome.published, "{}", outcome.reason);
    }
    assert_eq!(rig.head(&ada).await, rig.head(&bob).await, "the id is a hash of the weights");
    assert_ne!(rig.head(&ada).await, Some(old));
    stop.cancel();
    worker.await.unwrap().unwrap();
}
