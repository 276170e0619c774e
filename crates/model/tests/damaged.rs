//! Damaged GGUF files are refused with an error: no panic, and no memory beyond what the file's size explains. The seeded
//! stable counterpart of the fuzz target in `fuzz/`.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

#[path = "support/synthetic.rs"]
mod synthetic;

use std::alloc::System;
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use kernels::Format;
use model::{LoadOptions, load};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use synthetic::Synthetic;

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Held by a test that counts: the count is the process's, and where the tests are its threads another one would be in it.
static ALONE: Mutex<()> = Mutex::new(());

const SOUND: Synthetic = Synthetic {
    hidden: 64,
    layers: 1,
    heads: 2,
    kv_heads: 1,
    feed_forward: 96,
    vocab: 40,
    context: 64,
    window: None,
    formats: &[Format::Q4_1, Format::Q8_0, Format::F16],
};

fn sound(folder: &Path) -> Vec<u8> {
    let path = folder.join("sound.gguf");
    SOUND.write(&path, 1);
    std::fs::read(path).unwrap()
}

/// Whether the bytes load; panics when loading panics or takes too much memory.
fn try_load(folder: &Path, bytes: &[u8]) -> bool {
    let path = folder.join("damaged.gguf");
    std::fs::write(&path, bytes).unwrap();
    let region = Region::new(COUNTING);
    let loaded = catch_unwind(|| load(&path, LoadOptions { max_context: Some(64) }).is_ok());
    let taken = region.change().bytes_allocated;
    // The hash reads through a buffer of 1 MiB; all else is a few copies of parts of the file, F16 to panels of 16 rows.
    assert!(taken < (2 << 20) + 40 * bytes.len(), "{taken} bytes for a file of {}", bytes.len());
    loaded.unwrap_or_else(|_| panic!("loading panicked"))
}

#[test]
fn damaged_files_are_errors_of_bounded_cost() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let sound = sound(folder.path());
    assert!(try_load(folder.path(), &sound), "the sound file loads");
    let mut rng = StdRng::seed_from_u64(3);
    let header = 1500.min(sound.len());
    let mut refused = 0;
    for case in 0..4_000 {
        let mut bytes = sound.clone();
        match case % 4 {
            // Bytes of the header are what lengths and types hang on.
            0 => (0..rng.random_range(1..4)).for_each(|_| bytes[rng.random_range(0..header)] = rng.random()),
            1 => {
                let at = rng.random_range(0..header - 8);
                let extreme = [0, 1, u64::MAX, u64::MAX / 2, 1 << 32, 1 << 40, 1 << 62];
                let value: u64 = extreme[rng.random_range(0..extreme.len())];
                bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
            2 => bytes.truncate(rng.random_range(0..bytes.len())),
            _ => {
                let (at, len) = (rng.random_range(0..header), rng.random_range(1..40));
                bytes.drain(at..at + len);
            }
        }
        refused += usize::from(!try_load(folder.path(), &bytes));
    }
    println!("{refused} of 4000 damaged files were refused");
    assert!(refused > 2_000);
}

#[test]
fn a_context_whose_angles_would_fill_the_memory_is_refused_before_they_are_made() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.gguf");
    Synthetic { context: 1 << 24, ..SOUND }.write(&path, 1);
    let region = Region::new(COUNTING);
    let refused = load(&path, LoadOptions::default()).unwrap_err().to_string();
    let taken = region.change().bytes_allocated;
    assert!(refused.contains("context length is 16777216"), "{refused}");
    assert!(taken < 1 << 20, "{taken} bytes");
    // The same file serves with a shorter context.
    let loaded = load(&path, LoadOptions { max_context: Some(64) }).unwrap();
    assert_eq!(loaded.model.config().context, 64);
}
