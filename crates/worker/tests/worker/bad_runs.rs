//! Two hundred trainings that go wrong, each in its own way: none may be published.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use model::BaseModel;
use peft::AdapterWeights;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use train::{Control, Recipe, TrainError, TrainJob, Trained};
use types::{JobState, NewItem};
use worker::{GateRules, Jointly, Settings, Trainer};

use crate::rig::{Rig, done, item, settings, user, watched};

/// What goes wrong in a training.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// Nothing.
    None,
    /// A weight becomes NaN or infinite, and the trainer does not notice.
    Poison,
    /// The learning rate is a thousand times too large.
    Rate,
    /// It fails at a random step, as a trainer does that sees a NaN.
    Diverge,
}

/// Trains, and spoils the result by a seed of its own.
struct Faulty {
    fault: Fault,
    seed: AtomicU64,
}

impl Trainer for Faulty {
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        let mut random = StdRng::seed_from_u64(self.seed.fetch_add(1, Ordering::Relaxed));
        match self.fault {
            Fault::None => Jointly.train(base, jobs, control),
            Fault::Rate => {
                let recipes: Vec<Recipe> = jobs.iter().map(|job| too_fast(job.recipe)).collect();
                let jobs = jobs.iter().zip(&recipes).map(|(job, recipe)| TrainJob { recipe, ..*job });
                Jointly.train(base, &jobs.collect::<Vec<_>>(), control)
            }
            Fault::Diverge => {
                let step = random.random_range(1..8);
                let mut reached = false;
                let results = watched(base, jobs, control, &mut |job, report, inner| {
                    reached |= report.step >= step;
                    if reached { ControlFlow::Break(()) } else { inner.step(job, report) }
                });
                let diverged = |result| match result {
                    Err(TrainError::Stopped) => Err(TrainError::Diverged { step, what: "the loss" }),
                    other => other,
                };
                results.into_iter().map(diverged).collect()
            }
            Fault::Poison => {
                let mut results = Jointly.train(base, jobs, control);
                for trained in results.iter_mut().flatten() {
                    let bad = [f32::NAN, f32::INFINITY, f32::MAX][random.random_range(0..3)];
                    let AdapterWeights::Lora(lora) = &mut trained.weights else { panic!("not LoRA") };
                    let sites: Vec<_> = lora.sites.iter_mut().flatten().collect();
                    let at = random.random_range(0..sites.len());
                    let site = sites.into_iter().nth(at).unwrap();
                    let values = if random.random() { &mut site.a } else { &mut site.b };
                    let at = random.random_range(0..values.len());
                    values[at] = bad;
                }
                results
            }
        }
    }
}

/// A rate a thousand times as large.
fn too_fast(recipe: &Recipe) -> Recipe {
    Recipe { learning_rate: recipe.learning_rate * 1000.0, clip: 1e9, ..recipe.clone() }
}

fn quick() -> Settings {
    let mut settings = settings();
    settings.recipe.epochs = 2;
    // A thousand times this is the most that a recipe may say, so that it is the gate that refuses it.
    settings.recipe.learning_rate = 1e-3;
    settings
}

/// A history that teaches.
fn teaching() -> Vec<NewItem> {
    (0..20).map(|at| item(at, "ahoy and welcome aboard".into())).collect()
}

/// A history of noise. What is learnt from it at a sane rate may well be its letters, which then help with what comes
/// after, if that is made of the same.
fn noisy(kind: usize, random: &mut StdRng) -> Vec<NewItem> {
    let noise = |random: &mut StdRng, len: usize, from: &[char]| -> String {
        (0..len).map(|_| from[random.random_range(0..from.len())]).collect()
    };
    let control: Vec<char> =
        ('\u{0}'..'\u{20}').chain(['\u{7f}', '\u{85}', '\u{200b}', '\u{202e}', '\u{feff}']).collect();
    let broken = ['\u{fffd}', '\u{fffe}', '\u{ffff}', '\u{10ffff}', '\u{e000}', '\u{d7ff}'];
    let letters: Vec<char> = ('a'..='z').chain(['é', 'ß', '中', '🦀', ' ']).collect();
    let text = |random: &mut StdRng| match kind {
        0 => noise(random, 20, &control),
        1 => noise(random, 20, &broken),
        2 => noise(random, 30, &letters),
        _ => "<|im_end|><|im_start|>system".repeat(1 + random.random_range(0..3)),
    };
    let items = (0..12).map(|at| {
        // The same question with answers that contradict each other.
        let mut item = item(at, text(random));
        item.input = Some(text(random));
        item
    });
    items.collect()
}

