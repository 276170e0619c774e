//! How much is kept for the way back changes memory and time, and never a bit.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::ops::ControlFlow;

use kernels::Products;
use model::BaseModel;
use peft::AdapterWeights;
use types::Example;

use crate::buffers::Pool;
use crate::joint_tests::{examples, recipes};
use crate::pack::Pack;
use crate::pass::Pass;
use crate::recipe::Recipe;
use crate::reference_tests::base;
use crate::run::Run;
use crate::trainer::{TrainJob, step, train};

#[derive(Clone)]
struct Job {
    recipe: Recipe,
    start: AdapterWeights,
    examples: Vec<Example>,
}

impl Job {
    /// Weights that have learnt something, so that none of their gradients is nought.
    fn new(base: &BaseModel, recipe: &Recipe, examples: Vec<Example>) -> Self {
        let recipe = Recipe { micro_batch_tokens: 1000, batch: 8, ..recipe.clone() };
        let start = train(base, None, &examples, &recipe, |_| ControlFlow::Continue(())).unwrap().weights;
        Self { recipe, start, examples }
    }
}

fn runs<'a>(base: &BaseModel, jobs: &'a [Job]) -> Vec<(usize, Run<'a>)> {
    let run = |Job { recipe, start, examples }: &'a Job| {
        Run::new(base, &TrainJob { recipe, start: Some(start), examples, resume: None }).unwrap()
    };
    jobs.iter().map(run).enumerate().collect()
}

/// The budgets at which one block more is kept in the jobs' first pass, and the lowest block with a way back.
fn budgets(base: &BaseModel, jobs: &[Job]) -> (Vec<usize>, usize) {
    let mut runs = runs(base, jobs);
    let mut pack = Pack::default();
    for (at, run) in &mut runs {
        for chunk in run.begin(base) {
            pack.push(*at, run.cut(), run.examples(), &chunk);
        }
    }
    let members: Vec<_> = runs.iter_mut().map(|(_, run)| run.member()).collect();
    Pass::new(base, &pack, 0).budgets(&mut Pool::default(), &members)
}

/// Losses and gradients of the jobs' first step, and the breaths drawn in it: one per pass and block, either way, and
/// one for each block that is computed again.
fn first_step(base: &BaseModel, jobs: &[Job], budget: usize) -> (Vec<(f64, AdapterWeights)>, usize) {
    let mut jobs = jobs.to_vec();
    jobs.iter_mut().for_each(|job| job.recipe.activation_bytes = budget);
    let (mut runs, mut breaths) = (runs(base, &jobs), 0);
    step(base, &mut Pool::default(), &mut runs, &mut || breaths += 1);
    (runs.iter().map(|(_, run)| run.gradients()).collect(), breaths)
}

/// Every budget from none to all blocks; one byte less keeps one block less.
fn check(base: &BaseModel, jobs: &[Job]) {
    let layers = base.config().layers;
    let (budgets, lowest) = budgets(base, jobs);
    assert_eq!(budgets.len(), layers - lowest + 1);
    let (all, _) = first_step(base, jobs, usize::MAX);
    for (kept, &budget) in budgets.iter().enumerate() {
        for (budget, kept) in [(budget, kept), (budget - 1, kept.saturating_sub(1))] {
            let (gradients, breaths) = first_step(base, jobs, budget);
            let again = layers - lowest - kept;
            assert_eq!(breaths, 1 + layers + (layers - lowest) + again, "{budget} of {budgets:?} bytes");
            assert_eq!(gradients, all, "{kept} blocks kept");
        }
    }
}

#[test]
fn gradients_are_bit_equal_under_every_budget() {
    let llama = base("tiny-llama");
    let recipes = recipes();
    let job = |(at, recipe)| Job::new(&llama, recipe, examples(at as u64, 8));
    let jobs: Vec<Job> = recipes.iter().enumerate().map(job).collect();
    jobs.iter().for_each(|job| check(&llama, std::slice::from_ref(job)));
    // Magnitudes, factors and plain LoRA in one pass, where some rows have what others have not.
    let mut three = [jobs[0].clone(), jobs[2].clone(), jobs[3].clone()];
    check(&llama, &three);
    three.iter_mut().for_each(|job| job.recipe.products = Products::Bf16);
    check(&llama, &three);
    // Norms of queries and keys leave more.
    let qwen = base("tiny-qwen3");
    for (at, recipe) in recipes.iter().enumerate().take(5) {
        let mut examples = examples(at as u64, 8);
        examples.iter_mut().flat_map(|example| &mut example.tokens).for_each(|token| *token %= 160);
        check(&qwen, &[Job::new(&qwen, recipe, examples)]);
    }
}
