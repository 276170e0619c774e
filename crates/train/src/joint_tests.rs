//! What joint training, common beginnings, interruptions and broken jobs may and may not change.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::ops::ControlFlow;

use kernels::Products;
use peft::{AdapterConfig, AdapterWeights, Ia3Config, LoraConfig, PromptConfig};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use types::Example;

use crate::error::TrainError;
use crate::recipe::Recipe;
use crate::reference_tests::{base, gradients};
use crate::run::{Fault, Run};
use crate::trainer::{Control, StepReport, TrainJob, Trained, Verdict, go_on, train, train_jointly};

/// Examples of different lengths; the first tokens of most are the same.
pub(crate) fn examples(seed: u64, count: usize) -> Vec<Example> {
    let mut rng = StdRng::seed_from_u64(seed);
    let template: Vec<u32> = (0..9).map(|at| 10 + at + seed as u32).collect();
    let example = |at: usize| {
        let mut tokens = if at % 5 == 4 { Vec::new() } else { template.clone() };
        tokens.extend((0..rng.random_range(3..12)).map(|_| rng.random_range(0..320u32)));
        let answer_start = tokens.len() - rng.random_range(1..3);
        Example { tokens, answer_start }
    };
    (0..count).map(example).collect()
}

fn lora(change: impl FnOnce(&mut LoraConfig)) -> AdapterConfig {
    let mut config = LoraConfig::oppu();
    change(&mut config);
    AdapterConfig::Lora(config)
}

/// A recipe of every kind, no two alike.
pub(crate) fn recipes() -> Vec<Recipe> {
    let adapters = [
        lora(|_| ()),
        lora(|config| (config.r, config.lora_bias, config.dropout) = (3, true, 0.2)),
        lora(|config| config.use_dora = true),
        AdapterConfig::Ia3(Ia3Config::llama()),
        AdapterConfig::Prompt(PromptConfig { virtual_tokens: 4 }),
        lora(|config| config.layers_to_transform = Some(vec![2])),
    ];
    let recipe = |(at, adapter)| Recipe {
        adapter,
        epochs: 2,
        batch: 3 + at % 2,
        learning_rate: 1e-2,
        micro_batch_tokens: [40, 64, 200][at % 3],
        seed: at as u64,
        ..Recipe::oppu()
    };
    adapters.into_iter().enumerate().map(recipe).collect()
}

/// The same, every other one with products in bfloat16.
fn mixed() -> Vec<Recipe> {
    let mut recipes = recipes();
    recipes.iter_mut().skip(1).step_by(2).for_each(|recipe| recipe.products = Products::Bf16);
    recipes
}

struct Quiet;

impl Control for Quiet {
    fn step(&mut self, _: usize, _: StepReport) -> Verdict {
        ControlFlow::Continue(())
    }
}

fn job<'a>(recipe: &'a Recipe, examples: &'a [Example]) -> TrainJob<'a> {
    TrainJob { recipe, start: None, examples, resume: None }
}

