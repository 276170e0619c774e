//! Tensors in a safetensors file: checked when read, float32 when written.

use std::collections::{BTreeMap, HashSet};

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::de::IgnoredAny;

use crate::error::PeftError;
use crate::fields::Members;

/// Longest safetensors header that is read; the format itself allows 100 MB.
const MAX_HEADER: u64 = 1 << 20;

/// A file whose header is sound.
pub(crate) struct TensorFile<'a>(SafeTensors<'a>);

impl<'a> TensorFile<'a> {
    pub(crate) fn open(file: &'a [u8]) -> Result<Self, PeftError> {
        check_header(file)?;
        let invalid = |error: safetensors::SafeTensorError| PeftError::Safetensors(error.to_string());
        SafeTensors::deserialize(file).map(Self).map_err(invalid)
    }

    /// Refuses tensors of other names.
    pub(crate) fn only(&self, names: &HashSet<String>) -> Result<(), PeftError> {
        match self.0.names().into_iter().find(|name| !names.contains(*name)) {
            None => Ok(()),
            Some(extra) => Err(PeftError::tensor(extra, "is not implied by the config for this base")),
        }
    }

    /// A tensor of exactly this shape, every value finite.
    pub(crate) fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, PeftError> {
        let view = self.0.tensor(name).map_err(|_| PeftError::tensor(name, "is missing"))?;
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
                let problem = format!("has the type {other:?}; F32, F16 or BF16 is needed");
                return Err(PeftError::tensor(name, problem));
            }
        };
        // To the end in any case: without a way out in its middle the loop takes many values at a time.
        if values.iter().fold(true, |finite, value| finite & value.is_finite()) {
            Ok(values)
        } else {
            Err(PeftError::tensor(name, "holds a value that is not finite"))
        }
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
    let members: Result<Members<IgnoredAny>, _> = serde_json::from_slice(header);
    members.map(|_| ()).map_err(|error| PeftError::Safetensors(error.to_string()))
}

/// Collects the tensors of a file.
#[derive(Default)]
pub(crate) struct TensorWriter(BTreeMap<String, (Vec<usize>, Vec<u8>)>);

impl TensorWriter {
    pub(crate) fn add(&mut self, name: String, shape: &[usize], values: &[f32]) {
        self.0.insert(name, (shape.to_vec(), values.iter().flat_map(|v| v.to_le_bytes()).collect()));
    }

    /// The file, tensors in the order of their names.
    ///
    /// # Errors
    /// When a tensor's length does not fit its shape.
    pub(crate) fn finish(&self) -> Result<Vec<u8>, PeftError> {
        let mut views = Vec::with_capacity(self.0.len());
        for (name, (shape, bytes)) in &self.0 {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes)
                .map_err(|error| PeftError::tensor(name, error.to_string()))?;
            views.push((name, view));
        }
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        safetensors::serialize(views, Some(metadata))
            .map_err(|error| PeftError::Safetensors(error.to_string()))
    }
}
