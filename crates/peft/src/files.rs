//! The two files of an adapter as HF peft saves them, to and from weights.

use std::collections::HashSet;

use sha2::{Digest, Sha256};
use types::{GenerationId, SiteId};

use crate::config::LoraConfig;
use crate::error::PeftError;
use crate::kind::{AdapterConfig, Ia3Config, PromptConfig};
use crate::shape::BaseShape;
use crate::tensors::{TensorFile, TensorWriter};
use crate::weights::{
    AdapterWeights, Ia3Scale, Ia3Weights, LoraTensors, LoraWeights, PeftFiles, PromptWeights,
};

/// The id of a generation: SHA-256 over the base's hash and the hashes of both files.
#[must_use]
pub fn generation_id(base_hash: &[u8; 32], config: &[u8], weights: &[u8]) -> GenerationId {
    let whole = Sha256::new()
        .chain_update(base_hash)
        .chain_update(Sha256::digest(config))
        .chain_update(Sha256::digest(weights));
    GenerationId::from_bytes(whole.finalize().into())
}

const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";
const BIAS: &str = "lora_B.bias";
const MAGNITUDE: &str = "lora_magnitude_vector";
const IA3: &str = "ia3_l";
const PROMPT: &str = "prompt_embeddings";

fn tensor_name(id: SiteId, which: &str) -> String {
    format!("base_model.model.{}.{which}", id.module_path())
}

impl AdapterWeights {
    /// Reads both files and checks them against the base: exactly the tensors the config implies, exact shapes, every
    /// value finite.
    ///
    /// # Errors
    /// Names the field or tensor that is wrong.
    pub fn parse(config: &[u8], weights: &[u8], shape: &BaseShape) -> Result<Self, PeftError> {
        Self::read(AdapterConfig::parse(config, shape)?, weights, shape)
    }

    /// As [`AdapterWeights::parse`], with a config that has been read.
    ///
    /// # Errors
    /// Names the field or tensor that is wrong.
    pub fn read(config: AdapterConfig, weights: &[u8], shape: &BaseShape) -> Result<Self, PeftError> {
        match config {
            AdapterConfig::Lora(config) => LoraWeights::read(config, weights, shape).map(Self::Lora),
            AdapterConfig::Ia3(config) => Ia3Weights::read(config, weights, shape).map(Self::Ia3),
            AdapterConfig::Prompt(config) => PromptWeights::read(config, weights, shape).map(Self::Prompt),
        }
    }

    /// Both files; `base_model` is the name the config gives the base.
    ///
    /// # Errors
    /// When a tensor's length does not fit the base's shape.
    pub fn to_files(&self, shape: &BaseShape, base_model: &str) -> Result<PeftFiles, PeftError> {
        let weights = match self {
            Self::Lora(lora) => lora.to_safetensors(shape),
            Self::Ia3(ia3) => ia3.to_safetensors(shape),
            Self::Prompt(prompt) => {
                let mut tensors = TensorWriter::default();
                tensors.add(PROMPT.into(), &[prompt.config.virtual_tokens, prompt.width], &prompt.embeddings);
                tensors.finish()
            }
        };
        Ok(PeftFiles { config: self.config().to_json(shape, base_model), weights: weights? })
    }
}

impl LoraWeights {
    /// Reads both files and checks them against the base: exactly the tensors the config implies, exact
    /// shapes, every value finite.
    ///
    /// # Errors
    /// Names the field or tensor that is wrong; a config of another kind is refused.
    pub fn parse(config: &[u8], weights: &[u8], shape: &BaseShape) -> Result<Self, PeftError> {
        Self::read(LoraConfig::parse(config)?, weights, shape)
    }

    fn read(config: LoraConfig, weights: &[u8], shape: &BaseShape) -> Result<Self, PeftError> {
        let file = LoraFile::open(config, weights, shape)?;
        let mut sites = vec![None; shape.sites()];
        for &(id, rank, scale) in &file.expected {
            sites[id.index()] = Some(file.site(id, rank, scale)?);
        }
        Ok(Self { config: file.config, sites })
    }

