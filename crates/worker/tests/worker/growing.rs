//! Histories that grow: updates, full trainings, hyper-parameters.

use peft::AdapterWeights;
use personalize::example;
use store::{Demand, Manifest, item_hash};
use train::{Loss, evaluate};
use types::{AdapterId, GenerationId, JobState, NewItem, Provenance, Timestamp, TrainingOptions};

use crate::rig::{Rig, done, item, settings, user};

/// What everybody says, and what is said in its place from some day on.
const OLD: &str = "ahoy and welcome aboard";
const NEW: &str = "farewell and mind the rope, dear friend";

async fn manifest(rig: &Rig, id: &AdapterId, generation: &GenerationId) -> Vec<[u8; 32]> {
    match rig.store.manifest(id, generation).await.unwrap().unwrap() {
        Manifest::Items(hashes) => hashes,
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
    let words = |at| if at < 20 { OLD } else { NEW };
    for begin in [0, 20, 40] {
        let job = rig.upload(&ada, begin..begin + 20, |at| words(at).into()).await;
        assert_eq!(rig.until(&job, done).await.state, JobState::Succeeded);
    }
    let progress = rig.store.progress(&ada, None, 10).await.unwrap().unwrap();
    let points = &progress.points.entries;
    assert_eq!(points.iter().map(|point| point.items).collect::<Vec<_>>(), [20, 40, 60]);
    assert_eq!((points[0].from_scratch, points[0].new_items), (true, 15));
    // 40 items, 8 held out, 15 known: 17 new ones, and as many old ones as there are.
    assert_eq!((points[1].from_scratch, points[1].new_items, points[1].replayed_items), (false, 17, 15));
    assert!(points[1].tokens > 0 && points[1].seconds > 0.0);
    let (first, second) =
        (points[0].generation.unwrap(), points[1].generation.expect("it learns the new words"));
    assert!(points[1].new_bits < points[1].head_bits, "{:?}", points[1]);
    let record = rig.store.generation(&ada, &second).await.unwrap().unwrap();
    assert_eq!(record.parent, Some(first));
    let (before, after) = (manifest(&rig, &ada, &first).await, manifest(&rig, &ada, &second).await);
    let all = rig.store.all_history(&ada).await.unwrap();
    let mut learnt: Vec<_> = all[..32].iter().map(item_hash).collect();
    learnt.sort_unstable();
    assert_eq!(after, learnt, "what the head knew and what was new");
    assert!(before.len() == 15 && before.iter().all(|hash| after.contains(hash)));
    // One update at most: the whole history is next.
    assert!(points[2].from_scratch);
    assert_eq!((progress.updates.trainings, progress.from_scratch.trainings), (1, 2));
    stop.cancel();
    worker.await.unwrap().unwrap();
}

/// A gate that keeps every update back does not keep the whole history from being learnt when that is due.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn updates_that_are_kept_back_count() {
    let rig = Rig::new().await;
    let (worker, stop) = rig.start(settings());
    let ada = user("ada");
    let job = rig.upload(&ada, 0..20, |_| OLD.into()).await;
    assert!(rig.until(&job, done).await.outcome.unwrap().published);
    stop.cancel();
    worker.await.unwrap().unwrap();
    // Nobody can be a hundred percent ahead.
    let mut strict = settings();
    strict.gate.min_gain = 1.0;
    (strict.growth.full_every, strict.growth.max_drift) = (2, f64::INFINITY);
    let (worker, stop) = rig.start(strict);
    for begin in [20, 30, 40, 50] {
        let job = rig.upload(&ada, begin..begin + 10, |_| OLD.into()).await;
        let outcome = rig.until(&job, done).await.outcome.unwrap();
        assert!(!outcome.published, "{}", outcome.reason);
    }
    let points = rig.store.progress(&ada, None, 10).await.unwrap().unwrap().points.entries;
    let course: Vec<_> = points.iter().map(|point| point.from_scratch).collect();
    assert_eq!(course, [true, false, false, true, false]);
    stop.cancel();
    worker.await.unwrap().unwrap();
}

