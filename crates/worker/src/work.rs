//! One job's computing: read, train, compare. The part without the queue, and the only one that calls the trainer.

use std::sync::Arc;

use model::BaseModel;
use peft::{AdapterConfig, AdapterWeights, PeftFiles, generation_id};
use personalize::example;
use serde_json::json;
use store::{Lesson, NewGeneration, OldLoss, item_hash};
use text::Tokenizer;
use train::{Control, Loss, Recipe, TrainError, TrainJob, Trained, evaluate};
use types::{Example, GateReport, HistoryItem, Job, Provenance, TrainingCourse};

use crate::drift::has_drifted;
use crate::error::WorkerError;
use crate::gate::{HeadMeasured, Judgement, Measured, judge};
use crate::norm::insane;
use crate::options;
use crate::plan::{Head, Plan, plan, work_hash};
use crate::run::OnStep;
use crate::settings::Settings;
use crate::trainer::Trainer;

/// What jobs need besides their histories.
pub(crate) struct Bench {
    pub(crate) base: Arc<BaseModel>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) settings: Settings,
    pub(crate) trainer: Arc<dyn Trainer>,
    pub(crate) on_step: OnStep,
}

/// A job that is ready to be trained.
pub(crate) struct Prepared {
    pub(crate) work: [u8; 32],
    recipe: Recipe,
    plan: Plan,
    start: Option<AdapterWeights>,
    head: Option<Head>,
    examples: Vec<Example>,
    heldout: Vec<Example>,
    /// Which of them the head has learnt, or may have.
    heldout_learnt: Vec<bool>,
    old: Vec<Example>,
    old_items: Vec<[u8; 32]>,
    /// Why the head cannot be read, if it cannot: then it is as if there were none.
    unreadable: Option<String>,
}

/// What a job came to.
pub(crate) enum Verdict {
    /// Better: to be published.
    Publish { generation: Box<NewGeneration>, gate: Option<GateReport>, reason: String, lesson: Lesson },
    /// Kept back by the gate.
    Keep { gate: Option<GateReport>, reason: String, lesson: Lesson },
}

impl Bench {
    /// Decides what a job learns, and reads it. `from_scratch` rules an update out, and so does a head that cannot be read:
    /// an error that says why. `breathe` is called now and then.
    pub(crate) fn prepare(
        &self,
        job: &Job,
        items: Vec<HistoryItem>,
        head: Result<Option<Head>, String>,
        from_scratch: bool,
        breathe: &mut dyn FnMut(),
    ) -> Result<Prepared, WorkerError> {
        let recipe = options::recipe(&self.settings, &job.adapter.tenant, job.training.as_ref())?;
        let shape = self.base.shape();
        let parse = |head: Head| match head.weights(&shape) {
            Ok(weights) => Ok((head, weights)),
            Err(problem) => Err(problem.to_string()),
        };
        let parsed = head.and_then(|head| head.map(parse).transpose());
        let (parsed, unreadable) = match parsed {
            Ok(parsed) => (parsed, None),
            Err(problem) => {
                tracing::warn!(job = %job.id, adapter = %job.adapter, problem, "the current adapter cannot be read");
                (None, Some(problem))
            }
        };
        let (head, weights) = parsed.unzip();
        breathe();
        let fits = weights.as_ref().is_some_and(|weights| is_alike(weights, &recipe));
        let plan = plan(items, head.as_ref(), fits, from_scratch, &self.settings, recipe.seed);
        let start = weights.filter(|_| !plan.lesson.from_scratch);
        let begins_at = head.as_ref().map(|head| head.id).filter(|_| start.is_some());
        let work = work_hash(&plan, &recipe, begins_at.as_ref());
        let mut read = |item: &HistoryItem| {
            breathe();
            self.example(item)
        };
        let examples = plan.train.iter().filter_map(&mut read).collect();
        let old = plan.old.iter().filter_map(|item| Some((read(item)?, item_hash(item))));
        let (old, old_items) = old.unzip();
        let judges = plan.heldout.iter().zip(&plan.heldout_learnt);
        let judges = judges.filter_map(|(item, learnt)| Some((read(item)?, *learnt)));
        let (heldout, heldout_learnt) = judges.unzip();
        Ok(Prepared {
            work,
            recipe,
            plan,
            start,
            head,
            examples,
            heldout,
            heldout_learnt,
            old,
            old_items,
            unreadable,
        })
    }

