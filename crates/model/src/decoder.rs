//! The decoder: Llama, Mistral, Qwen2 and Qwen3 are this one definition with different settings.
//!
//! A block is `x += o(attend(rope(q(n)), rope(k(n)), v(n)))` with `n = norm(x)`, then
//! `x += down(silu(gate(n)) * up(n))` with `n = norm(x)`.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use kernels::{RopeTable, Weight};
use peft::{BaseShape, FrozenBase};
use types::{Site, SiteId};

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::ops::{Residual, RmsNorm, Rope, SwiGlu};

/// A frozen linear layer.
#[derive(Debug, Clone)]
pub struct Linear {
    /// Shape (output features, input features).
    pub weight: Arc<Weight>,
    /// One value per output feature.
    pub bias: Option<Arc<[f32]>>,
}

/// One decoder block's weights.
#[derive(Debug)]
pub struct Block {
    /// One factor per hidden value.
    pub attention_norm: Arc<[f32]>,
    /// One factor per hidden value.
    pub feed_forward_norm: Arc<[f32]>,
    /// Per-head norm of Qwen3's queries.
    pub query_norm: Option<Arc<[f32]>>,
    /// Per-head norm of Qwen3's keys.
    pub key_norm: Option<Arc<[f32]>>,
    /// In the order of [`Site::ALL`].
    pub linears: [Linear; 7],
}

/// How a linear layer is adapted and where keys and values are.
pub trait Pass {
    /// The layer at `id` with whatever adapters act there; `x` is (rows, input features).
    ///
    /// # Errors
    /// When shapes do not fit.
    fn linear(&mut self, id: SiteId, linear: &Linear, x: &Tensor) -> Result<Tensor, ModelError>;

    /// Attention of the rows of `q` (rows, heads * head_dim) given the rows' own `k` and `v` (rows,
    /// kv_heads * head_dim), rotary positions applied.
    ///
    /// # Errors
    /// When shapes do not fit.
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, ModelError>;
}

/// The frozen base model: read-only, in memory once, shared by serving and training.
#[derive(Debug)]
pub struct BaseModel {
    config: ModelConfig,
    embedding: Arc<Weight>,
    head: Linear,
    final_norm: Arc<[f32]>,
    blocks: Vec<Block>,
    rope: Arc<RopeTable>,
    hash: [u8; 32],
}

impl BaseModel {
    pub(crate) fn new(
        config: ModelConfig,
        embedding: Arc<Weight>,
        head: Arc<Weight>,
        final_norm: Arc<[f32]>,
        blocks: Vec<Block>,
        hash: [u8; 32],
    ) -> Result<Self, ModelError> {
        let rope = Arc::new(RopeTable::new(&config.inverse_frequencies()?, config.context));
        let head = Linear { weight: head, bias: None };
        Ok(Self { config, embedding, head, final_norm, blocks, rope, hash })
    }

    /// Its dimensions.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The shapes of its sites.
    #[must_use]
    pub fn shape(&self) -> BaseShape {
        self.config.shape()
    }

    /// SHA-256 of its files: adapters belong to exactly this base.
    #[must_use]
    pub fn hash(&self) -> &[u8; 32] {
        &self.hash
    }

