//! Any bytes as the two files of an adapter: an error or weights, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peft::{AdapterWeights, BaseShape};

fuzz_target!(|bytes: &[u8]| {
    // The first two bytes say where the config ends and the weights begin.
    let Some((length, rest)) = bytes.split_first_chunk::<2>() else { return };
    let (config, weights) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
    // That of the fixture `tiny-llama`.
    let dims = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)];
    if let Ok(weights) = AdapterWeights::parse(config, weights, &BaseShape { layers: 3, dims }) {
        assert!(weights.is_finite());
    }
});
