//! What a safetensors header and a scale may say: made by hand, taken or refused by the name of what is wrong.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use half::{bf16, f16};
use peft::{Adapter, AdapterWeights, BaseShape, LoraWeights, Storage};
use serde_json::{Value, json};
use testkit::SmallBase;

/// The shape of the fixture `tiny-llama`.
fn shape() -> BaseShape {
    let dims = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)];
    BaseShape { layers: 3, dims }
}

/// A file with this header and so many zeros.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + data, 0);
    file
}

fn entry(dtype: &str, shape: &str, end: u64) -> String {
    format!(r#""prompt_embeddings":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}"#)
}

/// Reads a file of five virtual tokens.
fn read(weights: &[u8]) -> Result<AdapterWeights, String> {
    let config = json!({ "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "token_dim": 64 });
    AdapterWeights::parse(config.to_string().as_bytes(), weights, &shape()).map_err(|error| error.to_string())
}

#[test]
fn headers_are_taken_or_refused() {
    let whole = |entry: &str| format!("{{{entry}}}");
    let sound = entry("F32", "[5,64]", 1280);
    let padded = |length: usize| {
        let mut header = whole(&sound);
        header.push_str(&" ".repeat(length - header.len()));
        header
    };
    for (header, data) in [
        (whole(&sound), 1280),
        (whole(&format!(r#""__metadata__":{{"format":"pt"}},{sound}"#)), 1280),
        (whole(&entry("F16", "[5,64]", 640)), 640),
        (whole(&entry("BF16", "[5,64]", 640)), 640),
        (padded(1 << 20), 1280),
    ] {
        let read = read(&file(&header, data));
        assert!(read.is_ok(), "{}: {read:?}", header.trim_end());
    }
    let twice_inside =
        r#""prompt_embeddings":{"dtype":"F32","dtype":"F32","shape":[5,64],"data_offsets":[0,1280]}"#;
    for (header, data, said) in [
        // Other numbers.
        (whole(&entry("F64", "[5,64]", 2560)), 2560, "F64"),
        (whole(&entry("I8", "[5,64]", 320)), 320, "I8"),
        (whole(&entry("U8", "[5,64]", 320)), 320, "U8"),
        (whole(&entry("I16", "[5,64]", 640)), 640, "I16"),
        (whole(&entry("I32", "[5,64]", 1280)), 1280, "I32"),
        (whole(&entry("I64", "[5,64]", 2560)), 2560, "I64"),
        (whole(&entry("BOOL", "[5,64]", 320)), 320, "BOOL"),
        (whole(&entry("F8_E4M3", "[5,64]", 320)), 320, "F8_E4M3"),
        (whole(&entry("C128", "[5,64]", 5120)), 5120, "not valid"),
        // Shapes.
        (whole(&entry("F32", "[0,64]", 0)), 0, "[0, 64]"),
        (whole(&entry("F32", "[5,0]", 0)), 0, "[5, 0]"),
        (whole(&entry("F32", "[0,18446744073709551615]", 0)), 0, "[0, 18446744073709551615]"),
        (whole(&entry("F32", "[0,18446744073709551616]", 0)), 0, "not valid"),
        (whole(&entry("F32", "[18446744073709551615,2]", 0)), 0, "not valid"),
        (whole(&entry("F32", "[]", 4)), 4, "[]"),
        (whole(&entry("F32", "[320]", 1280)), 1280, "[320]"),
        (whole(&entry("F32", "[64,5]", 1280)), 1280, "[64, 5]"),
        // Offsets.
        (whole(&entry("F32", "[5,64]", 1280)), 1279, "not valid"),
        (whole(&entry("F32", "[5,64]", 1280)), 1281, "not valid"),
        (whole(&entry("F32", "[5,64]", 1276)), 1276, "not valid"),
        (whole(&entry("F32", "[5,64]", u64::MAX)), 1280, "not valid"),
        // Names.
        (whole(&format!("{sound},{sound}")), 1280, "duplicate"),
        (whole(&format!(r#""__metadata__":{{}},"__metadata__":{{}},{sound}"#)), 1280, "duplicate"),
        (whole(twice_inside), 1280, "duplicate"),
        (whole(&sound.replace("embeddings", "embedding")), 1280, "not implied"),
        ("{}".to_owned(), 0, "is missing"),
        // The header itself.
        (padded((1 << 20) + 1), 1280, "1 MiB"),
        ("[]".to_owned(), 0, "not valid"),
        (String::new(), 0, "not valid"),
    ] {
        let refused = read(&file(&header, data)).unwrap_err();
        assert!(refused.contains(said), "{}: {refused}", header.trim_end());
        assert!(refused.contains("adapter_model.safetensors"), "{refused}");
    }
}

/// Both files of the fixture with changes.
fn files(config: impl FnOnce(&mut Value), weights: impl FnOnce(&mut LoraWeights)) -> (Vec<u8>, Vec<u8>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama/lora-qv");
    let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
    let (old, file) = (read("adapter_config.json"), read("adapter_model.safetensors"));
    let mut lora = LoraWeights::parse(&old, &file, &shape()).unwrap();
    weights(&mut lora);
    let mut json: Value = serde_json::from_slice(&old).unwrap();
    config(&mut json);
    (json.to_string().into_bytes(), lora.to_safetensors(&shape()).unwrap())
}

#[test]
fn half_precision_means_what_it_says() {
    let values: Vec<f32> = (0..320).map(|at| (at as f32 - 160.0) / 16.0).collect();
    let header = |dtype: &str| format!("{{{}}}", entry(dtype, "[5,64]", 640));
    let with = |dtype: &str, bits: Vec<u16>| {
        let mut file = file(&header(dtype), 0);
        file.extend(bits.iter().flat_map(|bits| bits.to_le_bytes()));
        read(&file)
    };
    for (dtype, bits) in [
        ("F16", values.iter().map(|value| f16::from_f32(*value).to_bits()).collect::<Vec<u16>>()),
        ("BF16", values.iter().map(|value| bf16::from_f32(*value).to_bits()).collect()),
    ] {
        let Ok(AdapterWeights::Prompt(read)) = with(dtype, bits.clone()) else { panic!("{dtype}") };
        let expected: Vec<f32> = match dtype {
            "F16" => values.clone(),
            _ => values.iter().map(|value| bf16::from_f32(*value).to_f32()).collect(),
        };
        assert_eq!(read.embeddings, expected, "{dtype}");
        for infinite in [0x7c00, 0x7f80, 0xffff] {
            let mut bits = bits.clone();
            bits[319] = infinite;
            let is_finite = match dtype {
                "F16" => f16::from_bits(infinite).is_finite(),
                _ => bf16::from_bits(infinite).is_finite(),
            };
            assert_eq!(with(dtype, bits).is_ok(), is_finite, "{dtype} {infinite:x}");
        }
    }
}

#[test]
fn alphas_out_of_bounds_are_refused_by_name() {
    let parse = |config: &[u8], weights: &[u8]| LoraWeights::parse(config, weights, &shape());
    for (alpha, sound) in
        [(json!(1e6), true), (json!(0.5), true), (json!(1_000_001), false), (json!(1e9), false)]
    {
        for field in ["lora_alpha", "alpha_pattern"] {
            let value = if field == "lora_alpha" { alpha.clone() } else { json!({ "q_proj": alpha }) };
            let (config, weights) = files(|config| config[field] = value, |_| ());
            match parse(&config, &weights) {
                Ok(_) => assert!(sound, "{field} {alpha}"),
                Err(error) => {
                    assert!(!sound && error.to_string().contains(field), "{field} {alpha}: {error}")
                }
            }
        }
    }
    // No float64 holds these.
    for alpha in ["1e400", "-1e400", "NaN", "Infinity"] {
        let (config, weights) = files(|config| config["lora_alpha"] = json!("HERE"), |_| ());
        let config = String::from_utf8(config).unwrap().replace("\"HERE\"", alpha);
        let refused = parse(config.as_bytes(), &weights).unwrap_err().to_string();
        assert!(refused.contains("adapter_config.json"), "{alpha}: {refused}");
    }
}

#[test]
fn what_scaling_makes_infinite_is_refused() {
    let base = SmallBase::new(shape(), [0; 32]);
    let load = |files: &(Vec<u8>, Vec<u8>), storage| {
        let loaded = Adapter::load(&files.0, &files.1, &base, storage, &mut || ()).map(|_| ());
        let parsed = AdapterWeights::parse(&files.0, &files.1, &shape()).unwrap();
        assert!(parsed.is_finite());
        assert_eq!(Adapter::build(&parsed, &base, storage).map(|_| ()), loaded);
        loaded.map_err(|error| error.to_string())
    };
    let large = |value: f32| move |lora: &mut LoraWeights| lora.sites[0].as_mut().unwrap().b[5] = value;
    let scaled = files(|config| config["lora_alpha"] = json!(1e6), large(1e36));
    let rounded = files(|config| config["lora_alpha"] = json!(8), large(3.4e38));
    let sound = files(|config| config["lora_alpha"] = json!(8), large(1e36));
    for (files, storage, taken) in [
        (&scaled, Storage::F32, false),
        (&scaled, Storage::Bf16, false),
        (&scaled, Storage::Int8, false),
        // Finite in float32, beyond the largest bfloat16.
        (&rounded, Storage::F32, true),
        (&rounded, Storage::Bf16, false),
        // Negative control.
        (&sound, Storage::F32, true),
        (&sound, Storage::Bf16, true),
    ] {
        match load(files, storage) {
            Ok(()) => assert!(taken, "{storage:?}"),
            Err(said) => {
                let named = said.contains("model.layers.0.self_attn.q_proj") && said.contains("not finite");
                assert!(!taken && named, "{storage:?}: {said}");
            }
        }
    }
}
