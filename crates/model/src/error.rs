//! Why a model cannot be loaded or run.

use std::path::PathBuf;

/// A refusal names the file and the field or tensor that is wrong.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The path is neither a GGUF file nor a folder with a config.json.
    #[error("{}: not a model: expected a .gguf file or a folder with config.json, tokenizer.json and *.safetensors", path.display())]
    NotAModel {
        /// The path.
        path: PathBuf,
    },
    /// The file is not what its format says it is.
    #[error("{}: corrupt: {problem}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A field of the model's config is missing, malformed or not supported.
    #[error("model config: {field} {problem}")]
    Config {
        /// The field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor is missing, or of the wrong shape or format.
    #[error("tensor {name:?} {problem}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A batch does not fit the model or the KV pool.
    #[error("batch: {0}")]
    Batch(String),
    /// The task adapter does not fit the base.
    #[error("task adapter: {0}")]
    Task(#[from] peft::PeftError),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl ModelError {
    pub(crate) fn config(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Config { field: field.into(), problem: problem.into() }
    }

    pub(crate) fn tensor(name: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), problem: problem.into() }
    }
}