    /// Bytes of weights in memory.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let linears = self.blocks.iter().flat_map(|block| &block.linears).map(|l| l.weight.bytes());
        let head = if Arc::ptr_eq(&self.embedding, &self.head.weight) { 0 } else { self.head.weight.bytes() };
        linears.sum::<usize>() + self.embedding.bytes() + head
    }

    /// The last hidden states, final norm applied: shape (tokens.len(), hidden). `positions` gives each
    /// token's place in its sequence.
    ///
    /// # Errors
    /// When a token or position is out of range, or the pass fails.
    pub fn hidden(
        &self,
        tokens: &[u32],
        positions: &[u32],
        pass: &mut impl Pass,
    ) -> Result<Tensor, ModelError> {
        let config = &self.config;
        if tokens.is_empty() || tokens.len() != positions.len() {
            return Err(ModelError::Batch(format!(
                "{} tokens with {} positions",
                tokens.len(),
                positions.len()
            )));
        }
        if let Some(position) = positions.iter().find(|p| **p as usize >= config.context) {
            return Err(ModelError::Batch(format!(
                "position {position} is beyond the context of {}",
                config.context
            )));
        }
        let mut x = self.embed(tokens)?;
        let rope = Rope { table: Arc::clone(&self.rope), positions: positions.into() };
        for (layer, block) in self.blocks.iter().enumerate() {
            let site = |site: Site| (SiteId::new(layer, site), &block.linears[site.index()]);
            let normed = self.norm(&block.attention_norm, &x)?;
            let mut project = |at: Site, norm: Option<&Arc<[f32]>>| -> Result<Tensor, ModelError> {
                let (id, linear) = site(at);
                let y = pass.linear(id, linear, &normed)?;
                Ok(match norm {
                    Some(norm) => {
                        let (rows, width) = y.dims2()?;
                        let heads = y.reshape((rows, width / config.head_dim, config.head_dim))?;
                        self.norm(norm, &heads)?.reshape((rows, width))?
                    }
                    None => y,
                })
            };
            let q = project(Site::Q, block.query_norm.as_ref())?.apply_op1(rope.clone())?;
            let k = project(Site::K, block.key_norm.as_ref())?.apply_op1(rope.clone())?;
            let v = project(Site::V, None)?;
            let attended = pass.attend(layer, &q, &k, &v)?;
            let (id, linear) = site(Site::O);
            x = x.apply_op2(&pass.linear(id, linear, &attended)?, Residual)?;

            let normed = self.norm(&block.feed_forward_norm, &x)?;
            let (id, linear) = site(Site::Gate);
            let gate = pass.linear(id, linear, &normed)?;
            let (id, linear) = site(Site::Up);
            let up = pass.linear(id, linear, &normed)?;
            let (id, linear) = site(Site::Down);
            x = x.apply_op2(&pass.linear(id, linear, &gate.apply_op2(&up, SwiGlu)?)?, Residual)?;
        }
        self.norm(&self.final_norm, &x)
    }

    /// The output layer, tied to the embedding or not: hidden states to logits.
    #[must_use]
    pub fn head(&self) -> &Linear {
        &self.head
    }

    /// The input embeddings, one row a token.
    #[must_use]
    pub fn embedding(&self) -> &Weight {
        &self.embedding
    }

    /// The blocks, from the first to the last.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The rotary angles of all positions.
    #[must_use]
    pub fn rope(&self) -> &RopeTable {
        &self.rope
    }

    /// The norm before the output layer.
    #[must_use]
    pub fn final_norm(&self) -> &[f32] {
        &self.final_norm
    }

    fn embed(&self, tokens: &[u32]) -> Result<Tensor, ModelError> {
        let hidden = self.config.hidden;
        let mut values = vec![0.0; tokens.len() * hidden];
        for (&token, row) in tokens.iter().zip(values.chunks_exact_mut(hidden)) {
            if token as usize >= self.config.vocab {
                let problem = format!("token id {token} is beyond the vocabulary of {}", self.config.vocab);
                return Err(ModelError::Batch(problem));
            }
            self.embedding.decode_row(token as usize, row);
        }
        Ok(Tensor::from_vec(values, (tokens.len(), hidden), &Device::Cpu)?)
    }

    fn norm(&self, weight: &Arc<[f32]>, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(x.apply_op1(RmsNorm { weight: Arc::clone(weight), eps: self.config.norm_eps })?)
    }
}

impl FrozenBase for BaseModel {
    fn shape(&self) -> BaseShape {
        self.config.shape()
    }

    fn hash(&self) -> [u8; 32] {
        self.hash
    }

    fn linear(&self, id: SiteId) -> (&Weight, Option<&[f32]>) {
        let linear = &self.blocks[id.layer].linears[id.site.index()];
        (&linear.weight, linear.bias.as_deref())
    }
}
