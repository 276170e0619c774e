//! One job's trainable numbers: a flat vector, and where each site's tensors lie in it.
//!
//! LoRA's B is kept transposed, (rank, output features), so that all its products run along rows.

use std::ops::Range;

use kernels::{Left, Products, Right, multiply};
use model::BaseModel;
use peft::{
    AdapterConfig, AdapterWeights, Ia3Scale, Ia3Weights, LoraConfig, LoraTensors, LoraWeights, PromptWeights,
};
use rand::Rng;
use rayon::prelude::*;
use types::SiteId;

use crate::error::TrainError;
use crate::random;
use crate::recipe::Recipe;

/// LoRA at one site.
#[derive(Debug, Clone)]
pub(crate) struct Lora {
    pub(crate) rank: usize,
    pub(crate) scale: f64,
    /// (rank, input features).
    pub(crate) a: Range<usize>,
    /// (rank, output features).
    pub(crate) b: Range<usize>,
    pub(crate) bias: Option<Range<usize>>,
    pub(crate) dora: Option<Dora>,
}

/// DoRA's magnitude, and the row norms of W + scale B A as they are in this step.
#[derive(Debug, Clone)]
pub(crate) struct Dora {
    pub(crate) magnitude: Range<usize>,
    /// Squared row norms of W.
    frozen: Vec<f64>,
    pub(crate) norms: Vec<f32>,
}

/// What trains at one site.
#[derive(Debug, Clone)]
pub(crate) enum SiteParams {
    Lora(Lora),
    /// IA3: one factor per output.
    Output(Range<usize>),
    /// IA3: one factor per input.
    Input(Range<usize>),
}

/// All of a job's numbers.
#[derive(Debug, Clone)]
pub(crate) struct Params {
    config: AdapterConfig,
    pub(crate) values: Vec<f32>,
    /// By [`SiteId::index`].
    pub(crate) sites: Vec<Option<SiteParams>>,
    /// Virtual tokens before every example; their embeddings are then all of `values`.
    pub(crate) virtual_tokens: usize,
}

impl Params {
    /// Fresh weights: A uniform in ±1/sqrt(input features) (Kaiming with a = sqrt 5), B and its bias zero, DoRA's
    /// magnitude the row norms of W, IA3's factors one, as peft has them; virtual tokens begin as embeddings of random
    /// tokens (peft's `SAMPLE_VOCAB`).
    pub(crate) fn fresh(recipe: &Recipe, base: &BaseModel) -> Result<Self, TrainError> {
        let shape = base.shape();
        let mut rng = random::weights(recipe.seed);
        let weights = match &recipe.adapter {
            AdapterConfig::Lora(config) => {
                let mut sites = vec![None; shape.sites()];
                for (id, rank, scale) in config.sites(&shape)? {
                    let (out, input) = shape.dims(id.site);
                    let bound = 1.0 / (input as f32).sqrt();
                    let a = (0..rank * input).map(|_| rng.random_range(-bound..bound)).collect();
                    let norms = || row_squares(base, id).iter().map(|square| square.sqrt() as f32).collect();
                    sites[id.index()] = Some(LoraTensors {
                        rank,
                        scale,
                        a,
                        b: vec![0.0; out * rank],
                        bias: config.lora_bias.then(|| vec![0.0; out]),
                        magnitude: config.use_dora.then(norms),
                    });
                }
                LoraWeights { config: config.clone(), sites }.into()
            }
            AdapterConfig::Ia3(config) => {
                let mut sites = vec![None; shape.sites()];
                for (id, is_input) in config.sites(&shape)? {
                    let (out, input) = shape.dims(id.site);
                    sites[id.index()] = Some(match is_input {
                        true => Ia3Scale::Input(vec![1.0; input]),
                        false => Ia3Scale::Output(vec![1.0; out]),
                    });
                }
                AdapterWeights::Ia3(Ia3Weights { config: config.clone(), sites })
            }
            AdapterConfig::Prompt(config) => {
                let width = base.config().hidden;
                let mut embeddings = vec![0.0; config.virtual_tokens * width];
                for row in embeddings.chunks_exact_mut(width) {
                    base.embedding().decode_row(rng.random_range(0..base.config().vocab), row);
                }
                AdapterWeights::Prompt(PromptWeights { config: config.clone(), width, embeddings })
            }
        };
        Self::of(&weights, base)
    }

