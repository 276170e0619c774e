//! Histories that grow: updates, full trainings, hyper-parameters.

use peft::AdapterWeights;
use personalize::example;
use store::{Demand, Manifest};
use train::{Loss, evaluate};
use types::{AdapterId, JobState, NewItem, Provenance, Timestamp, TrainingOptions};

use crate::rig::{Rig, done, item, settings, user};

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

/// Bits per answer token of the user's items with these places under the user's head.
async fn bits(rig: &Rig, id: &AdapterId, places: &[i64]) -> f64 {
    let head = rig.head(id).await.unwrap();
    let files = rig.store.fetch(id, &head).await.unwrap();
    let weights = AdapterWeights::parse(&files.config, &files.weights, &rig.base.shape()).unwrap();
    let all = rig.store.all_history(id).await.unwrap();
    let chosen = all.iter().filter(|item| places.contains(&item.created_at.0));
    let examples: Vec<_> = chosen.map(|item| example(&rig.tokenizer, item).unwrap()).collect();
    assert_eq!(examples.len(), places.len());
    let losses = evaluate(&rig.base, &[Some(&weights)], &examples, 2048, 512, &mut || ()).unwrap();
    Loss::bits_per_token(&losses[0])
}

/// A held-out item that is too long to have a loss takes nobody's place: what the head has learnt of the others is told
/// item by item.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_item_without_a_loss_shifts_no_other() {
    let rig = Rig::new().await;
    let (worker, stop) = rig.start(settings());
    let ada = user("ada");
    // What is learnt is not quite what is held out, so that it shows which items the head is compared on.
    let words =
        |at: usize| if at < 115 { "ahoy and welcome aboard" } else { "ahoy and welcome aboard, my dear" };
    let job = rig.upload(&ada, 100..120, |at| words(at).into()).await;
    assert!(rig.until(&job, done).await.outcome.unwrap().published);
    let mut late: Vec<_> = (0..20).map(|at| item(at, words(at).into())).collect();
    // The last of the time of item 112, so the first that is held out; longer than the model's context.
    late.push(NewItem {
        created_at: Some(Timestamp(112)),
        input: Some("long ".repeat(500)),
        ..item(500, "x".into())
    });
    let right = bits(&rig, &ada, &[115, 116, 117, 118, 119]).await;
    let shifted = bits(&rig, &ada, &[113, 116, 117, 118, 119]).await;
    let job = rig.upload_items(&ada, late).await;
    let outcome = rig.until(&job, done).await.outcome.unwrap();
    let gate = outcome.gate.unwrap();
    assert_eq!((gate.heldout_items, gate.head_items), (7, Some(5)));
    let says = |bits: f64| outcome.reason.contains(&format!("the current adapter ({bits:.3}"));
    assert!(says(right), "{right} {}", outcome.reason);
    assert!(!says(shifted), "{shifted} would not be told from {right}");
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
