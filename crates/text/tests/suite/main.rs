//! Tests of the crate's public interface, on small vocabularies made here and on the committed fixtures.

#![expect(clippy::unwrap_used, reason = "tests")]

mod byte_level;
mod chat;
mod detokenizer;
mod hugging_face;
mod sentencepiece;
mod stop;
mod vocabulary;
