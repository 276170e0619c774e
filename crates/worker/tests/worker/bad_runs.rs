//! Two hundred trainings that go wrong, each in its own way: none may be published, and every head stays.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use model::BaseModel;
use peft::{AdapterWeights, Ia3Scale};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sha2::{Digest, Sha256};
use store::{Demand, NewGeneration, Selection};
use train::{Control, Recipe, StepReport, TrainError, TrainJob, Trained, Verdict, train_jointly};
use types::{AdapterKind, Job, JobState, NewItem, TrainingOptions};
use worker::{GateRules, Jointly, Settings, Trainer};

use crate::rig::{Rig, done, item, settings, user};

/// What goes wrong in a training.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// Nothing.
    None,
    /// A weight becomes NaN or infinite at the end, and the trainer does not notice.
    Poison,
    /// A weight or a moment becomes NaN or infinite between two steps.
    Nan,
    /// The learning rate is a thousand times too large.
    Rate,
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
            Fault::Nan => jobs.iter().map(|job| with_nan(base, job, control, &mut random)).collect(),
            Fault::Poison => {
                let mut results = Jointly.train(base, jobs, control);
                results.iter_mut().flatten().for_each(|trained| poison(&mut trained.weights, &mut random));
                results
            }
        }
    }
}

/// A rate a thousand times as large.
fn too_fast(recipe: &Recipe) -> Recipe {
    Recipe { learning_rate: recipe.learning_rate * 1000.0, clip: 1e9, ..recipe.clone() }
}

