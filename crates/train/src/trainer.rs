//! Training of several users' jobs at once: their rows share the passes through the base, and nothing else.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use kernels::Products;
use model::BaseModel;
use peft::AdapterWeights;
use types::Example;

use crate::buffers::Pool;
use crate::error::TrainError;
use crate::pack::{Chunk, Pack, next_pass};
use crate::pass::Pass;
use crate::recipe::Recipe;
use crate::run::Run;

/// One user's job.
#[derive(Debug, Clone, Copy)]
pub struct TrainJob<'a> {
    /// How to train.
    pub recipe: &'a Recipe,
    /// The weights to go on from, of the recipe's kind; their own config and ranks stay. Fresh ones if `None`.
    pub start: Option<&'a AdapterWeights>,
    /// What to learn.
    pub examples: &'a [Example],
    /// A checkpoint of the same run, which goes on from there.
    pub resume: Option<&'a [u8]>,
}

/// Told after every optimiser step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Steps done.
    pub step: u32,
    /// Steps in all.
    pub steps: u32,
    /// Mean loss of the step's answer tokens before the update, in nats.
    pub loss: f64,
    /// Rows of the step that went through the model.
    pub tokens: u64,
}

/// Whether a job goes on after a step.
pub type Verdict = ControlFlow<()>;

/// Who watches over a training.
pub trait Control {
    /// Called after every step of every job; a job that shall stop ends with [`TrainError::Stopped`], the others go on. After
    /// the last step there is nothing to stop: what is done is not thrown away.
    fn step(&mut self, job: usize, report: StepReport) -> Verdict;

    /// Called between two steps of a job, of which `step` are done; `make` gives the checkpoint if it is wanted.
    fn checkpoint(&mut self, _job: usize, _step: u32, _make: &mut dyn FnMut() -> Vec<u8>) {}

    /// Called often, at least once per block of the model: the place to give way to others.
    fn breathe(&mut self) {}
}

/// The outcome of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    /// The new weights.
    pub weights: AdapterWeights,
    /// Loss of every step, in nats per answer token.
    pub losses: Vec<f64>,
    /// Rows that went through the model, all epochs; a common beginning counts once.
    pub tokens: u64,
}

/// Trains an adapter on examples, from `start` or from fresh weights.
///
/// # Errors
/// When the recipe is outside its limits, no example has an answer, loss, gradient or a weight is not finite, or
/// `on_step` stops it.
pub fn train(
    base: &BaseModel,
    start: Option<&AdapterWeights>,
    examples: &[Example],
    recipe: &Recipe,
    on_step: impl FnMut(StepReport) -> Verdict,
) -> Result<Trained, TrainError> {
    struct Steps<F>(F);
    impl<F: FnMut(StepReport) -> Verdict> Control for Steps<F> {
        fn step(&mut self, _: usize, report: StepReport) -> Verdict {
            (self.0)(report)
        }
    }
    let job = TrainJob { recipe, start, examples, resume: None };
    train_jointly(base, &[job], &mut Steps(on_step)).pop().unwrap_or(Err(TrainError::NoExamples))
}

/// Trains all jobs, one step of each at a time; a job's result does not depend on the others, to the bit. A job that
/// fails or is stopped ends alone.
pub fn train_jointly(
    base: &BaseModel,
    jobs: &[TrainJob<'_>],
    control: &mut dyn Control,
) -> Vec<Result<Trained, TrainError>> {
    go_on(base, jobs.iter().map(|job| Run::new(base, job)).collect(), control)
}

/// Runs to their ends, in their order.
pub(crate) fn go_on(
    base: &BaseModel,
    begun: Vec<Result<Run<'_>, TrainError>>,
    control: &mut dyn Control,
) -> Vec<Result<Trained, TrainError>> {
    let mut pool = Pool::default();
    let mut ended: Vec<Option<Result<Trained, TrainError>>> = begun.iter().map(|_| None).collect();
    let mut runs: Vec<(usize, Run<'_>)> = Vec::new();
    for (job, run) in begun.into_iter().enumerate() {
        match run {
            Ok(run) => runs.push((job, run)),
            Err(error) => ended[job] = Some(Err(error)),
        }
    }
    loop {
        let mut running = Vec::with_capacity(runs.len());
        for (job, run) in runs {
            if run.step() < run.steps() {
                running.push((job, run));
            } else {
                ended[job] = Some(Ok(run.finish()));
            }
        }
        runs = running;
        if runs.is_empty() {
            break;
        }
        step(base, &mut pool, &mut runs, &mut || control.breathe());
        let mut running = Vec::with_capacity(runs.len());
        for (job, mut run) in runs {
            match run.end() {
                Ok(report) => {
                    let verdict = control.step(job, report);
                    let goes_on = report.step < report.steps;
                    if goes_on {
                        control.checkpoint(job, report.step, &mut || run.checkpoint());
                    }
                    if goes_on && verdict.is_break() {
                        ended[job] = Some(Err(TrainError::Stopped));
                    } else {
                        running.push((job, run));
                    }
                }
                Err(error) => ended[job] = Some(Err(error)),
            }
        }
        runs = running;
    }
    ended.into_iter().map(|end| end.unwrap_or(Err(TrainError::NoExamples))).collect()
}

/// The passes of one step of every run, each as full as the runs' recipes allow. Chunks of a run stay in their order.
pub(crate) fn step(
    base: &BaseModel,
    pool: &mut Pool,
    runs: &mut [(usize, Run<'_>)],
    breathe: &mut dyn FnMut(),
) {
    let mut waiting: [VecDeque<(usize, Chunk)>; Products::ALL.len()] = Default::default();
    for (at, (_, run)) in runs.iter_mut().enumerate() {
        let own = &mut waiting[run.recipe().products as usize];
        own.extend(run.begin(base).into_iter().map(|chunk| (at, chunk)));
    }
    let limit = runs.iter().map(|(_, run)| run.recipe().micro_batch_tokens).max().unwrap_or(0);
    let budget = runs.iter().map(|(_, run)| run.recipe().activation_bytes).min().unwrap_or(0);
    // Each precision has passes of its own.
    for (products, mut waiting) in Products::ALL.into_iter().zip(waiting) {
        while !waiting.is_empty() {
            let mut pack = Pack::new(products);
            for (at, chunk) in next_pass(&mut waiting, limit) {
                let run = &runs[at].1;
                pack.push(at, run.cut(), run.examples(), &chunk);
            }
            breathe();
            let mut members: Vec<_> = runs.iter_mut().map(|(_, run)| run.member()).collect();
            Pass::new(base, &pack, budget).run(pool, &mut members, breathe);
        }
    }
}
