//! Training in figures: beside HF peft on PyTorch, and joint beside one user after another.
//!
//! `cargo xtask bench training [--quick] [--json]` runs it and writes `benches/RESULTS.md`. One JSON object a line. Both
//! sides of a row take turns within one run, on the same examples. The floor is what operations over peak allow on a
//! two-core Zen 4 (392 GFLOP/s in BF16, 0.54 GFLOP a token with the whole loss). `cargo bench --bench training -- rate`
//! prints one section alone: `rate`, `joint`, `users` or `service`.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark")]

#[path = "../engine/events.rs"]
mod events;
mod histories;
mod peer;
#[path = "../engine/progress.rs"]
mod progress;
#[path = "../engine/row.rs"]
#[expect(dead_code, reason = "the engine's rows say more")]
mod row;
mod service;

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::ensure;
use atelier::fetch;
use atelier::service::cores;
use indicatif::ProgressBar;
use model::{BaseModel, LoadOptions, Loaded};
use text::Tokenizer;
use train::{Control, Products, Recipe, StepReport, TrainJob, Verdict, train_jointly};
use types::Example;

use crate::peer::Peft;
use crate::progress::progress;
use crate::row::{Goal, Row};

const USERS: usize = 16;

fn main() -> anyhow::Result<()> {
    let has = |wanted: &str| std::env::args().any(|arg| arg == wanted);
    let all = !["rate", "joint", "users", "service"].into_iter().any(has);
    let runs = if has("--quick") { 1 } else { 5 };
    let cache = fetch::cache_folder(None)?;
    let path = fetch::default_model(&cache)?;
    let Loaded { model: base, tokenizer } = model::load(&path, LoadOptions { max_context: Some(2048) })?;
    let bench = Bench { base, pool: rayon::ThreadPoolBuilder::new().build()? };
    let threads = cores();
    if all || has("rate") {
        let mut peer = Peft::start(&path, threads)?;
        print(&rate(&bench, &mut peer, runs)?);
    }
    if all || has("joint") {
        print(&joint(&bench, if has("--quick") { 4 } else { 16 }, runs)?);
    }
    if !(all || has("users") || has("service")) {
        return Ok(());
    }
    let histories = histories::users(&cache, USERS)?;
    if all || has("service") {
        let seconds = if has("--quick") { 10 } else { 20 };
        print(&service::rows(&histories, seconds, runs.min(3))?);
    }
    if all || has("users") {
        let tokenizer = tokenizer.map(|files| Tokenizer::new(&files)).transpose()?;
        let tokenizer = tokenizer.ok_or_else(|| anyhow::anyhow!("the model has no tokenizer"))?;
        let mut users = histories::examples(&histories, &tokenizer)?;
        if has("--quick") {
            // Some of each kind.
            users = users.into_iter().step_by(USERS / 4).collect();
            users.iter_mut().for_each(|items| items.truncate(12));
        }
        let mut peer = Peft::start(&path, threads)?;
        print(&users_per_hour(&bench, &mut peer, &users, 1)?);
    }
    Ok(())
}

fn print(rows: &[Row]) {
    for row in rows {
        println!("{}", row.json());
    }
}

/// Moves the bar on.
struct Watched<'a>(&'a ProgressBar);

impl Control for Watched<'_> {
    fn step(&mut self, _: usize, _: StepReport) -> Verdict {
        self.0.tick();
        ControlFlow::Continue(())
    }
}

/// The base, and the threads that train on it, as the worker has them.
struct Bench {
    base: BaseModel,
    pool: rayon::ThreadPool,
}

/// Seconds of a joint training, one of those that `bar` counts.
fn seconds(bench: &Bench, recipe: &Recipe, users: &[Vec<Example>], bar: &ProgressBar) -> anyhow::Result<f64> {
    let job = |examples| TrainJob { recipe, start: None, examples, resume: None };
    let jobs: Vec<TrainJob<'_>> = users.iter().map(|examples| job(examples.as_slice())).collect();
    let start = Instant::now();
    let ends = bench.pool.install(|| train_jointly(&bench.base, &jobs, &mut Watched(bar)));
    let seconds = start.elapsed().as_secs_f64();
    bar.inc(1);
    for end in ends {
        end?;
    }
    Ok(seconds)
}

/// An example of arbitrary tokens.
fn example(seed: u32, len: u32, answer_start: usize) -> Example {
    Example { tokens: (0..len).map(|at| (at * 37 + seed * 101) % 40_000 + 20).collect(), answer_start }
}

/// torch's names of what peft trains in.
const HALF: &str = "bfloat16";
const SINGLE: &str = "float32";
/// Where peft is slower by this factor in bfloat16 than in float32, as on CPUs without instructions for it, it is measured
/// by a single short step, and in float32 wherever there is but one side.
const HOPELESS: f64 = 3.0;

