//! The trainer that the worker has, behind a trait so that tests can put a faulty one in its place.

use model::BaseModel;
use train::{Control, TrainError, TrainJob, Trained, train_jointly};

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

/// All jobs in shared passes through the base.
#[derive(Debug, Clone, Copy, Default)]
pub struct Jointly;

impl Trainer for Jointly {
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        train_jointly(base, jobs, control)
    }
}
