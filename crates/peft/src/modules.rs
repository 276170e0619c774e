//! Which modules of a base a config names, by HF peft's rules of matching.

use regex::bytes::{Regex, RegexBuilder};
use serde_json::Value;
use types::{Site, SiteId};

use crate::error::PeftError;
use crate::fields::{Fields, MAX_ENTRIES};
use crate::shape::BaseShape;

/// Which modules an adapter acts on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Module names: a module's path is the name or ends with "." and the name.
    Names(Vec<String>),
    /// A regular expression that matches the whole path.
    Pattern(String),
}

impl TargetModules {
    /// A list of names.
    #[must_use]
    pub fn names(names: &[&str]) -> Self {
        Self::Names(names.iter().map(|name| (*name).to_owned()).collect())
    }

    /// Reads a field; `None` if it is null, empty or not there.
    pub(crate) fn read(fields: &Fields, field: &str) -> Result<Option<Self>, PeftError> {
        match fields.get(field)? {
            Value::Null => Ok(None),
            Value::String(text) if text.is_empty() => Ok(None),
            Value::String(text) => Ok(Some(Self::Pattern(text.clone()))),
            Value::Array(items) if items.is_empty() => Ok(None),
            // All linear layers by their full paths, as peft writes "all-linear" out for a model with many blocks.
            Value::Array(items) if items.len() <= 16 * MAX_ENTRIES => {
                let names: Option<_> = items.iter().map(|item| item.as_str().map(str::to_owned)).collect();
                names
                    .map(|names| Some(Self::Names(names)))
                    .ok_or_else(|| PeftError::field(field, "must hold strings"))
            }
            _ => Err(PeftError::field(field, "must be a list of names or an expression")),
        }
    }

    /// As [`Self::read`]; "all-linear" in any case is every site, and nothing is refused.
    pub(crate) fn targets(fields: &Fields) -> Result<Self, PeftError> {
        let all = |text: &str| text.eq_ignore_ascii_case("all-linear");
        match Self::read(fields, "target_modules")? {
            Some(Self::Pattern(text)) if all(&text) => {
                Ok(Self::Names(Site::ALL.iter().map(|site| site.module().to_owned()).collect()))
            }
            Some(modules) => Ok(modules),
            None => {
                Err(PeftError::field("target_modules", "must be a non-empty list of names or an expression"))
            }
        }
    }

    /// What is written: a list of strings or a string.
    pub(crate) fn json(&self) -> Value {
        match self {
            Self::Names(names) => names.iter().cloned().map(Value::String).collect(),
            Self::Pattern(pattern) => Value::String(pattern.clone()),
        }
    }
}

/// An expression on a whole path, bounded in memory; paths are ASCII, so classes are too.
pub(crate) fn expression(field: &str, text: &str) -> Result<Regex, PeftError> {
    RegexBuilder::new(text)
        .unicode(false)
        .size_limit(1 << 17)
        .dfa_size_limit(1 << 16)
        .build()
        .map_err(|_| PeftError::field(field, format!("holds an expression that is not supported: {text:?}")))
}

/// [`TargetModules`], ready to match.
pub(crate) enum Matcher<'a> {
    Names(&'a [String]),
    Pattern(Regex),
}

impl<'a> Matcher<'a> {
    pub(crate) fn new(field: &str, target: &'a TargetModules) -> Result<Self, PeftError> {
        Ok(match target {
            TargetModules::Names(names) => Self::Names(names),
            TargetModules::Pattern(text) => Self::Pattern(expression(field, &format!("^(?:{text})$"))?),
        })
    }

    pub(crate) fn matches(&self, path: &str) -> bool {
        let named = |name: &String| {
            path.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        match self {
            Self::Names(names) => names.iter().any(named),
            Self::Pattern(pattern) => pattern.is_match(path.as_bytes()),
        }
    }

    /// Whether the path is a feed-forward module of IA3, where names are ends of paths, at a dot or not.
    pub(crate) fn is_end(&self, path: &str) -> bool {
        match self {
            Self::Names(names) => names.iter().any(|name| path.ends_with(name.as_str())),
            Self::Pattern(pattern) => pattern.is_match(path.as_bytes()),
        }
    }
}

/// Values by the first pattern that matches `(.*\.)?(KEY)$`, in the order of the file.
pub(crate) struct Patterns<'a, T>(Vec<(Regex, &'a T)>);

