//! Sixteen users over HTTP with an adapter each, beside llama-server; and what HTTP itself costs.

use anyhow::Context;
use peft::{LoraWeights, Storage};
use types::Site;

use crate::Bench;
use crate::adapters::{self, gguf, weights};
use crate::cpu;
use crate::load::{self, Arrival, Load, Popularity, Prompts, Report, Target};
use crate::ours::{Job, Ours};
use crate::plot::{self, Bar};
use crate::progress::progress;
use crate::row::{Goal, Row};
use crate::server::Server;
use crate::vllm::{Vllm, number_format};

const USERS: usize = 16;
const PROMPT: usize = 64;
const ANSWER: u32 = 64;
/// Requests per second of the Poisson arrivals: about what llama-server can just do.
const RATE: f64 = 1.0;

/// What tokio calls the threads of its runtime; here they serve HTTP.
const IO_THREADS: &str = "tokio-rt-worker";

/// Where the seeds of the prompts for the adapters in bfloat16 begin, and those of the popularities.
const WIDE: u64 = 1 << 32;
const POPULARITIES: u64 = 2 << 32;

/// Everything asked at once: a request for each user.
const CROWD: Load = Load {
    users: USERS,
    requests: USERS,
    popularity: Popularity::Distinct,
    arrival: Arrival::Closed,
    prompt: PROMPT,
    answer: ANSWER,
};

/// The rows, and the plot beside them.
pub(crate) fn rows(bench: &Bench, ours: &Ours) -> anyhow::Result<Vec<Row>> {
    let shape = ours.base.shape();
    let adapters: Vec<LoraWeights> =
        (0..USERS as u64).map(|seed| weights(&shape, seed, &Site::ALL)).collect();
    let folder = tempfile::tempdir().context("a folder for the adapters")?;
    let mut files = Vec::new();
    for (number, weights) in adapters.iter().enumerate() {
        let file = folder.path().join(format!("{number}.gguf"));
        std::fs::write(&file, gguf(weights, &shape)?).context("cannot write an adapter")?;
        files.push(file);
    }
    let server = Server::start(ours, &adapters, Storage::Int8)?;
    let wide = Server::start(ours, &adapters, Storage::Bf16)?;
    let (same, best) =
        (bench.peer.serve(&bench.model, &files, USERS)?, bench.peer.serve(&bench.best, &files, USERS)?);
    let targets = [
        Target::Atelier(server.address),
        Target::LlamaServer(same.address),
        Target::LlamaServer(best.address),
    ];
    let prompts = Prompts::new(&ours.tokenizer)?;
    let mut rows = crowd(bench, ours, &adapters, targets, Target::Atelier(wide.address), &prompts)?;
    rows.extend(popularities(bench, targets, &prompts)?);
    Ok(rows)
}

/// The sixteen different adapters, side by side.
fn crowd(
    bench: &Bench,
    ours: &Ours,
    adapters: &[LoraWeights],
    targets: [Target; 3],
    wide: Target,
    prompts: &Prompts,
) -> anyhow::Result<Vec<Row>> {
    let leases = adapters::leases(&ours.base.shape(), adapters, Storage::Int8)?;
    let progress = progress("16 users over HTTP", (bench.runs + 1) * USERS * (targets.len() + 1));
    let mut reports: [Vec<Report>; 3] = Default::default();
    let mut in_bfloat16 = Vec::new();
    let mut vllm = bench.vllm.then(|| Vllm::start(bench, ours, adapters)).transpose()?;
    let (mut alone, mut batched, mut serving) = (Vec::new(), Vec::new(), Vec::new());
    for target in targets.into_iter().chain([wide]) {
        // Adapters are loaded and pages touched.
        load::run(target, &Load { answer: 2, ..CROWD }, prompts, u64::MAX, &progress)?;
    }
    for run in 0..bench.runs as u64 {
        let busy = cpu::named(IO_THREADS);
        let report = load::run(targets[0], &CROWD, prompts, run, &progress)?;
        serving.push(report.share(cpu::named(IO_THREADS) - busy));
        reports[0].push(report);
        // Other prompts: the engine is the same, and would know these by now.
        in_bfloat16.push(load::run(wide, &CROWD, prompts, WIDE + run, &progress)?);
        let job = |lease| Job { prompt: PROMPT, answer: ANSWER, adapter: Some(lease) };
        alone.push(ours.run(leases.iter().cloned().map(job).collect())?.wall());
        for (reports, target) in reports.iter_mut().zip(targets).skip(1) {
            reports.push(load::run(target, &CROWD, prompts, run, &progress)?);
        }
        if let Some(vllm) = &mut vllm {
            batched.push(vllm.measure()?);
        }
    }
    progress.finish_and_clear();
    let speeds = reports.each_ref().map(|reports| of(reports, Report::throughput));
    let waits = reports.each_ref().map(|reports| of(reports, |report| report.first_token(0.99)));
    let gaps = reports.each_ref().map(|reports| of(reports, |report| report.gap(0.99)));
    let walls = of(&reports[0], |report| report.wall);
    let driver = of(&reports[0], |report| report.share(report.driver));
    let wide = of(&in_bfloat16, Report::throughput);
    let name = "16 users, 16 adapters (rank 8, all seven sites), 64 + 64 tokens, HTTP";
    let first = format!("{name}: first token p99, s (ratio: its time / ours)");
    let best = format!("{name}: first token p99, s, its best quant (ratio: its time / ours)");
    let between = format!("{name}: between tokens p99, ms, same file (ratio: its time / ours)");
    let cost = format!("{name}: wall s / engine alone, s (ratio: share of HTTP, tokenising, streaming)");
    let busy = |who: &str| format!("{name}: processor time of {who}, % of all cores'");
    let other = Row::against(
        format!("{name}: ours / vLLM on CPU, {}, without HTTP, tok/s", number_format()),
        &speeds[0],
        &batched,
    )
    .goal(Goal::AtLeast(6.0));
    let other = if bench.vllm { other } else { other.note("not measured: it takes --vllm") };
    Ok(vec![
        Row::against(format!("{name}: same file, tok/s"), &speeds[0], &speeds[1]).goal(Goal::AtLeast(10.0)),
        Row::against(format!("{name}: ours / its best quant, tok/s"), &speeds[0], &speeds[2])
            .goal(Goal::AtLeast(7.0)),
        Row::against(format!("{name}: same file, our adapters in bfloat16, tok/s"), &wide, &speeds[1])
            .goal(Goal::AtLeast(10.0)),
        Row::against(
            format!("{name}: ours, adapters in bfloat16 / its best quant, tok/s"),
            &wide,
            &speeds[2],
        )
        .goal(Goal::AtLeast(7.0)),
        other,
        Row::against(first, &waits[0], &waits[1]).inverse().goal(Goal::AtLeast(10.0)),
        Row::against(best, &waits[0], &waits[2]).inverse(),
        Row::against(between, &gaps[0], &gaps[1]).inverse(),
        Row::paired(cost, &walls, &alone).share().goal(Goal::AtMost(0.03)),
        Row::alone(busy("the server's threads beside the model's"), &serving),
        Row::alone(busy("the load driver"), &driver),
    ])
}

