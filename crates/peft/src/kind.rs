//! The config of an adapter of any kind.

use crate::config::{LoraConfig, TargetModules};

/// The fields of an IA3 config (Liu et al. 2022) that change its maths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ia3Config {
    /// The modules it acts on.
    pub target_modules: TargetModules,
    /// Those of them whose input is scaled instead of their output.
    pub feedforward_modules: TargetModules,
}

/// The fields of a prompt-tuning config (Lester et al. 2021) that change its maths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptConfig {
    /// Embeddings that stand before the prompt's.
    pub virtual_tokens: usize,
}

/// The config of an adapter of any kind.
#[derive(Debug, Clone, PartialEq)]
pub enum AdapterConfig {
    /// LoRA with rsLoRA, DoRA and bias.
    Lora(LoraConfig),
    /// IA3.
    Ia3(Ia3Config),
    /// Prompt tuning.
    Prompt(PromptConfig),
}
