//! One job's run: its weights and moments between steps, its batches, and what a step does to it.

use model::BaseModel;
use sha2::{Digest, Sha256};
use types::Example;

use crate::checkpoint::{self, State};
use crate::error::TrainError;
use crate::optimiser::{AdamW, clip};
use crate::pack::{Chunk, Cut};
use crate::params::Params;
use crate::random::{self, Dropout};
use crate::recipe::{Recipe, learning_rate};
use crate::site::Member;
use crate::trainer::{StepReport, TrainJob, Trained};

/// A run between or within its steps.
pub(crate) struct Run<'a> {
    recipe: &'a Recipe,
    examples: &'a [Example],
    /// Indices of the examples that have an answer.
    useful: Vec<usize>,
    cut: Cut,
    fingerprint: [u8; 32],
    params: Params,
    moments: AdamW,
    grads: Vec<f32>,
    losses: Vec<f64>,
    tokens: u64,
    /// Of the step at hand.
    batch: Batch,
    /// What breaks in which step.
    #[cfg(test)]
    fault: Option<(u32, Fault)>,
}

/// Something that breaks in a run.
#[cfg(test)]
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// A weight becomes this before the passes of a step, which compute with it.
    Weight(f32),
    /// A gradient becomes this after them.
    Gradient(f32),
}

#[derive(Default)]
struct Batch {
    answers: usize,
    loss: f64,
    rows: usize,
    dropout: Option<Dropout>,
}

impl<'a> Run<'a> {
    /// Checks a job against the base and makes its weights, or takes them out of its checkpoint.
    pub(crate) fn new(base: &BaseModel, job: &TrainJob<'a>) -> Result<Self, TrainError> {
        let recipe = job.recipe;
        recipe.check()?;
        let params = match job.start {
            Some(start)
                if std::mem::discriminant(&start.config()) != std::mem::discriminant(&recipe.adapter) =>
            {
                return Err(TrainError::Recipe {
                    field: "adapter",
                    problem: "is of another kind than the weights to start from".into(),
                });
            }
            Some(start) => Params::of(start, base)?,
            None => Params::fresh(recipe, base)?,
        };
        let config = base.config();
        let virtual_tokens = params.virtual_tokens;
        let cut = Cut {
            max_tokens: recipe.max_tokens.min(config.context.saturating_sub(virtual_tokens)),
            limit: recipe.micro_batch_tokens,
            virtual_tokens,
            share: recipe.share_prefix,
        };
        let useful = cut.useful(job.examples, config.vocab)?;
        if useful.is_empty() {
            return Err(TrainError::NoExamples);
        }
        let len = params.values.len();
        let fingerprint = fingerprint(base, job, &params);
        let mut run = Self {
            recipe,
            examples: job.examples,
            useful,
            cut,
            fingerprint,
            params,
            moments: AdamW::new(len),
            grads: vec![0.0; len],
            losses: Vec::new(),
            tokens: 0,
            batch: Batch::default(),
            #[cfg(test)]
            fault: None,
        };
        if let Some(bytes) = job.resume {
            let State { values, moments, losses, tokens } = checkpoint::read(bytes, &fingerprint, len)?;
            (run.params.values, run.moments, run.losses, run.tokens) = (values, moments, losses, tokens);
            if run.step() > run.steps() {
                return Err(TrainError::Checkpoint("has more steps than the run"));
            }
        }
        Ok(run)
    }

    /// Steps done.
    pub(crate) fn step(&self) -> u32 {
        self.losses.len() as u32
    }

    pub(crate) fn steps(&self) -> u32 {
        self.recipe.steps(self.useful.len())
    }

