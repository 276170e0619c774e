//! The base with the task adapter that the settings name.

use std::path::Path;

use anyhow::{Context, ensure};
use model::{BaseModel, TaskMode};

/// Longest file of a task adapter that is read.
const MAX_BYTES: u64 = 8 << 30;

/// The base with the adapter in `folder`, which holds HF peft's two files.
///
/// # Errors
/// When a file cannot be read, or the adapter does not fit the base.
pub(crate) fn apply(base: BaseModel, folder: &Path, mode: TaskMode) -> anyhow::Result<BaseModel> {
    let read = |file: &str| {
        let path = folder.join(file);
        let named = || format!("--task-adapter: {}", path.display());
        let length = std::fs::metadata(&path).with_context(named)?.len();
        ensure!(length <= MAX_BYTES, "{}: has {length} bytes", named());
        std::fs::read(&path).with_context(named)
    };
    let (config, weights) = (read("adapter_config.json")?, read("adapter_model.safetensors")?);
    let base = base
        .with_task(&config, &weights, mode)
        .with_context(|| format!("--task-adapter {}", folder.display()))?;
    tracing::info!(path = %folder.display(), ?mode, bytes = base.weight_bytes(), "task adapter in place");
    Ok(base)
}