fn alone(base: &model::BaseModel, recipe: &Recipe, examples: &[Example]) -> Trained {
    train(base, None, examples, recipe, |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn a_job_is_bit_equal_alone_and_in_company() {
    let base = base("tiny-llama");
    let recipes = mixed();
    let histories: Vec<Vec<Example>> = (0..recipes.len()).map(|at| examples(at as u64, 5 + 2 * at)).collect();
    let jobs: Vec<TrainJob<'_>> = recipes.iter().zip(&histories).map(|(r, e)| job(r, e)).collect();
    let expected: Vec<Trained> =
        recipes.iter().zip(&histories).map(|(recipe, examples)| alone(&base, recipe, examples)).collect();
    for company in [vec![0, 1, 2, 3, 4, 5], vec![5, 4, 3, 2, 1, 0], vec![2, 0], vec![3, 1, 4]] {
        let chosen: Vec<TrainJob<'_>> = company.iter().map(|&at| jobs[at]).collect();
        for (at, trained) in company.iter().zip(train_jointly(&base, &chosen, &mut Quiet)) {
            assert_eq!(trained.unwrap(), expected[*at], "job {at} in company {company:?}");
        }
    }
    // Negative control: another seed and another example show.
    let other = Recipe { seed: 99, ..recipes[0].clone() };
    assert_ne!(alone(&base, &other, &histories[0]).weights, expected[0].weights);
    let mut changed = histories[0].clone();
    changed[0].tokens[0] ^= 1;
    assert_ne!(alone(&base, &recipes[0], &changed).weights, expected[0].weights);
}

#[test]
fn a_job_is_bit_equal_with_any_number_of_threads() {
    let base = base("tiny-llama");
    let recipes = mixed();
    let histories: Vec<Vec<Example>> = (0..recipes.len()).map(|at| examples(at as u64, 9)).collect();
    let jobs: Vec<TrainJob<'_>> = recipes.iter().zip(&histories).map(|(r, e)| job(r, e)).collect();
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let ends = pool.install(|| {
            assert_eq!(rayon::current_num_threads(), threads);
            train_jointly(&base, &jobs, &mut Quiet)
        });
        ends.into_iter().map(Result::unwrap).collect::<Vec<Trained>>()
    };
    let expected = on(1);
    for threads in [2, 3, 5] {
        assert_eq!(on(threads), expected, "{threads} threads");
    }
}

/// Counts the breaths of training: one per pass, and one per block and way.
struct Breaths(usize);

impl Control for Breaths {
    fn step(&mut self, _: usize, _: StepReport) -> Verdict {
        ControlFlow::Continue(())
    }
    fn breathe(&mut self) {
        self.0 += 1;
    }
}

/// The way back ends at the lowest block that trains: of one job, and of all of a pass.
#[test]
fn nothing_below_the_lowest_site_is_computed() {
    let base = base("tiny-llama");
    let layers = base.config().layers;
    let history = examples(0, 4);
    let recipe = |lowest: usize| Recipe {
        adapter: lora(|config| config.layers_to_transform = Some(vec![lowest, layers - 1])),
        epochs: 1,
        batch: 4,
        ..Recipe::oppu()
    };
    let recipes: Vec<Recipe> = (0..layers).map(recipe).collect();
    let breaths = |jobs: &[usize]| {
        let jobs: Vec<_> = jobs.iter().map(|at| job(&recipes[*at], &history)).collect();
        let mut breaths = Breaths(0);
        train_jointly(&base, &jobs, &mut breaths).into_iter().for_each(|end| drop(end.unwrap()));
        breaths.0
    };
    for lowest in 0..layers {
        assert_eq!(breaths(&[lowest]), 1 + layers + (layers - lowest), "down to block {lowest}");
    }
    assert_eq!(breaths(&[layers - 1, layers - 1]), 1 + layers + 1);
    assert_eq!(breaths(&[layers - 1, 0]), 1 + layers + layers);
}

#[test]
fn a_broken_job_ends_alone() {
    let base = base("tiny-llama");
    let recipes = recipes();
    let history = examples(1, 6);
    let mut broken = alone(&base, &recipes[0], &history).weights;
    if let AdapterWeights::Lora(lora) = &mut broken {
        lora.sites.iter_mut().flatten().for_each(|site| site.b[0] = f32::NAN);
    }
    let wild = [Example { tokens: vec![1, 2, 5000], answer_start: 1 }];
    let huge =
        Recipe { learning_rate: 1.0, weight_decay: 0.0, clip: 1e30, epochs: 100, ..recipes[3].clone() };
    let jobs = [
        TrainJob { start: Some(&broken), ..job(&recipes[0], &history) },
        job(&recipes[1], &history),
        job(&recipes[1], &[]),
        job(&recipes[1], &wild),
        TrainJob { resume: Some(b"ATELTRN\x01 and then nothing"), ..job(&recipes[1], &history) },
        TrainJob { start: Some(&broken), ..job(&recipes[3], &history) },
    ];
    let mut ends = train_jointly(&base, &jobs, &mut Quiet);
    assert!(matches!(ends[0], Err(TrainError::Diverged { step: 0, what: "the loss" })));
    assert!(matches!(ends[2], Err(TrainError::NoExamples)));
    assert!(matches!(ends[3], Err(TrainError::Model(_))));
    assert!(matches!(ends[4], Err(TrainError::Checkpoint(_))));
    assert!(matches!(ends[5], Err(TrainError::Recipe { field: "adapter", .. })));
    assert_eq!(ends.swap_remove(1).unwrap(), alone(&base, &recipes[1], &history));
    // A rate that is far too high ends in an error or in finite weights, never in broken ones.
    let end = train(&base, None, &history, &huge, |_| ControlFlow::Continue(()));
    assert!(end.is_err() || end.is_ok_and(|trained| trained.weights.is_finite()));
}

/// Weights and gradients that break in any step are found in it, before anything comes of them; the jobs beside it, whose
/// rows share the passes and whose values lie in the same buffers afterwards, keep their bits.
#[test]
fn what_breaks_in_a_step_is_found_in_it_and_harms_nobody() {
    let base = base("tiny-llama");
    let recipes: Vec<Recipe> = mixed().into_iter().map(|recipe| Recipe { epochs: 4, ..recipe }).collect();
    let histories: Vec<Vec<Example>> = (0..recipes.len()).map(|at| examples(at as u64, 7)).collect();
    let expected: Vec<Trained> =
        recipes.iter().zip(&histories).map(|(recipe, examples)| alone(&base, recipe, examples)).collect();
    let mut rng = StdRng::seed_from_u64(5);
    let run = |at: usize| Run::new(&base, &job(&recipes[at], &histories[at])).unwrap();
    for (broken, trained) in expected.iter().enumerate() {
        let companions = [(broken + 1) % recipes.len(), (broken + 2) % recipes.len()];
        for (fault, what) in [
            (Fault::Weight(f32::NAN), "the loss"),
            (Fault::Weight(f32::INFINITY), "the loss"),
            (Fault::Gradient(f32::NAN), "the gradient"),
            (Fault::Gradient(f32::NEG_INFINITY), "the gradient"),
        ] {
            let at = rng.random_range(0..trained.losses.len() as u32);
            let begun = [run(broken).breaking(at, fault), run(companions[0]), run(companions[1])];
            let ends = go_on(&base, begun.into_iter().map(Ok).collect(), &mut Quiet);
            let found = matches!(
                &ends[0],
                Err(TrainError::Diverged { step, what: found }) if *step == at && *found == what
            );
            assert!(found, "{fault:?} in step {at} of recipe {broken}: {:?}", ends[0]);
            for (companion, end) in companions.iter().zip(&ends[1..]) {
                assert_eq!(end.as_ref().unwrap(), &expected[*companion], "{fault:?} in step {at}");
            }
        }
        // Negative control: what is no fault is none. A weight that is merely another shows in what comes out.
        let other = run(broken).breaking(1, Fault::Weight(0.5));
        let end = go_on(&base, vec![Ok(other)], &mut Quiet).swap_remove(0).unwrap();
        assert!(end.weights.is_finite() && end.weights != trained.weights);
    }
}

/// Stops a job after some step and keeps its last checkpoint.
struct Killer {
    after: u32,
    last: Option<Vec<u8>>,
}

impl Control for Killer {
    fn step(&mut self, _: usize, report: StepReport) -> Verdict {
        if report.step == self.after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn checkpoint(&mut self, _: usize, step: u32, make: &mut dyn FnMut() -> Vec<u8>) {
        // Not after every step: what was done since is done again.
        if step % 2 == 1 {
            self.last = Some(make());
        }
    }
}

#[test]
fn a_killed_run_goes_on_to_the_same_bits() {
    let base = base("tiny-llama");
    let mut rng = StdRng::seed_from_u64(3);
    for (at, recipe) in mixed().iter().enumerate() {
        let recipe = Recipe { epochs: 4, ..recipe.clone() };
        let history = examples(at as u64, 7);
        let expected = alone(&base, &recipe, &history);
        let steps = expected.losses.len() as u32;
        for _ in 0..9 {
            let mut saved: Option<Vec<u8>> = None;
            let mut done = 0;
            // Killed again and again, at random steps.
            let trained = loop {
                let after = rng.random_range(done + 1..=steps + 1);
                let mut killer = Killer { after, last: saved.clone() };
                let job = TrainJob { resume: saved.as_deref(), ..job(&recipe, &history) };
                match train_jointly(&base, &[job], &mut killer).pop().unwrap() {
                    Ok(trained) => break trained,
                    Err(TrainError::Stopped) => (saved, done) = (killer.last, after.min(steps - 1)),
                    Err(other) => panic!("{other}"),
                }
            };
            assert_eq!(trained, expected, "recipe {at}");
        }
        // A checkpoint does not fit another run.
        let mut killer = Killer { after: 1, last: None };
        assert!(train_jointly(&base, &[job(&recipe, &history)], &mut killer)[0].is_err());
        let saved = killer.last.unwrap();
        let other = Recipe { seed: 1234, ..recipe.clone() };
        let job = TrainJob { resume: Some(&saved), ..job(&other, &history) };
        assert!(matches!(train_jointly(&base, &[job], &mut Quiet)[0], Err(TrainError::Checkpoint(_))));
    }
}

fn flat(weights: &AdapterWeights) -> Vec<f32> {
    match weights {
        AdapterWeights::Lora(lora) => lora
            .sites
            .iter()
            .flatten()
            .flat_map(|site| {
                let vectors = site.bias.iter().chain(&site.magnitude).flatten();
                site.a.iter().chain(&site.b).chain(vectors).copied().collect::<Vec<_>>()
            })
            .collect(),
        AdapterWeights::Ia3(ia3) => ia3
            .sites
            .iter()
            .flatten()
            .flat_map(|site| match site {
                peft::Ia3Scale::Output(scale) | peft::Ia3Scale::Input(scale) => scale.clone(),
            })
            .collect(),
        AdapterWeights::Prompt(prompt) => prompt.embeddings.clone(),
    }
}

#[test]
fn a_common_beginning_gives_the_same_gradients() {
    let base = base("tiny-llama");
    for (at, mut recipe) in recipes().into_iter().enumerate() {
        if let AdapterConfig::Lora(lora) = &mut recipe.adapter {
            lora.dropout = 0.0;
        }
        recipe.batch = 16;
        recipe.micro_batch_tokens = 400;
        let history = examples(at as u64, 12);
        let start = alone(&base, &recipe, &history).weights;
        let once = gradients(&base, &recipe, &start, &history);
        let apart = gradients(&base, &Recipe { share_prefix: false, ..recipe.clone() }, &start, &history);
        assert!((once.0 - apart.0).abs() < 1e-5);
        let (once, apart) = (flat(&once.1), flat(&apart.1));
        let worst = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst(&once, &apart) < 1e-5, "recipe {at}: {}", worst(&once, &apart));
        // It was shared indeed, and a different beginning shows.
        let rows = |share_prefix| alone(&base, &Recipe { share_prefix, ..recipe.clone() }, &history).tokens;
        assert!(rows(true) * 4 < rows(false) * 3, "nothing was shared");
        let mut changed = history.clone();
        changed.iter_mut().for_each(|example| example.tokens[1] ^= 1);
        let changed = flat(&gradients(&base, &recipe, &start, &changed).1);
        assert!(worst(&changed, &apart) > 1e-4);
    }
}

/// Two templates in turns, over several chunks: each is computed once in a chunk, forward and backward.
#[test]
fn templates_in_turns_give_the_same_gradients() {
    let base = base("tiny-llama");
    for (at, mut recipe) in recipes().into_iter().enumerate() {
        if let AdapterConfig::Lora(lora) = &mut recipe.adapter {
            lora.dropout = 0.0;
        }
        recipe.batch = 32;
        recipe.micro_batch_tokens = 40;
        let mut rng = StdRng::seed_from_u64(at as u64);
        let mut of = |template: u32| {
            let mut tokens: Vec<u32> = (0..3).chain((0..14).map(|at| 20 * template + at)).collect();
            tokens.extend((0..rng.random_range(3..8)).map(|_| rng.random_range(0..320u32)));
            let answer_start = tokens.len() - 2;
            Example { tokens, answer_start }
        };
        let history: Vec<Example> = (0..20).map(|at| of(1 + at % 2)).collect();
        let start = alone(&base, &recipe, &history).weights;
        let whole = Recipe { share_prefix: false, micro_batch_tokens: 1000, ..recipe.clone() };
        let once = gradients(&base, &recipe, &start, &history);
        let apart = gradients(&base, &whole, &start, &history);
        assert!((once.0 - apart.0).abs() < 1e-5);
        let (once, apart) = (flat(&once.1), flat(&apart.1));
        let worst = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst(&once, &apart) < 1e-5, "recipe {at}: {}", worst(&once, &apart));
        let chunks = |recipe: &Recipe| {
            let job = TrainJob { start: Some(&start), ..job(recipe, &history) };
            let chunks = Run::new(&base, &job).unwrap().begin(&base);
            (chunks.len(), chunks.iter().map(|chunk| chunk.rows).sum::<usize>())
        };
        let (passes, rows) = chunks(&recipe);
        assert!(passes >= 3, "{passes} passes");
        assert!(rows * 2 < chunks(&whole).1, "{rows} rows");
        // Negative control: one token of one template changed shows.
        let mut changed = history.clone();
        changed[1].tokens[4] ^= 1;
        assert!(worst(&flat(&gradients(&base, &recipe, &start, &changed).1), &apart) > 1e-4);
    }
}