    /// No numbers: the base alone.
    pub(crate) fn none(base: &BaseModel) -> Self {
        Self {
            config: AdapterConfig::Lora(LoraConfig::oppu()),
            values: Vec::new(),
            sites: vec![None; base.shape().sites()],
            virtual_tokens: 0,
        }
    }

    /// The numbers of weights, which must fit the base.
    pub(crate) fn of(weights: &AdapterWeights, base: &BaseModel) -> Result<Self, TrainError> {
        let shape = base.shape();
        let mut params = Self { config: weights.config(), ..Self::none(base) };
        let misfit = |what: &str| TrainError::Recipe {
            field: "start",
            problem: format!("{what} do not fit the base"),
        };
        match weights {
            AdapterWeights::Lora(lora) => {
                for (id, site) in shape.site_ids().zip(&lora.sites) {
                    let Some(site) = site else { continue };
                    let (out, input) = shape.dims(id.site);
                    let rank = site.rank;
                    let vectors = [&site.bias, &site.magnitude];
                    if rank == 0
                        || site.a.len() != rank * input
                        || site.b.len() != out * rank
                        || vectors.into_iter().flatten().any(|vector| vector.len() != out)
                    {
                        return Err(misfit("its tensors"));
                    }
                    let a = params.push(&site.a);
                    let b = params.push(&transposed(&site.b, out, rank));
                    let bias = site.bias.as_ref().map(|bias| params.push(bias));
                    let dora = site.magnitude.as_ref().map(|magnitude| Dora {
                        magnitude: params.push(magnitude),
                        frozen: row_squares(base, id),
                        norms: Vec::new(),
                    });
                    params.sites[id.index()] =
                        Some(SiteParams::Lora(Lora { rank, scale: site.scale, a, b, bias, dora }));
                }
            }
            AdapterWeights::Ia3(ia3) => {
                for (id, site) in shape.site_ids().zip(&ia3.sites) {
                    let (out, input) = shape.dims(id.site);
                    let site = match site {
                        None => continue,
                        Some(Ia3Scale::Output(scale)) if scale.len() == out => {
                            SiteParams::Output(params.push(scale))
                        }
                        Some(Ia3Scale::Input(scale)) if scale.len() == input => {
                            SiteParams::Input(params.push(scale))
                        }
                        Some(_) => return Err(misfit("its tensors")),
                    };
                    params.sites[id.index()] = Some(site);
                }
            }
            AdapterWeights::Prompt(prompt) => {
                let width = base.config().hidden;
                if prompt.embeddings.is_empty() || !prompt.embeddings.len().is_multiple_of(width) {
                    return Err(misfit("its embeddings"));
                }
                params.virtual_tokens = prompt.embeddings.len() / width;
                params.values = prompt.embeddings.clone();
            }
        }
        if params.values.is_empty() {
            return Err(misfit("its sites"));
        }
        Ok(params)
    }

    fn push(&mut self, values: &[f32]) -> Range<usize> {
        let from = self.values.len();
        self.values.extend_from_slice(values);
        from..self.values.len()
    }