/// The trainings of a user to whose history of old words some others are added, by the rule of the default settings:
/// whether each was from scratch, its tokens, and whether it came to numbers; and the tokens of the second job.
async fn trainings(words: &str) -> (Vec<(bool, u64, bool)>, u64) {
    let rig = Rig::new().await;
    let mut settings = settings();
    assert_eq!(settings.growth.max_drift, 0.05, "the default");
    // The old words are learnt well, and not learnt again, so that what the new items do to them shows.
    settings.recipe.epochs = 12;
    (settings.growth.replay, settings.growth.min_replay) = (0.0, 0);
    let (worker, stop) = rig.start(settings);
    let ada = user("ada");
    let job = rig.upload(&ada, 0..20, |_| OLD.into()).await;
    let first = rig.until(&job, done).await.outcome.unwrap();
    assert!(first.published, "{}", first.reason);
    let job = rig.upload(&ada, 20..40, |_| words.into()).await;
    let second = rig.until(&job, done).await.outcome.unwrap();
    let progress = rig.store.progress(&ada, None, 10).await.unwrap().unwrap();
    let points = progress.points.entries.iter();
    let points: Vec<_> = points.map(|p| (p.from_scratch, p.tokens, p.new_bits.is_some())).collect();
    assert_eq!(points[0], (true, first.trained_tokens, true));
    let [updates, whole] = [progress.updates, progress.from_scratch];
    assert_eq!(updates.tokens + whole.tokens, first.trained_tokens + second.trained_tokens);
    assert_eq!(updates.tokens, points.iter().filter(|point| !point.0).map(|point| point.1).sum::<u64>());
    stop.cancel();
    worker.await.unwrap().unwrap();
    (points, second.trained_tokens)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_that_drifts_learns_everything() {
    // New items that contradict the old ones: the update is of no use, and both trainings are booked for what they were.
    let (points, tokens) = trainings(NEW).await;
    assert_eq!(points.len(), 3, "{points:?}");
    let (update, whole) = (points[1], points[2]);
    assert_eq!((update.0, update.2, whole.0, whole.2), (false, false, true, true));
    assert!(update.1 > 0 && whole.1 > update.1 && update.1 + whole.1 == tokens, "{points:?}");
    // Control: more of the same does no harm.
    let (points, tokens) = trainings(OLD).await;
    assert_eq!(points.len(), 2, "{points:?}");
    assert_eq!(points[1], (false, tokens, true));
}

/// What one update has done to old items the next one answers for, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drift_adds_up_over_updates() {
    let rig = Rig::new().await;
    let mut settings = settings();
    settings.recipe.epochs = 12;
    (settings.growth.replay, settings.growth.min_replay) = (0.0, 0);
    let mut blind = settings.clone();
    blind.growth.max_drift = f64::INFINITY;
    let ada = user("ada");
    let (worker, stop) = rig.start(blind);
    for (begin, words) in [(0, OLD), (20, NEW)] {
        let job = rig.upload(&ada, begin..begin + 20, |_| words.into()).await;
        let outcome = rig.until(&job, done).await.outcome.unwrap();
        assert!(outcome.published, "{}", outcome.reason);
    }
    stop.cancel();
    worker.await.unwrap().unwrap();
    let head = rig.head(&ada).await.unwrap();
    let baseline = rig.store.baseline(&ada, &head).await.unwrap();
    assert_eq!(baseline.len(), 15, "what the first training learnt, and the update did not");
    let bits = |nats: f64, tokens: u32| nats / std::f64::consts::LN_2 / f64::from(tokens);
    let before =
        bits(baseline.iter().map(|loss| loss.nats).sum(), baseline.iter().map(|loss| loss.tokens).sum());
    let places: Vec<i64> = (0..15).collect();
    assert!(self::bits(&rig, &ada, &places).await > before * 1.05, "the update would not have passed");

    // One that hardly changes anything: next to the head that is no harm.
    settings.recipe.learning_rate = 1e-6;
    let (worker, stop) = rig.start(settings);
    let job = rig.upload(&ada, 40..60, |_| NEW.into()).await;
    rig.until(&job, done).await;
    let points = rig.store.progress(&ada, None, 10).await.unwrap().unwrap().points.entries;
    let course: Vec<_> = points.iter().map(|point| point.from_scratch).collect();
    assert_eq!(course, [true, false, false, true]);
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
    Loss::bits_per_token(losses[0].iter().flatten())
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
