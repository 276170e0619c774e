//! Byte-level BPE from GGUF metadata.

use proptest::prelude::*;
use text::{MAX_TEXT_BYTES, Special, TextError, Tokenizer};
use types::{GgufVocabulary, TokenizerSource};

use crate::vocabulary::{SPECIAL, byte_level, pieces, texts, tokenizer};

fn refused(change: impl FnOnce(&mut GgufVocabulary)) -> TextError {
    let mut vocabulary = byte_level("smollm");
    change(&mut vocabulary);
    Tokenizer::new(&TokenizerSource::Gguf(vocabulary)).unwrap_err()
}

#[test]
fn words_are_merged_within_the_cuts_of_the_pre_tokenizer() {
    let smollm = tokenizer(byte_level("smollm"));
    let ids = smollm.encode("hello world 42", Special::Parse).unwrap();
    assert_eq!(pieces(&smollm, &ids), ["hello", " world", " ", "4", "2"]);
    assert_eq!(smollm.decode(&ids), "hello world 42");
    assert_eq!(smollm.encode("", Special::Parse).unwrap(), [0; 0]);
}

#[test]
fn special_tokens_are_read_or_spelt() {
    let smollm = tokenizer(byte_level("smollm"));
    let text = "hello<|im_end|> <think>";
    let parsed = smollm.encode(text, Special::Parse).unwrap();
    assert_eq!(pieces(&smollm, &parsed), ["hello", "<|im_end|>", " ", "<think>"]);
    assert_eq!(parsed[1], 2);
    let literal = smollm.encode(text, Special::Literal).unwrap();
    assert_eq!(
        pieces(&smollm, &literal),
        ["hello", "<", "|", "im", "_", "end", "|", ">", " ", "<think>"],
        "user-defined tokens stay tokens"
    );
    assert_eq!(smollm.decode(&parsed), "hello <think>");
    assert_eq!(smollm.decode_with_special(&parsed), text);
    assert_eq!(smollm.decode(&literal), text);
}

#[test]
fn ids_and_flags_come_from_the_metadata() {
    let mut vocabulary = byte_level("smollm");
    let size = vocabulary.tokens.len();
    let smollm = tokenizer(vocabulary.clone());
    assert_eq!(smollm.vocab_size(), size);
    assert_eq!((smollm.bos(), smollm.add_bos()), (Some(1), false));
    assert_eq!(smollm.eos_ids(), [2, 0], "the named one first, then <|endoftext|>");
    assert_eq!(smollm.end_of_turn(), Some(2));
    assert_eq!(smollm.token_bytes(2), Some(&b"<|im_end|>"[..]));
    assert_eq!(smollm.token_bytes(size as u32), None);
    assert_eq!(smollm.token_text(u32::MAX), "");
    assert!(smollm.is_special(0) && !smollm.is_special(3) && !smollm.is_special(u32::MAX));
    assert_eq!(smollm.encode_prompt("hello", Special::Literal).unwrap().len(), 1);

    vocabulary.pre = Some("llama-bpe".to_owned());
    let llama = tokenizer(vocabulary.clone());
    assert!(llama.add_bos(), "these models expect it unless the file says no");
    let ids = llama.encode_prompt("hello", Special::Literal).unwrap();
    assert_eq!(pieces(&llama, &ids), ["<|im_start|>", "hello"]);
    let ids = llama.encode_prompt("<|im_start|>hello", Special::Parse).unwrap();
    assert_eq!(pieces(&llama, &ids), ["<|im_start|>", "hello"], "not twice");

    vocabulary.add_bos = Some(false);
    assert!(!tokenizer(vocabulary).add_bos());
}

#[test]
fn files_without_token_types_have_their_special_tokens_too() {
    let mut vocabulary = byte_level("smollm");
    vocabulary.token_types.clear();
    let smollm = tokenizer(vocabulary);
    assert!([0, 1, 2].into_iter().all(|id| smollm.is_special(id)));
    assert!(smollm.encode("<|im_end|>", Special::Literal).unwrap().len() > 1);
}

