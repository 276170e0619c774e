//! A step of the model allocates nothing once the buffers have grown.
#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "support/synthetic.rs"]
mod synthetic;

use std::alloc::System;
use std::sync::Arc;

use kernels::Format;
use model::{BatchInput, KvPool, LoadOptions, Logits, Precision, Runtime, load};
use peft::{Adapter, AdapterBatch, LoraConfig, LoraTensors, LoraWeights};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use synthetic::Synthetic;
use types::Site;

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

#[test]
fn a_step_allocates_nothing_after_warm_up() {
    let shape = Synthetic {
        hidden: 128,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        feed_forward: 256,
        vocab: 100,
        context: 256,
        window: None,
        formats: &[Format::Q4_1],
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("synthetic.gguf");
    shape.write(&path, 1);
    let base = load(&path, LoadOptions::default()).unwrap().model;
    let dims = base.shape();
    let site = |i: usize| {
        let (n, k) = dims.dims(Site::ALL[i % 7]);
        Some(LoraTensors {
            rank: 4,
            scale: 1.0,
            a: vec![0.01; 4 * k],
            b: vec![0.01; 4 * n],
            ..LoraTensors::default()
        })
    };
    let weights = LoraWeights { config: LoraConfig::oppu(), sites: (0..14).map(site).collect() };
    let adapter = Arc::new(Adapter::new(&weights, Precision::Fast));
    let mut runtime = Runtime::new(2, Precision::Fast).unwrap();
    let mut kv = KvPool::new(base.config(), 64, Precision::Fast).unwrap();
    let (mut input, mut adapters) = (BatchInput::default(), AdapterBatch::default());
    let mut logits = Logits::default();
    let mut step = |position: usize, rows: usize| {
        input.clear();
        adapters.clear();
        for sequence in 0..4u32 {
            let blocks: [u32; 16] = std::array::from_fn(|i| sequence * 16 + i as u32);
            input.push(&[7; 32][..rows], position, &blocks, true);
            adapters.push((sequence % 2 == 0).then_some(&adapter), rows);
        }
        base.forward(&mut runtime, &input, &mut kv, &adapters, &mut logits).unwrap();
    };
    // The longest context and the largest step come first, often enough for every thread to have had a part.
    step(0, 32);
    (0..200).for_each(|_| step(200, 32));
    let region = Region::new(COUNTING);
    for position in 32..200 {
        step(position, 1 + position % 20);
    }
    let change = region.change();
    assert_eq!((change.allocations, change.reallocations), (0, 0));
    // Negative control: the counter counts.
    drop(std::hint::black_box(vec![1u8; 100]));
    assert_eq!(region.change().allocations, 1);
}
