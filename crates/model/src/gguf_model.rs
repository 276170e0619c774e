//! What a GGUF file says about its model: config, vocabulary and tensor names.

use std::collections::BTreeMap;
use std::path::Path;

use types::{GgufVocabulary, Site};

use crate::config::{ModelConfig, RopeScaling};
use crate::error::ModelError;
use crate::gguf::{GgufFile, Value};
use crate::load::{Names, Source};
use crate::tensors::{Place, Tensors};

struct Metadata<'a> {
    file: &'a GgufFile,
    architecture: &'a str,
}

impl Metadata<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.file.metadata.get(&format!("{}.{key}", self.architecture))
    }

    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn optional_int(&self, key: &str) -> Result<Option<usize>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Int(value)) => usize::try_from(*value)
                .map(Some)
                .map_err(|_| ModelError::config(self.name(key), format!("is {value}"))),
            Some(_) => Err(ModelError::config(self.name(key), "is not an integer")),
        }
    }

    fn int(&self, key: &str) -> Result<usize, ModelError> {
        self.optional_int(key)?.ok_or_else(|| ModelError::config(self.name(key), "is missing"))
    }

    fn optional_float(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value)),
            Some(_) => Err(ModelError::config(self.name(key), "is not a number")),
        }
    }
}

/// Reads the header and describes the model.
pub(crate) fn open(path: &Path) -> Result<Source, ModelError> {
    let file = GgufFile::open(path)?;
    let architecture = match file.metadata.get("general.architecture") {
        Some(Value::Text(architecture)) => architecture.as_str(),
        _ => return Err(ModelError::config("general.architecture", "is missing")),
    };
    if !matches!(architecture, "llama" | "qwen2" | "qwen3") {
        let problem = format!("is {architecture:?}; llama, qwen2 and qwen3 are supported");
        return Err(ModelError::config("general.architecture", problem));
    }
    let mut tensors = Tensors::default();
    let index = tensors.add_file(path)?;
    for tensor in &file.tensors {
        let place =
            Place { format: tensor.format, shape: tensor.shape.clone(), file: index, offset: tensor.offset };
        if tensors.places.insert(tensor.name.clone(), place).is_some() {
            let problem = format!("tensor {:?} is there twice", tensor.name);
            return Err(ModelError::Corrupt { path: path.to_owned(), problem });
        }
    }
    let config = config(&Metadata { file: &file, architecture }, &tensors)?;
    // llama.cpp stores q and k of this family with the two halves of each head interleaved.
    let interleaved = architecture == "llama";
    let vocabulary = vocabulary(&file)?;
    Ok(Source {
        config,
        tensors,
        names: Names {
            embedding: "token_embd.weight".into(),
            output: "output.weight".into(),
            final_norm: "output_norm.weight".into(),
            block: block_name,
        },
        interleaved,
        tokenizer: vocabulary.map(types::TokenizerSource::Gguf),
    })
}

fn block_name(layer: usize, part: crate::load::Part) -> String {
    use crate::load::Part;
    let part = match part {
        Part::AttentionNorm => "attn_norm.weight".into(),
        Part::FeedForwardNorm => "ffn_norm.weight".into(),
        Part::QueryNorm => "attn_q_norm.weight".into(),
        Part::KeyNorm => "attn_k_norm.weight".into(),
        Part::Weight(site) => format!("{}.weight", site_name(site)),
        Part::Bias(site) => format!("{}.bias", site_name(site)),
    };
    format!("blk.{layer}.{part}")
}

/// What GGUF files call a site.
#[must_use]
pub fn site_name(site: Site) -> &'static str {
    match site {
        Site::Q => "attn_q",
        Site::K => "attn_k",
        Site::V => "attn_v",
        Site::O => "attn_output",
        Site::Gate => "ffn_gate",
        Site::Up => "ffn_up",
        Site::Down => "ffn_down",
    }
}

