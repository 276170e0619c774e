//! `adapter_config.json` of a LoRA adapter, as HF peft 0.21 writes it.

use serde_json::{Value, json};
use types::SiteId;

use crate::error::PeftError;
use crate::fields::{Fields, MAX_ENTRIES, Members, count, finite, render};
use crate::modules::{Layers, Patterns, TargetModules, sites};
use crate::shape::BaseShape;

/// Largest rank an adapter may have, whatever lower limit a server is set to.
pub const MAX_RANK: usize = 512;

/// The fields of a LoRA config that change its maths.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Default rank.
    pub r: usize,
    /// Default alpha; the update is scaled by alpha / r, or alpha / sqrt(r) with rsLoRA.
    pub alpha: f64,
    /// Dropout on the input of A, in training only.
    pub dropout: f64,
    /// Scale by alpha / sqrt(r) (Kalajdzievski 2023).
    pub use_rslora: bool,
    /// DoRA (Liu et al. 2024): a magnitude per output, the direction from W + scale B A.
    pub use_dora: bool,
    /// A bias on the way up, scaled like B.
    pub lora_bias: bool,
    /// The modules it acts on.
    pub target_modules: TargetModules,
    /// Modules among them it leaves alone.
    pub exclude_modules: Option<TargetModules>,
    /// The blocks it acts in, counted from 0; all of them if `None`.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Expressions for what stands before a block's number in a path; whatever stands there if empty.
    pub layers_pattern: Vec<String>,
    /// Ranks of modules that differ; a key matches a path as the regular expression `(.*\.)?(KEY)$`, and the first that
    /// matches decides.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of modules that differ, keys as above.
    pub alpha_pattern: Vec<(String, f64)>,
}

/// Fields that do not change what a finished LoRA adapter computes.
const HARMLESS: &[&str] = &[
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
];

/// Fields of any kind that do not change what it computes.
pub(crate) const ALWAYS_HARMLESS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
];

/// Fields that are read below.
const READ: &[&str] = &[
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
];

impl LoraConfig {
    /// OPPU's user adapter: rank 8, alpha 8, on q and v.
    #[must_use]
    pub fn oppu() -> Self {
        Self {
            r: 8,
            alpha: 8.0,
            dropout: 0.05,
            use_rslora: false,
            use_dora: false,
            lora_bias: false,
            target_modules: TargetModules::names(&["q_proj", "v_proj"]),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
        }
    }

    /// Reads the file.
    ///
    /// # Errors
    /// Names the field that is malformed, out of limits, or asks for what is not supported.
    pub fn parse(bytes: &[u8]) -> Result<Self, PeftError> {
        Self::read(&Fields::parse(bytes)?, MAX_RANK)
    }

    pub(crate) fn read(fields: &Fields, max_rank: usize) -> Result<Self, PeftError> {
        fields.one_of("peft_type", &[json!("LORA")], false)?;
        fields.only(&[ALWAYS_HARMLESS, HARMLESS, READ])?;
        fields.one_of("task_type", &[json!("CAUSAL_LM")], true)?;
        fields.one_of("bias", &[json!("none")], true)?;
        // The others also change the base's weights when they start, and an adapter that was saved then needs that base.
        let starts = [json!(true), json!(false), json!("gaussian"), json!("orthogonal"), json!("eva")];
        fields.one_of("init_lora_weights", &starts, true)?;
        let rank = |field: &str, value: &Value| count(field, value, max_rank);
        let dropout = match fields.get("lora_dropout")? {
            Value::Null => 0.0,
            value => finite("lora_dropout", value)?,
        };
        if !(0.0..1.0).contains(&dropout) {
            return Err(PeftError::field("lora_dropout", "must be at least 0 and less than 1"));
        }
        let config = Self {
            r: rank("r", fields.get("r")?)?,
            alpha: finite("lora_alpha", fields.get("lora_alpha")?)?,
            dropout,
            use_rslora: fields.flag("use_rslora")?,
            use_dora: fields.flag("use_dora")?,
            lora_bias: fields.flag("lora_bias")?,
            target_modules: TargetModules::targets(fields)?,
            exclude_modules: TargetModules::read(fields, "exclude_modules")?,
            layers_to_transform: layers(fields.get("layers_to_transform")?)?,
            layers_pattern: names("layers_pattern", fields.get("layers_pattern")?)?,
            rank_pattern: fields.members("rank_pattern", rank)?,
            alpha_pattern: fields.members("alpha_pattern", finite)?,
        };
        let is_text = fields.get("target_modules")?.is_string();
        if config.layers_to_transform.is_some() && is_text {
            let problem = "cannot be used when target_modules is a string";
            return Err(PeftError::field("layers_to_transform", problem));
        }
        config.check()?;
        Ok(config)
    }