    /// Trains all of them; `resume` holds their checkpoints.
    pub(crate) fn learn(
        &self,
        prepared: &[&Prepared],
        resume: &[Option<Vec<u8>>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        let jobs = prepared.iter().zip(resume).map(|(prepared, resume)| TrainJob {
            recipe: &prepared.recipe,
            start: prepared.start.as_ref(),
            examples: &prepared.examples,
            resume: resume.as_deref(),
        });
        let jobs: Vec<_> = jobs.collect();
        self.trainer.train(&self.base, &jobs, control)
    }

    /// Whether an update has made old items worse than the rules allow. `breathe` is called now and then.
    pub(crate) fn drifted(
        &self,
        prepared: &Prepared,
        trained: &Trained,
        breathe: &mut dyn FnMut(),
    ) -> Result<bool, WorkerError> {
        let Some(start) = &prepared.start else { return Ok(false) };
        if insane(&trained.weights, &self.base, self.settings.gate.max_norm).is_some() {
            return Ok(true);
        }
        let both = [Some(start), Some(&trained.weights)];
        let losses = self.measure(&both, &prepared.old, &prepared.recipe, breathe)?;
        let known = &prepared.plan.lesson.baseline;
        let baseline = prepared.old_items.iter().map(|item| {
            let OldLoss { nats, tokens, .. } = *known.iter().find(|loss| loss.item == *item)?;
            Some(Loss { nats, tokens: tokens as usize })
        });
        let baseline: Vec<_> = baseline.collect();
        Ok(has_drifted(&losses[0], &baseline, &losses[1], self.settings.growth.max_drift))
    }

    /// How well weights from fresh ones know what updates of them will be measured by.
    fn baseline(
        &self,
        prepared: &Prepared,
        trained: &Trained,
        breathe: &mut dyn FnMut(),
    ) -> Result<Vec<OldLoss>, WorkerError> {
        let losses = self.measure(&[Some(&trained.weights)], &prepared.old, &prepared.recipe, breathe)?;
        let losses = losses.iter().flatten().zip(&prepared.old_items).filter_map(|(loss, item)| {
            let Loss { nats, tokens } = (*loss)?;
            Some(OldLoss { item: *item, nats, tokens: u32::try_from(tokens).ok()? })
        });
        Ok(losses.collect())
    }

    /// Compares the new weights with base and head. The job has cost so many `tokens`. `breathe` is called now and then.
    pub(crate) fn conclude(
        &self,
        mut prepared: Prepared,
        trained: Trained,
        tokens: u64,
        breathe: &mut dyn FnMut(),
    ) -> Result<Verdict, WorkerError> {
        let judgement = self.judge(&prepared, &trained, breathe)?;
        if judgement.publish && prepared.plan.lesson.from_scratch {
            prepared.plan.lesson.baseline = self.baseline(&prepared, &trained, breathe)?;
        }
        let Prepared { plan: Plan { learnt, lesson, .. }, recipe, head, unreadable, .. } = prepared;
        let Judgement { publish, report: gate, mut reason } = judgement;
        if let Some(problem) = unreadable {
            reason =
                format!("{reason}; the current adapter cannot be read and counts for nothing: {problem}");
        }
        if !publish {
            return Ok(Verdict::Keep { gate, reason, lesson });
        }
        let shape = self.base.shape();
        let PeftFiles { config, weights } = trained.weights.to_files(&shape, "")?;
        let updates = match lesson.from_scratch {
            true => 0,
            false => head.as_ref().map_or(0, |head| head.updates + 1),
        };
        let generation = NewGeneration {
            id: generation_id(self.base.hash(), &config, &weights),
            parent: head.map(|head| head.id),
            base: *self.base.hash(),
            config: config.into(),
            weights: weights.into(),
            meta: json!(Provenance {
                history: learnt,
                recipe: options::in_full(&recipe),
                seed: recipe.seed,
                gate: gate.clone(),
                training: TrainingCourse {
                    from_scratch: lesson.from_scratch,
                    updates,
                    new_items: lesson.new_items,
                    replayed_items: lesson.replayed_items,
                    steps: trained.losses.len() as u64,
                    trained_tokens: tokens,
                },
            }),
        };
        Ok(Verdict::Publish { generation: Box::new(generation), gate, reason, lesson })
    }

    fn judge(
        &self,
        prepared: &Prepared,
        trained: &Trained,
        breathe: &mut dyn FnMut(),
    ) -> Result<Judgement, WorkerError> {
        let rules = &self.settings.gate;
        if let Some(problem) = insane(&trained.weights, &self.base, rules.max_norm) {
            return Ok(Judgement::no(problem));
        }
        let parsed = match (&prepared.start, &prepared.head) {
            (None, Some(head)) => Some(head.weights(&self.base.shape())?),
            _ => None,
        };
        let head = prepared.start.as_ref().or(parsed.as_ref());
        let mut sides = vec![None, Some(&trained.weights)];
        sides.extend(head.map(Some));
        let mut losses = self.measure(&sides, &prepared.heldout, &prepared.recipe, breathe)?.into_iter();
        let mut next = || losses.next().unwrap_or_default();
        let (base, new) = (next(), next());
        let flags = prepared.heldout_learnt.iter().zip(&new);
        let learnt = flags.filter(|(_, loss)| loss.is_some()).map(|(learnt, _)| *learnt).collect();
        // Held-out items that are too long for one of them have no loss under any.
        let known = |losses: Vec<Option<Loss>>| losses.into_iter().flatten().collect();
        let head = head.map(|_| HeadMeasured { losses: known(next()), learnt });
        let train_items = prepared.plan.train.len();
        let measured = Measured { train_items, base: known(base), head, new: known(new) };
        Ok(judge(&measured, rules))
    }

    /// An item that cannot be read (too long for the tokenizer, refused by the template) teaches nothing and judges
    /// nothing.
    fn example(&self, item: &HistoryItem) -> Option<Example> {
        match example(&self.tokenizer, item) {
            Ok(example) => Some(example),
            Err(error) => {
                tracing::warn!(item = %item.id, %error, "a history item is passed over");
                None
            }
        }
    }

    /// The losses of examples under each adapter, or the base alone.
    fn measure(
        &self,
        adapters: &[Option<&AdapterWeights>],
        examples: &[Example],
        recipe: &Recipe,
        breathe: &mut dyn FnMut(),
    ) -> Result<Vec<Vec<Option<Loss>>>, WorkerError> {
        let Recipe { max_tokens, micro_batch_tokens, .. } = recipe;
        Ok(evaluate(&self.base, adapters, examples, *max_tokens, *micro_batch_tokens, breathe)?)
    }
}

impl Prepared {
    /// What is written down of the training.
    pub(crate) fn lesson(&self) -> &Lesson {
        &self.plan.lesson
    }

    /// What the gate compares with, for a second round.
    pub(crate) fn into_head(self) -> Option<Head> {
        self.head
    }
}

/// Whether training by `recipe` can go on from `weights`.
fn is_alike(weights: &AdapterWeights, recipe: &Recipe) -> bool {
    match (weights, &recipe.adapter) {
        (AdapterWeights::Lora(has), AdapterConfig::Lora(wanted)) => {
            // Dropout is no part of the weights.
            peft::LoraConfig { dropout: wanted.dropout, ..has.config.clone() } == *wanted
        }
        (AdapterWeights::Ia3(has), AdapterConfig::Ia3(wanted)) => has.config == *wanted,
        (AdapterWeights::Prompt(has), AdapterConfig::Prompt(wanted)) => has.config == *wanted,
        _ => false,
    }
}