    /// The file `adapter_model.safetensors`, in float32, tensors in the order of their names.
    ///
    /// # Errors
    /// When a tensor's length does not fit the base's shape.
    pub fn to_safetensors(&self, shape: &BaseShape) -> Result<Vec<u8>, PeftError> {
        let mut tensors = TensorWriter::default();
        for (id, site) in shape.site_ids().zip(&self.sites) {
            let Some(site) = site else { continue };
            let (out, input) = shape.dims(id.site);
            tensors.add(tensor_name(id, A), &[site.rank, input], &site.a);
            tensors.add(tensor_name(id, B), &[out, site.rank], &site.b);
            for (part, values) in [(BIAS, &site.bias), (MAGNITUDE, &site.magnitude)] {
                if let Some(values) = values {
                    tensors.add(tensor_name(id, part), &[out], values);
                }
            }
        }
        tensors.finish()
    }
}

/// A LoRA adapter's files, the names of the tensors checked, to be read site by site.
pub(crate) struct LoraFile<'a> {
    config: LoraConfig,
    shape: BaseShape,
    tensors: TensorFile<'a>,
    /// The sites it has, with rank and scale.
    pub(crate) expected: Vec<(SiteId, usize, f64)>,
}

impl<'a> LoraFile<'a> {
    pub(crate) fn open(config: LoraConfig, weights: &'a [u8], shape: &BaseShape) -> Result<Self, PeftError> {
        let expected = config.sites(shape)?;
        let tensors = TensorFile::open(weights)?;
        let mut parts = vec![A, B];
        parts.extend(config.lora_bias.then_some(BIAS));
        parts.extend(config.use_dora.then_some(MAGNITUDE));
        let of_site = |&(id, ..): &(SiteId, usize, f64)| parts.iter().map(move |part| tensor_name(id, part));
        tensors.only(&expected.iter().flat_map(of_site).collect::<HashSet<String>>())?;
        Ok(Self { config, shape: shape.clone(), tensors, expected })
    }

    /// What it has at one of the expected sites: exact shapes, every value finite.
    pub(crate) fn site(&self, id: SiteId, rank: usize, scale: f64) -> Result<LoraTensors, PeftError> {
        let (out, input) = self.shape.dims(id.site);
        let read = |part, shape: &[usize]| self.tensors.read(&tensor_name(id, part), shape);
        let vector = |used: bool, part| used.then(|| read(part, &[out])).transpose();
        Ok(LoraTensors {
            rank,
            scale,
            a: read(A, &[rank, input])?,
            b: read(B, &[out, rank])?,
            bias: vector(self.config.lora_bias, BIAS)?,
            magnitude: vector(self.config.use_dora, MAGNITUDE)?,
        })
    }
}

impl Ia3Weights {
    fn read(config: Ia3Config, weights: &[u8], shape: &BaseShape) -> Result<Self, PeftError> {
        let expected = config.sites(shape)?;
        let file = TensorFile::open(weights)?;
        file.only(&expected.iter().map(|&(id, _)| tensor_name(id, IA3)).collect())?;
        let mut sites = vec![None; shape.sites()];
        for (id, feed_forward) in expected {
            let (out, input) = shape.dims(id.site);
            let name = tensor_name(id, IA3);
            sites[id.index()] = Some(if feed_forward {
                Ia3Scale::Input(file.read(&name, &[1, input])?)
            } else {
                Ia3Scale::Output(file.read(&name, &[out, 1])?)
            });
        }
        Ok(Self { config, sites })
    }

    fn to_safetensors(&self, shape: &BaseShape) -> Result<Vec<u8>, PeftError> {
        let mut tensors = TensorWriter::default();
        for (id, site) in shape.site_ids().zip(&self.sites) {
            let (out, input) = shape.dims(id.site);
            match site {
                None => {}
                Some(Ia3Scale::Output(values)) => tensors.add(tensor_name(id, IA3), &[out, 1], values),
                Some(Ia3Scale::Input(values)) => tensors.add(tensor_name(id, IA3), &[1, input], values),
            }
        }
        tensors.finish()
    }
}

impl PromptWeights {
    fn read(config: PromptConfig, weights: &[u8], shape: &BaseShape) -> Result<Self, PeftError> {
        let file = TensorFile::open(weights)?;
        file.only(&[PROMPT.to_owned()].into())?;
        let width = shape.width();
        let embeddings = file.read(PROMPT, &[config.virtual_tokens, width])?;
        Ok(Self { config, width, embeddings })
    }
}
