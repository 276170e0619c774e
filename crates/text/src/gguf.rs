//! Builds the tokenizer from the vocabulary inside a GGUF file.

use std::collections::HashMap;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::{Prepend, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper};
use types::GgufVocabulary;

use crate::TextError;
use crate::pre_tokenizer::WordRules;
use crate::sentencepiece;
use crate::tokenizer::{END_OF_TURN, Parts};

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// The ids that begin and end sequences and turns.
const TURN_KEYS: [&str; 4] = ["bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id"];

/// SentencePiece's visible blank, U+2581.
const BLANK: &str = "\u{2581}";

fn wrong(field: &str, detail: impl ToString) -> TextError {
    TextError::Gguf { field: field.to_owned(), detail: detail.to_string() }
}

/// The tokenizer and its special ids.
pub(crate) fn parts(vocabulary: &GgufVocabulary) -> Result<Parts, TextError> {
    check(vocabulary)?;
    let (mut core, default_add_bos) = match vocabulary.model.as_str() {
        "gpt2" => byte_level(vocabulary)?,
        "llama" => (sentencepiece(vocabulary)?, true),
        other => return Err(TextError::GgufModel(other.to_owned())),
    };
    core.add_tokens(added_tokens(vocabulary)).map_err(|error| wrong("tokens", error))?;

    let special = |key: &str| vocabulary.special.get(key).copied();
    let names = [
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ];
    let names = names.into_iter().filter_map(|(name, key)| {
        let id = special(key)?;
        Some((name, vocabulary.tokens.get(id as usize)?.clone()))
    });
    Ok(Parts {
        bos: special("bos_token_id"),
        eos: ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().filter_map(special).collect(),
        end_of_turn: special("eot_token_id"),
        add_bos: vocabulary.add_bos.unwrap_or(default_add_bos),
        chat_template: vocabulary.chat_template.clone(),
        names: names.collect(),
        core,
    })
}

/// Everything that indexes the vocabulary stays within it, and every token is there once.
fn check(vocabulary: &GgufVocabulary) -> Result<(), TextError> {
    let count = vocabulary.tokens.len();
    if count == 0 {
        return Err(wrong("tokens", "the vocabulary is empty"));
    }
    let types = vocabulary.token_types.len();
    if types != 0 && types != count {
        return Err(wrong("token_type", format!("{types} entries for {count} tokens")));
    }
    for key in TURN_KEYS.into_iter().chain(["unknown_token_id"]) {
        if let Some(id) = vocabulary.special.get(key).filter(|&&id| id as usize >= count) {
            return Err(wrong(key, format!("id {id} is outside the vocabulary of {count} tokens")));
        }
    }
    let mut seen = HashMap::with_capacity(count);
    for (id, token) in vocabulary.tokens.iter().enumerate().filter(|(_, token)| !token.is_empty()) {
        if let Some(first) = seen.insert(token.as_str(), id) {
            return Err(wrong("tokens", format!("{token:?} is there twice, as {first} and {id}")));
        }
    }
    Ok(())
}

fn ids(vocabulary: &GgufVocabulary) -> Vocab {
    vocabulary.tokens.iter().cloned().zip(0..).filter(|(token, _)| !token.is_empty()).collect()
}

/// Byte-level BPE with the pre-tokenizer the file names; also whether prompts begin with BOS by default.
fn byte_level(vocabulary: &GgufVocabulary) -> Result<(tokenizers::Tokenizer, bool), TextError> {
    let name = vocabulary.pre.as_deref().unwrap_or_else(|| {
        tracing::warn!(
            "the file names no pre-tokenizer (tokenizer.ggml.pre): taking \"default\", answers may suffer"
        );
        "default"
    });
    let rules = WordRules::named(name).ok_or_else(|| TextError::GgufPreTokenizer(name.to_owned()))?;
    let mut merges = Vec::with_capacity(vocabulary.merges.len());
    for merge in &vocabulary.merges {
        let pair = merge.split_once(' ').filter(|(left, right)| !left.is_empty() && !right.is_empty());
        let (left, right) = pair.ok_or_else(|| wrong("merges", format!("{merge:?} is not two pieces")))?;
        merges.push((left.to_owned(), right.to_owned()));
    }
    let model = BPE::builder()
        .vocab_and_merges(ids(vocabulary), merges)
        .ignore_merges(rules.ignore_merges)
        .build()
        .map_err(|error| wrong("merges", error))?;
    let mut core = tokenizers::Tokenizer::new(model);
    core.with_pre_tokenizer(Some(rules.pre_tokenizer().map_err(|error| wrong("pre", error))?))
        .with_decoder(Some(ByteLevel::default()))
        .with_normalizer(rules.normalizer())
        .map_err(|error| wrong("pre", error))?;
    Ok((core, rules.add_bos))
}

