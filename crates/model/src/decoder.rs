//! The decoder: Llama, Mistral, Qwen2 and Qwen3 are this one definition with different settings.
//!
//! A block is `x += o(attend(rope(q(n)), rope(k(n)), v(n)))` with `n = norm(x)`, then
//! `x += down(silu(gate(n)) * up(n))` with `n = norm(x)`.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use kernels::{LowRank, Precision, Products, RopeTable, Weight};
use peft::{BaseShape, FrozenBase};
use types::{Site, SiteId};

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::ops::{Residual, RmsNorm, Rope, SwiGlu};
use crate::task::Under;

/// A frozen linear layer.
#[derive(Debug, Clone)]
pub struct Linear {
    /// Shape (output features, input features).
    pub weight: Arc<Weight>,
    /// One value per output feature.
    pub bias: Option<Arc<[f32]>>,
    /// A task adapter's update, where it is stacked: the frozen matrix is W + B A.
    pub under: Option<Arc<Under>>,
}

impl Linear {
    /// `y = (W + B A) x` without the bias: `x` of shape (rows, input features). The frozen product is in `products`, the
    /// rest in float32.
    ///
    /// # Panics
    /// When a buffer's length does not fit the weight's shape.
    pub fn product(&self, products: Products, x: &[f32], y: &mut [f32]) {
        kernels::linear_many(&self.weight, products, x, y);
        if let Some(under) = &self.under {
            under.add(x, y);
        }
    }

    /// The gradient of that with respect to `x`: `dx = dy (W + B A)`, `dy` of shape (rows, output features).
    ///
    /// # Panics
    /// When a buffer's length does not fit the weight's shape.
    pub fn transposed(&self, products: Products, dy: &[f32], dx: &mut [f32]) {
        kernels::linear_transposed(&self.weight, products, dy, dx);
        if let Some(under) = &self.under {
            under.add_transposed(dy, dx);
        }
    }

    /// Row `row` of `W + B A`, one value per input feature.
    ///
    /// # Panics
    /// When there is no such row, or `out` has another length.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        self.weight.decode_row(row, out);
        if let Some(under) = &self.under {
            under.add_to_row(row, out);
        }
    }
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

    /// Writes the embedding of virtual token `index` of the adapter of row `row`; false if it has none.
    fn embed(&self, _row: usize, _index: usize, _out: &mut [f32]) -> bool {
        false
    }
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
        let head = Linear { weight: head, bias: None, under: None };
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

    /// SHA-256 of its files, those of a task adapter among them: adapters belong to exactly this base.
    #[must_use]
    pub fn hash(&self) -> &[u8; 32] {
        &self.hash
    }

    /// Its parameters, without the few thousand of norms and biases.
    #[must_use]
    pub fn parameters(&self) -> usize {
        let head = (!Arc::ptr_eq(&self.embedding, &self.head.weight)).then_some(&self.head.weight);
        let ends = [&self.embedding].into_iter().chain(head);
        self.layer_parameters() + ends.map(|weight| weight.rows() * weight.cols()).sum::<usize>()
    }

    /// Those of the layers between embedding and output.
    fn layer_parameters(&self) -> usize {
        let linears = self.blocks.iter().flat_map(|block| &block.linears).map(|linear| &linear.weight);
        linears.map(|weight| weight.rows() * weight.cols()).sum()
    }

    /// Positions that a row looks back on when its attention takes about as long as its products with the weights of all
    /// layers. Both are two operations for each pair of factors, but attention's are of float32 and begin anew with every
    /// position: they take about three times as long as those of 8-bit activations, as long as those of float32 ones.
    #[must_use]
    pub fn attention_parity(&self, precision: Precision) -> usize {
        let of_a_position = 2 * self.config.layers * self.config.heads * self.config.head_dim;
        let times = if precision == Precision::Fast { 3 } else { 1 };
        self.layer_parameters() / (times * of_a_position).max(1)
    }

    /// Bytes of weights in memory.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let under = |linear: &Linear| linear.under.as_ref().map_or(0, |under| under.bytes());
        let linears = self.blocks.iter().flat_map(|block| &block.linears);
        let linears = linears.map(|linear| linear.weight.bytes() + under(linear));
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
        let mut x = self.embed(tokens, &*pass)?;
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

    /// The linear layer of a site, to be replaced.
    pub(crate) fn linear_mut(&mut self, id: SiteId) -> &mut Linear {
        &mut self.blocks[id.layer].linears[id.site.index()]
    }

    /// Makes it another base: what is made for one does not fit the other.
    pub(crate) fn set_hash(&mut self, hash: [u8; 32]) {
        self.hash = hash;
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

    fn embed(&self, tokens: &[u32], pass: &impl Pass) -> Result<Tensor, ModelError> {
        let hidden = self.config.hidden;
        let mut values = vec![0.0; tokens.len() * hidden];
        for (at, (&token, row)) in tokens.iter().zip(values.chunks_exact_mut(hidden)).enumerate() {
            match (token as usize).checked_sub(self.config.vocab) {
                None => self.embedding.decode_row(token as usize, row),
                Some(index) if pass.embed(at, index, row) => {}
                Some(_) => return Err(self.config.unknown_token(token)),
            }
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

    fn under(&self, id: SiteId) -> Option<LowRank<'_>> {
        self.blocks[id.layer].linears[id.site.index()].under.as_ref().map(|under| under.low_rank())
    }
}
