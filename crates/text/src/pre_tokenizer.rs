//! The pre-tokenizers a GGUF file can name: how byte-level BPE cuts a text into words before it merges.
//!
//! A GGUF file carries only a name (`tokenizer.ggml.pre`); the expressions behind it are those of the models' own
//! `tokenizer.json`, and the names are llama.cpp's. Each expression cuts the pieces its predecessor left; what an
//! expression does not match stays one piece.

use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const DIGIT: &str = r"\p{N}";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_CODER: [&str; 5] = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", DIGIT];
/// What llama.cpp does when a file names nothing.
const UNNAMED: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"];

/// How one family of byte-level BPE vocabularies prepares its words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WordRules {
    splits: &'static [&'static str],
    /// A word that is a token as it stands is taken whole, whatever the merges say.
    pub(crate) ignore_merges: bool,
    /// Prompts begin with the beginning-of-sequence token unless the file says otherwise.
    pub(crate) add_bos: bool,
    /// The text is brought into Unicode's composed form first.
    composed: bool,
}

const PLAIN: WordRules = WordRules { splits: &[GPT2], ignore_merges: false, add_bos: false, composed: false };

impl WordRules {
    /// The rules that llama.cpp knows under `name`; `None` if this crate does not know them.
    pub(crate) fn named(name: &str) -> Option<Self> {
        let rules = match name {
            "default" => Self { splits: &UNNAMED, ..PLAIN },
            "gpt-2" | "phi-2" | "olmo" | "jais" | "mpt" => PLAIN,
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
                Self { splits: &[DIGIT, GPT2], ..PLAIN }
            }
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => {
                Self { splits: &[LLAMA3], ignore_merges: true, add_bos: true, ..PLAIN }
            }
            "dbrx" | "smaug-bpe" => Self { splits: &[LLAMA3], ..PLAIN },
            // The GGUF file does not say so, but these models' own tokenizers compose the text.
            "qwen2" => Self { splits: &[QWEN2], composed: true, ..PLAIN },
            "deepseek-r1-qwen" | "megrez" | "stablelm2" => Self { splits: &[QWEN2], ..PLAIN },
            "seed-coder" => Self { splits: &[SEED_CODER], ..PLAIN },
            "deepseek-coder" => Self { splits: &DEEPSEEK_CODER, ..PLAIN },
            "tekken" => Self { splits: &[TEKKEN], ignore_merges: true, add_bos: true, ..PLAIN },
            "gpt-4o" | "llama4" => Self { splits: &[GPT4O], ..PLAIN },
            _ => return None,
        };
        Some(rules)
    }

    /// The cutting into words, with each word's bytes spelt in the byte-level alphabet.
    pub(crate) fn pre_tokenizer(&self) -> tokenizers::Result<PreTokenizerWrapper> {
        let mut steps = Vec::with_capacity(self.splits.len() + 1);
        for &expression in self.splits {
            let pattern = SplitPattern::Regex(expression.to_owned());
            steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into());
        }
        steps.push(ByteLevel::new(false, true, false).into());
        Ok(Sequence::new(steps).into())
    }

    /// What is done to the text before it is cut, if anything.
    pub(crate) fn normalizer(&self) -> Option<NormalizerWrapper> {
        self.composed.then(|| NFC.into())
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;
    use crate::MAX_TEXT_BYTES;

    /// One name for each set of rules.
    const NAMES: [&str; 9] = [
        "default",
        "gpt-2",
        "smollm",
        "llama-bpe",
        "qwen2",
        "seed-coder",
        "deepseek-coder",
        "tekken",
        "gpt-4o",
    ];

    fn words(name: &str, text: &str) -> Vec<String> {
        let rules = WordRules::named(name).expect("known name");
        let mut cut = PreTokenizedString::from(text);
        rules.pre_tokenizer().expect("compiles").pre_tokenize(&mut cut).expect("cuts");
        let splits = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(_, (from, to), _)| text[from..to].to_owned()).collect()
    }

    #[test]
    fn families_differ_where_they_should() {
        assert_eq!(words("gpt-2", "in 2024, I'd"), ["in", " 2024", ",", " I", "'d"]);
        assert_eq!(words("smollm", "in 2024"), ["in", " ", "2", "0", "2", "4"]);
        assert_eq!(words("llama-bpe", "in 2024\n\nI'D"), ["in", " ", "202", "4", "\n\n", "I", "'D"]);
        assert_eq!(words("qwen2", "in 2024"), ["in", " ", "2", "0", "2", "4"]);
        assert_eq!(words("tekken", "camelCase 12"), ["camel", "Case", " ", "1", "2"]);
        assert_eq!(words("gpt-4o", "We'Re 1234"), ["We'Re", " ", "123", "4"]);
        assert_eq!(words("default", "a<=b 12345"), ["a", "<=", "b", " ", "123", "45"]);
    }

    #[test]
    fn no_text_is_lost() {
        let text = "a  b\t\u{a0}\r\n\n c'S 1234.5 ÀÉ 日本語 👩‍👩‍👧 क्षि ... \u{3000}z\u{85}  ";
        for name in NAMES {
            assert_eq!(words(name, text).concat(), text, "{name}");
        }
    }

    /// The regular expressions stop, without a word, when they have backtracked a million times; what follows would
    /// be left uncut. A text of the greatest length must not reach that point.
    #[test]
    fn longest_texts_are_still_cut() {
        for name in NAMES {
            for unit in [" ", "A", "_A", "\u{301}", "\n"] {
                let mut text = unit.repeat((MAX_TEXT_BYTES - 16) / unit.len());
                text.push_str("x, one two");
                assert_eq!(words(name, &text).last().map(String::as_str), Some(" two"), "{name} {unit:?}");
            }
        }
    }

    /// The danger is real: twice the limit is too much for one of the expressions.
    #[test]
    fn longer_texts_would_not_be() {
        let text = " ".repeat(2 * MAX_TEXT_BYTES) + "x, one two";
        assert_eq!(words("llama-bpe", &text).len(), 1);
    }

    #[test]
    fn unknown_names_are_not_guessed() {
        assert_eq!(WordRules::named("kimi-k2"), None);
        assert_eq!(WordRules::named(""), None);
    }
}
