//! Tasks of the repository: `cargo xtask <command>`.
//!
//! What it is not: part of the product. It checks, measures and describes the other crates.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command talks to its user")]

mod aarch64;
mod bench;
mod ci;
#[cfg(test)]
mod container_tests;
mod edges;
mod licences;
mod lines;
mod openapi;
mod results;
mod sources;
mod tidy;
mod totals;
mod workspace;

use clap::{Parser, Subcommand};

/// Tasks of the repository.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// The rules of the house: crate edges, file sizes, names, licences
    Tidy,
    /// Write openapi/openapi.json, or compare it
    Openapi {
        /// Only compare, and fail if the file is out of date
        #[arg(long)]
        check: bool,
    },
    /// Source and test lines of each crate, and the number of dependencies
    Lines,
    /// Run a benchmark and write benches/RESULTS.md
    Bench {
        area: bench::Area,
        /// One run instead of several
        #[arg(long)]
        quick: bool,
        /// Print one JSON object instead of a table
        #[arg(long)]
        json: bool,
        /// Install vLLM and measure it too (engine only; gigabytes)
        #[arg(long)]
        vllm: bool,
    },
    /// Fetch the default model into the cache folder and print its path
    FetchModel,
    /// Everything that must hold before a change is merged
    Ci,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().task {
        Task::Tidy => tidy::run(),
        Task::Openapi { check } => openapi::run(check),
        Task::Lines => lines::run(),
        Task::Bench { area, quick, json, vllm } => {
            let options = [(quick, "--quick"), (vllm, "--vllm")];
            let options = options.into_iter().filter_map(|(given, option)| given.then_some(option));
            bench::run(area, &options.collect::<Vec<_>>(), json)
        }
        Task::FetchModel => ci::cargo("run --release --quiet -- fetch"),
        Task::Ci => ci::run(),
    }
}
