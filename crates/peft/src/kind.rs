//! The config of an adapter of any kind, and the files of the kinds beside LoRA.

use serde_json::{Value, json};
use types::SiteId;

use crate::config::{ALWAYS_HARMLESS, LoraConfig, MAX_RANK};
use crate::error::PeftError;
use crate::fields::{Fields, count, render};
use crate::modules::{Matcher, TargetModules, sites};
use crate::shape::BaseShape;

/// Most virtual tokens of a prompt-tuning adapter.
pub const MAX_VIRTUAL_TOKENS: usize = 1024;

/// The fields of an IA3 config (Liu et al. 2022) that change its maths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ia3Config {
    /// The modules it acts on.
    pub target_modules: TargetModules,
    /// Those of them whose input is scaled instead of their output: paths that end in a name, or match the expression.
    pub feedforward_modules: TargetModules,
    /// Modules among them it leaves alone.
    pub exclude_modules: Option<TargetModules>,
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

impl AdapterConfig {
    /// Reads `adapter_config.json`, made for a base of this shape.
    ///
    /// # Errors
    /// Names the field that is malformed, out of limits, or asks for what is not supported.
    pub fn parse(bytes: &[u8], shape: &BaseShape) -> Result<Self, PeftError> {
        Self::parse_within(bytes, shape, MAX_RANK)
    }

    /// As [`AdapterConfig::parse`], where no module may have a rank beyond `max_rank`.
    ///
    /// # Errors
    /// As [`AdapterConfig::parse`]; a rank that is too large is named by its field, `r` or `rank_pattern`.
    pub fn parse_within(bytes: &[u8], shape: &BaseShape, max_rank: usize) -> Result<Self, PeftError> {
        let fields = Fields::parse(bytes)?;
        match fields.get("peft_type")?.as_str() {
            Some("IA3") => Ia3Config::read(&fields).map(Self::Ia3),
            Some("PROMPT_TUNING") => PromptConfig::read(&fields, shape).map(Self::Prompt),
            _ => LoraConfig::read(&fields, max_rank.min(MAX_RANK)).map(Self::Lora),
        }
    }

    /// The file's content: keys sorted, indented by two, as HF peft writes it. `base_model` is the name it gives the base.
    #[must_use]
    pub fn to_json(&self, shape: &BaseShape, base_model: &str) -> Vec<u8> {
        match self {
            Self::Lora(lora) => lora.to_json(base_model),
            Self::Ia3(ia3) => ia3.to_json(base_model),
            Self::Prompt(prompt) => prompt.to_json(shape, base_model),
        }
    }
}

impl Ia3Config {
    /// A config with these modules, given by name.
    #[must_use]
    pub fn new(target_modules: &[&str], feedforward_modules: &[&str]) -> Self {
        Self {
            target_modules: TargetModules::names(target_modules),
            feedforward_modules: TargetModules::names(feedforward_modules),
            exclude_modules: None,
        }
    }

    /// HF peft's modules for Llama and Mistral: k, v and down, with down's input scaled.
    #[must_use]
    pub fn llama() -> Self {
        Self::new(&["k_proj", "v_proj", "down_proj"], &["down_proj"])
    }

    /// HF peft's modules for Qwen2 and Qwen3: q, v and down, with down's input scaled.
    #[must_use]
    pub fn qwen() -> Self {
        Self::new(&["q_proj", "v_proj", "down_proj"], &["down_proj"])
    }

    fn read(fields: &Fields) -> Result<Self, PeftError> {
        let own = ["exclude_modules", "feedforward_modules", "init_ia3_weights", "target_modules"];
        fields.only(&[ALWAYS_HARMLESS, &own])?;
        fields.one_of("task_type", &[json!("CAUSAL_LM")], true)?;
        let config = Self {
            target_modules: TargetModules::targets(fields)?,
            feedforward_modules: match fields.get("feedforward_modules")? {
                Value::Null => {
                    return Err(PeftError::field(
                        "feedforward_modules",
                        "must be a list of names or an expression",
                    ));
                }
                _ => TargetModules::read(fields, "feedforward_modules")?
                    .unwrap_or(TargetModules::Names(Vec::new())),
            },
            exclude_modules: TargetModules::read(fields, "exclude_modules")?,
        };
        if let (TargetModules::Names(ends), Value::Array(targets)) =
            (&config.feedforward_modules, fields.get("target_modules")?)
            && let Some(end) = ends.iter().find(|end| !targets.contains(&json!(end)))
        {
            let problem = format!("names {end:?}, which is not among target_modules");
            return Err(PeftError::field("feedforward_modules", problem));
        }
        Ok(config)
    }

    fn to_json(&self, base_model: &str) -> Vec<u8> {
        render(&[
            ("base_model_name_or_path", &base_model),
            ("exclude_modules", &self.exclude_modules.as_ref().map(TargetModules::json)),
            ("fan_in_fan_out", &false),
            ("feedforward_modules", &self.feedforward_modules.json()),
            ("inference_mode", &true),
            ("init_ia3_weights", &true),
            ("modules_to_save", &None::<()>),
            ("peft_type", &"IA3"),
            ("target_modules", &self.target_modules.json()),
            ("task_type", &"CAUSAL_LM"),
        ])
    }

    /// The sites of a base that the adapter acts on, and whether it scales their input.
    ///
    /// # Errors
    /// When an expression is not valid, or `target_modules` matches no module or one that is not a site.
    pub fn sites(&self, shape: &BaseShape) -> Result<Vec<(SiteId, bool)>, PeftError> {
        let ends = Matcher::new("feedforward_modules", &self.feedforward_modules)?;
        let sites = sites(shape, &self.target_modules, self.exclude_modules.as_ref(), None)?;
        Ok(sites.into_iter().map(|(id, path)| (id, ends.is_end(&path))).collect())
    }
}

impl PromptConfig {
    fn read(fields: &Fields, shape: &BaseShape) -> Result<Self, PeftError> {
        // How it began changes nothing; heads are not needed.
        let harmless = [
            "num_attention_heads",
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "tokenizer_kwargs",
            "tokenizer_name_or_path",
        ];
        let own = ["num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim"];
        fields.only(&[ALWAYS_HARMLESS, &harmless, &own])?;
        fields.one_of("task_type", &[json!("CAUSAL_LM")], true)?;
        fields.one_of("num_transformer_submodules", &[json!(1)], true)?;
        for (field, expected) in [("token_dim", shape.width()), ("num_layers", shape.layers)] {
            let value = fields.get(field)?;
            if !value.is_null() && *value != json!(expected) {
                return Err(PeftError::field(field, format!("is {value}; this base has {expected}")));
            }
        }
        let virtual_tokens =
            count("num_virtual_tokens", fields.get("num_virtual_tokens")?, MAX_VIRTUAL_TOKENS)?;
        Ok(Self { virtual_tokens })
    }

    fn to_json(&self, shape: &BaseShape, base_model: &str) -> Vec<u8> {
        render(&[
            ("base_model_name_or_path", &base_model),
            ("inference_mode", &true),
            // Left for peft to take from the base.
            ("num_attention_heads", &None::<()>),
            ("num_layers", &shape.layers),
            ("num_transformer_submodules", &1),
            ("num_virtual_tokens", &self.virtual_tokens),
            ("peft_type", &"PROMPT_TUNING"),
            ("prompt_tuning_init", &"RANDOM"),
            ("task_type", &"CAUSAL_LM"),
            ("token_dim", &shape.width()),
        ])
    }
}
