//! Histories that shrink: whoever forgets has the adapter of one who never knew, or none.

use std::sync::Arc;

use store::{Manifest, Selection, Store, item_hash};
use types::{JobState, SystemClock};

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
