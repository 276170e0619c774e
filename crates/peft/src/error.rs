//! Why an adapter is refused.

/// A refusal names the field or tensor that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeftError {
    /// `adapter_config.json` is not a JSON object.
    #[error("adapter_config.json is not valid: {0}")]
    Json(String),
    /// A field has a value of the wrong type or outside its limits.
    #[error("adapter_config.json: {field} {problem}")]
    Field {
        /// The field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A field asks for something this version does not do.
    #[error("adapter_config.json: {field} is not supported with the value {value}")]
    Unsupported {
        /// The field.
        field: String,
        /// Its value.
        value: String,
    },
    /// `adapter_model.safetensors` cannot be read.
    #[error("adapter_model.safetensors is not valid: {0}")]
    Safetensors(String),
    /// A tensor is missing, unexpected, or of the wrong shape or type.
    #[error("adapter_model.safetensors: tensor {tensor:?} {problem}")]
    Tensor {
        /// The tensor's name.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl PeftError {
    pub(crate) fn field(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Field { field: field.into(), problem: problem.into() }
    }

    pub(crate) fn tensor(tensor: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Tensor { tensor: tensor.into(), problem: problem.into() }
    }
}