impl<'a, T> Patterns<'a, T> {
    pub(crate) fn new(field: &str, entries: &'a [(String, T)]) -> Result<Self, PeftError> {
        let compile = |(key, value): &'a (String, T)| {
            Ok((expression(field, &format!(r"^(?:(.*\.)?({key}))$"))?, value))
        };
        entries.iter().map(compile).collect::<Result<_, _>>().map(Self)
    }

    pub(crate) fn find(&self, path: &str) -> Option<&'a T> {
        self.0.iter().find(|(key, _)| key.is_match(path.as_bytes())).map(|(_, value)| *value)
    }
}

/// The blocks a config is limited to, as peft finds a block's number in a path.
pub(crate) struct Layers<'a> {
    wanted: &'a [usize],
    patterns: Vec<Regex>,
}

impl<'a> Layers<'a> {
    pub(crate) fn new(wanted: &'a [usize], patterns: &[String]) -> Result<Self, PeftError> {
        let any = || expression("layers_pattern", r"^.*?\.[^.]*\.(?P<idx>[0-9]+)\.").map(|any| vec![any]);
        let own = |pattern: &String| {
            expression("layers_pattern", &format!(r"^(?:^|.*?\.){pattern}\.(?P<idx>[0-9]+)\."))
        };
        let patterns =
            if patterns.is_empty() { any()? } else { patterns.iter().map(own).collect::<Result<_, _>>()? };
        Ok(Self { wanted, patterns })
    }

    pub(crate) fn has(&self, path: &str) -> bool {
        let found = self.patterns.iter().find_map(|pattern| pattern.captures(path.as_bytes()));
        let index =
            found.and_then(|found| std::str::from_utf8(found.name("idx")?.as_bytes()).ok()?.parse().ok());
        index.is_some_and(|index: usize| self.wanted.contains(&index))
    }
}

/// The sites that `target` names and `exclude` and `layers` leave.
///
/// # Errors
/// When nothing is left, or a module is named that is none of the sites.
pub(crate) fn sites(
    shape: &BaseShape,
    target: &TargetModules,
    exclude: Option<&TargetModules>,
    layers: Option<&Layers<'_>>,
) -> Result<Vec<(SiteId, String)>, PeftError> {
    let matcher = Matcher::new("target_modules", target)?;
    let exclude = exclude.map(|exclude| Matcher::new("exclude_modules", exclude)).transpose()?;
    let is_target = |path: &str| {
        !exclude.as_ref().is_some_and(|exclude| exclude.matches(path))
            && matcher.matches(path)
            && layers.is_none_or(|layers| layers.has(path))
    };
    if let Some(other) = other_modules(shape).find(|path| is_target(path)) {
        let problem = format!("matches {other:?}, which is no linear layer that adapters act on");
        return Err(PeftError::field("target_modules", problem));
    }
    let named = shape.site_ids().map(|id| (id, id.module_path())).filter(|(_, path)| is_target(path));
    let sites: Vec<_> = named.collect();
    if sites.is_empty() {
        return Err(PeftError::field("target_modules", "matches no linear layer of this base"));
    }
    Ok(sites)
}

/// Modules of the family in HF transformers that are no sites.
fn other_modules(shape: &BaseShape) -> impl Iterator<Item = String> {
    let top = ["model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"];
    let inner = [
        "self_attn",
        "self_attn.q_norm",
        "self_attn.k_norm",
        "mlp",
        "mlp.act_fn",
        "input_layernorm",
        "post_attention_layernorm",
    ];
    let in_layer = move |layer: usize| {
        let own = std::iter::once(format!("model.layers.{layer}"));
        own.chain(inner.map(|name| format!("model.layers.{layer}.{name}")))
    };
    top.map(str::to_owned).into_iter().chain((0..shape.layers).flat_map(in_layer))
}
