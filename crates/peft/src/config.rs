//! `adapter_config.json` of a LoRA adapter, as HF peft 0.21 writes it.

use std::collections::BTreeMap;

use regex::Regex;
use serde_json::{Map, Value, json};
use types::{Site, SiteId};

use crate::error::PeftError;
use crate::shape::BaseShape;

/// Largest rank an adapter may have.
pub const MAX_RANK: usize = 64;

/// Which modules an adapter acts on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Module names: a module's path is the name or ends with "." and the name.
    Names(Vec<String>),
    /// A regular expression that matches the whole path.
    Pattern(String),
}

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
    /// Ranks of modules that differ; a key matches a path as the regular expression `(.*\.)?(KEY)$`.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Alphas of modules that differ, keys as above.
    pub alpha_pattern: BTreeMap<String, f64>,
}

/// Fields that do not change what a finished LoRA adapter computes.
const HARMLESS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Fields that are read below.
const READ: &[&str] = &[
    "alpha_pattern",
    "bias",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
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
            target_modules: TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]),
            exclude_modules: None,
            layers_to_transform: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }

    /// Reads the file.
    ///
    /// # Errors
    /// Names the field that is malformed, out of limits, or asks for what is not supported.
    pub fn parse(bytes: &[u8]) -> Result<Self, PeftError> {
        let fields: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|error| PeftError::Json(error.to_string()))?;
        for (field, value) in &fields {
            let known = HARMLESS.contains(&field.as_str()) || READ.contains(&field.as_str());
            if !known && !is_off(value) {
                return Err(PeftError::Unsupported { field: field.clone(), value: excerpt(value) });
            }
        }
        for (field, only) in [("peft_type", "LORA"), ("bias", "none")] {
            match fields.get(field) {
                Some(Value::String(value)) if value == only => {}
                None if field == "bias" => {}
                None => return Err(PeftError::field(field, "is missing")),
                Some(value) => {
                    return Err(PeftError::Unsupported { field: field.into(), value: excerpt(value) });
                }
            }
        }
        let r = rank("r", fields.get("r").unwrap_or(&Value::Null))?;
        let alpha = finite("lora_alpha", fields.get("lora_alpha").unwrap_or(&Value::Null))?;
        let dropout = fields.get("lora_dropout").map_or(Ok(0.0), |value| finite("lora_dropout", value))?;
        if !(0.0..1.0).contains(&dropout) {
            return Err(PeftError::field("lora_dropout", "must be at least 0 and less than 1"));
        }
        let use_rslora = match fields.get("use_rslora") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(on)) => *on,
            Some(_) => return Err(PeftError::field("use_rslora", "must be a boolean")),
        };
        Ok(Self {
            r,
            alpha,
            dropout,
            use_rslora,
            use_dora: false,
            lora_bias: false,
            exclude_modules: None,
            layers_to_transform: None,
            target_modules: target_modules(fields.get("target_modules").unwrap_or(&Value::Null))?,
            rank_pattern: pattern("rank_pattern", &fields, rank)?,
            alpha_pattern: pattern("alpha_pattern", &fields, finite)?,
        })
    }

    /// The file's content: keys sorted, indented by two, as HF peft writes it.
    #[must_use]
    pub fn to_json(&self, base_model: &str) -> Vec<u8> {
        let target_modules = match &self.target_modules {
            TargetModules::Names(names) => json!(names),
            TargetModules::Pattern(pattern) => json!(pattern),
        };
        let fields = json!({
            "alpha_pattern": self.alpha_pattern,
            "base_model_name_or_path": base_model,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": if self.alpha.fract() == 0.0 { json!(self.alpha as i64) } else { json!(self.alpha) },
            "lora_bias": false,
            "lora_dropout": self.dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "target_modules": target_modules,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.use_rslora,
        });
        let mut text = format!("{fields:#}");
        text.push('\n');
        text.into_bytes()
    }

    /// The sites of a base that the adapter acts on, with rank and scale.
    ///
    /// # Errors
    /// When `target_modules` is no valid expression, or matches no module or one that is not a site.
    pub fn sites(&self, shape: &BaseShape) -> Result<Vec<(SiteId, usize, f64)>, PeftError> {
        let target = Matcher::new(&self.target_modules)?;
        let ranks = Patterns::new("rank_pattern", &self.rank_pattern)?;
        let alphas = Patterns::new("alpha_pattern", &self.alpha_pattern)?;
        if let TargetModules::Names(names) = &self.target_modules {
            let is_site = |name: &String| shape.site_ids().any(|id| named(&id.module_path(), name));
            if let Some(name) = names.iter().find(|name| !is_site(name)) {
                return Err(PeftError::field(
                    "target_modules",
                    format!("names {name:?}, which is no linear layer of this base that adapters act on"),
                ));
            }
        }
        let mut sites = Vec::new();
        for id in shape.site_ids() {
            let path = id.module_path();
            if target.matches(&path) {
                let rank = ranks.find(&path).copied().unwrap_or(self.r);
                let alpha = alphas.find(&path).copied().unwrap_or(self.alpha);
                let divisor = if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
                sites.push((id, rank, alpha / divisor));
            }
        }
        if sites.is_empty() {
            return Err(PeftError::field("target_modules", "matches no linear layer of this base"));
        }
        Ok(sites)
    }
}