fn of(reports: &[Report], figure: impl Fn(&Report) -> f64) -> Vec<f64> {
    reports.iter().map(figure).collect()
}

/// Both servers under every popularity and arrival, once each; also drawn.
fn popularities(bench: &Bench, targets: [Target; 3], prompts: &Prompts) -> anyhow::Result<Vec<Row>> {
    let (requests, rate) = if bench.quick { (4, 4.0 * RATE) } else { (2 * USERS, RATE) };
    let arrivals = [("closed loop", Arrival::Closed), ("Poisson", Arrival::Poisson(rate))];
    let progress = progress("popularities", requests * 2 * Popularity::ALL.len() * arrivals.len());
    let (mut rows, mut throughput) = (Vec::new(), Vec::new());
    let (mut waits, mut gaps) = (Vec::new(), Vec::new());
    // Both are asked the same at the same times, and no load repeats what an earlier one has left in our prefix cache.
    let mut seeds = POPULARITIES..;
    let [atelier, same, _] = targets;
    for (arrival_name, arrival) in arrivals {
        for popularity in Popularity::ALL {
            let load = Load { requests, popularity, arrival, ..CROWD };
            let seed = seeds.next().context("a seed")?;
            let ours = load::run(atelier, &load, prompts, seed, &progress)?;
            let peer = load::run(same, &load, prompts, seed, &progress)?;
            let label = format!("{}, {arrival_name}", popularity.name());
            throughput.push(Bar { label: label.clone(), ours: ours.throughput(), peer: peer.throughput() });
            let (wait, peer_wait) = (ours.first_token(0.5), peer.first_token(0.5));
            waits.push(Bar { label: label.clone(), ours: wait, peer: peer_wait });
            let (gap, peer_gap) = (ours.gap(0.5), peer.gap(0.5));
            gaps.push(Bar { label: label.clone(), ours: gap, peer: peer_gap });
            let name = |what: &str| format!("16 users over HTTP, {label}: {what}");
            let against = |what: &str, ours, peer| Row::against(name(what), &[ours], &[peer]);
            rows.push(against("tok/s", ours.throughput(), peer.throughput()));
            for (what, ours, peer) in [
                ("first token p50, s", wait, peer_wait),
                ("first token p99, s", ours.first_token(0.99), peer.first_token(0.99)),
                ("between tokens p50, ms", gap, peer_gap),
                ("between tokens p99, ms", ours.gap(0.99), peer.gap(0.99)),
            ] {
                rows.push(against(&format!("{what} (ratio: its time / ours)"), ours, peer).inverse());
            }
        }
    }
    progress.finish_and_clear();
    let panels = [
        ("Throughput, generated tokens per second (more is better)", throughput),
        ("Time to first token, median, seconds (less is better)", waits),
        ("Time between tokens, median, milliseconds (less is better)", gaps),
    ];
    plot::write(&panels).context("cannot write the plot")?;
    Ok(rows)
}
