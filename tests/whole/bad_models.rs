//! Damaged and incomplete model files: a clear error, no panic, no huge allocation.

use std::path::{Path, PathBuf};

use atelier::fetch;
use model::{LoadOptions, load};

use crate::program::Program;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn error(path: &Path) -> String {
    load(path, LoadOptions::default()).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn damaged_gguf_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let good = std::fs::read(fetch::default_model(&fetch::cache_folder(None).unwrap()).unwrap()).unwrap();
    let try_bytes = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        error(&path)
    };
    assert!(try_bytes(b"").contains("cut off"));
    assert!(try_bytes(b"GARBAGE AND MORE OF IT").contains("does not begin with GGUF"));
    assert!(try_bytes(&good[..good.len() / 2]).contains("beyond the end of the file"));
    assert!(try_bytes(&good[..1000]).contains("corrupt"));
    let mut huge = good[..4096].to_vec();
    huge[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(try_bytes(&huge).contains("more than the file can hold"));
    let mut version = good[..4096].to_vec();
    version[4] = 9;
    assert!(try_bytes(&version).contains("version 9"));
}

#[test]
fn no_single_damaged_header_byte_panics() {
    let good = std::fs::read(fetch::default_model(&fetch::cache_folder(None).unwrap()).unwrap()).unwrap();
    let length = good.len() as u64;
    // The beginning with counts, keys and lengths, and samples of the token lists.
    let places = (0..600).chain((600..1_700_000).step_by(9_973));
    for at in places {
        for value in [0u8, 0x7f, 0xff] {
            let mut header = good[..2_000_000].to_vec();
            header[at] = value;
            // Either is fine: the reader must come back.
            let _either = model::GgufFile::read(header.as_slice(), length);
        }
    }
}

#[test]
fn damaged_folders_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert!(error(folder.path()).contains("not a model"));
    assert!(error(&folder.path().join("absent")).contains("absent"));
    let copy =
        |file: &str| std::fs::copy(fixture("tiny-llama").join(file), folder.path().join(file)).unwrap();
    copy("config.json");
    assert!(error(folder.path()).contains("model.safetensors"));
    let weights = std::fs::read(fixture("tiny-llama/model.safetensors")).unwrap();
    let put = |file: &str, bytes: &[u8]| std::fs::write(folder.path().join(file), bytes).unwrap();
    put("model.safetensors", &weights[..weights.len() - 1000]);
    assert!(error(folder.path()).contains("truncated or damaged"));
    put("model.safetensors", &[255; 64]);
    assert!(error(folder.path()).contains("header claims"));
    put("model.safetensors", &weights);
    let config = std::fs::read_to_string(fixture("tiny-llama/config.json")).unwrap();
    put("config.json", config.replace("\"hidden_size\": 64", "\"hidden_size\": 60").as_bytes());
    assert!(error(folder.path()).contains("shape"));
    put("config.json", config.replace("\"llama\"", "\"mamba\"").as_bytes());
    assert!(error(folder.path()).contains("model_type"));
    put("config.json", config.replace("\"silu\"", "\"gelu\"").as_bytes());
    assert!(error(folder.path()).contains("hidden_act"));
    put("config.json", b"{");
    assert!(error(folder.path()).contains("config.json"));
}

#[test]
fn the_program_says_what_is_wrong_with_its_model() {
    let folder = tempfile::tempdir().unwrap();
    let run = |model: &Path| Program::refuses(&["--model", model.to_str().unwrap()], folder.path());
    let missing_tokenizer = run(&fixture("tiny-mistral"));
    assert!(missing_tokenizer.contains("there is no tokenizer"), "{missing_tokenizer}");
    let garbage = folder.path().join("bad.gguf");
    std::fs::write(&garbage, b"not a model").unwrap();
    let corrupt = run(&garbage);
    assert!(corrupt.contains("does not begin with GGUF"), "{corrupt}");
    assert!(run(&folder.path().join("absent.gguf")).contains("there is no such file"));
}

#[test]
fn settings_are_refused_before_the_model_is_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("absent.gguf");
    for (settings, words) in [
        (&["--listen", "0.0.0.0:0"][..], "--api-key or --api-keys"),
        (&["--api-keys", "no-such-file.json"], "--api-keys no-such-file.json"),
        (
            &["--adapter-storage", "int8", "--precision", "exact"],
            "--adapter-storage int8: needs --precision fast",
        ),
        (&["--rank", "65"], "--rank 65: must be at most --max-rank, 64"),
        (&["--max-rank", "513"], "--max-rank"),
        (&["--tenant-training", r#"{"a":{"rank":65}}"#], "rank must be from 1 to 64"),
        (&["--train-floor", "0"], "--train-floor"),
        (&["--learning-rate", "0"], "learning_rate"),
    ] {
        let arguments = [settings, &["--model", absent.to_str().unwrap()]].concat();
        let said = Program::refuses(&arguments, folder.path());
        assert!(said.contains(words) && !said.contains("absent"), "{said}");
    }
    // Negative control: sound settings come to the model.
    let said = Program::refuses(
        &["--rank", "65", "--max-rank", "65", "--model", absent.to_str().unwrap()],
        folder.path(),
    );
    assert!(said.contains("absent.gguf"), "{said}");
    // This one hangs on the model: a page holds the largest tensor an adapter may have.
    let small = Program::refuses(&["--adapter-device-mib", "1", "--max-rank", "512"], folder.path());
    assert!(small.contains("--adapter-device-mib: must be at least 2 "), "{small}");
}
