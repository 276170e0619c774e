//! Any bytes as the two files of an adapter: an error, or weights and what is served of them, never a panic.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use peft::{Adapter, AdapterWeights, BaseShape, Storage};
use testkit::SmallBase;

/// Of the shape of the fixture `tiny-llama`.
static BASE: LazyLock<(BaseShape, SmallBase)> = LazyLock::new(|| {
    let dims = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)];
    let shape = BaseShape { layers: 3, dims };
    (shape.clone(), SmallBase::new(shape, [0; 32]))
});

fuzz_target!(|bytes: &[u8]| {
    // The first two bytes say where the config ends and the weights begin.
    let Some((length, rest)) = bytes.split_first_chunk::<2>() else { return };
    let (config, weights) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
    let (shape, base) = &*BASE;
    let parsed = AdapterWeights::parse(config, weights, shape);
    assert!(parsed.as_ref().is_ok_and(AdapterWeights::is_finite) || parsed.is_err());
    for storage in [Storage::F32, Storage::Bf16, Storage::Int8] {
        let loaded = Adapter::load(config, weights, base, storage, &mut || ());
        let built = parsed.as_ref().map_err(Clone::clone).and_then(|parsed| Adapter::build(parsed, base, storage));
        // A file is read site by site, so that a later problem may be told first.
        assert_eq!(loaded.is_ok(), built.is_ok());
    }
});
