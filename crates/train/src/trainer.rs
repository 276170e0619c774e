//! One user's training run: batches, gradients, AdamW (Loshchilov and Hutter 2019), clipping, schedule.

use std::ops::ControlFlow;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};
use model::BaseModel;
use peft::{LoraTensors, LoraWeights};
use rand::rngs::{SmallRng, StdRng};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use types::Example;

use crate::error::TrainError;
use crate::loss::CrossEntropy;
use crate::pack::{Pack, is_useful};
use crate::pass::{SiteVars, Training};
use crate::recipe::{Recipe, learning_rate};

/// Told after every optimiser step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Steps done.
    pub step: u32,
    /// Steps in all.
    pub steps: u32,
    /// Mean loss of the step's answer tokens before the update, in nats.
    pub loss: f64,
}

/// Whether training goes on after a step.
pub type Verdict = ControlFlow<()>;

/// The outcome of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    /// The new weights.
    pub weights: LoraWeights,
    /// Loss of every step, in nats per answer token.
    pub losses: Vec<f64>,
    /// Tokens that went through the model, all epochs.
    pub tokens: u64,
}

/// Trains an adapter on examples, from `start` or from fresh weights.
///
/// # Errors
/// When the recipe is outside its limits, no example has an answer, the loss or a weight is not finite, or
/// `on_step` stops it.
pub fn train(
    base: &BaseModel,
    start: Option<&LoraWeights>,
    examples: &[Example],
    recipe: &Recipe,
    mut on_step: impl FnMut(StepReport) -> Verdict,
) -> Result<Trained, TrainError> {
    recipe.check()?;
    let max_tokens = recipe.max_tokens.min(base.config().context);
    let mut order: Vec<&Example> = examples.iter().filter(|e| is_useful(e, max_tokens)).collect();
    if order.is_empty() {
        return Err(TrainError::NoExamples);
    }
    let sites = match start {
        Some(weights) => vars_of(weights, base)?,
        None => fresh_vars(recipe, base)?,
    };
    let vars: Vec<Var> = sites.iter().flatten().flat_map(|site| [site.a.clone(), site.b.clone()]).collect();
    let mut optimiser = AdamW::new(
        vars.clone(),
        ParamsAdamW { lr: 0.0, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: recipe.weight_decay },
    )?;
    let steps = recipe.steps(order.len());
    let mut shuffle = StdRng::seed_from_u64(recipe.seed);
    let (mut losses, mut tokens) = (Vec::new(), 0);
    for _ in 0..recipe.epochs {
        order.shuffle(&mut shuffle);
        for batch in order.chunks(recipe.batch) {
            let step = losses.len() as u32;
            let packs = Pack::all(batch.iter().copied(), max_tokens, recipe.micro_batch_tokens);
            tokens += packs.iter().map(|pack| pack.tokens.len() as u64).sum::<u64>();
            let (loss, grads) = gradients(base, &sites, &vars, &packs, recipe, step)?;
            if !loss.is_finite() {
                return Err(TrainError::Diverged { step, what: "the loss" });
            }
            if let Some(grads) = clip(grads, &vars, recipe.clip)? {
                optimiser.set_learning_rate(learning_rate(recipe, step, steps));
                optimiser.step(&grads)?;
            } else {
                return Err(TrainError::Diverged { step, what: "the gradient" });
            }
            losses.push(loss);
            if on_step(StepReport { step: step + 1, steps, loss }).is_break() {
                return Err(TrainError::Stopped);
            }
        }
    }
    let weights = weights_of(&sites, start.map_or(&recipe.lora, |start| &start.config))?;
    if !weights.is_finite() {
        return Err(TrainError::Diverged { step: losses.len() as u32, what: "a weight" });
    }
    Ok(Trained { weights, losses, tokens })
}

