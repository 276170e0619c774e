//! Text to tokens and back: tokenizer, chat template, incremental detokeniser, stop strings.
//!
//! What it is not: no files, no sockets, no clock. The vocabulary comes in as bytes or GGUF metadata
//! ([`types::TokenizerSource`]), the time of day as a [`types::Timestamp`], and nothing here knows which user or
//! model a text belongs to.
//!
//! Architecture invariant: what a user writes never becomes a special token unless the caller asked for it with
//! [`Special::Parse`]. Chat messages take [`Tokenizer::render_chat_tokens`], which keeps the two apart.

mod added;
mod chat;
mod detokenizer;
mod error;
mod gguf;
mod hugging_face;
mod pieces;
mod pre_tokenizer;
mod python_json;
mod sentencepiece;
mod stop;
mod template;
mod tokenizer;

pub use chat::{ChatOptions, Message, Role};
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use stop::{Scan, StopStrings};
pub use template::MAX_TEMPLATE_BYTES;
pub use tokenizer::{MAX_TEXT_BYTES, Special, Tokenizer};
