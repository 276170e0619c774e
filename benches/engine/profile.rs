//! Where a step's time goes: each phase's share, and its products beside what the same kernel and the memory do at best.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Context;
use atelier::service::cores;
use kernels::{Input, Layer, Means, NoAdapters, PageBuffer, Scratch, Team, Workers, fused_linear, isa};
use model::{BLOCK_LEN, BatchInput, KvPool, Logits, Phase, PhaseTime, Precision, Runtime};
use peft::{AdapterBatch, Lease, Storage};
use types::Site;

use crate::Bench;
use crate::adapters::{self, weights};
use crate::ours::Ours;
use crate::progress::progress;
use crate::row::{Row, median};

/// What each phase took.
type Times = [PhaseTime; Phase::ALL.len()];

const USERS: usize = 16;
/// Where the steps that count begin and end, in tokens of a sequence.
const STEPS: std::ops::Range<usize> = 24..72;
/// A buffer that no cache holds.
const STREAM_BYTES: usize = 512 << 20;

/// The rows: batches of one and of sixteen, without adapters and with one each on all sites.
pub(crate) fn rows(bench: &Bench, ours: &Ours) -> anyhow::Result<Vec<Row>> {
    let shape = ours.base.shape();
    let weights: Vec<_> = (0..USERS as u64).map(|seed| weights(&shape, seed, &Site::ALL)).collect();
    let leases = adapters::leases(&shape, &weights, Storage::Int8)?;
    let cases = [("1 row", 1, &[][..]), ("16 rows", USERS, &[]), ("16 rows with adapters", USERS, &leases)];
    let progress = progress("profile", bench.runs * cases.len());
    let team = Team::new(cores()).context("a team")?;
    let (mut cached, mut stream) = (Vec::new(), Vec::new());
    let mut times: Vec<Vec<Times>> = vec![Vec::new(); cases.len()];
    for _ in 0..bench.runs {
        cached.push(at_best(ours, &team)?);
        stream.push(bandwidth(&team));
        for (times, (_, rows, leases)) in times.iter_mut().zip(&cases) {
            times.push(steps(ours, *rows, leases)?);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    let (cached, stream) = (median(&cached).context("no run")?, median(&stream).context("no run")?);
    let mut rows = vec![];
    for (times, (name, batch, _)) in times.iter().zip(cases) {
        let of = |of: &dyn Fn(&Times) -> f64| times.iter().map(of).collect::<Vec<_>>();
        let whole = |times: &Times| times.iter().map(|time| time.whole.as_secs_f64()).sum::<f64>();
        rows.push(Row::alone(
            format!("a step of {name}, ms"),
            &of(&|times| whole(times) * 1e3 / STEPS.len() as f64),
        ));
        for (at, phase) in Phase::ALL.into_iter().enumerate() {
            let share = of(&|times| times[at].whole.as_secs_f64() / whole(times) * 100.0);
            let row = Row::alone(format!("a step of {name}: {}, % of it", title(phase)), &share);
            let Some((values, bytes)) = products(ours, phase) else {
                rows.push(row);
                continue;
            };
            let seconds =
                of(&|times| (times[at].whole - times[at].preparing).as_secs_f64() / STEPS.len() as f64);
            let preparing = of(&|times| times[at].preparing.as_secs_f64() / whole(times) * 100.0);
            let (seconds, preparing) =
                (median(&seconds).context("no run")?, median(&preparing).context("no run")?);
            let (rate, read) = (2.0 * (batch * values) as f64 / seconds / 1e9, bytes as f64 / seconds / 1e9);
            rows.push(row.note(&format!(
                "{preparing:.1} of it prepare rows; products {rate:.0} GOP/s of {cached:.0} in the cache, {read:.0} GB/s of {stream:.0}"
            )));
        }
    }
    Ok(rows)
}

fn title(phase: Phase) -> &'static str {
    match phase {
        Phase::Embedding => "embeddings and checks",
        Phase::Qkv => "q, k and v",
        Phase::Attention => "rotation and attention",
        Phase::O => "o",
        Phase::GateUp => "gate and up",
        Phase::Down => "down",
        Phase::Head => "output layer",
    }
}

/// Weights that a phase multiplies with, and the bytes they take.
fn products(ours: &Ours, phase: Phase) -> Option<(usize, usize)> {
    let sites: &[Site] = match phase {
        Phase::Embedding | Phase::Attention => return None,
        Phase::Qkv => &[Site::Q, Site::K, Site::V],
        Phase::O => &[Site::O],
        Phase::GateUp => &[Site::Gate, Site::Up],
        Phase::Down => &[Site::Down],
        Phase::Head => {
            let head = &ours.base.head().weight;
            return Some((head.rows() * head.cols(), head.bytes()));
        }
    };
    let weights = ours
        .base
        .blocks()
        .iter()
        .flat_map(|block| sites.iter().map(|site| &block.linears[site.index()].weight));
    Some(weights.fold((0, 0), |(values, bytes), weight| {
        (values + weight.rows() * weight.cols(), bytes + weight.bytes())
    }))
}

/// A token for each of `rows` sequences, step after step.
fn steps(ours: &Ours, rows: usize, leases: &[Lease]) -> anyhow::Result<Times> {
    let each = STEPS.end.div_ceil(BLOCK_LEN) as u32;
    let mut runtime = Runtime::new(cores(), Precision::Fast).context("threads")?;
    let mut kv = KvPool::new(ours.base.config(), rows * each as usize, Precision::Fast)?;
    let (mut input, mut adapters, mut logits) =
        (BatchInput::default(), AdapterBatch::default(), Logits::default());
    for position in 0..STEPS.end {
        if position == STEPS.start {
            runtime.watch();
        }
        input.clear();
        adapters.clear();
        for row in 0..rows {
            let first = row as u32 * each;
            let blocks: Vec<u32> = (first..first + each).collect();
            let token = (1_000 + 37 * position + row) as u32;
            input.push(&[token], position, &blocks[..position / BLOCK_LEN + 1], true);
            adapters.push(leases.get(row).map(|lease| &lease.adapter), 1);
        }
        ours.base.forward(&mut runtime, &input, &mut kv, &adapters, &mut logits)?;
    }
    runtime.times().context("nothing was measured")
}

/// GOP/s of the kernel at sixteen rows with a matrix that stays in the cache: the first layer's gate.
fn at_best(ours: &Ours, team: &Team) -> anyhow::Result<f64> {
    let weight = &ours.base.blocks().first().context("a block")?.linears[Site::Gate.index()].weight;
    let (n, k) = (weight.rows(), weight.cols());
    let (x, mut y) = (vec![0.5; USERS * k], vec![0.0; USERS * n]);
    let means = Means { isa: isa(), workers: team, precision: Precision::Fast };
    let mut scratch = Scratch::default();
    let mut best = f64::INFINITY;
    for _ in 0..2_000 {
        let start = Instant::now();
        let layer = Layer { weight, bias: None, adapters: &NoAdapters, y: &mut y, add: false };
        fused_linear(&mut scratch, means, Input::Plain(&x), &mut [layer]);
        best = best.min(start.elapsed().as_secs_f64());
    }
    black_box(&y);
    Ok(2.0 * (USERS * n * k) as f64 / best / 1e9)
}

/// GB/s of reading what no cache holds, on all threads.
fn bandwidth(team: &Team) -> f64 {
    let mut buffer = PageBuffer::zeroed(STREAM_BYTES);
    buffer.f32_mut().fill(1.0);
    let parts = 64 * team.threads();
    let start = Instant::now();
    team.run(parts, &|part| {
        let values = buffer.f32();
        let own = &values[values.len() * part / parts..values.len() * (part + 1) / parts];
        let mut sums = [0.0_f32; 64];
        for values in own.as_chunks::<64>().0 {
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
        black_box(sums);
    });
    STREAM_BYTES as f64 / start.elapsed().as_secs_f64() / 1e9
}
