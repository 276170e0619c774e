//! SentencePiece BPE from GGUF metadata.

use proptest::prelude::*;
use text::{Special, TextError, Tokenizer};
use types::TokenizerSource;

use crate::vocabulary::{pieces, sentencepiece, texts, tokenizer};

#[test]
fn pieces_merge_by_score_and_the_rest_falls_back_to_bytes() {
    let llama = tokenizer(sentencepiece());
    let ids = llama.encode("the thing  日é", Special::Literal).unwrap();
    let bytes: Vec<&[u8]> = ids.iter().map(|&id| llama.token_bytes(id).unwrap()).collect();
    let expected: [&[u8]; 10] =
        [b" the", b" t", b"h", b"ing", b"  ", b"\xe6", b"\x97", b"\xa5", "é".as_bytes(), b""];
    assert_eq!(bytes, expected[..9]);
    assert_eq!(llama.decode(&ids), "the thing  日é");
    assert_eq!(llama.decode(&ids[1..]), "thing  日é", "the first blank of a text is not part of it");
}

#[test]
fn the_blank_before_a_text_can_be_switched_off() {
    let mut vocabulary = sentencepiece();
    vocabulary.add_space_prefix = Some(false);
    let plain = tokenizer(vocabulary);
    let ids = plain.encode("the", Special::Literal).unwrap();
    assert_eq!(pieces(&plain, &ids), ["t", "he"]);
    let ids = plain.encode(" the", Special::Literal).unwrap();
    assert_eq!(plain.decode(&ids), " the");
}

#[test]
fn prompts_begin_with_bos_and_control_tokens_cannot_be_merged() {
    let llama = tokenizer(sentencepiece());
    assert!(llama.add_bos());
    let ids = llama.encode_prompt("the", Special::Literal).unwrap();
    assert_eq!(pieces(&llama, &ids), ["<s>", " the"]);
    let ids = llama.encode("</s>", Special::Literal).unwrap();
    assert_eq!(
        pieces(&llama, &ids),
        [" ", "</", "s>"],
        "not the control token, though its halves are pieces"
    );
    assert_eq!(llama.encode("</s>", Special::Parse).unwrap(), [2]);
    assert_eq!(llama.eos_ids(), [2]);
}

#[test]
fn a_vocabulary_without_scores_is_refused() {
    let mut vocabulary = sentencepiece();
    vocabulary.scores.pop();
    let error = Tokenizer::new(&TokenizerSource::Gguf(vocabulary)).unwrap_err();
    assert!(matches!(error, TextError::Gguf { field, .. } if field == "scores"));
}

proptest! {
    #[test]
    fn decoding_gives_back_what_was_encoded(text in texts()) {
        let llama = tokenizer(sentencepiece());
        let ids = llama.encode(&text, Special::Literal).unwrap();
        // U+2581 is how the vocabulary writes a blank, so it cannot survive.
        prop_assert_eq!(llama.decode(&ids), text.replace('\u{2581}', " "));
        prop_assert!(!ids.iter().any(|&id| llama.is_special(id)));
    }
}
