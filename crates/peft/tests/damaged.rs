//! Damaged adapters are refused with an error: no panic, and no memory beyond what the files' size explains. The seeded
//! stable counterpart of the fuzz target `adapter` in `fuzz/`.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

use std::alloc::System;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::LazyLock;

use peft::{Adapter, AdapterWeights, BaseShape, Storage};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use testkit::SmallBase;

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Damaged pairs of files per adapter of the fixtures.
const CASES: usize = 2_000;

/// What expressions and error messages may take, whatever the files hold.
const FIXED: usize = 8 << 20;

/// A copy of the values in float32, and lists and names on the way.
const TIMES: usize = 40;

const STORAGES: [Storage; 3] = [Storage::F32, Storage::Bf16, Storage::Int8];

/// What replaces a number or a word.
const EXTREMES: [&str; 12] = [
    "-1",
    "0",
    "1",
    "513",
    "4294967296",
    "18446744073709551615",
    "1e400",
    "null",
    "true",
    "\"\"",
    "[[[[[[[[",
    "{\"a\":{\"a\":{\"a\":0}}}",
];

/// The shape of the fixture `tiny-llama`.
fn shape() -> BaseShape {
    let (query, key, hidden, wide) = (64, 32, 64, 96);
    let dims = [
        (query, hidden),
        (key, hidden),
        (key, hidden),
        (hidden, query),
        (wide, hidden),
        (wide, hidden),
        (hidden, wide),
    ];
    BaseShape { layers: 3, dims }
}

/// The adapters among the fixtures of `tiny-llama`, whatever their kind.
fn adapters() -> Vec<(String, Vec<u8>, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let read = |file: &str| std::fs::read(entry.path().join(file)).ok();
        if let (Some(config), Some(weights)) =
            (read("adapter_config.json"), read("adapter_model.safetensors"))
        {
            found.push((entry.file_name().into_string().unwrap(), config, weights));
        }
    }
    found.sort();
    found
}

/// Whether `read` takes the files; panics when it panics or takes too much memory.
fn try_read(config: &[u8], weights: &[u8], read: impl FnOnce(&[u8], &[u8]) -> bool) -> bool {
    let region = Region::new(COUNTING);
    let result = catch_unwind(AssertUnwindSafe(|| read(config, weights)));
    let taken = region.change().bytes_allocated;
    let size = config.len() + weights.len();
    assert!(taken < FIXED + TIMES * size, "{taken} bytes for files of {size}");
    result.unwrap_or_else(|_| panic!("reading panicked"))
}

fn parse(config: &[u8], weights: &[u8]) -> bool {
    AdapterWeights::parse(config, weights, &shape()).is_ok_and(|weights| weights.is_finite())
}

/// Reads the files as they are read to be served.
fn load(config: &[u8], weights: &[u8], storage: Storage) -> bool {
    static BASE: LazyLock<SmallBase> = LazyLock::new(|| SmallBase::new(shape(), [0; 32]));
    Adapter::load(config, weights, &*BASE, storage, &mut || ()).is_ok()
}

/// Replaces a run of digits or letters of a text by something extreme.
fn replace(bytes: &mut Vec<u8>, within: std::ops::Range<usize>, rng: &mut StdRng) {
    let start = rng.random_range(within.clone());
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'.';
    let Some(at) = bytes[start..within.end].iter().position(is_word).map(|at| start + at) else { return };
    let len = bytes[at..within.end].iter().take_while(|byte| is_word(byte)).count();
    let extreme = EXTREMES[rng.random_range(0..EXTREMES.len())];
    bytes.splice(at..at + len, extreme.bytes());
}

fn damage(config: &mut Vec<u8>, weights: &mut Vec<u8>, case: usize, rng: &mut StdRng) {
    // What lengths, names and shapes hang on; the rest is numbers.
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    match case % 8 {
        0 => (0..rng.random_range(1..4)).for_each(|_| weights[rng.random_range(0..header)] = rng.random()),
        1 => {
            let extreme = [0, 1, u64::MAX, u64::MAX / 2, 1 << 20, (1 << 20) + 1, 1 << 32, 1 << 62];
            let value: u64 = extreme[rng.random_range(0..extreme.len())];
            weights[..8].copy_from_slice(&value.to_le_bytes());
        }
        2 => replace(weights, 8..header, rng),
        3 => weights.truncate(rng.random_range(0..weights.len())),
        4 => {
            let (at, len) = (rng.random_range(0..header), rng.random_range(1..40));
            weights.drain(at..at + len);
        }
        5 => {
            let last = config.len();
            (0..rng.random_range(1..4)).for_each(|_| config[rng.random_range(0..last)] = rng.random());
        }
        6 => {
            let all = 0..config.len();
            replace(config, all, rng);
        }
        _ => {
            let (from, to) = (rng.random_range(0..config.len()), rng.random_range(0..config.len()));
            let piece = config[from.min(to)..from.max(to)].to_vec();
            let at = rng.random_range(0..config.len());
            config.splice(at..at, piece);
        }
    }
}