/// Trains up to a random step, spoils one number of the state between two steps, and goes on from there.
fn with_nan(
    base: &BaseModel,
    job: &TrainJob<'_>,
    control: &mut dyn Control,
    random: &mut StdRng,
) -> Result<Trained, TrainError> {
    struct UpTo {
        step: u32,
        state: Vec<u8>,
    }
    impl Control for UpTo {
        fn step(&mut self, _: usize, report: StepReport) -> Verdict {
            if report.step < self.step { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        }

        fn checkpoint(&mut self, _: usize, _: u32, make: &mut dyn FnMut() -> Vec<u8>) {
            self.state = make();
        }
    }
    let mut up_to = UpTo { step: random.random_range(1..8), state: Vec::new() };
    let stopped = train_jointly(base, &[*job], &mut up_to).pop().unwrap();
    assert!(matches!(stopped, Err(TrainError::Stopped)), "{stopped:?}");
    // The checkpoint's layout: 52 bytes, the number of values, a loss for every step, values and both moments; a hash.
    let state = &mut up_to.state;
    let body = state.len() - 32;
    let values = u64::from_le_bytes(state[52..60].try_into().unwrap()) as usize;
    let first = 60 + 8 * up_to.step as usize;
    assert_eq!(first + 12 * values, body);
    let at = first + 4 * random.random_range(0..3 * values);
    let bad = [f32::NAN, f32::INFINITY][random.random_range(0..2)];
    state[at..at + 4].copy_from_slice(&bad.to_le_bytes());
    let sum = Sha256::digest(&state[..body]);
    state[body..].copy_from_slice(&sum);
    let result = train_jointly(base, &[TrainJob { resume: Some(state), ..*job }], control).pop().unwrap();
    // An infinite second moment only keeps its weight where it is; nothing else may come through.
    assert!(
        result.is_err() || bad == f32::INFINITY && at >= first + 8 * values,
        "the trainer did not notice"
    );
    let Ok(mut trained) = result else { return result };
    poison(&mut trained.weights, random);
    Ok(trained)
}

/// Makes one weight a number that is none, or the largest there is.
fn poison(weights: &mut AdapterWeights, random: &mut StdRng) {
    let mut tensors: Vec<&mut Vec<f32>> = match weights {
        AdapterWeights::Lora(lora) => {
            let sites = lora.sites.iter_mut().flatten();
            sites.flat_map(|site| [&mut site.a, &mut site.b].into_iter().chain(&mut site.magnitude)).collect()
        }
        AdapterWeights::Ia3(ia3) => {
            let scales = ia3.sites.iter_mut().flatten();
            scales
                .map(|scale| match scale {
                    Ia3Scale::Output(values) | Ia3Scale::Input(values) => values,
                })
                .collect()
        }
        AdapterWeights::Prompt(prompt) => vec![&mut prompt.embeddings],
    };
    let at = random.random_range(0..tensors.len());
    let values = &mut tensors[at];
    let at = random.random_range(0..values.len());
    values[at] = [f32::NAN, f32::INFINITY, f32::MAX][random.random_range(0..3)];
}

fn quick() -> Settings {
    let mut settings = settings();
    settings.recipe.epochs = 2;
    // A thousand times this is the most that a recipe may say, so that it is the gate that refuses it.
    settings.recipe.learning_rate = 1e-3;
    settings
}

/// One user's training.
struct Run {
    /// None: the history is empty.
    items: Vec<NewItem>,
    training: TrainingOptions,
    /// Whether there is a head before it, which is good for the first of the teaching histories.
    head: bool,
}

/// As many runs as histories, each of its own seed and of another kind than the one before it, half of them with a head.
fn runs(histories: impl IntoIterator<Item = Vec<NewItem>>, kinds: &[AdapterKind]) -> Vec<Run> {
    let run = |(at, items): (usize, Vec<NewItem>)| {
        let training = TrainingOptions {
            kind: Some(kinds[at % kinds.len()]),
            seed: Some(at as u64),
            ..Default::default()
        };
        Run { items, training, head: at / kinds.len() % 2 == 1 }
    };
    histories.into_iter().enumerate().map(run).collect()
}

use AdapterKind::{Dora, Ia3, Lora, Prompt};
const KINDS: [AdapterKind; 4] = [Lora, Dora, Ia3, Prompt];

/// A history that teaches, of one of six kinds and of 18 to 24 items.
fn teaching(at: usize) -> Vec<NewItem> {
    let words = [
        "ahoy and welcome aboard",
        "farewell and mind the rope",
        "good morning, dear guest",
        "no entry for strangers",
        "the ship sails at nine",
        "tea is served on deck",
    ];
    (0..18 + at % 7).map(|place| item(place, words[at % 6].into())).collect()
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

/// A rig, and an adapter that has learnt the first of the teaching histories.
async fn with_head() -> (Rig, NewGeneration) {
    let rig = Rig::new().await;
    let (worker, stop) = rig.start(settings());
    let ada = user("ada");
    let job = rig.upload_items(&ada, teaching(0)).await;
    assert!(rig.until(&job, done).await.outcome.unwrap().published);
    stop.cancel();
    worker.await.unwrap().unwrap();
    let record = rig.store.head(&ada).await.unwrap().unwrap();
    let files = rig.store.fetch(&ada, &record.id).await.unwrap();
    let (id, base, meta) = (record.id, record.base, record.meta);
    let head = NewGeneration { id, parent: None, base, config: files.config, weights: files.weights, meta };
    (rig, head)
}

/// Begins a run of its own user.
async fn begin(rig: &Rig, head: &NewGeneration, name: &str, run: &Run) -> Job {
    let id = user(name);
    if run.head {
        rig.store.publish(&id, head.clone(), None, None).await.unwrap();
    }
    let training = Some(run.training.clone());
    if !run.items.is_empty() {
        let appended = rig.store.append_for(&id, None, [0; 32], run.items.clone(), training).await.unwrap();
        rig.wake.notify_one();
        return appended.job.unwrap();
    }
    // Somebody who had something once.
    rig.store.append(&id, None, [0; 32], vec![item(0, "x".into())]).await.unwrap();
    rig.store.forget_items(&id, &Selection::All).await.unwrap();
    let job = rig.store.enqueue(&id, &Demand { urgent: true, training, ..Demand::default() }).await.unwrap();
    rig.wake.notify_one();
    job.unwrap()
}

/// How many runs there were, and which of them were published. Whoever had a head has it still if not.
async fn published(
    rig: &Rig,
    head: &NewGeneration,
    settings: Settings,
    fault: Fault,
    runs: Vec<Run>,
) -> (usize, Vec<usize>) {
    let trainer = Faulty { fault, seed: AtomicU64::new(fault as u64 * 1000) };
    let (worker, stop) = rig.start_with(settings, Arc::new(trainer));
    let mut published = Vec::new();
    for (at, run) in runs.iter().enumerate() {
        let name = format!("u{at}");
        let job = rig.until(&begin(rig, head, &name, run).await, done).await;
        let was_published = match (&job.outcome, &job.error) {
            (Some(outcome), None) => {
                assert!(!outcome.reason.is_empty());
                outcome.published
            }
            (None, Some(error)) => {
                assert!(job.state == JobState::Failed && !error.is_empty());
                false
            }
            other => panic!("an end without a reason: {other:?}"),
        };
        if was_published {
            published.push(at);
        } else {
            let before = run.head.then_some(head.id);
            assert_eq!(rig.head(&user(&name)).await, before, "{fault:?} {at}: the head stays");
        }
        if fault == Fault::Nan {
            let reason = job.error.as_deref().or(job.outcome.as_ref().map(|outcome| outcome.reason.as_str()));
            assert!(
                reason.is_some_and(|reason| reason.contains("not finite") || reason.contains("weight")),
                "{job:?}"
            );
        }
        assert!(rig.store.erase_user(&user(&name)).await.unwrap());
    }
    stop.cancel();
    worker.await.unwrap().unwrap();
    (runs.len(), published)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_hundred_bad_runs_none_is_published() {
    let (rig, head) = with_head().await;
    let mut random = StdRng::seed_from_u64(1);
    let mut batches = Vec::new();
    batches.push((Fault::Poison, runs((0..48).map(teaching), &KINDS)));
    batches.push((Fault::Nan, runs((0..48).map(teaching), &KINDS)));
    // IA3 and virtual tokens bear such a rate, and learn by it.
    batches.push((Fault::Rate, runs((0..40).map(teaching), &[Lora, Dora])));
    // Not the noise of six letters, nor the same word again and again: that these come again is something to learn. And
    // virtual tokens make this base, whose weights are random, better at any noise.
    let bearable = [Lora, Dora, Ia3];
    let noise: Vec<_> = (0..24).map(|at| noisy([0, 2][at / 3 % 2], &mut random)).collect();
    batches.push((Fault::None, runs(noise, &bearable)));
    let harm: Vec<_> = (0..24).map(|at| hostile(at, &mut random)).collect();
    batches.push((Fault::None, runs(harm, &bearable)));
    let few = (0..13).map(|at| (0..at / 2 % 6).map(|place| item(place, "x".into())).collect());
    batches.push((Fault::None, runs(few, &[Lora])));
    let mut huge: Vec<_> = (0..3).map(|kind| noisy(kind, &mut random)).collect();
    huge.iter_mut().flatten().for_each(|item| item.output = item.output.repeat(300));
    batches.push((Fault::Rate, runs(huge, &[Lora])));
    let (mut all, mut wrong) = (0, Vec::new());
    for (at, (fault, runs)) in batches.into_iter().enumerate() {
        let (count, published) = published(&rig, &head, quick(), fault, runs).await;
        wrong.extend(published.into_iter().map(|run| (at, fault, run)));
        all += count;
    }
    assert_eq!((all, wrong), (200, vec![]));
}

/// Negative controls: without the fault, or without the rule that is there for it, runs like these are published.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_rule_is_what_keeps_bad_runs_back() {
    let (rig, head) = with_head().await;
    let gate = |gate: GateRules| Settings { gate, ..quick() };
    let rules = quick().gate;
    let loose = GateRules { level: 1.0, min_gain: 0.0, max_norm: f64::INFINITY };

    // Not a number: the same trainings without it, at a rate that tells, come through.
    let unspoilt = || runs((0..12).map(teaching), &[Lora, Dora]);
    let without_head = |runs: Vec<Run>| runs.into_iter().filter(|run| !run.head).collect::<Vec<_>>();
    let good = published(&rig, &head, settings(), Fault::None, without_head(unspoilt())).await;
    assert_eq!(good, (6, (0..6).collect()));
    for fault in [Fault::Nan, Fault::Poison] {
        // And no other rule is needed against it, unless the number is one.
        let bad =
            published(&rig, &head, gate(GateRules { max_norm: rules.max_norm, ..loose }), fault, unspoilt());
        assert_eq!(bad.await, (12, vec![]), "{fault:?}");
    }

    // Weights beyond measure.
    let fast = || runs((0..6).map(teaching), &[Lora]);
    let bad = published(&rig, &head, gate(loose), Fault::Rate, fast()).await;
    assert!(!bad.1.is_empty(), "without its rules the gate lets the worst through");
    let bad =
        published(&rig, &head, gate(GateRules { max_norm: rules.max_norm, ..loose }), Fault::Rate, fast());
    assert_eq!(bad.await, (6, vec![]), "the norm alone keeps them back");

    // A lead that may be chance, and one that is a trifle.
    let mut random = StdRng::seed_from_u64(1);
    let noise: Vec<_> = (0..12).map(|at| noisy([0, 2, 3][at % 3], &mut random)).collect();
    let noise = || runs(noise.clone(), &[Lora]);
    let bad = published(&rig, &head, gate(GateRules { level: 1.0, ..rules }), Fault::None, noise()).await;
    assert!(!bad.1.is_empty(), "without the paired test noise comes through");
    let bad = published(&rig, &head, gate(GateRules { min_gain: 0.0, ..rules }), Fault::None, noise()).await;
    assert!(!bad.1.is_empty(), "without a least lead noise comes through");
    assert_eq!(published(&rig, &head, quick(), Fault::None, noise()).await, (12, vec![]));

    // Better than the base, but not than the head that is there.
    let same = |head| Run { items: teaching(0), training: TrainingOptions::default(), head };
    let fair = published(&rig, &head, settings(), Fault::None, vec![same(false), same(true)]).await;
    assert_eq!(fair, (2, vec![0]));
}