/// A special token spelt like an ordinary word is in the vocabulary that merging looks words up in.
#[test]
fn a_word_spelt_like_a_special_token_stays_text() {
    let mut vocabulary = byte_level("llama-bpe");
    let id = vocabulary.tokens.iter().position(|token| token == "hello").unwrap();
    vocabulary.token_types[id] = 3;
    let llama = tokenizer(vocabulary);
    assert_eq!(llama.encode("hello", Special::Parse).unwrap(), [id as u32]);
    let ids = llama.encode("hello", Special::Literal).unwrap();
    assert_eq!(pieces(&llama, &ids), ["h", "e", "l", "l", "o"]);
    assert_eq!(llama.decode(&ids), "hello");
}

#[test]
fn qwen2_composes_the_text_first() {
    let (qwen, smollm) = (tokenizer(byte_level("qwen2")), tokenizer(byte_level("smollm")));
    let text = "e\u{301}";
    assert_eq!(qwen.decode(&qwen.encode(text, Special::Parse).unwrap()), "\u{e9}");
    assert_eq!(smollm.decode(&smollm.encode(text, Special::Parse).unwrap()), text);
}

#[test]
fn texts_above_the_limit_are_refused_and_the_limit_is_named() {
    let smollm = tokenizer(byte_level("smollm"));
    assert!(smollm.encode(&"a".repeat(MAX_TEXT_BYTES), Special::Literal).is_ok());
    let error = smollm.encode(&"a".repeat(MAX_TEXT_BYTES + 1), Special::Literal).unwrap_err();
    assert_eq!(error, TextError::TextTooLong { bytes: 524_289, max: 524_288 });
    assert_eq!(error.to_string(), "text has 524289 bytes, the limit is 524288");
    assert!(error.is_callers_fault());
}

#[test]
fn broken_metadata_is_refused_by_name() {
    let unknown = refused(|vocabulary| vocabulary.pre = Some("mystery".to_owned()));
    assert_eq!(unknown, TextError::GgufPreTokenizer("mystery".to_owned()));
    assert_eq!(refused(|v| v.model = "rwkv".to_owned()), TextError::GgufModel("rwkv".to_owned()));

    let field = |error: TextError| match error {
        TextError::Gguf { field, detail } => format!("{field}: {detail}"),
        other => panic!("{other:?}"),
    };
    assert_eq!(field(refused(|v| v.tokens.clear())), "tokens: the vocabulary is empty");
    let outside = refused(|v| v.special = [("eos_token_id".to_owned(), 9999)].into());
    assert!(field(outside).starts_with("eos_token_id: id 9999 is outside"));
    assert!(field(refused(|v| v.token_types.truncate(5))).starts_with("token_type: 5 entries"));
    let twice = refused(|v| v.tokens[5] = v.tokens[4].clone());
    assert!(field(twice).contains("is there twice, as 4 and 5"));
    assert!(field(refused(|v| v.merges[0] = "ab".to_owned())).starts_with("merges: \"ab\" is not two"));
    assert!(field(refused(|v| v.merges[0] = "x yz".to_owned())).starts_with("merges: "));
    assert!(!refused(|v| v.tokens.clear()).is_callers_fault());
}

proptest! {
    #[test]
    fn decoding_gives_back_what_was_encoded(text in texts()) {
        for pre in ["smollm", "llama-bpe", "gpt-4o"] {
            let tokenizer = tokenizer(byte_level(pre));
            let literal = tokenizer.encode(&text, Special::Literal).unwrap();
            prop_assert_eq!(tokenizer.decode(&literal), text.as_str());
            prop_assert!(!literal.iter().any(|&id| tokenizer.is_special(id)));
            let parsed = tokenizer.encode(&text, Special::Parse).unwrap();
            prop_assert_eq!(tokenizer.decode_with_special(&parsed), text.as_str());
            if !SPECIAL.iter().any(|special| text.contains(special)) {
                prop_assert_eq!(parsed, literal);
            }
        }
    }
}
