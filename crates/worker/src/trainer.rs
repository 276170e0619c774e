//! What the worker asks of a trainer, and the trainer it has.

use model::BaseModel;
use peft::LoraWeights;
use train::{Recipe, StepReport, TrainError, Trained, Verdict};
use types::Example;

/// One adapter to train.
#[derive(Debug, Clone, Copy)]
pub struct TrainJob<'a> {
    /// How.
    pub recipe: &'a Recipe,
    /// The weights to go on from; fresh ones if absent.
    pub start: Option<&'a LoraWeights>,
    /// What to learn.
    pub examples: &'a [Example],
    /// A checkpoint of this very work, to go on from.
    pub resume: Option<&'a [u8]>,
}

/// How training is watched and steered; `job` is an index into the jobs.
pub trait Control {
    /// After every optimiser step.
    fn step(&mut self, job: usize, report: StepReport) -> Verdict;
    /// Where a checkpoint can be taken; `make` makes it.
    fn checkpoint(&mut self, job: usize, step: u32, make: &mut dyn FnMut() -> Vec<u8>);
    /// Between micro-batches.
    fn breathe(&mut self) {}
}

/// Trains adapters.
pub trait Trainer: Send + Sync + 'static {
    /// Trains the jobs; each ends alone. The results are in the jobs' order.
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>>;
}

/// One job after the other, each from its beginning.
#[derive(Debug, Clone, Copy, Default)]
pub struct OneByOne;

impl Trainer for OneByOne {
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        let mut one = |(at, job): (usize, &TrainJob<'_>)| {
            train::train(base, job.start, job.examples, job.recipe, |report| {
                control.breathe();
                control.step(at, report)
            })
        };
        jobs.iter().enumerate().map(&mut one).collect()
    }
}
