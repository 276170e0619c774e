//! PEFT files: what HF peft wrote is read, what is wrong is refused by name.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use peft::{BaseShape, LoraConfig, LoraWeights, generation_id};
use serde_json::{Value, json};

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

fn files(kind: &str) -> (Vec<u8>, Vec<u8>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama").join(kind);
    let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
    (read("adapter_config.json"), read("adapter_model.safetensors"))
}

#[test]
fn what_is_written_reads_the_same() {
    for kind in ["lora-qv", "lora-all", "lora-patterns", "lora-rslora"] {
        let (config, weights) = files(kind);
        let read = LoraWeights::parse(&config, &weights, &shape()).unwrap();
        let (config, weights) = (read.config.to_json("base"), read.to_safetensors(&shape()).unwrap());
        assert_eq!(LoraWeights::parse(&config, &weights, &shape()).unwrap(), read, "{kind}");
    }
}

#[test]
fn ranks_and_scales_follow_the_patterns() {
    let (config, weights) = files("lora-patterns");
    let read = LoraWeights::parse(&config, &weights, &shape()).unwrap();
    let mut ranks: Vec<usize> = read.sites.iter().flatten().map(|site| site.rank).collect();
    ranks.sort_unstable();
    ranks.dedup();
    assert!(ranks.len() > 2, "{ranks:?}");
    let (config, weights) = files("lora-rslora");
    let read = LoraWeights::parse(&config, &weights, &shape()).unwrap();
    let site = read.sites.iter().flatten().next().unwrap();
    assert!((site.scale - read.config.alpha / (site.rank as f64).sqrt()).abs() < 1e-9);
}

/// The refusal of a changed config.
fn refuse(change: impl Fn(&mut Value)) -> String {
    let (config, weights) = files("lora-qv");
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    change(&mut config);
    LoraWeights::parse(config.to_string().as_bytes(), &weights, &shape()).unwrap_err().to_string()
}

#[test]
fn configs_are_refused_by_field() {
    for (field, value) in [
        ("r", json!(0)),
        ("r", json!(513)),
        ("r", json!(-1)),
        ("r", json!("8")),
        ("r", json!(4_294_967_304u64)),
        ("lora_alpha", json!(null)),
        ("lora_alpha", json!(-8)),
        ("lora_dropout", json!(1.0)),
        ("use_rslora", json!("yes")),
        ("use_dora", json!(1)),
        ("lora_bias", json!("yes")),
        ("fan_in_fan_out", json!(true)),
        ("bias", json!("all")),
        ("modules_to_save", json!(["lm_head"])),
        ("layers_to_transform", json!([-1])),
        ("layers_pattern", json!("layers")),
        ("exclude_modules", json!({ "q_proj": true })),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("loftq")),
        ("task_type", json!("SEQ_CLS")),
        ("use_qalora", json!(true)),
        ("trainable_token_indices", json!([1])),
        ("layer_replication", json!([[0, 1]])),
        ("some_future_field", json!({ "on": 1 })),
        ("peft_type", json!("LOHA")),
        ("target_modules", json!([])),
        ("target_modules", json!(["embed_tokens"])),
        ("target_modules", json!(["q_proj", "lm_head"])),
        ("target_modules", json!(".*")),
        ("target_modules", json!("(((")),
        ("target_modules", json!("nothing")),
        ("rank_pattern", json!([1])),
        ("rank_pattern", json!({ "q_proj": 0 })),
    ] {
        let said = refuse(|config| config[field] = value.clone());
        assert!(said.contains(field), "{field} = {value}: {said}");
    }
    assert!(LoraConfig::parse(b"[]").unwrap_err().to_string().contains("not valid"));
}

#[test]
fn weights_are_refused_by_tensor() {
    let (config, weights) = files("lora-qv");
    let parse =
        |weights: &[u8]| LoraWeights::parse(&config, weights, &shape()).map(|_| ()).unwrap_err().to_string();
    assert!(parse(b"").contains("shorter than 8 bytes"));
    assert!(parse(&weights[..weights.len() - 4]).contains("not valid"));
    assert!(parse(&u64::MAX.to_le_bytes()).contains("1 MiB"));
    let mut infinite = weights.clone();
    let end = infinite.len();
    infinite[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    assert!(parse(&infinite).contains("not finite"));

    // A config that implies other tensors than the file holds.
    assert!(refuse(|config| config["target_modules"] = json!(["q_proj"])).contains("not implied"));
    assert!(
        refuse(|config| config["target_modules"] = json!(["q_proj", "v_proj", "k_proj"]))
            .contains("is missing")
    );
    assert!(refuse(|config| config["r"] = json!(4)).contains("shape"));
    let mut wide = shape();
    wide.dims[0] = (128, 64);
    let other_base = LoraWeights::parse(&config, &weights, &wide).unwrap_err().to_string();
    assert!(other_base.contains("q_proj") && other_base.contains("[128, 8]"), "{other_base}");

    let header = br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let mut twice = (header.len() as u64).to_le_bytes().to_vec();
    twice.extend(header);
    twice.extend([0; 4]);
    assert!(parse(&twice).contains("duplicate"));
}

#[test]
fn no_damaged_byte_panics() {
    let (config, weights) = files("lora-qv");
    for at in 0..600 {
        for value in [0, 0x22, 0x7f, 0xff] {
            let mut damaged = weights.clone();
            damaged[at] = value;
            let _either = LoraWeights::parse(&config, &damaged, &shape());
            let mut damaged = config.clone();
            if let Some(byte) = damaged.get_mut(at) {
                *byte = value;
            }
            let _either = LoraWeights::parse(&damaged, &weights, &shape());
        }
    }
}

#[test]
fn a_generation_is_named_by_all_its_parts() {
    let id = |base: u8, config: &[u8], weights: &[u8]| generation_id(&[base; 32], config, weights);
    let one = id(1, b"config", b"weights");
    assert_eq!(one, id(1, b"config", b"weights"));
    for other in [id(2, b"config", b"weights"), id(1, b"configw", b"eights"), id(1, b"config", b"weight")] {
        assert_ne!(one, other);
    }
}
