//! Configs and files of every kind: read as HF peft reads them, written back the same, refused by name.
#![expect(clippy::unwrap_used, reason = "tests")]

mod fixtures;

use fixtures::{KINDS, contents, files, shape};
use peft::{
    Adapter, AdapterConfig, AdapterWeights, Ia3Config, Ia3Scale, LoraConfig, LoraWeights, Storage,
    TargetModules,
};
use serde_json::{Value, json};
use testkit::SmallBase;
use types::{Site, SiteId};

#[test]
fn loading_is_parsing_and_building() {
    let base = SmallBase::new(shape(), [0; 32]);
    for kind in KINDS {
        for storage in [Storage::F32, Storage::Bf16, Storage::Int8] {
            let (config, weights) = files(kind);
            let parsed = AdapterWeights::parse(&config, &weights, &shape()).unwrap();
            let built = Adapter::build(&parsed, &base, storage).unwrap();
            let mut pieces = 0;
            let loaded = Adapter::load(&config, &weights, &base, storage, &mut || pieces += 1).unwrap();
            assert_eq!(contents(&loaded), contents(&built), "{kind}");
            assert_eq!(loaded.bytes(), built.bytes(), "{kind}");
            let AdapterWeights::Lora(lora) = parsed else { continue };
            assert_eq!(pieces, lora.sites.iter().flatten().count(), "{kind}");
            let mut other = lora.clone();
            other.sites.iter_mut().flatten().last().unwrap().b[0] += 0.5;
            let other = Adapter::build(&other.into(), &base, storage).unwrap();
            assert_ne!(contents(&loaded), contents(&other), "negative control: {kind}");
        }
        let (config, mut weights) = files(kind);
        let len = weights.len();
        weights[len - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        let refused = AdapterWeights::parse(&config, &weights, &shape()).unwrap_err();
        let loaded = Adapter::load(&config, &weights, &base, Storage::Bf16, &mut || ());
        assert_eq!(loaded.unwrap_err(), refused, "{kind}");
    }
}

#[test]
fn what_is_written_reads_the_same() {
    for kind in KINDS {
        let (config, weights) = files(kind);
        let read = AdapterWeights::parse(&config, &weights, &shape()).unwrap();
        assert!(read.is_finite());
        let written = read.to_files(&shape(), "base").unwrap();
        assert_eq!(
            AdapterWeights::parse(&written.config, &written.weights, &shape()).unwrap(),
            read,
            "{kind}"
        );
        assert_eq!(AdapterConfig::parse(&written.config, &shape()).unwrap(), read.config());
        // The tensors are the file's own, to the byte.
        let tensors = |file: &[u8]| {
            let file = safetensors::SafeTensors::deserialize(file).unwrap();
            let all = file.tensors().into_iter();
            let mut all: Vec<_> =
                all.map(|(name, view)| (name, view.shape().to_vec(), view.data().to_vec())).collect();
            all.sort();
            all
        };
        assert_eq!(tensors(&written.weights), tensors(&weights), "{kind}");
        // What changes the maths stands in the file as peft wrote it.
        let (theirs, ours): (Value, Value) =
            (serde_json::from_slice(&config).unwrap(), serde_json::from_slice(&written.config).unwrap());
        for (field, value) in ours.as_object().unwrap() {
            let ours_alone = ["base_model_name_or_path", "num_attention_heads", "lora_dropout"];
            if !ours_alone.contains(&field.as_str()) {
                assert_eq!(value, &theirs[field], "{kind}: {field}");
            }
        }
    }
}

/// The refusal of a changed config.
fn refuse(kind: &str, field: &str, value: Value) -> String {
    let (config, weights) = files(kind);
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config[field] = value;
    let parsed = AdapterWeights::parse(config.to_string().as_bytes(), &weights, &shape());
    parsed.map(|_| ()).unwrap_err().to_string()
}

#[test]
fn configs_are_refused_by_field() {
    for (kind, field, value) in [
        ("ia3", "peft_type", json!("VERA")),
        ("ia3", "fan_in_fan_out", json!(true)),
        ("ia3", "modules_to_save", json!(["lm_head"])),
        ("ia3", "feedforward_modules", json!(null)),
        ("ia3", "feedforward_modules", json!(["up_proj"])),
        ("ia3", "feedforward_modules", json!({})),
        ("ia3", "target_modules", json!(null)),
        ("ia3", "target_modules", json!(["lm_head"])),
        ("ia3", "task_type", json!("SEQ_CLS")),
        ("ia3", "use_dora", json!(true)),
        ("prompt", "num_virtual_tokens", json!(0)),
        ("prompt", "num_virtual_tokens", json!(1_000_000)),
        ("prompt", "num_transformer_submodules", json!(2)),
        ("prompt", "token_dim", json!(65)),
        ("prompt", "num_layers", json!(4)),
        ("prompt", "modules_to_save", json!(["lm_head"])),
        ("prompt", "task_type", json!("SEQ_2_SEQ_LM")),
        ("dora", "lora_bias", json!(true)),
        ("lora-layers", "layers_to_transform", json!("1")),
        ("lora-layers", "layers_to_transform", json!(null)),
        ("lora-layers", "layers_pattern", json!([1])),
        ("lora-layers", "target_modules", json!(".*q_proj")),
        ("lora-layers", "rank_pattern", json!({ "(": 3 })),
        ("lora-layers", "alpha_pattern", json!({ "q_proj": -1 })),
        ("lora-layers", "alpha_pattern", json!({ "q_proj": 1e9 })),
    ] {
        let said = refuse(kind, field, value.clone());
        let named = said.contains(field)
            || (field == "layers_to_transform" && said.contains("layers_pattern"))
            || (field == "target_modules" && said.contains("layers_to_transform"));
        assert!(named, "{kind}: {field} = {value}: {said}");
    }
}

#[test]
fn tensors_are_refused_by_name() {
    for (kind, field, value, tensor) in [
        ("dora", "use_dora", json!(false), "lora_magnitude_vector"),
        ("lora-bias", "lora_bias", json!(false), "lora_B.bias"),
        ("lora-layers", "layers_to_transform", json!([0]), "layers."),
        ("lora-layers", "exclude_modules", json!(["v_proj"]), "proj"),
        ("ia3", "feedforward_modules", json!([]), "down_proj.ia3_l"),
        ("ia3", "target_modules", json!(["k_proj", "down_proj"]), "v_proj.ia3_l"),
        ("prompt", "num_virtual_tokens", json!(6), "prompt_embeddings"),
    ] {
        let said = refuse(kind, field, value);
        assert!(
            said.contains("adapter_model.safetensors") && said.contains(tensor),
            "{kind} {field}: {said}"
        );
    }
    let (config, _) = files("prompt");
    let (_, weights) = files("ia3");
    let said = AdapterWeights::parse(&config, &weights, &shape()).unwrap_err().to_string();
    assert!(said.contains("ia3_l"), "{said}");
}

#[test]
fn the_first_pattern_of_the_file_decides() {
    let config = |patterns: &str| {
        let text = format!(
            r#"{{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"],
                 "rank_pattern": {patterns}}}"#
        );
        LoraConfig::parse(text.as_bytes())
    };
    let rank = |patterns: &str| {
        let sites = config(patterns).unwrap().sites(&shape()).unwrap();
        sites.iter().find(|(id, ..)| *id == SiteId::new(1, Site::V)).unwrap().1
    };
    let (specific, general) = (r#""layers.1.self_attn.v_proj": 2"#, r#"".*": 8"#);
    assert_eq!(rank(&format!("{{{specific}, {general}}}")), 2);
    assert_eq!(rank(&format!("{{{general}, {specific}}}")), 8);
    // Written back, they keep their order.
    let turned = config(&format!("{{{specific}, {general}}}")).unwrap();
    assert_eq!(LoraConfig::parse(&turned.to_json("base")).unwrap(), turned);
    assert!(config(r#"{"v_proj": 2, "v_proj": 3}"#).unwrap_err().to_string().contains("rank_pattern"));
    let twice = br#"{"peft_type": "LORA", "r": 4, "r": 8}"#;
    assert!(LoraConfig::parse(twice).unwrap_err().to_string().contains("duplicate"));
}

/// The sites of block 1 and the blocks in which q is adapted.
fn chosen(config: &LoraConfig) -> (Vec<Site>, Vec<usize>) {
    let sites = config.sites(&shape()).unwrap();
    let in_block = sites.iter().filter(|(id, ..)| id.layer == 1).map(|(id, ..)| id.site).collect();
    let blocks = sites.iter().filter(|(id, ..)| id.site == Site::Q).map(|(id, ..)| id.layer).collect();
    (in_block, blocks)
}

#[test]
fn modules_are_matched_as_in_peft() {
    let names = TargetModules::names;
    let with = |target_modules: TargetModules| LoraConfig { target_modules, ..LoraConfig::oppu() };
    // OPPU's list names a module that Llama does not have; a name is a whole part of a path.
    assert_eq!(chosen(&with(names(&["q_proj", "out_proj", "proj"]))).0, [Site::Q]);
    assert_eq!(
        chosen(&with(names(&["self_attn.o_proj", "model.layers.1.mlp.up_proj"]))).0,
        [Site::O, Site::Up]
    );
    let pattern = TargetModules::Pattern(r".*\.[qk]_proj|.*gate.*".into());
    assert_eq!(chosen(&with(pattern)).0, [Site::Q, Site::K, Site::Gate]);
    assert!(with(TargetModules::Pattern("q_proj".into())).sites(&shape()).is_err(), "the whole path matches");
    let all = br#"{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": "ALL-linear"}"#;
    assert_eq!(chosen(&LoraConfig::parse(all).unwrap()).0, Site::ALL);
    let exclude = |modules| LoraConfig { exclude_modules: Some(modules), ..LoraConfig::oppu() };
    assert_eq!(chosen(&exclude(names(&["layers.1.self_attn.q_proj"]))), (vec![Site::V], vec![0, 2]));
    assert_eq!(chosen(&exclude(TargetModules::Pattern(r".*\.[01]\..*".into()))), (vec![], vec![2]));
    let layers = |wanted: &[usize], pattern: &[&str]| LoraConfig {
        layers_to_transform: Some(wanted.to_vec()),
        layers_pattern: pattern.iter().map(|p| (*p).to_owned()).collect(),
        ..LoraConfig::oppu()
    };
    assert_eq!(chosen(&layers(&[2, 0], &[])).1, [0, 2]);
    assert_eq!(chosen(&layers(&[1], &["h", "layers"])).1, [1]);
    assert!(layers(&[1], &["h"]).sites(&shape()).is_err(), "no such blocks");
    // Names of feed-forward modules are ends of paths, at a dot or not.
    let ia3 = Ia3Config { feedforward_modules: names(&["n_proj"]), ..Ia3Config::llama() };
    let sites = ia3.sites(&shape()).unwrap();
    assert!(sites.iter().all(|(id, feed_forward)| *feed_forward == (id.site == Site::Down)));
}

#[test]
fn what_is_not_finite_is_seen_in_every_kind() {
    for kind in KINDS {
        let (config, weights) = files(kind);
        let mut read = AdapterWeights::parse(&config, &weights, &shape()).unwrap();
        match &mut read {
            AdapterWeights::Lora(LoraWeights { sites, .. }) => {
                let site = sites.iter_mut().flatten().next().unwrap();
                let values = site.bias.as_mut().or(site.magnitude.as_mut()).unwrap_or(&mut site.b);
                values[1] = f32::NAN;
            }
            AdapterWeights::Ia3(ia3) => match ia3.sites.iter_mut().flatten().next().unwrap() {
                Ia3Scale::Output(values) | Ia3Scale::Input(values) => values[1] = f32::INFINITY,
            },
            AdapterWeights::Prompt(prompt) => prompt.embeddings[1] = f32::NAN,
        }
        assert!(!read.is_finite(), "{kind}");
        let files = read.to_files(&shape(), "base").unwrap();
        let said = AdapterWeights::parse(&files.config, &files.weights, &shape()).unwrap_err().to_string();
        assert!(said.contains("not finite"), "{kind}: {said}");
    }
}