    /// The weights in the form of the files.
    pub(crate) fn weights(&self) -> AdapterWeights {
        let read = |range: &Range<usize>| self.values[range.clone()].to_vec();
        match &self.config {
            AdapterConfig::Lora(config) => {
                let site = |site: &SiteParams| {
                    let SiteParams::Lora(lora) = site else { return None };
                    let b = &self.values[lora.b.clone()];
                    Some(LoraTensors {
                        rank: lora.rank,
                        scale: lora.scale,
                        a: read(&lora.a),
                        b: transposed(b, lora.rank, b.len() / lora.rank),
                        bias: lora.bias.as_ref().map(read),
                        magnitude: lora.dora.as_ref().map(|dora| read(&dora.magnitude)),
                    })
                };
                let sites = self.sites.iter().map(|params| params.as_ref().and_then(site)).collect();
                LoraWeights { config: config.clone(), sites }.into()
            }
            AdapterConfig::Ia3(config) => {
                let site = |site: &SiteParams| match site {
                    SiteParams::Output(range) => Some(Ia3Scale::Output(read(range))),
                    SiteParams::Input(range) => Some(Ia3Scale::Input(read(range))),
                    SiteParams::Lora(_) => None,
                };
                let sites = self.sites.iter().map(|params| params.as_ref().and_then(site)).collect();
                AdapterWeights::Ia3(Ia3Weights { config: config.clone(), sites })
            }
            AdapterConfig::Prompt(config) => AdapterWeights::Prompt(PromptWeights {
                config: config.clone(),
                width: self.values.len() / self.virtual_tokens.max(1),
                embeddings: self.values.clone(),
            }),
        }
    }

    /// The index of the lowest site that trains; `None` when the input embeddings do.
    pub(crate) fn lowest(&self) -> Option<usize> {
        self.sites.iter().position(Option::is_some)
    }

    /// Brings DoRA's norms up to date: `|W + s B A|² = |W|² + 2 s B . (W Aᵀ) + s² B (A Aᵀ) Bᵀ` row by row.
    pub(crate) fn refresh(&mut self, base: &BaseModel) {
        let shape = base.shape();
        let values = &self.values;
        for (id, site) in shape.site_ids().zip(&mut self.sites) {
            let Some(SiteParams::Lora(Lora { rank, scale, a, b, dora: Some(dora), .. })) = site else {
                continue;
            };
            let (out, input) = shape.dims(id.site);
            let (rank, scale) = (*rank, *scale);
            let (a, b) = (&values[a.clone()], &values[b.clone()]);
            let mut wa = vec![0.0; rank * out];
            base.blocks()[id.layer].linears[id.site.index()].product(Products::F32, a, &mut wa);
            let mut square = vec![0.0; rank * rank];
            let (left, right) = (Left { values: a, row: input, step: 1 }, transposed(a, rank, input));
            multiply([rank, input, rank], left, Right { values: &right, stride: rank }, &mut square, false);
            let norm = |(o, frozen): (usize, &f64)| {
                let b = |r: usize| f64::from(b[r * out + o]);
                let along: f64 = (0..rank).map(|r| b(r) * f64::from(wa[r * out + o])).sum();
                let rows = (0..rank)
                    .map(|r| b(r) * (0..rank).map(|s| b(s) * f64::from(square[r * rank + s])).sum::<f64>());
                (frozen + 2.0 * scale * along + scale * scale * rows.sum::<f64>()).max(0.0).sqrt() as f32
            };
            dora.norms = dora.frozen.iter().enumerate().map(norm).collect();
        }
    }
}

/// The squared norm of every row of the frozen matrix at a site: what DoRA's magnitudes begin as, squared.
#[must_use]
pub fn row_squares(base: &BaseModel, id: SiteId) -> Vec<f64> {
    let linear = &base.blocks()[id.layer].linears[id.site.index()];
    let square = |row: usize| {
        let mut values = vec![0.0; linear.weight.cols()];
        linear.row(row, &mut values);
        values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()
    };
    (0..linear.weight.rows()).into_par_iter().map(square).collect()
}

/// A matrix of (rows, columns) as (columns, rows).
fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|at| values[at % rows * columns + at / rows]).collect()
}
