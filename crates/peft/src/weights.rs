//! An adapter's weights as its files describe them, of every kind.

use crate::config::LoraConfig;
use crate::kind::{AdapterConfig, Ia3Config, PromptConfig};

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
    /// The config.
    pub config: Ia3Config,
    /// By [`types::SiteId::index`].
    pub sites: Vec<Option<Ia3Scale>>,
}

/// A prompt-tuning adapter (Lester et al. 2021): embeddings that stand before the prompt's.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptWeights {
    /// The config.
    pub config: PromptConfig,
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

/// The two files of an adapter, as HF peft reads them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeftFiles {
    /// Content of `adapter_config.json`.
    pub config: Vec<u8>,
    /// Content of `adapter_model.safetensors`.
    pub weights: Vec<u8>,
}

impl LoraWeights {
    /// Whether every value is finite.
    #[must_use]
    pub fn is_finite(&self) -> bool {
        self.sites.iter().flatten().all(|site| {
            let vectors = [&site.bias, &site.magnitude].into_iter().flatten();
            all_finite(&site.a) && all_finite(&site.b) && vectors.into_iter().all(|v| all_finite(v))
        })
    }
}

fn all_finite(values: &[f32]) -> bool {
    values.iter().all(|value| value.is_finite())
}

impl AdapterWeights {
    /// The config.
    #[must_use]
    pub fn config(&self) -> AdapterConfig {
        match self {
            Self::Lora(lora) => AdapterConfig::Lora(lora.config.clone()),
            Self::Ia3(ia3) => AdapterConfig::Ia3(ia3.config.clone()),
            Self::Prompt(prompt) => AdapterConfig::Prompt(prompt.config.clone()),
        }
    }

    /// Whether every value is finite.
    #[must_use]
    pub fn is_finite(&self) -> bool {
        match self {
            Self::Lora(lora) => lora.is_finite(),
            Self::Ia3(ia3) => ia3.sites.iter().flatten().all(|site| match site {
                Ia3Scale::Output(values) | Ia3Scale::Input(values) => all_finite(values),
            }),
            Self::Prompt(prompt) => all_finite(&prompt.embeddings),
        }
    }
}

impl From<LoraWeights> for AdapterWeights {
    fn from(weights: LoraWeights) -> Self {
        Self::Lora(weights)
    }
}