/// SentencePiece BPE: merges from scores, bytes for what the vocabulary lacks, blanks made visible.
fn sentencepiece(vocabulary: &GgufVocabulary) -> Result<tokenizers::Tokenizer, TextError> {
    let (count, scores) = (vocabulary.tokens.len(), vocabulary.scores.len());
    if scores != count {
        return Err(wrong("scores", format!("{scores} entries for {count} tokens")));
    }
    let pieces: Vec<(&str, f32)> = (vocabulary.tokens.iter().zip(&vocabulary.scores).enumerate())
        .filter(|&(id, _)| is_ordinary(vocabulary, id))
        .map(|(_, (text, &score))| (text.as_str(), score))
        .collect();
    let mut model = BPE::builder()
        .vocab_and_merges(ids(vocabulary), sentencepiece::merges(&pieces))
        .byte_fallback(true)
        .fuse_unk(true);
    let unknown = vocabulary.special.get("unknown_token_id").map(|&id| id as usize);
    if let Some(id) = unknown.or_else(|| vocabulary.token_types.iter().position(|&kind| kind == UNKNOWN)) {
        model = model.unk_token(vocabulary.tokens[id].clone());
    }
    let mut core = tokenizers::Tokenizer::new(model.build().map_err(|error| wrong("scores", error))?);

    // As in llama.cpp, a blank goes before the text and before whatever follows a special token.
    let prefix = vocabulary.add_space_prefix.unwrap_or(true);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders: Vec<DecoderWrapper> = Vec::new();
    if prefix {
        normalizers.push(Prepend::new(BLANK.to_owned()).into());
    }
    normalizers.push(Replace::new(" ", BLANK).map_err(|error| wrong("tokens", error))?.into());
    decoders.push(Replace::new(BLANK, " ").map_err(|error| wrong("tokens", error))?.into());
    decoders.push(ByteFallback::new().into());
    decoders.push(Fuse::new().into());
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    core.with_decoder(Some(DecoderSequence::new(decoders)))
        .with_normalizer(Some(NormalizerSequence::new(normalizers)))
        .map_err(|error| wrong("tokens", error))?;
    Ok(core)
}

/// Whether text may merge into this token.
fn is_ordinary(vocabulary: &GgufVocabulary, id: usize) -> bool {
    let text = vocabulary.tokens[id].as_str();
    let kind_fits = match vocabulary.token_types.get(id) {
        Some(&kind) => kind == NORMAL,
        None => !(text.len() == 6 && text.starts_with("<0x") && text.ends_with('>')),
    };
    kind_fits && !text.is_empty() && !is_special(vocabulary, id)
}

/// Control tokens, the unknown token, and those that begin or end something, whatever type the file gives them.
fn is_special(vocabulary: &GgufVocabulary, id: usize) -> bool {
    let named = |key: &str| vocabulary.special.get(key).is_some_and(|&named| named as usize == id);
    match vocabulary.token_types.get(id) {
        Some(&(CONTROL | UNKNOWN)) => true,
        _ if TURN_KEYS.into_iter().any(named) => true,
        Some(&NORMAL) => false,
        _ => named("unknown_token_id") || END_OF_TURN.contains(&vocabulary.tokens[id].as_str()),
    }
}

/// The tokens that are found in the text before it is cut into words.
fn added_tokens(vocabulary: &GgufVocabulary) -> Vec<AddedToken> {
    let added = vocabulary.tokens.iter().enumerate().filter_map(|(id, text)| {
        let special = is_special(vocabulary, id);
        let user_defined = vocabulary.token_types.get(id) == Some(&USER_DEFINED);
        (special || user_defined).then(|| AddedToken::from(text.clone(), special).normalized(false))
    });
    added.collect()
}
