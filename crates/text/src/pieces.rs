//! The bytes behind every token id, which is all that decoding needs.

use serde_json::Value;
use tokenizers::{DecoderWrapper, Model};

use crate::TextError;

/// How a vocabulary spells its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Spelling {
    /// GPT-2's alphabet: one character per byte.
    byte_level: bool,
    /// U+2581 stands for a blank.
    visible_blanks: bool,
    /// `<0x0A>` stands for one byte.
    byte_tokens: bool,
    /// A whole text begins with a blank that is not part of it.
    leading_blank: bool,
}

/// The bytes of all tokens, in one buffer.
#[derive(Debug)]
pub(crate) struct Pieces {
    bytes: Vec<u8>,
    /// `bytes[ends[id - 1]..ends[id]]` belongs to `id`; empty if no token has that id.
    ends: Vec<usize>,
    /// By id: control tokens that are no part of the text.
    special: Vec<bool>,
    leading_blank: bool,
}

impl Pieces {
    /// Reads the vocabulary of `core` and how its decoder spells text.
    pub(crate) fn new(core: &tokenizers::Tokenizer) -> Result<Self, TextError> {
        let spelling = Spelling::of(core.get_decoder())?;
        let added = core.get_added_tokens_decoder();
        let model = core.get_model();
        let count = core.get_vocab(true).into_values().max().map_or(0, |last| last as usize + 1);
        let mut pieces = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(count),
            special: vec![false; count],
            leading_blank: spelling.leading_blank,
        };
        for (id, special) in (0..).zip(&mut pieces.special) {
            if let Some(token) = added.get(&id) {
                *special = token.special;
                pieces.bytes.extend_from_slice(token.content.as_bytes());
            } else if let Some(token) = model.id_to_token(id) {
                spelling.read(&token, &mut pieces.bytes);
            }
            pieces.ends.push(pieces.bytes.len());
        }
        Ok(pieces)
    }

    /// Ids run below this number.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of a token; they need not be whole characters. `None` if there is no such token.
    pub(crate) fn get(&self, id: u32) -> Option<&[u8]> {
        let at = id as usize;
        let end = *self.ends.get(at)?;
        let start = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        (start < end).then(|| &self.bytes[start..end])
    }

    /// Whether the token is a control token.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Whether the first blank of a whole text is not part of it.
    pub(crate) fn leading_blank(&self) -> bool {
        self.leading_blank
    }
}

impl Spelling {
    fn of(decoder: Option<&DecoderWrapper>) -> Result<Self, TextError> {
        let decoder = decoder.ok_or_else(|| TextError::Decoder("null".to_owned()))?;
        let decoder = serde_json::to_value(decoder).map_err(|error| TextError::Decoder(error.to_string()))?;
        let mut spelling = Self::default();
        spelling.add(&decoder)?;
        if spelling.byte_level && spelling.visible_blanks {
            return Err(TextError::Decoder(decoder.to_string()));
        }
        Ok(spelling)
    }

    fn add(&mut self, decoder: &Value) -> Result<(), TextError> {
        let unsupported = || Err(TextError::Decoder(decoder.to_string()));
        match decoder["type"].as_str().unwrap_or_default() {
            "Sequence" => {
                decoder["decoders"].as_array().into_iter().flatten().try_for_each(|step| self.add(step))?
            }
            "ByteLevel" => self.byte_level = true,
            "ByteFallback" => self.byte_tokens = true,
            "Fuse" => {}
            "Replace" if decoder["pattern"]["String"] == "\u{2581}" && decoder["content"] == " " => {
                self.visible_blanks = true;
            }
            "Strip" if decoder["content"] == " " && decoder["start"] == 1 && decoder["stop"] == 0 => {
                self.leading_blank = true;
            }
            "Metaspace" if decoder["replacement"] == "\u{2581}" => {
                self.visible_blanks = true;
                self.leading_blank = decoder["prepend_scheme"] != "never";
            }
            _ => return unsupported(),
        }
        Ok(())
    }

    /// Appends the bytes that `token` stands for.
    fn read(&self, token: &str, bytes: &mut Vec<u8>) {
        if self.byte_level {
            let start = bytes.len();
            for c in token.chars() {
                match alphabet_byte(c) {
                    Some(byte) => bytes.push(byte),
                    // Not in the alphabet, so the token was never spelt in it.
                    None => {
                        bytes.truncate(start);
                        return bytes.extend_from_slice(token.as_bytes());
                    }
                }
            }
        } else if let Some(byte) = self.byte_tokens.then(|| byte_token(token)).flatten() {
            bytes.push(byte);
        } else if self.visible_blanks {
            bytes.extend_from_slice(token.replace('\u{2581}', " ").as_bytes());
        } else {
            bytes.extend_from_slice(token.as_bytes());
        }
    }
}

/// `<0x0A>` is one byte.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    hexadecimal.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 stands for itself, the other 68 bytes
/// are numbered from U+0100.
fn alphabet_byte(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    #[test]
    fn alphabet_is_the_inverse_of_the_pre_tokenizer() {
        let all: String =
            (0..=0x7ff).filter_map(char::from_u32).chain(['€', '한', '𝄞', '\u{10ffff}']).collect();
        let mut spelt = PreTokenizedString::from(all.as_str());
        ByteLevel::new(false, false, false).pre_tokenize(&mut spelt).expect("spells");
        let splits = spelt.get_splits(OffsetReferential::Normalized, OffsetType::None);
        let bytes: Vec<u8> =
            splits[0].0.chars().map(|c| alphabet_byte(c).expect("in the alphabet")).collect();
        assert_eq!(bytes, all.as_bytes());
        let letters = (0..0x400).filter_map(char::from_u32).filter_map(alphabet_byte);
        let mut letters: Vec<u8> = letters.collect();
        letters.sort_unstable();
        assert_eq!(letters, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn byte_tokens_are_exact() {
        assert_eq!(byte_token("<0x0A>"), Some(10));
        assert_eq!(byte_token("<0xff>"), Some(255));
        for not in ["<0x0>", "<0x+1>", "0x0A", "<0x0AA>", "<0xG0>", "x<0x0A>"] {
            assert_eq!(byte_token(not), None, "{not}");
        }
    }

    #[test]
    fn unknown_decoders_are_refused() {
        let decoder: DecoderWrapper =
            serde_json::from_str(r###"{"type":"WordPiece","prefix":"##","cleanup":true}"###)
                .expect("decoder");
        assert!(matches!(Spelling::of(Some(&decoder)), Err(TextError::Decoder(_))));
        assert!(matches!(Spelling::of(None), Err(TextError::Decoder(_))));
    }
}