fn config(metadata: &Metadata<'_>, tensors: &Tensors) -> Result<ModelConfig, ModelError> {
    let hidden = metadata.int("embedding_length")?;
    let layers = metadata.int("block_count")?;
    let heads = metadata.int("attention.head_count")?;
    let head_dim = match metadata.optional_int("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => hidden
            .checked_div(heads)
            .ok_or_else(|| ModelError::config(metadata.name("attention.head_count"), "is 0"))?,
    };
    let vocab = match tensors.places.get("token_embd.weight").map(|place| place.shape.as_slice()) {
        Some([vocab, _]) => *vocab,
        _ => return Err(ModelError::tensor("token_embd.weight", "is missing or no matrix")),
    };
    let eps = metadata
        .optional_float("attention.layer_norm_rms_epsilon")?
        .ok_or_else(|| ModelError::config(metadata.name("attention.layer_norm_rms_epsilon"), "is missing"))?;
    let window = metadata.optional_int("attention.sliding_window")?.filter(|window| *window > 0);
    Ok(ModelConfig {
        hidden,
        layers,
        heads,
        kv_heads: metadata.optional_int("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        feed_forward: metadata.int("feed_forward_length")?,
        vocab,
        context: metadata.int("context_length")?,
        norm_eps: eps as f32,
        rope_theta: metadata.optional_float("rope.freq_base")?.unwrap_or(10_000.0),
        rope_scaling: rope_scaling(metadata, tensors, head_dim)?,
        windows: vec![window; layers.min(4096)],
    })
}

fn rope_scaling(
    metadata: &Metadata<'_>,
    tensors: &Tensors,
    head_dim: usize,
) -> Result<RopeScaling, ModelError> {
    if tensors.has("rope_freqs.weight") {
        return tensors.vector("rope_freqs.weight", head_dim / 2).map(RopeScaling::Factors);
    }
    match metadata.get("rope.scaling.type") {
        None => Ok(RopeScaling::None),
        Some(Value::Text(kind)) if kind == "none" => Ok(RopeScaling::None),
        Some(Value::Text(kind)) if kind == "linear" => {
            let factor = metadata.optional_float("rope.scaling.factor")?.unwrap_or(1.0);
            Ok(RopeScaling::Linear { factor })
        }
        Some(other) => {
            let problem = format!("is {other:?}; none and linear are supported");
            Err(ModelError::config(metadata.name("rope.scaling.type"), problem))
        }
    }
}

fn vocabulary(file: &GgufFile) -> Result<Option<GgufVocabulary>, ModelError> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let text = |key: &str| match file.metadata.get(key) {
        Some(Value::Text(text)) => Some(text.clone()),
        _ => None,
    };
    let flag = |name: &str| match file.metadata.get(&key(name)) {
        Some(Value::Bool(flag)) => Some(*flag),
        _ => None,
    };
    let list = |name: &str| match file.metadata.get(&key(name)) {
        Some(Value::List(items)) => items.as_slice(),
        _ => &[],
    };
    let texts = |name: &str| -> Result<Vec<String>, ModelError> {
        let read = |item: &Value| match item {
            Value::Text(text) => Ok(text.clone()),
            _ => Err(ModelError::config(key(name), "is not a list of texts")),
        };
        list(name).iter().map(read).collect()
    };
    let mut special = BTreeMap::new();
    for name in ["bos", "eos", "eot", "eom", "unknown", "padding"] {
        let name = format!("{name}_token_id");
        if let Some(Value::Int(id)) = file.metadata.get(&key(&name)) {
            let id = u32::try_from(*id).map_err(|_| ModelError::config(key(&name), "is no token id"))?;
            special.insert(name, id);
        }
    }
    let number = |item: &Value| match item {
        Value::Int(value) => *value as f64,
        Value::Float(value) => *value,
        _ => 0.0,
    };
    let Some(model) = text(&key("model")) else { return Ok(None) };
    Ok(Some(GgufVocabulary {
        model,
        pre: text(&key("pre")),
        tokens: texts("tokens")?,
        token_types: list("token_type").iter().map(|item| number(item) as i32).collect(),
        scores: list("scores").iter().map(|item| number(item) as f32).collect(),
        merges: texts("merges")?,
        special,
        add_bos: flag("add_bos_token"),
        add_eos: flag("add_eos_token"),
        add_space_prefix: flag("add_space_prefix"),
        chat_template: text("tokenizer.chat_template"),
    }))
}
