//! Any bytes as a GGUF model: an error or a model, never a panic.
#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;
use model::{LoadOptions, load};

fuzz_target!(|bytes: &[u8]| {
    let mut file = tempfile::Builder::new().suffix(".gguf").tempfile().expect("a temporary file");
    file.write_all(bytes).expect("it is written");
    let _loaded_or_refused = load(file.path(), LoadOptions { max_context: Some(64) });
});