    pub(crate) fn examples(&self) -> &'a [Example] {
        self.examples
    }

    pub(crate) fn recipe(&self) -> &'a Recipe {
        self.recipe
    }

    pub(crate) fn cut(&self) -> &Cut {
        &self.cut
    }

    /// Begins the next step: the batch, cut into chunks.
    pub(crate) fn begin(&mut self, base: &BaseModel) -> Vec<Chunk> {
        let step = self.step();
        #[cfg(test)]
        if let Some((_, Fault::Weight(value))) = self.fault.filter(|(at, _)| *at == step) {
            let middle = self.params.values.len() / 2;
            self.params.values[middle] = value;
        }
        let per_epoch = self.useful.len().div_ceil(self.recipe.batch) as u32;
        let order = random::order(self.recipe.seed, step / per_epoch, self.useful.len());
        let first = (step % per_epoch) as usize * self.recipe.batch;
        let batch: Vec<usize> =
            order.iter().skip(first).take(self.recipe.batch).map(|&at| self.useful[at]).collect();
        self.params.refresh(base);
        self.grads.fill(0.0);
        let chunks = self.cut.chunks(self.examples, &batch);
        self.batch = Batch {
            answers: batch.iter().map(|&index| self.cut.answers(&self.examples[index])).sum(),
            loss: 0.0,
            rows: chunks.iter().map(|chunk| chunk.rows).sum(),
            dropout: Dropout::new(self.recipe.seed, step, self.recipe.dropout()),
        };
        chunks
    }

    /// The run as a pass of the step sees it.
    pub(crate) fn member(&mut self) -> Member<'_> {
        Member {
            params: &self.params,
            grads: &mut self.grads,
            dropout: self.batch.dropout,
            share: 1.0 / self.batch.answers as f32,
            loss: &mut self.batch.loss,
        }
    }

    /// Ends the step whose passes are done: clips, and moves the weights.
    pub(crate) fn end(&mut self) -> Result<StepReport, TrainError> {
        let step = self.step();
        #[cfg(test)]
        if let Some((_, Fault::Gradient(value))) = self.fault.filter(|(at, _)| *at == step) {
            let middle = self.grads.len() / 2;
            self.grads[middle] = value;
        }
        let diverged = |what| Err(TrainError::Diverged { step, what });
        let loss = self.batch.loss / self.batch.answers as f64;
        if !loss.is_finite() {
            return diverged("the loss");
        }
        if !clip(&mut self.grads, self.recipe.clip) {
            return diverged("the gradient");
        }
        let rate = learning_rate(self.recipe, step, self.steps());
        let Recipe { adam, weight_decay, .. } = *self.recipe;
        self.moments.step(adam, step, rate, weight_decay, &self.grads, &mut self.params.values);
        if !self.params.values.iter().all(|value| value.is_finite()) {
            return diverged("a weight");
        }
        self.losses.push(loss);
        self.tokens += self.batch.rows as u64;
        Ok(StepReport { step: step + 1, steps: self.steps(), loss, tokens: self.batch.rows as u64 })
    }

    /// The state between two steps.
    pub(crate) fn checkpoint(&self) -> Vec<u8> {
        let state = State {
            values: self.params.values.clone(),
            moments: self.moments.clone(),
            losses: self.losses.clone(),
            tokens: self.tokens,
        };
        checkpoint::write(&self.fingerprint, &state)
    }

    /// What came out of it.
    pub(crate) fn finish(self) -> Trained {
        Trained { weights: self.params.weights(), losses: self.losses, tokens: self.tokens }
    }

    /// The same run, which breaks in a step.
    #[cfg(test)]
    pub(crate) fn breaking(self, step: u32, fault: Fault) -> Self {
        Self { fault: Some((step, fault)), ..self }
    }

    #[cfg(test)]
    pub(crate) fn gradients(&self) -> (f64, peft::AdapterWeights) {
        let mut params = self.params.clone();
        params.values.clone_from(&self.grads);
        (self.batch.loss / self.batch.answers as f64, params.weights())
    }
}

/// What makes a run what it is: the base, the recipe, the weights it starts from and its examples.
fn fingerprint(base: &BaseModel, job: &TrainJob<'_>, start: &Params) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(base.hash());
    hash.update(format!("{} {:?}", job.recipe.identity(), start.weights().config()));
    hash.update((start.values.len() as u64).to_le_bytes());
    start.values.iter().for_each(|value| hash.update(value.to_le_bytes()));
    for example in job.examples {
        hash.update((example.tokens.len() as u64).to_le_bytes());
        hash.update((example.answer_start as u64).to_le_bytes());
        example.tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
    }
    hash.finalize().into()
}
