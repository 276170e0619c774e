//! An adapter's weights as its files describe them, of every kind.

use crate::config::LoraConfig;

/// What LoRA has at one site, as in the file (the scale is apart).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LoraTensors {
    /// Rank at this site.
    pub rank: usize,
    /// alpha / rank, or alpha / sqrt(rank).
    pub scale: f64,
    /// Shape (rank, input features).
    pub a: Vec<f32>,
    /// Shape (output features, rank).
    pub b: Vec<f32>,
    /// `lora_B.bias` of shape (output features), scaled like B: y = W x + scale (B A x + bias).
    pub bias: Option<Vec<f32>>,
    /// DoRA's magnitude m of shape (output features) (Liu et al. 2024): y = (m / n) (W x + scale B A x), where n are the
    /// row norms of W + scale B A; a bias of the base is not scaled.
    pub magnitude: Option<Vec<f32>>,
}

/// A LoRA adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraWeights {
    /// The config.
    pub config: LoraConfig,
    /// By [`types::SiteId::index`].
    pub sites: Vec<Option<LoraTensors>>,
}

/// What IA3 (Liu et al. 2022) has at one site.
#[derive(Debug, Clone, PartialEq)]
pub enum Ia3Scale {
    /// y = l (W x + bias), one value per output feature.
    Output(Vec<f32>),
    /// y = W (l x) + bias, one value per input feature (feed-forward sites).
    Input(Vec<f32>),
}

/// An IA3 adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Ia3Weights {
    /// By [`types::SiteId::index`].
    pub sites: Vec<Option<Ia3Scale>>,
}

/// A prompt-tuning adapter (Lester et al. 2021): embeddings that stand before the prompt's.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptWeights {
    /// Values of one embedding.
    pub width: usize,
    /// Shape (virtual tokens, width).
    pub embeddings: Vec<f32>,
}

/// An adapter of any kind.
#[derive(Debug, Clone, PartialEq)]
pub enum AdapterWeights {
    /// LoRA with rsLoRA, DoRA and bias.
    Lora(LoraWeights),
    /// IA3.
    Ia3(Ia3Weights),
    /// Prompt tuning.
    Prompt(PromptWeights),
}
