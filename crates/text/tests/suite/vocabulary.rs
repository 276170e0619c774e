//! Small vocabularies and texts for the tests.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;
use text::Tokenizer;
use types::{GgufVocabulary, TokenizerSource};

/// SmolLM2's chat template.
pub(crate) const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

pub(crate) const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

const WORDS: [&str; 12] =
    ["hello", " hello", " world", "user", "system", "assistant", "\n\n", "  ", "im", "end", " é", "日本"];

/// GPT-2's byte-level alphabet.
fn spelt(bytes: &[u8]) -> String {
    let letter = |&byte: &u8| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0x00..=0x20 => char::from_u32(0x100 + u32::from(byte)).unwrap(),
        0x7f..=0xa0 => char::from_u32(0x121 + u32::from(byte) - 0x7f).unwrap(),
        0xad => '\u{143}',
    };
    bytes.iter().map(letter).collect()
}

/// Byte-level BPE: three special tokens, `<think>` (user-defined), all bytes, and a few words.
pub(crate) fn byte_level(pre: &str) -> GgufVocabulary {
    let mut tokens: Vec<String> = SPECIAL.iter().map(|&text| text.to_owned()).collect();
    tokens.push("<think>".to_owned());
    let mut token_types = vec![3, 3, 3, 4];
    tokens.extend((0..=255).map(|byte| spelt(&[byte])));
    let mut merges = Vec::new();
    for word in WORDS {
        let word = word.as_bytes();
        for end in 2..=word.len() {
            let whole = spelt(&word[..end]);
            if !tokens.contains(&whole) {
                merges.push(format!("{} {}", spelt(&word[..end - 1]), spelt(&word[end - 1..end])));
                tokens.push(whole);
            }
        }
    }
    token_types.resize(tokens.len(), 1);
    let special = [("bos_token_id", 1), ("eos_token_id", 2), ("unknown_token_id", 0)];
    GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some(pre.to_owned()),
        tokens,
        token_types,
        merges,
        special: special.into_iter().map(|(key, id)| (key.to_owned(), id)).collect(),
        chat_template: Some(CHATML.to_owned()),
        ..GgufVocabulary::default()
    }
}

/// SentencePiece BPE: `<unk>`, `<s>`, `</s>`, all bytes, and a few pieces by score.
pub(crate) fn sentencepiece() -> GgufVocabulary {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    let mut token_types = vec![2, 3, 3];
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    token_types.resize(tokens.len(), 6);
    let mut scores = vec![0.0; tokens.len()];
    let pieces = [
        "▁t", "he", "▁the", "▁▁", "in", "ing", "s>", "</", "▁", "t", "h", "e", "i", "n", "g", "s", "<", "/",
        ">", "é",
    ];
    for (rank, piece) in pieces.into_iter().enumerate() {
        tokens.push(piece.to_owned());
        scores.push(-(rank as f32));
    }
    token_types.resize(tokens.len(), 1);
    let special = [("bos_token_id", 1), ("eos_token_id", 2), ("unknown_token_id", 0)];
    GgufVocabulary {
        model: "llama".to_owned(),
        tokens,
        token_types,
        scores,
        special: special.into_iter().map(|(key, id)| (key.to_owned(), id)).collect::<BTreeMap<_, _>>(),
        ..GgufVocabulary::default()
    }
}

pub(crate) fn tokenizer(vocabulary: GgufVocabulary) -> Tokenizer {
    Tokenizer::new(&TokenizerSource::Gguf(vocabulary)).unwrap()
}

/// The texts of `ids`, one by one.
pub(crate) fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    ids.iter().map(|&id| tokenizer.token_text(id).into_owned()).collect()
}

/// A committed fixture, such as `tiny-llama/tokenizer.json`.
pub(crate) fn fixture(path: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(path)).unwrap()
}

/// Texts with what is known to be difficult: blanks, scripts, joined emoji, special tokens and halves of them.
pub(crate) fn texts() -> impl Strategy<Value = String> {
    const KNOWN: &[&str] = &[
        "hello",
        " world",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "1234",
        "it's",
        "é",
        "e\u{301}",
        "日本語",
        "한",
        "👩‍👩‍👧",
        "🏳️‍🌈",
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
        "<|im_",
        "end|>",
        "<",
        "|>",
        "<think>",
        "\u{f0000}",
        "\u{fffd}",
        "\0",
    ];
    let part = prop_oneof![4 => prop::sample::select(KNOWN).prop_map(str::to_owned), 1 => any::<char>().prop_map(String::from)];
    prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
}