/// What is beyond the most tokens of an example is cut off on the right; without an answer token left, it teaches nothing.
#[test]
fn examples_are_cut_on_the_right() {
    let base = base("tiny-llama");
    for recipe in recipes() {
        let recipe = Recipe { max_tokens: 14, ..recipe };
        let mut history = examples(3, 8);
        history.iter_mut().for_each(|example| example.answer_start = example.answer_start.min(12));
        let mut cut = history.clone();
        cut.iter_mut().for_each(|example| example.tokens.truncate(14));
        assert_ne!(cut, history, "some are longer");
        let expected = alone(&base, &recipe, &cut);
        assert_eq!(alone(&base, &recipe, &history), expected);
        let unheard = Example { tokens: vec![5; 30], answer_start: 14 };
        history.push(unheard.clone());
        assert_eq!(alone(&base, &recipe, &history), expected);
        // Negative controls: one token less of the prompt, and it is heard; one more of the others, and that shows.
        history[8].answer_start = 13;
        assert_ne!(alone(&base, &recipe, &history).losses, expected.losses);
        let longer = Recipe { max_tokens: 15, ..recipe };
        assert_ne!(alone(&base, &longer, &history[..8]).weights, expected.weights);
    }
}

#[test]
fn training_is_reproducible_and_can_be_stopped() {
    let base = base("tiny-llama");
    let recipe = recipes().swap_remove(0);
    let history = examples(0, 6);
    struct Stops;
    impl Control for Stops {
        fn step(&mut self, _: usize, report: StepReport) -> Verdict {
            if report.step == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }
    let stopped = train_jointly(&base, &[job(&recipe, &history)], &mut Stops);
    assert!(matches!(stopped[0], Err(TrainError::Stopped)));
}
