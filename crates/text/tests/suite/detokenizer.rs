//! Incremental decoding against decoding all at once.

use proptest::prelude::*;
use text::{Detokenizer, Special, Tokenizer};

use crate::vocabulary::{byte_level, sentencepiece, texts, tokenizer};

fn streamed(mut detokenizer: Detokenizer, ids: &[u32]) -> String {
    let mut text = String::new();
    for &id in ids {
        text.push_str(detokenizer.push(id));
    }
    text.push_str(detokenizer.finish());
    assert_eq!(detokenizer.finish(), "", "the end comes once");
    text
}

fn agree(tokenizer: &Tokenizer, ids: &[u32]) {
    assert_eq!(streamed(Detokenizer::new(tokenizer), ids), tokenizer.decode(ids));
    let with_special = Detokenizer::new(tokenizer).with_special();
    assert_eq!(streamed(with_special, ids), tokenizer.decode_with_special(ids));
}

#[test]
fn characters_come_whole() {
    let smollm = tokenizer(byte_level("smollm"));
    let ids = smollm.encode("a🦊b", Special::Literal).unwrap();
    assert_eq!(ids.len(), 6);
    let mut detokenizer = Detokenizer::new(&smollm);
    let deltas: Vec<String> = ids.iter().map(|&id| detokenizer.push(id).to_owned()).collect();
    assert_eq!(deltas, ["a", "", "", "", "🦊", "b"]);
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn what_stays_incomplete_is_marked() {
    let smollm = tokenizer(byte_level("smollm"));
    let fox = smollm.encode("🦊", Special::Literal).unwrap();
    assert_eq!(streamed(Detokenizer::new(&smollm), &fox[..3]), "\u{fffd}");
    let broken = [&fox[..2], &smollm.encode("!", Special::Literal).unwrap()].concat();
    assert_eq!(streamed(Detokenizer::new(&smollm), &broken), "\u{fffd}!");
    // A special token between the bytes of a character is no part of the text.
    let interrupted = [&fox[..2], &[2], &fox[2..]].concat();
    assert_eq!(streamed(Detokenizer::new(&smollm), &interrupted), "🦊");
}

#[test]
fn special_and_unknown_ids_are_silent() {
    let smollm = tokenizer(byte_level("smollm"));
    assert_eq!(streamed(Detokenizer::new(&smollm), &[1, 2, 0, u32::MAX, 99_999]), "");
    let shown = Detokenizer::new(&smollm).with_special();
    assert_eq!(streamed(shown, &[1, u32::MAX]), "<|im_start|>");
}

#[test]
fn only_a_continuation_keeps_its_first_blank() {
    let llama = tokenizer(sentencepiece());
    let ids = llama.encode("the the", Special::Literal).unwrap();
    assert_eq!(streamed(Detokenizer::new(&llama), &ids), "the the");
    assert_eq!(streamed(Detokenizer::continuing(&llama), &ids), " the the");
    assert_eq!(streamed(Detokenizer::new(&llama), &[&[1], &ids[..]].concat()), "the the");
}

proptest! {
    #[test]
    fn texts_stream_as_they_decode(text in texts()) {
        for tokenizer in [tokenizer(byte_level("smollm")), tokenizer(sentencepiece())] {
            agree(&tokenizer, &tokenizer.encode(&text, Special::Parse).unwrap());
        }
    }

    /// Any ids at all, so mostly broken UTF-8.
    #[test]
    fn nonsense_streams_as_it_decodes(ids in prop::collection::vec(0..340u32, 0..64)) {
        agree(&tokenizer(byte_level("smollm")), &ids);
        agree(&tokenizer(sentencepiece()), &ids);
    }
}