/// A history that is made to do harm: of two kinds of noise, the later one, by which the gate judges, is not the one that
/// is learnt.
fn hostile(kind: usize, random: &mut StdRng) -> Vec<NewItem> {
    let (learnt, later) = (noisy(kind % 4, random), noisy((kind + 1 + kind / 4 % 3) % 4, random));
    let train = learnt.len() - quick().holdout.min;
    learnt.into_iter().take(train).chain(later.into_iter().skip(train)).collect()
}

async fn published(rig: &Rig, settings: Settings, trainer: Faulty, runs: Vec<Vec<NewItem>>) -> usize {
    let (worker, stop) = rig.start_with(settings, Arc::new(trainer));
    let (mut published, all) = (0, runs.len());
    for (at, items) in runs.into_iter().enumerate() {
        let id = user(&format!("u{}-{at}", rig.announced.lock().unwrap().len()));
        let job = rig.upload_items(&id, items).await;
        let job = rig.until(&job, done).await;
        match (&job.outcome, &job.error) {
            (Some(outcome), None) => {
                assert!(!outcome.reason.is_empty());
                published += usize::from(outcome.published);
            }
            (None, Some(error)) => assert!(job.state == JobState::Failed && !error.is_empty()),
            other => panic!("an end without a reason: {other:?}"),
        }
        assert!(rig.store.erase_user(&id).await.unwrap());
    }
    assert!(all > 0);
    stop.cancel();
    worker.await.unwrap().unwrap();
    published
}

fn faulty(fault: Fault) -> Faulty {
    Faulty { fault, seed: AtomicU64::new(fault as u64 * 1000) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_hundred_bad_runs_none_is_published() {
    let rig = Rig::new().await;
    let repeated = |count: usize| vec![teaching(); count];
    assert_eq!(published(&rig, quick(), faulty(Fault::Poison), repeated(60)).await, 0);
    assert_eq!(published(&rig, quick(), faulty(Fault::Diverge), repeated(40)).await, 0);
    assert_eq!(published(&rig, quick(), faulty(Fault::Rate), repeated(40)).await, 0);
    let mut random = StdRng::seed_from_u64(1);
    // Not the noise of six letters: that these come again is something to learn.
    let histories = (0..26).map(|at| noisy([0, 2, 3][at % 3], &mut random)).collect();
    assert_eq!(published(&rig, quick(), faulty(Fault::None), histories).await, 0);
    let histories = (0..26).map(|at| hostile(at, &mut random)).collect();
    assert_eq!(published(&rig, quick(), faulty(Fault::None), histories).await, 0);
    let few = (0..8).map(|at| (0..at).map(|at| item(at, "x".into())).collect::<Vec<_>>());
    let few = few.filter(|items| !items.is_empty()).take(5).collect();
    assert_eq!(published(&rig, quick(), faulty(Fault::None), few).await, 0);
    let huge = (0..3).map(|kind| {
        noisy(kind, &mut random)
            .into_iter()
            .map(|mut item| {
                item.output = item.output.repeat(300);
                item
            })
            .collect()
    });
    assert_eq!(published(&rig, quick(), faulty(Fault::Rate), huge.collect()).await, 0);
}

/// Negative controls: a gate that lets everything through publishes bad runs, and a good run passes the real one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_gate_is_noticed_and_good_runs_pass() {
    let rig = Rig::new().await;
    let mut open = quick();
    open.gate = GateRules { level: 1.0, min_gain: 0.0, max_norm: f64::INFINITY };
    let through = published(&rig, open, faulty(Fault::Rate), vec![teaching(); 5]).await;
    assert!(through > 0, "without its rules the gate lets the worst through");
    assert_eq!(published(&rig, settings(), faulty(Fault::None), vec![teaching(); 5]).await, 5);
}
