//! Where a model's tokenizer comes from, as raw material for the `text` crate.

use std::collections::BTreeMap;

/// What a model brings along to turn text into tokens.
#[derive(Debug, Clone)]
pub enum TokenizerSource {
    /// Files of a Hugging Face folder.
    HuggingFace {
        /// Content of `tokenizer.json`.
        tokenizer_json: Vec<u8>,
        /// Content of `tokenizer_config.json`, if there is one.
        tokenizer_config: Option<Vec<u8>>,
        /// Content of `chat_template.jinja`, if there is one; it wins over the config's.
        chat_template: Option<String>,
        /// Content of `generation_config.json`, if there is one (end-of-sequence ids).
        generation_config: Option<Vec<u8>>,
    },
    /// The vocabulary inside a GGUF file.
    Gguf(GgufVocabulary),
}

/// The `tokenizer.*` metadata of a GGUF file.
#[derive(Debug, Clone, Default)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`: `gpt2` is byte-level BPE, `llama` is SentencePiece.
    pub model: String,
    /// `tokenizer.ggml.pre`: name of the pre-tokenizer, e.g. `smollm`, `llama-bpe`, `qwen2`.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.scores`, by id (SentencePiece).
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.merges`, best first, two pieces separated by a space.
    pub merges: Vec<String>,
    /// The special ids present, by key: `bos_token_id`, `eos_token_id`, `eot_token_id`, `unknown_token_id`, `padding_token_id`.
    pub special: BTreeMap<String, u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}
