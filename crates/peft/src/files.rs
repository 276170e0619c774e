//! The two files of a LoRA adapter as HF peft saves them, to and from weights.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use sha2::{Digest, Sha256};
use types::{GenerationId, SiteId};

use crate::config::LoraConfig;
use crate::error::PeftError;
use crate::shape::BaseShape;
use crate::weights::{LoraTensors, LoraWeights};

/// Longest safetensors header that is read; the format itself allows 100 MB.
const MAX_HEADER: u64 = 1 << 20;

/// The id of a generation: SHA-256 over the base's hash and the hashes of both files.
#[must_use]
pub fn generation_id(base_hash: &[u8; 32], config: &[u8], weights: &[u8]) -> GenerationId {
    let whole = Sha256::new()
        .chain_update(base_hash)
        .chain_update(Sha256::digest(config))
        .chain_update(Sha256::digest(weights));
    GenerationId::from_bytes(whole.finalize().into())
}

fn tensor_name(id: SiteId, which: &str) -> String {
    format!("base_model.model.{}.lora_{which}.weight", id.module_path())
}

impl LoraWeights {
    /// Reads both files and checks them against the base: exactly the tensors the config implies, exact
    /// shapes, every value finite.
    ///
    /// # Errors
    /// Names the field or tensor that is wrong.
    pub fn parse(config: &[u8], weights: &[u8], shape: &BaseShape) -> Result<Self, PeftError> {
        let config = LoraConfig::parse(config)?;
        let expected = config.sites(shape)?;
        check_header(weights)?;
        let file =
            SafeTensors::deserialize(weights).map_err(|error| PeftError::Safetensors(error.to_string()))?;
        let names: HashSet<String> =
            expected.iter().flat_map(|&(id, ..)| [tensor_name(id, "A"), tensor_name(id, "B")]).collect();
        if let Some(extra) = file.names().into_iter().find(|name| !names.contains(*name)) {
            return Err(PeftError::tensor(extra, "is not implied by the config for this base"));
        }
        let mut sites = vec![None; shape.sites()];
        for (id, rank, scale) in expected {
            let (out, input) = shape.dims(id.site);
            let a = read(&file, &tensor_name(id, "A"), [rank, input])?;
            let b = read(&file, &tensor_name(id, "B"), [out, rank])?;
            sites[id.index()] = Some(LoraTensors { rank, scale, a, b, ..LoraTensors::default() });
        }
        Ok(Self { config, sites })
    }

    /// The file `adapter_model.safetensors`, in float32, tensors in the order of their names.
    ///
    /// # Errors
    /// When a tensor's length does not fit the base's shape.
    pub fn to_safetensors(&self, shape: &BaseShape) -> Result<Vec<u8>, PeftError> {
        let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
        for id in shape.site_ids() {
            let Some(site) = self.sites.get(id.index()).and_then(Option::as_ref) else { continue };
            let (out, input) = shape.dims(id.site);
            let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
            tensors.insert(tensor_name(id, "A"), (vec![site.rank, input], bytes(&site.a)));
            tensors.insert(tensor_name(id, "B"), (vec![out, site.rank], bytes(&site.b)));
        }
        let mut views = Vec::with_capacity(tensors.len());
        for (name, (shape, bytes)) in &tensors {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes)
                .map_err(|error| PeftError::tensor(name, error.to_string()))?;
            views.push((name, view));
        }
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        safetensors::serialize(views, Some(metadata))
            .map_err(|error| PeftError::Safetensors(error.to_string()))
    }

    /// Whether every value is finite.
    #[must_use]
    pub fn is_finite(&self) -> bool {
        self.sites.iter().flatten().all(|site| site.a.iter().chain(&site.b).all(|v| v.is_finite()))
    }
}

fn read(file: &SafeTensors<'_>, name: &str, shape: [usize; 2]) -> Result<Vec<f32>, PeftError> {
    let view = file.tensor(name).map_err(|_| PeftError::tensor(name, "is missing"))?;
    if view.shape() != shape {
        let problem = format!("has the shape {:?}; this base and config need {shape:?}", view.shape());
        return Err(PeftError::tensor(name, problem));
    }
    let bytes = view.data();
    let halves = || bytes.as_chunks::<2>().0.iter();
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => halves().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => halves().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        other => {
            return Err(PeftError::tensor(
                name,
                format!("has the type {other:?}; F32, F16 or BF16 is needed"),
            ));
        }
    };
    if values.iter().all(|v| v.is_finite()) {
        Ok(values)
    } else {
        Err(PeftError::tensor(name, "holds a value that is not finite"))
    }
}

/// Bounds the header and refuses duplicate tensor names, which the format's reader would let pass.
fn check_header(file: &[u8]) -> Result<(), PeftError> {
    let invalid = |problem: &str| PeftError::Safetensors(problem.to_owned());
    let (length, rest) =
        file.split_first_chunk::<8>().ok_or_else(|| invalid("it is shorter than 8 bytes"))?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(invalid("its header is longer than 1 MiB"));
    }
    let header = rest.get(..length as usize).ok_or_else(|| invalid("its header is cut off"))?;
    let mut json = serde_json::Deserializer::from_slice(header);
    json.deserialize_map(UniqueKeys).map_err(|error| PeftError::Safetensors(error.to_string()))
}

struct UniqueKeys;

impl<'de> Visitor<'de> for UniqueKeys {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object without duplicate keys")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<(), M::Error> {
        let mut seen = HashSet::new();
        while let Some((key, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
            if let Some(key) = seen.replace(key) {
                return Err(serde::de::Error::custom(format!("duplicate tensor {key:?}")));
            }
        }
        Ok(())
    }
}