#[test]
fn damaged_adapters_are_errors_of_bounded_cost() {
    let adapters = adapters();
    assert!(adapters.len() >= 4, "the fixtures are there");
    for (name, config, weights) in adapters {
        assert!(try_read(&config, &weights, parse), "the sound {name} is read");
        for storage in STORAGES {
            assert!(try_read(&config, &weights, |config, weights| load(config, weights, storage)), "{name}");
        }
        let mut rng = StdRng::seed_from_u64(7);
        let (mut refused, mut unserved) = (0, 0);
        for case in 0..CASES {
            let (mut config, mut weights) = (config.clone(), weights.clone());
            damage(&mut config, &mut weights, case, &mut rng);
            let parsed = try_read(&config, &weights, parse);
            refused += usize::from(!parsed);
            let storage = STORAGES[case / 8 % 3];
            let served = try_read(&config, &weights, |config, weights| load(config, weights, storage));
            assert!(parsed || !served, "{name}: case {case} is served and was not read");
            unserved += usize::from(parsed && !served);
        }
        println!(
            "{refused} of {CASES} damaged copies of {name} were refused, {unserved} when they were built"
        );
        assert!(refused > CASES / 2, "{name}: {refused}");
    }
    greedy_expressions();
    controls();
}

/// As many expressions as a config may hold, each of which is a large program.
fn greedy(field: &str) -> (Vec<u8>, Vec<u8>) {
    let (_, config, weights) = adapters().into_iter().find(|(name, ..)| name == "lora-qv").unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    let keys = (0..512).map(|at| format!("(?:a{{2000}}){at}"));
    config[field] = match field {
        "layers_pattern" => {
            config["layers_to_transform"] = json!([0]);
            keys.map(Value::from).collect()
        }
        _ => keys.map(|key| (key, json!(8))).collect::<serde_json::Map<_, _>>().into(),
    };
    (config.to_string().into_bytes(), weights)
}

/// Expressions share one bound, whatever their number. Not a test of its own: see [`controls`].
fn greedy_expressions() {
    let base = SmallBase::new(shape(), [0; 32]);
    for field in ["rank_pattern", "alpha_pattern", "layers_pattern"] {
        let (config, weights) = greedy(field);
        let mut said = String::new();
        let taken = try_read(&config, &weights, |config, weights| {
            let loaded = Adapter::load(config, weights, &base, Storage::F32, &mut || ());
            loaded.map_err(|error| said = error.to_string()).is_ok()
        });
        assert!(!taken && said.contains(field) && said.contains("128 KiB"), "{field}: {said}");
    }
    // Negative control: a program for each.
    let (config, weights) = greedy("rank_pattern");
    let compile = |config: &[u8], _: &[u8]| {
        let config: Value = serde_json::from_slice(config).unwrap();
        let keys = config["rank_pattern"].as_object().unwrap().keys();
        let programs: Vec<_> = keys
            .map(|key| {
                regex::bytes::RegexBuilder::new(key).unicode(false).size_limit(1 << 17).build().unwrap()
            })
            .collect();
        programs.is_empty()
    };
    assert!(catch_unwind(AssertUnwindSafe(|| try_read(&config, &weights, compile))).is_err());
}

/// Readers that are broken on purpose are noticed. Not a test of its own: the allocations of all threads are counted.
fn controls() {
    let (_, config, weights) = adapters().remove(0);
    let noticed = |read: fn(&[u8], &[u8]) -> bool| {
        let mut rng = StdRng::seed_from_u64(7);
        (0..64).any(|case| {
            let (mut config, mut weights) = (config.clone(), weights.clone());
            damage(&mut config, &mut weights, case, &mut rng);
            catch_unwind(AssertUnwindSafe(|| try_read(&config, &weights, read))).is_err()
        })
    };
    assert!(!noticed(parse));
    // Believes the length in the file.
    assert!(noticed(|_, weights| {
        let length = weights.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
        vec![0u8; length.min(1 << 28) as usize].is_empty()
    }));
    // Believes that the header is there.
    assert!(noticed(|_, weights| {
        let length = u64::from_le_bytes(weights[..8].try_into().unwrap());
        weights[8..8 + length as usize].is_empty()
    }));
}
