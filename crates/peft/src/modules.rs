//! Which modules of a base a config names, by HF peft's rules of matching.

use regex::bytes::{Regex, RegexBuilder, RegexSet, RegexSetBuilder};
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

/// Largest program, in bytes, that all expressions of a field may take together. A config has five such fields, so its
/// expressions take little memory and time however many there are.
const PROGRAM: usize = 1 << 17;
/// Most memory that a search may fill with states that it has seen.
const STATES: usize = 1 << 16;

/// An expression on a whole path, bounded in memory; paths are ASCII, so classes are too.
fn expression(field: &str, text: &str) -> Result<Regex, PeftError> {
    RegexBuilder::new(text)
        .unicode(false)
        .size_limit(PROGRAM)
        .dfa_size_limit(STATES)
        .build()
        .map_err(|error| refused(field, &error))
}

/// As [`expression`] for several, which share its bounds.
fn expressions(field: &str, texts: &[String]) -> Result<RegexSet, PeftError> {
    RegexSetBuilder::new(texts)
        .unicode(false)
        .size_limit(PROGRAM)
        .dfa_size_limit(STATES)
        .build()
        .map_err(|error| refused(field, &error))
}

fn refused(field: &str, error: &regex::Error) -> PeftError {
    match error {
        regex::Error::CompiledTooBig(_) => {
            let kibibytes = PROGRAM >> 10;
            PeftError::field(field, format!("holds expressions that take more than {kibibytes} KiB together"))
        }
        // Its own message shows the whole expression over several lines.
        other => {
            let said = other.to_string();
            let why = said.lines().last().unwrap_or_default().trim();
            PeftError::field(field, format!("holds an expression that is not supported: {why}"))
        }
    }
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
pub(crate) struct Patterns<'a, T> {
    entries: &'a [(String, T)],
    /// Keys that need no expression, which most are, with their places among the entries.
    plain: Vec<(usize, Plain)>,
    /// The others, if there are any.
    others: Vec<usize>,
    set: Option<RegexSet>,
}

/// A key of a fixed length: each of its bytes, or any byte.
struct Plain(Vec<Option<u8>>);

impl Plain {
    /// Letters, digits, `_` and `-`, dots for any byte and escaped dots for dots; `None` for a key of anything else.
    fn new(key: &str) -> Option<Self> {
        let mut bytes = key.bytes();
        let mut plain = Vec::new();
        while let Some(byte) = bytes.next() {
            plain.push(match byte {
                b'.' => None,
                b'\\' => Some(bytes.next().filter(|next| *next == b'.')?),
                b'_' | b'-' => Some(byte),
                _ if byte.is_ascii_alphanumeric() => Some(byte),
                _ => return None,
            });
        }
        Some(Self(plain))
    }

    fn matches(&self, path: &str) -> bool {
        let path = path.as_bytes();
        let Some((rest, end)) = path.len().checked_sub(self.0.len()).map(|at| path.split_at(at)) else {
            return false;
        };
        let same = end.iter().zip(&self.0).all(|(byte, key)| key.is_none_or(|key| key == *byte));
        same && (rest.is_empty() || rest.ends_with(b"."))
    }
}

impl<'a, T> Patterns<'a, T> {
    pub(crate) fn new(field: &str, entries: &'a [(String, T)]) -> Result<Self, PeftError> {
        let (mut plain, mut others, mut texts) = (Vec::new(), Vec::new(), Vec::new());
        for (at, (key, _)) in entries.iter().enumerate() {
            match Plain::new(key) {
                Some(key) => plain.push((at, key)),
                None => {
                    others.push(at);
                    texts.push(format!(r"^(?:(.*\.)?({key}))$"));
                }
            }
        }
        let set = (!texts.is_empty()).then(|| expressions(field, &texts)).transpose()?;
        Ok(Self { entries, plain, others, set })
    }

