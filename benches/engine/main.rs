//! The engine in figures: beside llama.cpp, beside candle's products, and beside itself.
//!
//! `cargo xtask bench engine [--quick] [--json] [--vllm]` runs it and writes `benches/RESULTS.md` and a plot. One JSON
//! object a line. All sides of a row take turns within one run. The floor is what bytes over bandwidth or operations
//! over peak allow on a two-core Zen 4 with AVX-512 (27 GB/s from memory, 917 GOP/s in int8); on a CPU with AMX, which
//! llama.cpp uses for prompts, it is no floor. `cargo bench --bench engine -- batches` prints one section alone:
//! `products`, `perplexity`, `single`, `web`, `batches`, `prompts` or `profile`.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark")]

mod adapters;
mod batches;
mod cpu;
mod events;
mod load;
mod ours;
mod peer;
mod peer_build;
mod perplexity;
mod plot;
mod product;
mod profile;
mod progress;
mod row;
mod server;
mod single;
mod vllm;
mod web;

use std::path::PathBuf;

use anyhow::Context;
use atelier::fetch;

use crate::ours::Ours;
use crate::peer::Peer;
use crate::row::Row;

/// A part of the table.
type Section = fn(&Bench, &Ours) -> anyhow::Result<Vec<Row>>;

/// What all sections work with.
struct Bench {
    cache: PathBuf,
    /// The default model, as shipped.
    model: PathBuf,
    /// The same in the peer's best format.
    best: PathBuf,
    peer: Peer,
    /// Measurements of each figure; their median counts.
    runs: usize,
    quick: bool,
    /// Whether vLLM is installed and measured too.
    vllm: bool,
}

fn main() -> anyhow::Result<()> {
    let has = |wanted: &str| std::env::args().any(|arg| arg == wanted);
    let quick = has("--quick");
    let cache = fetch::cache_folder(None)?;
    let model = fetch::default_model(&cache)?;
    let peer = Peer::new(&cache).context("llama.cpp")?;
    let best = peer.best_quant(&model)?;
    let runs = if quick { 1 } else { 5 };
    let bench = Bench { cache, model, best, peer, runs, quick, vllm: has("--vllm") };
    let all =
        !["products", "perplexity", "single", "web", "batches", "prompts", "profile"].into_iter().any(has);
    if all || has("products") {
        print(&product::rows(&bench)?);
    }
    if all || has("perplexity") {
        print(&perplexity::rows(&bench)?);
    }
    let ours = Ours::start(&bench.model)?;
    let single: (_, Section) = ("single", single::rows);
    for (name, rows) in [
        single,
        ("web", web::rows),
        ("batches", batches::rows),
        ("prompts", batches::prompts),
        ("profile", profile::rows),
    ] {
        if all || has(name) {
            print(&rows(&bench, &ours)?);
        }
    }
    Ok(())
}

fn print(rows: &[Row]) {
    for row in rows {
        println!("{}", row.json());
    }
}
