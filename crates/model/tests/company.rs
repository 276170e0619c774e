//! A row's logits do not depend on its company: batch size, place in the batch, other rows, threads, and whether its
//! prefix was computed with it or long before. Compared to the bit.
//!
//! The long run: `COMPANY_COMPARISONS=10000 cargo test --release -p model --test company`.
#![expect(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_methods, reason = "tests")]

#[path = "support/synthetic.rs"]
mod synthetic;

use std::sync::Arc;

use kernels::Format;
use model::{BLOCK_LEN, BaseModel, BatchInput, KvPool, LoadOptions, Logits, Precision, Runtime, load};
use peft::{
    Adapter, AdapterBatch, AdapterWeights, Ia3Config, Ia3Scale, Ia3Weights, LoraConfig, LoraTensors,
    LoraWeights, PromptConfig, PromptWeights,
};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use synthetic::Synthetic;
use types::Site;

/// Rows of a batch.
const SIZES: [usize; 13] = [1, 2, 7, 8, 9, 31, 32, 33, 64, 65, 127, 128, 129];
/// Rows that a seeded bug gets, at least: some are spared by chance.
const SEEDED: usize = 24;
const LONGEST: usize = 72;
/// Virtual tokens of prompt tuning.
const VIRTUAL: usize = 21;
const BLOCKS: u32 = (LONGEST as u32).div_ceil(BLOCK_LEN as u32);

/// Widths that are whole blocks of 32, and keys of all positions.
const SHORT_BLOCKS: Synthetic = Synthetic {
    hidden: 1120,
    layers: 2,
    heads: 14,
    kv_heads: 2,
    feed_forward: 1792,
    vocab: 300,
    context: 128,
    window: None,
    formats: &[Format::Q4_1, Format::Q8_0, Format::Q4_0, Format::Bf16],
};

/// Widths that are whole blocks of 256, and a sliding window.
const LONG_BLOCKS: Synthetic = Synthetic {
    hidden: 1280,
    heads: 20,
    kv_heads: 4,
    window: Some(23),
    formats: &[Format::Q4K, Format::Q6K, Format::F32, Format::Q4K, Format::F16],
    ..SHORT_BLOCKS
};

fn base(shape: Synthetic) -> BaseModel {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("synthetic.gguf");
    shape.write(&path, 1);
    load(&path, LoadOptions::default()).unwrap().model
}

/// An adapter on some sites: of LoRA or DoRA of a rank from 1 to 64 (the first has that), IA3 or prompt tuning.
fn adapter(base: &BaseModel, rng: &mut StdRng, precision: Precision, kind: usize) -> Arc<Adapter> {
    let shape = base.shape();
    let rank = if kind == 0 { 64 } else { rng.random_range(1..=64) };
    let mut values =
        |mean: f32, len: usize| (0..len).map(|_| mean + rng.random_range(-0.05..0.05)).collect::<Vec<f32>>();
    let sites = shape.sites();
    let dims = |index: usize| shape.dims(Site::ALL[index % 7]);
    let weights = match kind {
        0..4 => {
            let mut site = |index: usize| {
                let (n, k) = dims(index);
                let (bias, magnitude) =
                    ((kind == 2).then(|| values(0.0, n)), (kind == 3).then(|| values(1.0, n)));
                LoraTensors {
                    rank,
                    scale: 1.0,
                    a: values(0.0, rank * k),
                    b: values(0.0, rank * n),
                    bias,
                    magnitude,
                }
            };
            let sites = (0..sites).map(|i| (i % 3 != 2).then(|| site(i))).collect();
            AdapterWeights::Lora(LoraWeights { config: LoraConfig::oppu(), sites })
        }
        4 => {
            let mut site = |index: usize| {
                let (n, k) = dims(index);
                // Of layers that share an input, some have it scaled and some not.
                if index.is_multiple_of(2) {
                    Ia3Scale::Input(values(1.0, k))
                } else {
                    Ia3Scale::Output(values(1.0, n))
                }
            };
            let sites = (0..sites).map(|i| (i % 4 != 3).then(|| site(i))).collect();
            AdapterWeights::Ia3(Ia3Weights { config: Ia3Config::llama(), sites })
        }
        _ => {
            let (width, config) = (shape.width(), PromptConfig { virtual_tokens: VIRTUAL });
            AdapterWeights::Prompt(PromptWeights { config, width, embeddings: values(0.0, VIRTUAL * width) })
        }
    };
    Arc::new(Adapter::build(&weights, base, precision).unwrap())
}

/// A text with its adapter, and its last token's logits computed alone.
struct Case {
    tokens: Vec<u32>,
    adapter: Option<Arc<Adapter>>,
    alone: Vec<f32>,
}

struct Bench {
    base: BaseModel,
    kv: KvPool,
    one: Runtime,
    two: Runtime,
    logits: Logits,
}

impl Bench {
    fn new(shape: Synthetic, precision: Precision) -> Self {
        let base = base(shape);
        let kv = KvPool::new(&base.config().clone(), 130 * BLOCKS as usize, precision).unwrap();
        let runtime = |threads| Runtime::new(threads, precision).unwrap();
        Self { base, kv, one: runtime(1), two: runtime(2), logits: Logits::default() }
    }

    /// Runs the rows `from..to` of each sequence in its own blocks; the logits of each.
    fn run(&mut self, threads: usize, work: &[(&Case, u32, usize, usize)]) -> Vec<Vec<f32>> {
        let (mut input, mut adapters) = (BatchInput::default(), AdapterBatch::default());
        for &(case, slot, from, to) in work {
            let blocks: Vec<u32> = (slot * BLOCKS..(slot + 1) * BLOCKS).collect();
            input.push(&case.tokens[from..to], from, &blocks, true);
            adapters.push(case.adapter.as_ref(), to - from);
        }
        let runtime = if threads == 1 { &mut self.one } else { &mut self.two };
        self.base.forward(runtime, &input, &mut self.kv, &adapters, &mut self.logits).unwrap();
        self.logits.rows().map(<[f32]>::to_vec).collect()
    }

