//! A folder in Hugging Face layout: config.json, tokenizer.json, *.safetensors (one file or shards).

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use kernels::Format;
use serde::Deserialize;
use serde_json::Value;
use types::TokenizerSource;

use crate::config::{ModelConfig, RopeScaling};
use crate::error::ModelError;
use crate::load::{Names, Part, Source};
use crate::tensors::{Place, Tensors, io};

/// Longest safetensors header that is read, as in the format's own reader.
const MAX_HEADER: u64 = 100_000_000;

pub(crate) fn open(folder: &Path) -> Result<Source, ModelError> {
    let config_path = folder.join("config.json");
    if !config_path.is_file() {
        return Err(ModelError::NotAModel { path: folder.to_owned() });
    }
    let (config, tied) = read_config(&config_path)?;
    let mut tensors = read_tensors(folder)?;
    if tied {
        // Some files store the embedding twice.
        tensors.places.remove("lm_head.weight");
    }
    let optional = |name: &str| std::fs::read(folder.join(name)).ok();
    let tokenizer = optional("tokenizer.json").map(|tokenizer_json| TokenizerSource::HuggingFace {
        tokenizer_json,
        tokenizer_config: optional("tokenizer_config.json"),
        chat_template: optional("chat_template.jinja").and_then(|bytes| String::from_utf8(bytes).ok()),
        generation_config: optional("generation_config.json"),
    });
    let names = Names {
        embedding: "model.embed_tokens.weight".into(),
        output: "lm_head.weight".into(),
        final_norm: "model.norm.weight".into(),
        block: block_name,
    };
    Ok(Source { config, tensors, names, interleaved: false, tokenizer })
}

fn block_name(layer: usize, part: Part) -> String {
    let part = match part {
        Part::AttentionNorm => "input_layernorm.weight".into(),
        Part::FeedForwardNorm => "post_attention_layernorm.weight".into(),
        Part::QueryNorm => "self_attn.q_norm.weight".into(),
        Part::KeyNorm => "self_attn.k_norm.weight".into(),
        Part::Weight(site) => format!("{}.weight", site.path()),
        Part::Bias(site) => format!("{}.bias", site.path()),
    };
    format!("model.layers.{layer}.{part}")
}

/// The fields of `config.json` that are read.
#[derive(Debug, Deserialize)]
struct HfConfig {
    model_type: String,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    hidden_act: Option<String>,
    rope_theta: Option<f64>,
    rope_scaling: Option<HashMap<String, Value>>,
    rope_parameters: Option<HashMap<String, Value>>,
    tie_word_embeddings: Option<bool>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
}

/// The config, and whether the output layer is the embedding.
fn read_config(path: &Path) -> Result<(ModelConfig, bool), ModelError> {
    let bytes = std::fs::read(path).map_err(|source| io(path, source))?;
    let hf: HfConfig = serde_json::from_slice(&bytes)
        .map_err(|error| ModelError::Corrupt { path: path.to_owned(), problem: error.to_string() })?;
    if !matches!(hf.model_type.as_str(), "llama" | "mistral" | "qwen2" | "qwen3") {
        let problem = format!("is {:?}; llama, mistral, qwen2 and qwen3 are supported", hf.model_type);
        return Err(ModelError::config("model_type", problem));
    }
    if let Some(act) = hf.hidden_act.as_deref().filter(|act| *act != "silu") {
        return Err(ModelError::config("hidden_act", format!("is {act:?}; silu is supported")));
    }
    if hf.quantization_config.is_some() {
        let problem =
            "is set; safetensors in F32, F16 or BF16 are supported (use GGUF for quantised weights)";
        return Err(ModelError::config("quantization_config", problem));
    }
    let head_dim = match hf.head_dim {
        Some(head_dim) => head_dim,
        None => hf
            .hidden_size
            .checked_div(hf.num_attention_heads)
            .ok_or_else(|| ModelError::config("num_attention_heads", "is 0"))?,
    };
    let (rope_theta, rope_scaling) = rope(&hf)?;
    let model = ModelConfig {
        hidden: hf.hidden_size,
        layers: hf.num_hidden_layers,
        heads: hf.num_attention_heads,
        kv_heads: hf.num_key_value_heads.unwrap_or(hf.num_attention_heads),
        head_dim,
        feed_forward: hf.intermediate_size,
        vocab: hf.vocab_size,
        context: hf.max_position_embeddings,
        norm_eps: hf.rms_norm_eps as f32,
        rope_theta,
        rope_scaling,
        windows: windows(&hf)?,
    };
    // Llama's default is false, and so is that of the others in the family.
    Ok((model, hf.tie_word_embeddings.unwrap_or(false)))
}

