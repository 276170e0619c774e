//! Writes what the fuzz targets in `fuzz/` begin with: sound models and adapters, for the fuzzer to damage.
#![expect(clippy::unwrap_used, reason = "run by hand, on the repository's own files")]

#[path = "../tests/support/synthetic.rs"]
mod synthetic;

use std::fs;
use std::path::{Path, PathBuf};

use kernels::Format;
use synthetic::Synthetic;

/// The formats of a model's layers, by turns.
const FORMATS: [&[Format]; 5] = [
    &[Format::F32],
    &[Format::F16, Format::Bf16],
    &[Format::Q4_0],
    &[Format::Q4_1],
    &[Format::Q8_0, Format::Q4_0, Format::F32],
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
            feed_forward: 32,
            vocab: 8,
            context: 64,
            window: None,
            formats,
        };
        shape.write(&corpus("gguf").join(format!("model-{at}")), at as u64);
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
