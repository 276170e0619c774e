//! The fixture adapters of every kind.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use peft::{Adapter, BaseShape};

/// The shape of the fixture `tiny-llama`.
pub(crate) fn shape() -> BaseShape {
    let dims = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)];
    BaseShape { layers: 3, dims }
}

pub(crate) fn files(kind: &str) -> (Vec<u8>, Vec<u8>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama").join(kind);
    let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
    (read("adapter_config.json"), read("adapter_model.safetensors"))
}

pub(crate) const KINDS: [&str; 6] = ["lora-all-linear", "lora-layers", "lora-bias", "dora", "ia3", "prompt"];

/// Everything an adapter does, to the bit.
pub(crate) fn contents(adapter: &Adapter) -> String {
    let site = |id| format!("{:?} {:?}\n", adapter.site(id), adapter.vectors(id));
    let sites: String = shape().site_ids().map(site).collect();
    let mut embedding = vec![0.0; 64];
    let prompt = (0..adapter.virtual_tokens()).map(|token| {
        assert!(adapter.embed(token, &mut embedding));
        format!("{embedding:?}\n")
    });
    sites + &prompt.collect::<String>()
}
