//! The worker over a real store and a tiny random model.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use model::{BaseModel, LoadOptions, Loaded};
use peft::AdapterConfig;
use personalize::Holdout;
use store::Store;
use text::Tokenizer;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use train::Recipe;
use types::{AdapterId, GenerationId, Job, JobState, NewItem, SystemClock, Timestamp};
use worker::{Settings, Worker};

struct Fixture {
    store: Store,
    base: Arc<BaseModel>,
    tokenizer: Tokenizer,
    announced: Arc<Mutex<Vec<(AdapterId, GenerationId)>>>,
    wake: Arc<Notify>,
}

impl Fixture {
    async fn new() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama");
        let Loaded { model, tokenizer, .. } = model::load(&folder, LoadOptions::default()).unwrap();
        Self {
            store: Store::in_memory(Arc::new(SystemClock)).await.unwrap(),
            base: Arc::new(model),
            tokenizer: Tokenizer::new(&tokenizer.unwrap()).unwrap(),
            announced: Arc::default(),
            wake: Arc::new(Notify::new()),
        }
    }

    fn start(&self, settings: Settings) -> (tokio::task::JoinHandle<()>, CancellationToken) {
        let announced = Arc::clone(&self.announced);
        let worker = Worker::new(
            self.store.clone(),
            Arc::clone(&self.base),
            self.tokenizer.clone(),
            settings,
            Arc::new(move |id, generation| announced.lock().unwrap().push((id.clone(), *generation))),
        );
        let stop = CancellationToken::new();
        (tokio::spawn(worker.unwrap().run(Arc::clone(&self.wake), stop.clone())), stop)
    }

    async fn upload(
        &self,
        id: &AdapterId,
        range: std::ops::Range<usize>,
        output: impl Fn(usize) -> String,
    ) -> Job {
        let item = |at: usize| NewItem {
            id: Some(format!("i{at}").parse().unwrap()),
            input: Some(format!("greet guest {at}")),
            output: output(at),
            created_at: Some(Timestamp(at as i64)),
            metadata: None,
        };
        let appended = self.store.append(id, None, [0; 32], range.map(item).collect()).await.unwrap();
        self.wake.notify_one();
        appended.job.unwrap()
    }

    async fn until(&self, job: &Job, condition: impl Fn(&Job) -> bool) -> Job {
        loop {
            let now = self.store.job(&job.adapter.tenant, &job.id).await.unwrap().unwrap();
            if condition(&now) {
                return now;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn settings() -> Settings {
    let mut recipe = Recipe { epochs: 6, batch: 4, learning_rate: 1e-2, ..Recipe::oppu() };
    if let AdapterConfig::Lora(lora) = &mut recipe.adapter {
        lora.dropout = 0.0;
    }
    Settings {
        recipe,
        holdout: Holdout { share: 0.2, min: 2, max: 10 },
        min_items: 6,
        threads: 1,
        poll_millis: 50,
        ..Settings::default()
    }
}

fn user(name: &str) -> AdapterId {
    AdapterId::new("tenant".parse().unwrap(), name.parse().unwrap())
}

fn done(job: &Job) -> bool {
    !job.state.is_open()
}

#[tokio::test]
async fn history_becomes_a_better_head_and_only_a_better_one() {
    let fixture = Fixture::new().await;
    let (worker, stop) = fixture.start(settings());
    let ada = user("ada");
    let job = fixture.upload(&ada, 0..20, |_| "ahoy and welcome aboard".into()).await;
    let job = fixture.until(&job, done).await;
    let outcome = job.outcome.unwrap();
    assert_eq!(job.state, JobState::Succeeded);
    assert!(outcome.published, "{}", outcome.reason);
    let gate = outcome.gate.unwrap();
    assert!(gate.new_bits < gate.base_bits && gate.head_bits.is_none());
    assert_eq!((gate.train_items, gate.heldout_items), (16, 4));
    let head = fixture.store.head(&ada).await.unwrap().unwrap();
    assert_eq!(Some(head.id), outcome.generation);
    assert_eq!(fixture.announced.lock().unwrap().as_slice(), [(ada.clone(), head.id)]);

    // More of the same: retrained from fresh weights with fewer epochs it is worse, and the head stays.
    stop.cancel();
    worker.await.unwrap();
    let mut hasty = settings();
    hasty.recipe.epochs = 1;
    hasty.recipe.learning_rate = 1e-5;
    let (worker, stop) = fixture.start(hasty);
    let job = fixture.upload(&ada, 20..22, |_| "ahoy and welcome aboard".into()).await;
    let outcome = fixture.until(&job, done).await.outcome.unwrap();
    assert!(!outcome.published, "{}", outcome.reason);
    assert!(outcome.reason.contains("not better than the current adapter"), "{}", outcome.reason);
    assert_eq!(fixture.store.head(&ada).await.unwrap().unwrap().id, head.id);
    stop.cancel();
    worker.await.unwrap();
}

#[tokio::test]
async fn too_little_history_is_said_so() {
    let fixture = Fixture::new().await;
    let (worker, stop) = fixture.start(settings());
    let job = fixture.upload(&user("bob"), 0..5, |_| "hello".into()).await;
    let outcome = fixture.until(&job, done).await.outcome.unwrap();
    assert!(!outcome.published);
    assert_eq!(outcome.reason, "not trained: 5 items, at least 6 are needed");
    stop.cancel();
    worker.await.unwrap();
}

/// Training that takes long enough to be interrupted.
fn slow() -> Settings {
    let mut settings = settings();
    settings.recipe.epochs = 100;
    settings.recipe.batch = 1;
    settings.lease_millis = 300;
    settings
}

#[tokio::test]
async fn a_stopped_worker_hands_its_job_back() {
    let fixture = Fixture::new().await;
    let (worker, stop) = fixture.start(slow());
    let job = fixture.upload(&user("eve"), 0..200, |at| format!("welcome number {at}")).await;
    fixture.until(&job, |job| job.progress.is_some()).await;
    stop.cancel();
    worker.await.unwrap();
    let handed_back = fixture.store.job(&job.adapter.tenant, &job.id).await.unwrap().unwrap();
    assert_eq!(handed_back.state, JobState::Queued);
    let (worker, stop) = fixture.start(settings());
    let job = fixture.until(&job, done).await;
    assert_eq!(job.state, JobState::Succeeded);
    stop.cancel();
    worker.await.unwrap();
}

#[tokio::test]
async fn a_user_erased_during_training_does_not_come_back() {
    let fixture = Fixture::new().await;
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
    worker.await.unwrap();
}