/// Null, false, empty: what peft writes for a feature that is not used.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn excerpt(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() > 60 { text.chars().take(57).chain("...".chars()).collect() } else { text }
}

fn rank(field: &str, value: &Value) -> Result<usize, PeftError> {
    match value.as_u64() {
        Some(rank @ 1..) if rank <= MAX_RANK as u64 => Ok(rank as usize),
        _ => Err(PeftError::field(field, format!("must be an integer from 1 to {MAX_RANK}"))),
    }
}

fn finite(field: &str, value: &Value) -> Result<f64, PeftError> {
    match value.as_f64() {
        Some(number) if number.is_finite() && (0.0..=1e6).contains(&number) => Ok(number),
        _ => Err(PeftError::field(field, "must be a number from 0 to 1000000")),
    }
}

fn target_modules(value: &Value) -> Result<TargetModules, PeftError> {
    match value {
        Value::String(text) if text == "all-linear" => {
            Ok(TargetModules::Names(Site::ALL.iter().map(|site| site.module().to_owned()).collect()))
        }
        Value::String(text) if !text.is_empty() => Ok(TargetModules::Pattern(text.clone())),
        Value::Array(items) if !items.is_empty() && items.len() <= 4096 => items
            .iter()
            .map(|item| item.as_str().map(str::to_owned))
            .collect::<Option<_>>()
            .map(TargetModules::Names)
            .ok_or_else(|| PeftError::field("target_modules", "must hold strings")),
        _ => Err(PeftError::field("target_modules", "must be a non-empty list of names or an expression")),
    }
}

fn pattern<T>(
    field: &str,
    fields: &Map<String, Value>,
    read: impl Fn(&str, &Value) -> Result<T, PeftError>,
) -> Result<BTreeMap<String, T>, PeftError> {
    match fields.get(field) {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(Value::Object(entries)) if entries.len() <= 4096 => entries
            .iter()
            .map(|(key, value)| Ok((key.clone(), read(&format!("{field}.{key}"), value)?)))
            .collect(),
        Some(_) => Err(PeftError::field(field, "must be an object")),
    }
}

fn expression(field: &str, text: &str) -> Result<Regex, PeftError> {
    regex::RegexBuilder::new(text)
        .size_limit(1 << 20)
        .build()
        .map_err(|_| PeftError::field(field, format!("holds an expression that is not valid: {text:?}")))
}

fn named(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

enum Matcher<'a> {
    Names(&'a [String]),
    Pattern(Regex),
}

impl<'a> Matcher<'a> {
    fn new(target: &'a TargetModules) -> Result<Self, PeftError> {
        Ok(match target {
            TargetModules::Names(names) => Self::Names(names),
            TargetModules::Pattern(text) => {
                Self::Pattern(expression("target_modules", &format!("^(?:{text})$"))?)
            }
        })
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Names(names) => names.iter().any(|name| named(path, name)),
            Self::Pattern(pattern) => pattern.is_match(path),
        }
    }
}

struct Patterns<'a, T>(Vec<(Regex, &'a T)>);

impl<'a, T> Patterns<'a, T> {
    fn new(field: &str, entries: &'a BTreeMap<String, T>) -> Result<Self, PeftError> {
        let compile = |(key, value): (&String, &'a T)| {
            Ok((expression(field, &format!(r"^(?:(.*\.)?({key}))$"))?, value))
        };
        entries.iter().map(compile).collect::<Result<_, _>>().map(Self)
    }

    fn find(&self, path: &str) -> Option<&'a T> {
        self.0.iter().find(|(key, _)| key.is_match(path)).map(|(_, value)| *value)
    }
}
