//! The repository as the tasks see it: its root, its files, what cargo says about it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;

/// The folder of the root `Cargo.toml`.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A command that runs in the root.
pub(crate) fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).current_dir(root());
    command
}

/// The standard output of a command.
///
/// # Errors
/// If it does not start, fails, or its output is not UTF-8.
pub(crate) fn output(program: &str, args: &[&str]) -> anyhow::Result<String> {
    let output = command(program, args).output().with_context(|| format!("cannot start {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}\n{}",
        args.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).with_context(|| format!("{program} printed something else than UTF-8"))
}

/// `cargo metadata`, of the workspace alone or with all dependencies.
pub(crate) fn metadata(dependencies: bool) -> anyhow::Result<Value> {
    let mut args = vec!["metadata", "--format-version", "1"];
    if !dependencies {
        args.push("--no-deps");
    }
    serde_json::from_str(&output("cargo", &args)?).context("cargo metadata")
}

/// Paths of the files under version control or about to be, relative to the root.
pub(crate) fn files() -> anyhow::Result<Vec<String>> {
    // A checkout may belong to somebody else, e.g. when a container runs as root; git would refuse it.
    let anyones = ["-c", "safe.directory=*"];
    let wanted = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let listed = output("git", &[&anyones[..], &wanted[..]].concat())?;
    let mut files: Vec<String> = listed.split_terminator('\0').map(str::to_owned).collect();
    files.retain(|file| root().join(file).is_file());
    files.sort();
    files.dedup();
    Ok(files)
}
