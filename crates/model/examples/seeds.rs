//! Writes what the fuzz targets in `fuzz/` begin with: sound models and adapters, for the fuzzer to damage.
#![expect(clippy::unwrap_used, reason = "run by hand, on the repository's own files")]

#[path = "../tests/support/synthetic.rs"]
mod synthetic;

use std::fs;
use std::path::{Path, PathBuf};

use kernels::Format;
use model::LoadOptions;
use synthetic::Synthetic;

const Q4: Format = Format::Q4_0;

/// The formats of a model's layers, by turns: those in blocks of 256 where that is the width, in the feed-forward network's
/// way back.
const FORMATS: [&[Format]; 7] = [
    &[Format::F32],
    &[Format::F16, Format::Bf16],
    &[Format::Q4_0],
    &[Format::Q4_1],
    &[Format::Q8_0, Format::Q4_0, Format::F32],
    &[Q4, Q4, Q4, Q4, Q4, Q4, Format::Q4K],
    &[Q4, Q4, Q4, Q4, Q4, Q4, Format::Q6K],
];

fn corpus(target: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn main() {
    for (at, formats) in FORMATS.into_iter().enumerate() {
        let shape = Synthetic {
            hidden: 32,
            layers: 1,
            heads: 2,
            kv_heads: 1,
            feed_forward: formats.iter().map(|format| format.block_len()).fold(32, usize::max),
            vocab: 8,
            context: 64,
            window: None,
            formats,
        };
        let file = corpus("gguf").join(format!("model-{at}.gguf"));
        shape.write(&file, at as u64);
        model::load(&file, LoadOptions::default()).unwrap();
    }
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama");
    for folder in fs::read_dir(fixtures).unwrap().map(|entry| entry.unwrap().path()) {
        let Ok(config) = fs::read(folder.join("adapter_config.json")) else { continue };
        let mut seed = u16::try_from(config.len()).unwrap().to_le_bytes().to_vec();
        seed.extend(config);
        seed.extend(fs::read(folder.join("adapter_model.safetensors")).unwrap());
        fs::write(corpus("adapter").join(folder.file_name().unwrap()), seed).unwrap();
    }
}
