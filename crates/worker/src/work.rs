//! One job from claim to verdict: read, train, compare. The part that computes, without the queue.

use std::ops::ControlFlow;
use std::sync::Arc;

use model::BaseModel;
use peft::{Adapter, LoraWeights, PeftFiles, Precision, generation_id};
use personalize::{Holdout, example, split};
use serde_json::json;
use store::NewGeneration;
use text::Tokenizer;
use train::{Loss, Recipe, StepReport, evaluate, train};
use types::{Example, GateReport, GenerationId, HistoryItem};

use crate::error::WorkerError;
use crate::gate::{Measured, judge};

/// The worker's numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// How adapters are trained.
    pub recipe: Recipe,
    /// What is held out for the gate.
    pub holdout: Holdout,
    /// Fewest items a user must have.
    pub min_items: usize,
    /// Threads of the arithmetic.
    pub threads: usize,
    /// How long a claim lasts without a heartbeat.
    pub lease_millis: i64,
    /// Claims after which a job that never ends is given up.
    pub max_attempts: u32,
    /// Generations of a user that are kept, the head among them.
    pub keep_generations: usize,
    /// How often to look for jobs that nobody announced.
    pub poll_millis: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            recipe: Recipe::oppu(),
            holdout: Holdout { share: 0.2, min: 2, max: 64 },
            min_items: 8,
            threads: 1,
            lease_millis: 60_000,
            max_attempts: 5,
            keep_generations: 10,
            poll_millis: 5_000,
        }
    }
}

/// What a job needs besides its history.
pub(crate) struct Bench {
    pub(crate) base: Arc<BaseModel>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) settings: Settings,
}

/// The generation that is head when the job begins.
pub(crate) struct Head {
    pub(crate) id: GenerationId,
    pub(crate) config: Vec<u8>,
    pub(crate) weights: Vec<u8>,
}

/// What a job came to.
pub(crate) enum Verdict {
    /// Better: to be published.
    Publish { generation: Box<NewGeneration>, gate: GateReport, tokens: u64 },
    /// Kept back by the gate.
    Keep { gate: GateReport, tokens: u64 },
    /// Nothing to train on yet.
    TooFew { items: usize },
}

impl Bench {
    /// Trains on all but the newest items and judges on those. `on_step` may stop it.
    pub(crate) fn work(
        &self,
        items: Vec<HistoryItem>,
        head: Option<&Head>,
        on_step: impl FnMut(StepReport) -> ControlFlow<()>,
    ) -> Result<Verdict, WorkerError> {
        let Settings { recipe, holdout, min_items, .. } = &self.settings;
        if items.len() < *min_items {
            return Ok(Verdict::TooFew { items: items.len() });
        }
        let parts = split(items, *holdout);
        let train_items = parts.train.len();
        let (examples, heldout) = (self.examples(&parts.train)?, self.examples(&parts.heldout)?);
        let trained = train(&self.base, None, &examples, recipe, on_step)?;
        let adapter = Arc::new(Adapter::build(&trained.weights, &*self.base, Precision::Exact)?);
        let head_adapter = head.map(|head| self.parse(head)).transpose()?;
        let measure = |adapter: Option<&Arc<Adapter>>| self.measure(adapter, &heldout);
        let measured = Measured {
            train_items,
            base: measure(None)?,
            head: head_adapter.as_ref().map(|adapter| measure(Some(adapter))).transpose()?,
            new: measure(Some(&adapter))?,
        };
        let (publish, gate) = judge(&measured);
        let tokens = trained.tokens;
        if !publish {
            return Ok(Verdict::Keep { gate, tokens });
        }
        let shape = self.base.shape();
        let PeftFiles { config, weights } = trained.weights.to_files(&shape, "")?;
        let generation = NewGeneration {
            id: generation_id(self.base.hash(), &config, &weights),
            parent: head.map(|head| head.id),
            base: *self.base.hash(),
            config,
            weights,
            meta: json!({
                "recipe": {
                    "epochs": recipe.epochs,
                    "batch": recipe.batch,
                    "learning_rate": recipe.learning_rate,
                    "weight_decay": recipe.weight_decay,
                    "warmup_ratio": recipe.warmup_ratio,
                    "clip": recipe.clip,
                    "seed": recipe.seed,
                },
                "gate": gate,
                "steps": trained.losses.len(),
                "trained_tokens": tokens,
            }),
        };
        Ok(Verdict::Publish { generation: Box::new(generation), gate, tokens })
    }

    fn examples(&self, items: &[HistoryItem]) -> Result<Vec<Example>, WorkerError> {
        let read = |item: &HistoryItem| {
            example(&self.tokenizer, item)
                .map_err(|error| WorkerError::Item { item: item.id.to_string(), problem: error.to_string() })
        };
        items.iter().map(read).collect()
    }

    fn parse(&self, head: &Head) -> Result<Arc<Adapter>, WorkerError> {
        let weights = LoraWeights::parse(&head.config, &head.weights, &self.base.shape())?;
        Ok(Arc::new(Adapter::new(&weights, Precision::Exact)))
    }

    fn measure(&self, adapter: Option<&Arc<Adapter>>, heldout: &[Example]) -> Result<Vec<Loss>, WorkerError> {
        let recipe = &self.settings.recipe;
        let max_tokens = recipe.max_tokens.min(self.base.config().context);
        Ok(evaluate(&self.base, adapter, heldout, max_tokens, recipe.micro_batch_tokens)?)
    }
}
