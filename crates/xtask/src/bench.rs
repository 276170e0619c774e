//! `bench`: runs a benchmark, says on what machine, and keeps the result in `benches/RESULTS.md`.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, ensure};
use clap::ValueEnum;
use serde_json::{Value, json};

use crate::results::{self, Run};
use crate::workspace;

const FILE: &str = "benches/RESULTS.md";

/// What is measured: a bench target of the root package.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Area {
    /// Serving, training and memory, from end to end
    Loop,
    /// The engine beside llama.cpp, candle's products and itself; builds llama.cpp at its first run
    Engine,
    /// Training beside HF peft and beside itself; makes the Python environment at its first run
    Training,
    /// Adapters in three tiers: throughput, latency and memory with many users
    Adapters,
}

impl Area {
    fn name(self) -> &'static str {
        match self {
            Self::Loop => "loop",
            Self::Engine => "engine",
            Self::Training => "training",
            Self::Adapters => "adapters",
        }
    }
}

/// Runs the area's target with `options` for it.
pub(crate) fn run(area: Area, options: &[&str], json: bool) -> anyhow::Result<()> {
    let name = area.name();
    let rows = measure(name, options)?;
    let run = Run {
        area: name,
        date: workspace::output("date", &["+%F"])?.trim().to_owned(),
        machine: machine(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        command: ["cargo xtask bench", name].iter().chain(options).copied().collect::<Vec<_>>().join(" "),
        rows,
    };
    let path = workspace::root().join(FILE);
    let old = std::fs::read_to_string(&path).unwrap_or_default();
    std::fs::write(&path, results::with_section(&old, &run))
        .with_context(|| format!("cannot write {FILE}"))?;
    if json {
        println!("{}", json!({ "machine": run.machine, "date": run.date, "rows": run.rows }));
    } else {
        println!("{}", results::section(&run));
    }
    Ok(())
}

/// The JSON lines that the bench target prints; all others go to standard error.
fn measure(target: &str, options: &[&str]) -> anyhow::Result<Vec<Value>> {
    // The whole workspace, or cargo takes other features than the tests do and compiles everything once more.
    let mut command = workspace::command("cargo", &["bench", "--workspace", "--bench", target, "--"]);
    let mut child = command.args(options).stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
    let output = child.stdout.take().context("no standard output")?;
    let mut rows = Vec::new();
    for line in BufReader::new(output).lines() {
        let line = line.context("the bench printed something else than UTF-8")?;
        match serde_json::from_str::<Value>(&line) {
            Ok(row) if row["name"].is_string() => rows.push(row),
            _ => eprintln!("{line}"),
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "cargo bench --bench {target}: {status}");
    ensure!(!rows.is_empty(), "cargo bench --bench {target} printed no result");
    Ok(rows)
}

/// Processor, number of cores and AVX-512, from the text of `/proc/cpuinfo`.
fn machine(cpuinfo: &str) -> String {
    let field = |name: &str| {
        let mut fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        fields.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let avx512 = field("flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "avx512f"));
    let model = field("model name").unwrap_or("unknown processor");
    format!("{model}, {cores} cores, avx512: {}", if avx512 { "yes" } else { "no" })
}

#[cfg(test)]
mod tests {
    //! The machine's description.
    use super::*;

    #[test]
    fn the_machine_is_described() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512f\n";
        let text = machine(cpuinfo);
        assert!(text.starts_with("Some CPU, ") && text.ends_with("avx512: yes"), "{text}");
        assert!(machine("flags : fpu avx512\n").ends_with("avx512: no"));
        assert!(machine("").starts_with("unknown processor"));
    }
}