/// Mean loss over the packs' answer tokens and its gradients.
pub(crate) fn gradients(
    base: &BaseModel,
    sites: &[Option<SiteVars>],
    vars: &[Var],
    packs: &[Pack],
    recipe: &Recipe,
    step: u32,
) -> Result<(f64, GradStore), TrainError> {
    let answers: usize = packs.iter().map(|pack| pack.targets.len()).sum();
    let (mut loss, mut total): (f64, Option<GradStore>) = (0.0, None);
    for (at, pack) in (0u64..).zip(packs) {
        let seed = recipe.seed ^ (u64::from(step) << 32) ^ (at << 16) ^ 0x6472_6f70;
        let mut pass = Training {
            config: base.config(),
            sites,
            spans: &pack.spans,
            dropout: recipe.lora.dropout,
            dropout_rng: SmallRng::seed_from_u64(seed),
        };
        let hidden = base.hidden(&pack.tokens, &pack.positions, &mut pass)?;
        let rows = Tensor::from_slice(&pack.rows, pack.rows.len(), &Device::Cpu)?;
        let op = CrossEntropy { head: base.head().clone(), targets: pack.targets.clone() };
        let part = (hidden.index_select(&rows, 0)?.apply_op1(op)?.sum_all()? / answers as f64)?;
        loss += f64::from(part.to_scalar::<f32>()?);
        let mut grads = part.backward()?;
        if let Some(earlier) = total.take() {
            for var in vars {
                let sum = match (grads.get(var), earlier.get(var)) {
                    (Some(a), Some(b)) => (a + b)?,
                    (Some(one), None) | (None, Some(one)) => one.clone(),
                    (None, None) => continue,
                };
                grads.insert(var, sum);
            }
        }
        total = Some(grads);
    }
    Ok((loss, total.ok_or(TrainError::NoExamples)?))
}

/// Scales the gradients so that their common norm is at most `limit`, as torch's `clip_grad_norm_` does;
/// `None` when the norm is not finite.
fn clip(mut grads: GradStore, vars: &[Var], limit: f64) -> Result<Option<GradStore>, TrainError> {
    let mut squares = 0.0;
    for grad in vars.iter().filter_map(|var| grads.get(var)) {
        let values: Vec<f32> = grad.flatten_all()?.to_vec1()?;
        squares += values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
    }
    let norm = squares.sqrt();
    if !norm.is_finite() {
        return Ok(None);
    }
    let factor = limit / (norm + 1e-6);
    if factor < 1.0 {
        for var in vars {
            if let Some(grad) = grads.get(var) {
                let scaled = (grad * factor)?;
                grads.insert(var, scaled);
            }
        }
    }
    Ok(Some(grads))
}

/// A uniform in ±1/sqrt(input features) (Kaiming with a = sqrt 5), B zero, as peft initialises LoRA.
fn fresh_vars(recipe: &Recipe, base: &BaseModel) -> Result<Vec<Option<SiteVars>>, TrainError> {
    let shape = base.shape();
    let mut rng = StdRng::seed_from_u64(recipe.seed ^ 0x696e_6974);
    let mut sites: Vec<Option<SiteVars>> = (0..shape.sites()).map(|_| None).collect();
    for (id, rank, scale) in recipe.lora.sites(&shape)? {
        let (out, input) = shape.dims(id.site);
        let bound = 1.0 / (input as f32).sqrt();
        let a: Vec<f32> = (0..rank * input).map(|_| rng.random_range(-bound..bound)).collect();
        let a = Var::from_tensor(&Tensor::from_vec(a, (rank, input), &Device::Cpu)?)?;
        let b = Var::zeros((out, rank), candle_core::DType::F32, &Device::Cpu)?;
        sites[id.index()] = Some(SiteVars { a, b, rank, scale });
    }
    Ok(sites)
}

pub(crate) fn vars_of(weights: &LoraWeights, base: &BaseModel) -> Result<Vec<Option<SiteVars>>, TrainError> {
    let shape = base.shape();
    let ids = shape.site_ids().zip(&weights.sites);
    ids.map(|(id, site)| {
        let Some(site) = site else { return Ok(None) };
        let (out, input) = shape.dims(id.site);
        let var = |values: &[f32], dims| Var::from_tensor(&Tensor::from_slice(values, dims, &Device::Cpu)?);
        let (a, b) = (var(&site.a, (site.rank, input))?, var(&site.b, (out, site.rank))?);
        Ok(Some(SiteVars { a, b, rank: site.rank, scale: site.scale }))
    })
    .collect()
}

fn weights_of(sites: &[Option<SiteVars>], config: &peft::LoraConfig) -> Result<LoraWeights, TrainError> {
    let read = |site: &SiteVars| -> Result<LoraTensors, TrainError> {
        let values = |var: &Var| var.flatten_all()?.to_vec1::<f32>();
        let (a, b) = (values(&site.a)?, values(&site.b)?);
        Ok(LoraTensors { rank: site.rank, scale: site.scale, a, b, ..LoraTensors::default() })
    };
    let sites = sites.iter().map(|site| site.as_ref().map(read).transpose()).collect::<Result<_, _>>()?;
    Ok(LoraWeights { config: config.clone(), sites })
}