/// Newer exports keep theta and scaling in `rope_parameters`, older ones at the top and in `rope_scaling`.
fn rope(hf: &HfConfig) -> Result<(f64, RopeScaling), ModelError> {
    let empty = HashMap::new();
    let fields = hf.rope_parameters.as_ref().or(hf.rope_scaling.as_ref()).unwrap_or(&empty);
    let number = |field: &str| {
        let value =
            fields.get(field).and_then(Value::as_f64).filter(|value| value.is_finite() && *value > 0.0);
        value.ok_or_else(|| {
            ModelError::config(format!("rope_parameters.{field}"), "must be a positive number")
        })
    };
    let theta = match (fields.contains_key("rope_theta"), hf.rope_theta) {
        (true, _) => number("rope_theta")?,
        (false, Some(theta)) => theta,
        (false, None) => 10_000.0,
    };
    let kind = fields.get("rope_type").or_else(|| fields.get("type")).and_then(Value::as_str);
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: number("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context: number("original_max_position_embeddings")?,
        },
        other => {
            let problem = format!("is {other:?}; default, linear and llama3 are supported");
            return Err(ModelError::config("rope_parameters.rope_type", problem));
        }
    };
    Ok((theta, scaling))
}

fn windows(hf: &HfConfig) -> Result<Vec<Option<usize>>, ModelError> {
    let layers = hf.num_hidden_layers.min(4096);
    let switched_off = hf.use_sliding_window == Some(false)
        || (hf.use_sliding_window.is_none() && hf.model_type.starts_with("qwen"));
    let Some(window) = hf.sliding_window.filter(|_| !switched_off) else { return Ok(vec![None; layers]) };
    if let Some(kinds) = &hf.layer_types {
        if kinds.len() != hf.num_hidden_layers {
            return Err(ModelError::config("layer_types", "has not one entry per layer"));
        }
        return Ok(kinds.iter().map(|kind| (kind == "sliding_attention").then_some(window)).collect());
    }
    let first = if hf.model_type.starts_with("qwen") { hf.max_window_layers.unwrap_or(0) } else { 0 };
    Ok((0..layers).map(|layer| (layer >= first).then_some(window)).collect())
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: HashMap<String, String>,
}

fn read_tensors(folder: &Path) -> Result<Tensors, ModelError> {
    let index = folder.join("model.safetensors.index.json");
    let shards: BTreeSet<String> = if index.is_file() {
        let bytes = std::fs::read(&index).map_err(|source| io(&index, source))?;
        let index: ShardIndex = serde_json::from_slice(&bytes)
            .map_err(|error| ModelError::Corrupt { path: index.clone(), problem: error.to_string() })?;
        index.weight_map.into_values().collect()
    } else {
        ["model.safetensors".to_owned()].into()
    };
    let mut tensors = Tensors::default();
    for shard in shards {
        let path = folder.join(&shard);
        if shard.contains(['/', '\\']) || !path.is_file() {
            return Err(ModelError::Io { path, source: std::io::ErrorKind::NotFound.into() });
        }
        read_shard(&path, &mut tensors)?;
    }
    Ok(tensors)
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// Reads a safetensors header: eight bytes of length, then JSON.
fn read_shard(path: &Path, tensors: &mut Tensors) -> Result<(), ModelError> {
    let corrupt = |problem: String| ModelError::Corrupt { path: path.to_owned(), problem };
    let index = tensors.add_file(path)?;
    let length = tensors.files[index].1;
    let mut file = File::open(path).map_err(|source| io(path, source))?;
    let mut header_length = [0; 8];
    file.read_exact(&mut header_length).map_err(|source| io(path, source))?;
    let header_length = u64::from_le_bytes(header_length);
    if header_length > MAX_HEADER || header_length > length.saturating_sub(8) {
        return Err(corrupt(format!("its header claims {header_length} bytes")));
    }
    let mut header = vec![0; header_length as usize];
    file.read_exact(&mut header).map_err(|source| io(path, source))?;
    let entries: HashMap<String, Value> =
        serde_json::from_slice(&header).map_err(|error| corrupt(error.to_string()))?;
    for (name, entry) in entries.into_iter().filter(|(name, _)| name != "__metadata__") {
        let entry: Entry =
            serde_json::from_value(entry).map_err(|error| corrupt(format!("{name:?}: {error}")))?;
        let format = match entry.dtype.as_str() {
            "F32" => Format::F32,
            "F16" => Format::F16,
            "BF16" => Format::Bf16,
            // Buffers such as rotary tables in integers are none of ours; a weight would be missed by name.
            _ => continue,
        };
        let values = entry.shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size as u64));
        let bytes = values.and_then(|values| values.checked_mul(format.block_bytes() as u64));
        let [begin, end] = entry.data_offsets;
        if bytes.is_none() || end.checked_sub(begin) != bytes || end > length - 8 - header_length {
            return Err(corrupt(format!(
                "tensor {name:?} lies outside the file or has another length than its shape: it is truncated or damaged"
            )));
        }
        let place = Place { format, shape: entry.shape, file: index, offset: 8 + header_length + begin };
        tensors.places.insert(name, place);
    }
    Ok(())
}
