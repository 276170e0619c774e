//! `ci`: everything that must hold, in order, up to the first failure.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, ensure};

use crate::totals::Totals;
use crate::{aarch64, openapi, tidy, workspace};

/// Where the round trip's files go, relative to the root.
const ROUNDTRIP: &str = "target/roundtrip";
const FIXTURE: &str = "tests/fixtures/tiny-llama";
/// A base whose layers have biases.
const FIXTURE_WITH_BIAS: &str = "tests/fixtures/tiny-qwen2";

pub(crate) fn run() -> anyhow::Result<()> {
    step("format", || cargo("fmt --all --check"))?;
    step("clippy", || cargo("clippy --release --workspace --all-targets -- -D warnings"))?;
    step("tidy", tidy::run)?;
    step("documentation", documentation)?;
    step("kernels for aarch64", aarch64::run)?;
    step("fuzz targets", fuzz_targets)?;
    step("description of the API", || openapi::run(true))?;
    step("demo", demo)?;
    step("round trip through HF peft", roundtrip)?;
    step("tests on lesser vector units", lesser_units)?;
    let totals = step("tests", tests)?;
    println!("\n{totals}");
    println!("tests: {} passed, {} failed", totals.passed, totals.failed);
    Ok(())
}

fn step<T>(title: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    println!("\n== {title}");
    let start = Instant::now();
    let result = work();
    let seconds = start.elapsed().as_secs_f64();
    match &result {
        Ok(_) => println!("== {title}: passed in {seconds:.1} s"),
        Err(_) => println!("== {title}: FAILED after {seconds:.1} s"),
    }
    result.with_context(|| format!("step \"{title}\""))
}

/// Runs cargo with arguments that contain no spaces.
pub(crate) fn cargo(args: &str) -> anyhow::Result<()> {
    check("cargo", &args.split(' ').collect::<Vec<_>>(), &[])
}

pub(crate) fn check(program: &str, args: &[&str], environment: &[(&str, &str)]) -> anyhow::Result<()> {
    let mut command = workspace::command(program, args);
    let status = command.envs(environment.iter().copied()).status();
    let status = status.with_context(|| format!("cannot start {program}"))?;
    ensure!(status.success(), "{program} {}: {status}", args.join(" "));
    Ok(())
}

fn documentation() -> anyhow::Result<()> {
    let args = ["doc", "--release", "--workspace", "--no-deps"];
    check("cargo", &args, &[("RUSTDOCFLAGS", "-D warnings")])
}

/// Serving and training on the vector units that a CPU like this one would use if it had no better: the tests of the
/// kernels run on all of them, those of whole models on the one in use.
fn lesser_units() -> anyhow::Result<()> {
    let args = ["test", "--release", "-p", "kernels", "-p", "model", "-p", "train"];
    for (unit, found) in lesser() {
        if !found {
            println!("skipped: this CPU has no better unit than {unit}, or not that");
            continue;
        }
        println!("-- {unit}");
        check("cargo", &args, &[("ATELIER_ISA", unit), ("COMPANY_COMPARISONS", "100")])?;
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn lesser() -> [(&'static str, bool); 2] {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    [("avx2", avx2 && is_x86_feature_detected!("avx512vnni")), ("portable", avx2)]
}

#[cfg(not(target_arch = "x86_64"))]
fn lesser() -> [(&'static str, bool); 2] {
    let dot = cfg!(target_arch = "aarch64");
    [("neon", dot), ("portable", dot)]
}

/// Compiles the fuzz targets, which are no part of the workspace, where what they need besides it can be had. To check them
/// takes neither nightly nor libFuzzer itself, which is C++; to run them does.
fn fuzz_targets() -> anyhow::Result<()> {
    const MANIFEST: &str = "fuzz/Cargo.toml";
    // With the workspace's versions, so that little else is fetched.
    let lock = |folder: &str| workspace::root().join(folder).join("Cargo.lock");
    std::fs::copy(lock(""), lock("fuzz")).context("cannot copy Cargo.lock")?;
    let fetch = workspace::command("cargo", &["fetch", "--manifest-path", MANIFEST]).status();
    if !fetch.context("cannot start cargo")?.success() {
        println!("skipped: cargo cannot fetch what {MANIFEST} needs");
        return Ok(());
    }
    let args = ["check", "--release", "--manifest-path", MANIFEST, "--target-dir", "target/fuzz"];
    check("cargo", &args, &[("CUSTOM_LIBFUZZER_PATH", "/nowhere/libfuzzer.a")])
}

/// The demo with nothing left over from an earlier run.
fn demo() -> anyhow::Result<()> {
    let data = std::env::temp_dir().join(format!("atelier-ci-{}", std::process::id()));
    std::fs::create_dir(&data).with_context(|| format!("cannot create {}", data.display()))?;
    let folder = data.to_string_lossy();
    let args = ["run", "--release", "--", "demo", "--exit", "--listen", "127.0.0.1:0", "--data", &folder];
    let result = check("cargo", &args, &[]);
    std::fs::remove_dir_all(&data).with_context(|| format!("cannot remove {}", data.display()))?;
    result
}

/// The README's second command. Each test target has a summary of its own; they are added up.
fn tests() -> anyhow::Result<Totals> {
    let mut command = workspace::command("cargo", &["test", "--release", "--workspace"]);
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
    let output = child.stdout.take().context("no standard output")?;
    let mut totals = Totals::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("cannot read what the tests print")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        totals.add(&line);
    }
    let status = child.wait()?;
    ensure!(status.success(), "cargo test: {status}; {totals}");
    ensure!(totals.passed > 0, "cargo test ran no test");
    Ok(totals)
}

/// An adapter trained here gives the same logits in HF peft, and so does one of every kind; another adapter does not
/// (negative control).
fn roundtrip() -> anyhow::Result<()> {
    let printed = workspace::output("tests/reference/setup.sh", &[])?;
    let python = printed.lines().last().context("setup.sh printed no python")?;
    cargo(&format!("run --release -p train --example roundtrip -- {ROUNDTRIP}"))?;
    let script = "tests/reference/roundtrip.py";
    let (adapter, other) = (format!("{ROUNDTRIP}/adapter"), format!("{ROUNDTRIP}/other"));
    let logits = format!("{ROUNDTRIP}/logits.json");
    check(python, &[script, FIXTURE, &adapter, &logits], &[])?;
    check(python, &[script, FIXTURE, &other, &logits, "--expect-mismatch"], &[])?;
    for base in [FIXTURE, FIXTURE_WITH_BIAS] {
        let kinds = format!("{ROUNDTRIP}/kinds-{}", base.rsplit('/').next().unwrap_or_default());
        cargo(&format!("run --release -p model --example kinds -- {base} {kinds}"))?;
        check(python, &[script, base, &kinds], &[])?;
        let (dora, other) = (format!("{kinds}/dora"), format!("{kinds}/rslora/logits.json"));
        check(python, &[script, base, &dora, &other, "--expect-mismatch"], &[])?;
    }
    Ok(())
}