    fn cases(&mut self, rng: &mut StdRng, precision: Precision) -> Vec<Case> {
        let adapters: Vec<_> = (0..7).map(|kind| adapter(&self.base, rng, precision, kind)).collect();
        (0..40)
            .map(|i| {
                let adapter = (i % 4 != 0).then(|| Arc::clone(adapters.choose(rng).unwrap()));
                let own = adapter.as_ref().map_or(0, |adapter| adapter.virtual_tokens());
                let len = rng.random_range(own + 1..=LONGEST);
                let virtual_tokens = (0..own).map(|index| 300 + index as u32);
                let tokens: Vec<u32> =
                    virtual_tokens.chain((own..len).map(|_| rng.random_range(0..300))).collect();
                let mut case = Case { tokens, adapter, alone: Vec::new() };
                // One token after the other, alone.
                for at in 0..len {
                    case.alone = self.run(1, &[(&case, 0, at, at + 1)]).remove(0);
                }
                case
            })
            .collect()
    }

    /// One batch of `size` rows of random cases; returns how many rows were compared and how many differed.
    fn compare(
        &mut self,
        rng: &mut StdRng,
        cases: &[Case],
        size: usize,
        fault: Option<Fault>,
    ) -> (usize, usize) {
        let (mut work, mut left, mut slot) = (Vec::new(), size, 0);
        while left > 0 {
            let case = cases.choose(rng).unwrap();
            let len = case.tokens.len();
            // Cold, warm by whole blocks (as from a prefix cache), or all but the last token.
            let from = match rng.random_range(0..3) {
                0 => 0,
                1 => rng.random_range(0..len) / BLOCK_LEN * BLOCK_LEN,
                _ => len - 1,
            };
            let from = from.max(len.saturating_sub(left));
            work.push((case, slot, from, len));
            left -= len - from;
            slot += 1;
        }
        let warm = work.iter().filter(|w| w.2 > 0).map(|&(case, slot, from, _)| (case, slot, 0, from));
        let mut warm: Vec<(&Case, u32, usize, usize)> = warm.collect();
        if let Some(Fault::StalePrefix) = fault {
            // Another text's keys and values lie in the first blocks.
            let other = cases.iter().max_by_key(|case| case.tokens.len()).unwrap();
            warm.iter_mut().for_each(|w| w.0 = if w.3 <= other.tokens.len() { other } else { w.0 });
        }
        if !warm.is_empty() {
            self.run(rng.random_range(1..=2), &warm);
        }
        let routed: Vec<Case>;
        if let Some(Fault::NeighboursAdapter) = fault {
            let shifted = work.iter().zip(work.iter().cycle().skip(1));
            routed = shifted
                .map(|(w, next)| {
                    // Virtual tokens have no meaning to another adapter.
                    let own = w.0.tokens[0] >= 300;
                    let adapter = if own { &w.0.adapter } else { &next.0.adapter };
                    let (tokens, alone) = (w.0.tokens.clone(), w.0.alone.clone());
                    Case { tokens, adapter: adapter.clone(), alone }
                })
                .collect();
            work.iter_mut().zip(&routed).for_each(|(w, case)| w.0 = case);
        }
        let together = self.run(rng.random_range(1..=2), &work);
        let differ = work.iter().zip(&together).filter(|(w, logits)| !equal(&w.0.alone, logits)).count();
        (work.len(), differ)
    }
}

/// Bit by bit: unlike `==`, this tells 0 from -0 and compares NaN.
fn equal(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// A seeded bug that the comparison must see.
#[derive(Clone, Copy)]
enum Fault {
    NeighboursAdapter,
    StalePrefix,
}

#[test]
fn a_rows_logits_are_the_same_to_the_bit_in_any_company() {
    let wanted = std::env::var("COMPANY_COMPARISONS").map_or(2_000, |count| count.parse().unwrap());
    let shapes = [("short", SHORT_BLOCKS, wanted / 2), ("long", LONG_BLOCKS, wanted / 4)];
    let precisions = [Precision::Fast, Precision::Exact];
    for ((blocks, shape, wanted), precision) in
        shapes.into_iter().flat_map(|shape| precisions.map(|precision| (shape, precision)))
    {
        let mut rng = StdRng::seed_from_u64(20);
        let mut bench = Bench::new(shape, precision);
        let cases = bench.cases(&mut rng, precision);
        assert!(cases.iter().all(|case| case.alone.iter().all(|logit| logit.is_finite())));
        let (mut compared, mut sizes) = (0, SIZES.iter().cycle());
        while compared < wanted {
            let &size = sizes.next().unwrap();
            let (rows, differ) = bench.compare(&mut rng, &cases, size, None);
            assert_eq!(differ, 0, "of {rows} rows in a batch of {size}, {precision:?}");
            compared += rows;
        }
        println!("{compared} comparisons in {precision:?} precision, weights in {blocks} blocks");
        for fault in [Fault::NeighboursAdapter, Fault::StalePrefix] {
            let (mut batches, mut rows, mut differ) = (0, 0, 0);
            while batches < (wanted / 60).clamp(1, 8) || rows < SEEDED {
                let one = bench.compare(&mut rng, &cases, 128, Some(fault));
                (batches, rows, differ) = (batches + 1, rows + one.0, differ + one.1);
            }
            assert!(differ > rows / 4, "a seeded bug went unnoticed: {differ} of {rows} rows differ");
        }
    }
}