    /// What HF peft refuses too.
    fn check(&self) -> Result<(), PeftError> {
        if self.layers_to_transform.is_none() && !self.layers_pattern.is_empty() {
            return Err(PeftError::field("layers_pattern", "needs layers_to_transform"));
        }
        if self.use_dora && self.lora_bias {
            return Err(PeftError::field("lora_bias", "cannot be used together with use_dora"));
        }
        Ok(())
    }

    /// The file's content: keys sorted, indented by two, as HF peft writes it; the patterns keep their order, as the first
    /// that matches decides.
    #[must_use]
    pub fn to_json(&self, base_model: &str) -> Vec<u8> {
        let layers_pattern = match &self.layers_pattern[..] {
            [] => Value::Null,
            [one] => json!(one),
            several => json!(several),
        };
        let whole = |alpha: f64| if alpha.fract() == 0.0 { json!(alpha as i64) } else { json!(alpha) };
        let alphas = self.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), whole(*alpha)));
        render(&[
            ("alpha_pattern", &Members(alphas.collect())),
            ("base_model_name_or_path", &base_model),
            ("bias", &"none"),
            ("exclude_modules", &self.exclude_modules.as_ref().map(TargetModules::json)),
            ("fan_in_fan_out", &false),
            ("inference_mode", &true),
            ("init_lora_weights", &true),
            ("layers_pattern", &layers_pattern),
            ("layers_to_transform", &self.layers_to_transform),
            ("lora_alpha", &whole(self.alpha)),
            ("lora_bias", &self.lora_bias),
            ("lora_dropout", &self.dropout),
            ("modules_to_save", &None::<()>),
            ("peft_type", &"LORA"),
            ("r", &self.r),
            ("rank_pattern", &Members(self.rank_pattern.clone())),
            ("target_modules", &self.target_modules.json()),
            ("task_type", &"CAUSAL_LM"),
            ("use_dora", &self.use_dora),
            ("use_rslora", &self.use_rslora),
        ])
    }

    /// The sites of a base that the adapter acts on, with rank and scale.
    ///
    /// # Errors
    /// When an expression is not valid, or `target_modules` matches no module or one that is not a site.
    pub fn sites(&self, shape: &BaseShape) -> Result<Vec<(SiteId, usize, f64)>, PeftError> {
        self.check()?;
        let ranks = Patterns::new("rank_pattern", &self.rank_pattern)?;
        let alphas = Patterns::new("alpha_pattern", &self.alpha_pattern)?;
        let layers = self.layers_to_transform.as_deref();
        let layers = layers.map(|wanted| Layers::new(wanted, &self.layers_pattern)).transpose()?;
        let sites = sites(shape, &self.target_modules, self.exclude_modules.as_ref(), layers.as_ref())?;
        let with_rank = |(id, path): (SiteId, String)| {
            let rank = ranks.find(&path).copied().unwrap_or(self.r);
            let alpha = alphas.find(&path).copied().unwrap_or(self.alpha);
            let divisor = if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
            (id, rank, alpha / divisor)
        };
        Ok(sites.into_iter().map(with_rank).collect())
    }
}

/// A number or a list of numbers; an empty list limits nothing.
fn layers(value: &Value) -> Result<Option<Vec<usize>>, PeftError> {
    let layer = |value: &Value| value.as_u64().and_then(|layer| usize::try_from(layer).ok());
    let wrong = || PeftError::field("layers_to_transform", "must be a list of block numbers");
    match value {
        Value::Null => Ok(None),
        Value::Array(items) if items.is_empty() => Ok(None),
        Value::Array(items) if items.len() <= MAX_ENTRIES => {
            items.iter().map(layer).collect::<Option<_>>().map(Some).ok_or_else(wrong)
        }
        value => layer(value).map(|layer| Some(vec![layer])).ok_or_else(wrong),
    }
}

/// A string or a list of strings.
fn names(field: &str, value: &Value) -> Result<Vec<String>, PeftError> {
    let wrong = || PeftError::field(field, "must be a string or a list of strings");
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(name) if name.is_empty() => Ok(Vec::new()),
        Value::String(name) => Ok(vec![name.clone()]),
        Value::Array(items) if items.len() <= MAX_ENTRIES => {
            items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<_>>().ok_or_else(wrong)
        }
        _ => Err(wrong()),
    }
}
