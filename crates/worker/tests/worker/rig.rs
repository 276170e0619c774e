//! What every test gets: a store, a tiny model, a worker to start, and trainers that misbehave on demand.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use model::BaseModel;
use peft::{AdapterConfig, generation_id};
use personalize::Holdout;
use store::{AdapterFiles, Policy, Store};
use testkit::tiny_model;
use text::Tokenizer;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use train::{Control, Recipe, StepReport, TrainError, TrainJob, Trained, Verdict};
use types::{AdapterId, GenerationId, Job, NewItem, SystemClock, Timestamp};
use worker::{Jointly, Settings, Trainer, Worker, WorkerError};

pub(crate) struct Rig {
    pub(crate) store: Store,
    pub(crate) base: Arc<BaseModel>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) announced: Arc<Mutex<Vec<(AdapterId, GenerationId)>>>,
    pub(crate) wake: Arc<Notify>,
    /// The workers' visits to the processor, under way and in all.
    pub(crate) visits: Arc<Visits>,
}

#[derive(Default)]
pub(crate) struct Visits {
    pub(crate) now: AtomicU32,
    pub(crate) all: AtomicU32,
}

struct Visit(Arc<Visits>);

impl Drop for Visit {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::SeqCst);
    }
}

pub(crate) type Running = (JoinHandle<Result<(), WorkerError>>, CancellationToken);

impl Rig {
    pub(crate) async fn new() -> Self {
        Self::over(Store::in_memory(Arc::new(SystemClock)).await.unwrap())
    }

    pub(crate) fn over(store: Store) -> Self {
        let (base, tokenizer) = tiny_model();
        let (announced, visits) = Default::default();
        Self { store, base, tokenizer, announced, wake: Arc::new(Notify::new()), visits }
    }

    pub(crate) fn start(&self, settings: Settings) -> Running {
        self.start_with(settings, Arc::new(Jointly))
    }

    pub(crate) fn start_with(&self, settings: Settings, trainer: Arc<dyn Trainer>) -> Running {
        let (announced, base) = (Arc::clone(&self.announced), *self.base.hash());
        let announce = move |id: &AdapterId, head: &GenerationId, files: AdapterFiles| {
            // What is handed on is what was published.
            assert_eq!(generation_id(&base, &files.config, &files.weights), *head);
            announced.lock().unwrap().push((id.clone(), *head));
        };
        let worker = Worker::new(
            self.store.clone(),
            Arc::clone(&self.base),
            self.tokenizer.clone(),
            settings,
            Arc::new(announce),
        );
        let visits = Arc::clone(&self.visits);
        let visit = move || -> Box<dyn Send> {
            visits.now.fetch_add(1, Ordering::SeqCst);
            visits.all.fetch_add(1, Ordering::SeqCst);
            Box::new(Visit(Arc::clone(&visits)))
        };
        let worker = worker.beside(Arc::new(|| false), Arc::new(visit));
        let stop = CancellationToken::new();
        let run = worker.with_trainer(trainer).run(Arc::clone(&self.wake), stop.clone());
        (tokio::spawn(run), stop)
    }

    pub(crate) async fn upload(
        &self,
        id: &AdapterId,
        range: std::ops::Range<usize>,
        output: impl Fn(usize) -> String,
    ) -> Job {
        self.upload_items(id, range.map(|at| item(at, output(at))).collect()).await
    }

    pub(crate) async fn upload_items(&self, id: &AdapterId, items: Vec<NewItem>) -> Job {
        let appended = self.store.append(id, None, [0; 32], items).await.unwrap();
        self.wake.notify_one();
        appended.job.unwrap()
    }

    pub(crate) async fn until(&self, job: &Job, condition: impl Fn(&Job) -> bool) -> Job {
        loop {
            let now = self.store.job(&job.adapter.tenant, &job.id).await.unwrap().unwrap();
            if condition(&now) {
                return now;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn head(&self, id: &AdapterId) -> Option<GenerationId> {
        self.store.head(id).await.unwrap().map(|head| head.id)
    }
}

/// Item `at` of a history.
pub(crate) fn item(at: usize, output: String) -> NewItem {
    NewItem {
        id: Some(format!("i{at}").parse().unwrap()),
        input: Some(format!("greet guest {at}")),
        output,
        created_at: Some(Timestamp(at as i64)),
        metadata: None,
    }
}

pub(crate) fn settings() -> Settings {
    let mut recipe = Recipe { epochs: 6, batch: 4, learning_rate: 1e-2, ..Recipe::oppu() };
    if let AdapterConfig::Lora(lora) = &mut recipe.adapter {
        lora.dropout = 0.0;
    }
    Settings {
        recipe,
        holdout: Holdout { share: 0.2, min: 5, max: 10 },
        policy: Policy::AT_ONCE,
        min_items: 6,
        poll_millis: 50,
        ..Settings::default()
    }
}

/// Training that takes long enough to be interrupted.
pub(crate) fn slow() -> Settings {
    let mut settings = settings();
    settings.recipe.epochs = 100;
    settings.recipe.batch = 1;
    settings.lease_millis = 300;
    settings
}

pub(crate) fn user(name: &str) -> AdapterId {
    AdapterId::new("tenant".parse().unwrap(), name.parse().unwrap())
}

pub(crate) fn done(job: &Job) -> bool {
    !job.state.is_open()
}

/// What decides at every step in place of the worker's control, which it is given.
pub(crate) type Step<'a> = dyn FnMut(usize, StepReport, &mut dyn Control) -> Verdict + 'a;

struct Watch<'a> {
    step: &'a mut Step<'a>,
    inner: &'a mut dyn Control,
}

impl Control for Watch<'_> {
    fn step(&mut self, job: usize, report: StepReport) -> Verdict {
        (self.step)(job, report, self.inner)
    }

    fn checkpoint(&mut self, job: usize, step: u32, make: &mut dyn FnMut() -> Vec<u8>) {
        self.inner.checkpoint(job, step, make);
    }

    fn breathe(&mut self) {
        self.inner.breathe();
    }
}

/// Trains as the worker does, with `step` at every step.
pub(crate) fn watched(
    base: &BaseModel,
    jobs: &[TrainJob<'_>],
    control: &mut dyn Control,
    step: &mut Step<'_>,
) -> Vec<Result<Trained, TrainError>> {
    Jointly.train(base, jobs, &mut Watch { step, inner: control })
}
