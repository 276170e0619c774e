//! Tiny random models (made by `tests/reference`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::{BaseModel, LoadOptions, Loaded};
use text::Tokenizer;

/// A path within `tests/fixtures`.
#[must_use]
pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(path)
}

/// The random Llama with a byte-level tokenizer and a ChatML template.
///
/// # Panics
/// When the fixture is not there.
#[must_use]
pub fn tiny_model() -> (Arc<BaseModel>, Tokenizer) {
    let Loaded { model, tokenizer } =
        model::load(&fixture("tiny-llama"), LoadOptions::default()).expect("the fixture loads");
    let tokenizer = tokenizer.expect("the fixture has a tokenizer");
    (Arc::new(model), Tokenizer::new(&tokenizer).expect("the tokenizer is valid"))
}