/// The number format in which peft is faster here, and the two rates in tokens per second by a single step of one example.
fn faster(peer: &mut Peft) -> anyhow::Result<(&'static str, f64, f64)> {
    let recipe = Recipe { epochs: 1, batch: 1, share_prefix: false, ..Recipe::oppu() };
    let examples = [example(0, 128, 1)];
    let mut rate = |dtype| anyhow::Ok(128.0 / peer.train(dtype, &recipe, &examples)?);
    // The first one loads and warms.
    rate(SINGLE)?;
    let (single, half) = (rate(SINGLE)?, rate(HALF)?);
    Ok((if half > single { HALF } else { SINGLE }, half, single))
}

/// Two steps of 4 x 256 tokens with the whole loss, and what they add to the memory.
fn rate(bench: &Bench, peer: &mut Peft, runs: usize) -> anyhow::Result<Vec<Row>> {
    let users = [(0..4).map(|seed| example(seed, 256, 1)).collect::<Vec<_>>()];
    let recipe = Recipe { epochs: 2, batch: 4, share_prefix: false, ..Recipe::oppu() };
    let fast = Recipe { products: Products::fastest(), ..recipe.clone() };
    let tokens = 2.0 * 4.0 * 256.0;
    let before = status_mib("VmRSS:");
    let (_, half, single) = faster(peer)?;
    let hopeless = half * HOPELESS < single;
    let (mut ours, mut ours_single, mut singles) = (Vec::new(), Vec::new(), Vec::new());
    let mut halves = if hopeless { vec![half] } else { Vec::new() };
    let bar = progress("rate", runs * if hopeless { 3 } else { 4 });
    for _ in 0..runs {
        ours.push(tokens / seconds(bench, &fast, &users, &bar)?);
        if !hopeless {
            halves.push(tokens / peer.train(HALF, &recipe, &users[0])?);
            bar.inc(1);
        }
        ours_single.push(tokens / seconds(bench, &recipe, &users, &bar)?);
        singles.push(tokens / peer.train(SINGLE, &recipe, &users[0])?);
        bar.inc(1);
    }
    bar.finish();
    let added = (status_mib("VmHWM:") - before) / 1024.0;
    let name =
        |peer: &str| format!("training, rank 8 on q and v, 4 x 256, whole loss, tok/s (peer: peft {peer})");
    let bf16 = Row::against(name("bf16"), &ours, &halves).floor(725.0).goal(Goal::AtLeast(1.4));
    let why = "this CPU has no bfloat16 instructions: peft's bf16 measured by one step of 128 tokens";
    Ok(vec![
        if hopeless { bf16.note(why) } else { bf16 },
        Row::against(name("float32"), &ours_single, &singles).floor(725.0).goal(Goal::AtLeast(1.4)),
        Row::against("memory added by training 4 x 256, GiB (other: the 0.8 allowed)", &[added], &[0.8])
            .goal(Goal::AtMost(1.0)),
    ])
}

/// Sixteen users with some short items each, at once and one after another.
fn joint(bench: &Bench, count: u32, runs: usize) -> anyhow::Result<Vec<Row>> {
    let items =
        |user: u32| (0..count).map(move |at| example(user * 16 + at, 24 + (user + at) % 16, 18)).collect();
    let users: Vec<Vec<Example>> = (0..USERS as u32).map(items).collect();
    let recipe = Recipe { batch: 4, products: Products::fastest(), ..Recipe::oppu() };
    let (mut together, mut apart) = (Vec::new(), Vec::new());
    let bar = progress("joint", runs * (1 + USERS));
    for _ in 0..runs {
        together.push(3600.0 * USERS as f64 / seconds(bench, &recipe, &users, &bar)?);
        let each = users.iter().map(|user| seconds(bench, &recipe, std::slice::from_ref(user), &bar));
        apart.push(3600.0 * USERS as f64 / each.sum::<anyhow::Result<f64>>()?);
    }
    bar.finish();
    let name = format!(
        "joint training, 16 users with {count} short items, batch 4, users/hour (other: one after another)"
    );
    Ok(vec![Row::paired(name, &together, &apart).goal(Goal::AtLeast(1.5))])
}

/// Real histories with OPPU's recipe, all at once here and one after another there.
fn users_per_hour(
    bench: &Bench,
    peer: &mut Peft,
    users: &[Vec<Example>],
    runs: usize,
) -> anyhow::Result<Vec<Row>> {
    ensure!(!users.is_empty(), "no histories");
    let recipe = Recipe { products: Products::fastest(), ..Recipe::oppu() };
    let (dtype, ..) = faster(peer)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let bar = progress("users", runs * (1 + users.len()));
    for _ in 0..runs {
        ours.push(3600.0 * users.len() as f64 / seconds(bench, &recipe, users, &bar)?);
        let mut sum = 0.0;
        for user in users {
            sum += peer.train(dtype, &recipe, user)?;
            bar.inc(1);
        }
        theirs.push(3600.0 * users.len() as f64 / sum);
    }
    bar.finish();
    let count = users.len();
    let name =
        format!("{count} real histories, OPPU's recipe, users/hour (peer: peft {dtype}, one after another)");
    Ok(vec![Row::against(name, &ours, &theirs).goal(Goal::AtLeast(3.0))])
}

fn status_mib(field: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|kib| kib.parse::<f64>().ok());
    kib.unwrap_or(f64::NAN) / 1024.0
}
