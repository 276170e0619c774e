//! Why training stopped.

/// No weights come out of any of these.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// There is nothing to learn from.
    #[error("there is no example with an answer token")]
    NoExamples,
    /// A hyper-parameter is outside its limits.
    #[error("{field} {problem}")]
    Recipe {
        /// Which.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The loss, the gradient or a weight became infinite or not a number.
    #[error("training diverged at step {step}: {what} is not finite")]
    Diverged {
        /// Optimiser step, counted from 0.
        step: u32,
        /// What.
        what: &'static str,
    },
    /// The caller stopped it.
    #[error("training was stopped")]
    Stopped,
    /// The adapter's config does not fit the base.
    #[error(transparent)]
    Adapter(#[from] peft::PeftError),
    /// A checkpoint is damaged, or of another run.
    #[error("the checkpoint {0}")]
    Checkpoint(&'static str),
    /// A token or length is beyond the model.
    #[error(transparent)]
    Model(#[from] model::ModelError),
}
