//! Training in figures: beside HF peft on PyTorch, and joint beside one user after another.
//!
//! `cargo xtask bench training [--quick] [--json]` runs it and writes `benches/RESULTS.md`. One JSON object a line. Both
//! sides of a row take turns within one run, on the same examples. The floor is what operations over peak allow on a
//! two-core Zen 4 (392 GFLOP/s in BF16, 0.54 GFLOP a token with the whole loss). `cargo bench --bench training -- rate`
//! prints one section alone: `rate`, `joint` or `users`.
#![expect(clippy::print_stdout, reason = "a benchmark")]

mod histories;
mod peer;
#[path = "../engine/row.rs"]
#[expect(dead_code, reason = "the engine's rows say more")]
mod row;

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::ensure;
use atelier::fetch;
use model::{BaseModel, LoadOptions, Loaded};
use text::Tokenizer;
use train::{Control, Recipe, StepReport, TrainJob, Verdict, train_jointly};
use types::Example;

use crate::peer::Peft;
use crate::row::{Goal, Row};

const USERS: usize = 16;

fn main() -> anyhow::Result<()> {
    let has = |wanted: &str| std::env::args().any(|arg| arg == wanted);
    let all = !["rate", "joint", "users"].into_iter().any(has);
    let runs = if has("--quick") { 1 } else { 5 };
    let cache = fetch::cache_folder(None)?;
    let path = fetch::default_model(&cache)?;
    let Loaded { model: base, tokenizer } = model::load(&path, LoadOptions { max_context: Some(2048) })?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    if all || has("rate") {
        let mut peer = Peft::start(&path, threads)?;
        print(&rate(&base, &mut peer, runs)?);
    }
    if all || has("joint") {
        print(&joint(&base, runs)?);
    }
    if all || has("users") {
        let tokenizer = tokenizer.map(|files| Tokenizer::new(&files)).transpose()?;
        let tokenizer = tokenizer.ok_or_else(|| anyhow::anyhow!("the model has no tokenizer"))?;
        let users = histories::users(&cache, &tokenizer, USERS)?;
        let mut peer = Peft::start(&path, threads)?;
        print(&users_per_hour(&base, &mut peer, &users, runs.min(3))?);
    }
    Ok(())
}

fn print(rows: &[Row]) {
    for row in rows {
        println!("{}", row.json());
    }
}

struct Quiet;

impl Control for Quiet {
    fn step(&mut self, _: usize, _: StepReport) -> Verdict {
        ControlFlow::Continue(())
    }
}

/// Seconds of a joint training.
fn seconds(base: &BaseModel, recipe: &Recipe, users: &[Vec<Example>]) -> anyhow::Result<f64> {
    let job = |examples| TrainJob { recipe, start: None, examples, resume: None };
    let jobs: Vec<TrainJob<'_>> = users.iter().map(|examples| job(examples.as_slice())).collect();
    let start = Instant::now();
    let ends = train_jointly(base, &jobs, &mut Quiet);
    let seconds = start.elapsed().as_secs_f64();
    for end in ends {
        end?;
    }
    Ok(seconds)
}

/// An example of arbitrary tokens.
fn example(seed: u32, len: u32, answer_start: usize) -> Example {
    Example { tokens: (0..len).map(|at| (at * 37 + seed * 101) % 40_000 + 20).collect(), answer_start }
}

/// Two steps of 4 x 256 tokens with the whole loss, and what they add to the memory.
fn rate(base: &BaseModel, peer: &mut Peft, runs: usize) -> anyhow::Result<Vec<Row>> {
    let users = [(0..4).map(|seed| example(seed, 256, 1)).collect::<Vec<_>>()];
    let recipe = Recipe { epochs: 2, batch: 4, share_prefix: false, ..Recipe::oppu() };
    let tokens = 2.0 * 4.0 * 256.0;
    let before = status_mib("VmRSS:");
    let (mut ours, mut singles, mut halves) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        ours.push(tokens / seconds(base, &recipe, &users)?);
        halves.push(tokens / peer.train("bfloat16", &recipe, &users[0])?);
        singles.push(tokens / peer.train("float32", &recipe, &users[0])?);
    }
    let added = (status_mib("VmHWM:") - before) / 1024.0;
    let name =
        |peer: &str| format!("training, rank 8 on q and v, 4 x 256, whole loss, tok/s (peer: peft {peer})");
    Ok(vec![
        Row::against(name("bf16"), &ours, &halves).floor(725.0).goal(Goal::AtLeast(1.4)),
        Row::against(name("float32"), &ours, &singles).floor(725.0),
        Row::alone("memory added by training 4 x 256, GiB (goal 0.8 at most)", &[added]),
    ])
}

/// Sixteen users with sixteen short items each, at once and one after another.
fn joint(base: &BaseModel, runs: usize) -> anyhow::Result<Vec<Row>> {
    let items =
        |user: u32| (0..16).map(move |at| example(user * 16 + at, 24 + (user + at) % 16, 18)).collect();
    let users: Vec<Vec<Example>> = (0..USERS as u32).map(items).collect();
    let recipe = Recipe { batch: 4, ..Recipe::oppu() };
    let (mut together, mut apart) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        together.push(3600.0 * USERS as f64 / seconds(base, &recipe, &users)?);
        let each = users.iter().map(|user| seconds(base, &recipe, std::slice::from_ref(user)));
        apart.push(3600.0 * USERS as f64 / each.sum::<anyhow::Result<f64>>()?);
    }
    let name = "joint training, 16 users with 16 short items, batch 4, users/hour (other: one after another)";
    Ok(vec![Row::paired(name, &together, &apart).goal(Goal::AtLeast(1.5))])
}

/// Real histories with OPPU's recipe, all at once here and one after another there.
fn users_per_hour(
    base: &BaseModel,
    peer: &mut Peft,
    users: &[Vec<Example>],
    runs: usize,
) -> anyhow::Result<Vec<Row>> {
    ensure!(!users.is_empty(), "no histories");
    let recipe = Recipe::oppu();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        ours.push(3600.0 * users.len() as f64 / seconds(base, &recipe, users)?);
        let mut sum = 0.0;
        for user in users {
            sum += peer.train("bfloat16", &recipe, user)?;
        }
        theirs.push(3600.0 * users.len() as f64 / sum);
    }
    let name = "16 real histories, OPPU's recipe, users/hour (peer: peft bf16, one after another)";
    Ok(vec![Row::against(name, &ours, &theirs).goal(Goal::AtLeast(3.0))])
}

fn status_mib(field: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|kib| kib.parse::<f64>().ok());
    kib.unwrap_or(f64::NAN) / 1024.0
}
