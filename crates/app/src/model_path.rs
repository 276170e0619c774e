//! Which files `--model` means.

use std::path::{Path, PathBuf};

use anyhow::bail;

use crate::fetch;

/// A local path, the default model, or (feature `hub`) a hub id.
pub(crate) async fn find(model: Option<&str>, cache: &Path) -> anyhow::Result<PathBuf> {
    let Some(model) = model else {
        let cache = cache.to_owned();
        return tokio::task::spawn_blocking(move || fetch::default_model(&cache)).await?;
    };
    let path = PathBuf::from(model);
    if path.exists() {
        return Ok(path);
    }
    match model.split_once('/') {
        Some((owner, name)) if is_hub_name(owner) && is_hub_name(name) => from_hub(owner, name).await,
        _ => bail!("--model {model}: there is no such file or folder"),
    }
}

fn is_hub_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

#[cfg(not(feature = "hub"))]
#[expect(clippy::unused_async, reason = "the variant with the feature waits for the network")]
async fn from_hub(owner: &str, name: &str) -> anyhow::Result<PathBuf> {
    bail!(
        "--model {owner}/{name}: there is no such file or folder; to fetch it from a hub, build with `--features hub`"
    )
}

#[cfg(feature = "hub")]
async fn from_hub(owner: &str, name: &str) -> anyhow::Result<PathBuf> {
    use anyhow::Context;
    let wanted = ["*.json", "*.safetensors", "*.jinja"].map(str::to_owned).to_vec();
    let client = hf_hub::HFClient::new().context("cannot set up the hub client")?;
    let repository = client.model(owner, name);
    let download = repository.snapshot_download().allow_patterns(wanted).progress(hub_progress::Bar::new());
    download.send().await.with_context(|| format!("cannot fetch {owner}/{name} from the hub"))
}

#[cfg(feature = "hub")]
mod hub_progress {
    //! The hub's download events as a progress bar.

    use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
    use indicatif::ProgressBar;

    /// A bar on standard error, silent when that is no terminal.
    pub(super) struct Bar(ProgressBar);

    impl Bar {
        pub(super) fn new() -> Self {
            Self(ProgressBar::no_length())
        }
    }

    impl ProgressHandler for Bar {
        fn on_progress(&self, event: &ProgressEvent) {
            let ProgressEvent::Download(event) = event else { return };
            match event {
                DownloadEvent::Start { total_bytes, .. } => self.0.set_length(*total_bytes),
                DownloadEvent::AggregateProgress { bytes_completed, .. } => {
                    self.0.set_position(*bytes_completed)
                }
                DownloadEvent::Complete => self.0.finish(),
                DownloadEvent::Progress { .. } => {}
            }
        }
    }
}