    pub(crate) fn find(&self, path: &str) -> Option<&'a T> {
        let plain = self.plain.iter().find(|(_, key)| key.matches(path)).map(|(at, _)| *at);
        let matches = self.set.as_ref().map(|set| set.matches(path.as_bytes()));
        let other = matches.and_then(|matches| Some(self.others[matches.iter().next()?]));
        let first = plain.into_iter().chain(other).min()?;
        Some(&self.entries[first].1)
    }
}

/// The blocks a config is limited to, as peft finds a block's number in a path.
pub(crate) struct Layers<'a> {
    wanted: &'a [usize],
    pattern: Regex,
}

impl<'a> Layers<'a> {
    /// One expression for all patterns: the first that matches gives the number, wherever the others do.
    pub(crate) fn new(wanted: &'a [usize], patterns: &[String]) -> Result<Self, PeftError> {
        let before = if patterns.is_empty() {
            r".*?\.[^.]*".to_owned()
        } else {
            let each = patterns.iter().map(|pattern| format!(r"(?:^|.*?\.)(?:{pattern})"));
            each.collect::<Vec<_>>().join("|")
        };
        let pattern = expression("layers_pattern", &format!(r"^(?:{before})\.(?P<idx>[0-9]+)\."))?;
        Ok(Self { wanted, pattern })
    }

    pub(crate) fn has(&self, path: &str) -> bool {
        let found = self.pattern.captures(path.as_bytes());
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

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    const PATHS: [&str; 7] = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.12.self_attn.q_proj",
        "model.layers.2.mlp.down_proj",
        "layers.2.mlp.gate_proj",
        "model.layers.2.mlp.xgate_proj",
        "q_proj",
        "lm_head",
    ];

    #[test]
    fn plain_keys_match_what_their_expressions_match() {
        for key in [
            "q_proj",
            "self_attn.q_proj",
            r"layers\.2\.mlp\.gate_proj",
            "layers.1..self",
            "_proj",
            "",
            ".",
            r"\.",
        ] {
            let plain = Plain::new(key).unwrap();
            let expression = expression("f", &format!(r"^(?:(.*\.)?({key}))$")).unwrap();
            for path in PATHS {
                assert_eq!(plain.matches(path), expression.is_match(path.as_bytes()), "{key:?} {path}");
            }
        }
        for other in [r"layers\.[02]\..*", "q|v", "a*", r"\d", "(q_proj)", "é", r"a\"] {
            assert!(Plain::new(other).is_none(), "{other}");
        }
    }

    #[test]
    fn the_first_key_that_matches_decides_whatever_it_needs() {
        let entries = |keys: &[&str]| -> Vec<(String, usize)> {
            keys.iter().enumerate().map(|(at, key)| ((*key).to_owned(), at)).collect()
        };
        let keys = entries(&[r"layers\.12\..*", "q_proj", r".*\.(down|gate)_proj", "down_proj", ".*"]);
        let patterns = Patterns::new("f", &keys).unwrap();
        let found: Vec<Option<&usize>> = PATHS.iter().map(|path| patterns.find(path)).collect();
        assert_eq!(found, [1, 0, 2, 2, 4, 1, 4].each_ref().map(Some));
        let keys = entries(&["down_proj", r".*\.(down|gate)_proj"]);
        let patterns = Patterns::new("f", &keys).unwrap();
        assert_eq!(
            (patterns.find(PATHS[2]), patterns.find(PATHS[3]), patterns.find(PATHS[0])),
            (Some(&0), Some(&1), None)
        );
    }

    #[test]
    fn the_first_pattern_that_matches_gives_the_block() {
        let path = "a.experts.7.layers.3.q_proj";
        let patterns = |list: &[&str]| list.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>();
        for (list, block) in [
            (&[][..], 7),
            (&["layers"], 3),
            (&["experts"], 7),
            (&["layers", "experts"], 3),
            (&["experts", "layers"], 7),
            (&["none", "lay|layers"], 3),
        ] {
            for wanted in [3, 7] {
                let layers = [wanted];
                let layers = Layers::new(&layers, &patterns(list)).unwrap();
                assert_eq!(layers.has(path), wanted == block, "{list:?} {wanted}");
            }
        }
    }
}
