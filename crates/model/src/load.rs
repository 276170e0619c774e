//! Loading a model from a GGUF file or a folder in Hugging Face layout.

use std::path::Path;
use std::sync::Arc;

use types::{Site, TokenizerSource};

use crate::config::ModelConfig;
use crate::decoder::{BaseModel, Block, Linear};
use crate::error::ModelError;
use crate::tensors::Tensors;
use crate::{folder, gguf_model};

/// Choices that are not the file's.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoadOptions {
    /// Longest sequence to prepare for; the model's own context if `None`.
    pub max_context: Option<usize>,
}

/// A loaded model with what else its files hold.
#[derive(Debug)]
pub struct Loaded {
    /// The frozen base.
    pub model: BaseModel,
    /// The tokenizer's raw material; `None` if the files hold none.
    pub tokenizer: Option<TokenizerSource>,
}

/// A part of a block that has a tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    AttentionNorm,
    FeedForwardNorm,
    QueryNorm,
    KeyNorm,
    Weight(Site),
    Bias(Site),
}

/// How a format names its tensors.
pub(crate) struct Names {
    pub(crate) embedding: String,
    pub(crate) output: String,
    pub(crate) final_norm: String,
    pub(crate) block: fn(usize, Part) -> String,
}

/// A model's description before its weights are read.
pub(crate) struct Source {
    pub(crate) config: ModelConfig,
    pub(crate) tensors: Tensors,
    pub(crate) names: Names,
    /// Rows of q and k have the halves of each head interleaved.
    pub(crate) interleaved: bool,
    pub(crate) tokenizer: Option<TokenizerSource>,
}

/// Loads a model: a `.gguf` file, or a folder with config.json and *.safetensors.
///
/// # Errors
/// Names the file and the field or tensor that is wrong.
pub fn load(path: &Path, options: LoadOptions) -> Result<Loaded, ModelError> {
    let kind = std::fs::metadata(path).map_err(|source| crate::tensors::io(path, source))?;
    let mut source = if kind.is_dir() { folder::open(path)? } else { gguf_model::open(path)? };
    if let Some(max) = options.max_context {
        source.config.context = source.config.context.min(max);
    }
    source.config.check()?;
    let hash = source.tensors.hash()?;
    let model = build(&source, hash)?;
    let unit = kernels::isa().name();
    tracing::info!(path = %path.display(), bytes = model.weight_bytes(), parameters = model.parameters(), unit, "model loaded");
    Ok(Loaded { model, tokenizer: source.tokenizer })
}

fn build(source: &Source, hash: [u8; 32]) -> Result<BaseModel, ModelError> {
    let Source { config, tensors, names, .. } = source;
    let embedding = Arc::new(tensors.weight(&names.embedding, config.vocab, config.hidden)?);
    let head = if tensors.has(&names.output) {
        Arc::new(tensors.weight(&names.output, config.vocab, config.hidden)?)
    } else {
        Arc::clone(&embedding)
    };
    let shape = config.shape();
    let block = |layer| {
        let name = |part| (names.block)(layer, part);
        let linear = |site: Site| -> Result<Linear, ModelError> {
            let (rows, cols) = shape.dims(site);
            let turned = source.interleaved && matches!(site, Site::Q | Site::K);
            let order = |row| if turned { interleaved_row(row, config.head_dim) } else { row };
            let weight = tensors.reordered_weight(&name(Part::Weight(site)), rows, cols, order)?;
            let mut bias = tensors.optional_vector(&name(Part::Bias(site)), rows)?;
            if turned {
                bias = bias.map(|bias| (0..rows).map(|row| bias[order(row)]).collect());
            }
            Ok(Linear { weight: Arc::new(weight), bias: bias.map(Into::into), under: None })
        };
        Ok(Block {
            attention_norm: tensors.vector(&name(Part::AttentionNorm), config.hidden)?.into(),
            feed_forward_norm: tensors.vector(&name(Part::FeedForwardNorm), config.hidden)?.into(),
            query_norm: tensors.optional_vector(&name(Part::QueryNorm), config.head_dim)?.map(Into::into),
            key_norm: tensors.optional_vector(&name(Part::KeyNorm), config.head_dim)?.map(Into::into),
            linears: [
                linear(Site::Q)?,
                linear(Site::K)?,
                linear(Site::V)?,
                linear(Site::O)?,
                linear(Site::Gate)?,
                linear(Site::Up)?,
                linear(Site::Down)?,
            ],
        })
    };
    let blocks = (0..config.layers).map(block).collect::<Result<_, ModelError>>()?;
    let final_norm = tensors.vector(&names.final_norm, config.hidden)?;
    BaseModel::new(config.clone(), embedding, head, final_norm.into(), blocks, hash)
}

/// Where row `row` of the half-split layout is in the interleaved one.
fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
    head * head_dim + pair * 2 + half
}
