//! Adapters in three tiers, in figures: each row is a goal of the table in issue 4, both of its sides in one run.
//!
//! `cargo xtask bench adapters [--quick] [--json]` runs it and writes `benches/RESULTS.md`. One JSON object a line. The
//! default model, adapters on q and v, batches of sixteen; the sides of a row take turns. `cargo bench --bench adapters --
//! cold` prints one section alone: `zipf`, `ranks`, `cold`, `first`, `publish` or `idle`.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark")]

mod idle;
#[expect(dead_code, reason = "the engine's bench uses the rest")]
#[path = "../engine/row.rs"]
mod row;
mod traffic;
mod users;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use adapters::{AdapterCache, CacheSettings};
use anyhow::Context;
use atelier::fetch;
use atelier::service::cores;
use engine::{Engine as _, ModelEngine, Settings};
use model::{BaseModel, LoadOptions};
use peft::{PagePool, Precision};
use store::Store;
use types::{DEFAULT_MAX_RANK, SystemClock};

use crate::row::{Goal, Row, median, percentile};
use crate::traffic::{Traffic, ask};
use crate::users::{publish, publish_after, user, weights};

/// Sequences in a batch.
const BATCH: usize = 16;
/// Rank of the adapters where nothing else is said.
const RANK: usize = 8;
/// Whose turn it is within one run, ours or not: a machine that grows faster or slower meanwhile does so for both sides.
const TURNS: [bool; 4] = [true, false, false, true];

/// What all rows work with.
struct Bench {
    base: Arc<BaseModel>,
    engine: ModelEngine,
    store: Store,
    /// Measurements of each figure; their median counts.
    runs: usize,
    quick: bool,
}

impl Bench {
    async fn new(quick: bool, folder: &Path) -> anyhow::Result<Self> {
        let path = fetch::default_model(&fetch::cache_folder(None)?)?;
        let loaded = model::load(&path, LoadOptions { max_context: Some(2048) })?;
        let base = Arc::new(loaded.model);
        let settings = Settings {
            batch: BATCH,
            queue: 256,
            step_tokens: 256,
            kv_bytes: 512 << 20,
            prefix_cache: true,
            guest_floor: 0.2,
            threads: cores(),
            precision: Precision::Fast,
            eos: Vec::new(),
        };
        let engine = ModelEngine::start(Arc::clone(&base), settings)?;
        tokio::spawn(engine.carry());
        let store = Store::open(folder, Arc::new(SystemClock)).await?;
        Ok(Self { base, engine, store, runs: if quick { 1 } else { 5 }, quick })
    }

    /// A cache with host memory for `host` adapters of the common rank and slots for `device`.
    fn cache(&self, host: usize, device: usize) -> anyhow::Result<AdapterCache> {
        let page_bytes =
            PagePool::page_bytes_for(&self.base.shape(), Precision::Fast.into(), DEFAULT_MAX_RANK);
        let one = users::built(&self.base, RANK)?;
        let pages = one.pages(page_bytes).context("a tensor is larger than a page")?;
        let engine = self.engine.clone();
        let settings = CacheSettings {
            host_bytes: one.bytes() * host,
            device_bytes: page_bytes * pages * device,
            busy: Arc::new(move || engine.stats().running > 0),
            ..CacheSettings::new(Precision::Fast, 0)
        };
        Ok(AdapterCache::new(self.store.clone(), self.base.clone(), settings))
    }

    fn traffic(&self, cache: &AdapterCache) -> Traffic {
        Traffic { cache: cache.clone(), engine: self.engine.clone() }
    }

    /// The figures of both sides, each of a run that is the mean of two turns. `measure` is told whose turn it is, and a
    /// number that is the same once on each side.
    async fn in_turns(
        &self,
        measure: impl AsyncFn(bool, u64) -> anyhow::Result<f64>,
    ) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
        let mut sides = [Vec::new(), Vec::new()];
        for run in 0..self.runs as u64 {
            let mut sums = [0.0; 2];
            let mut times = [0; 2];
            for ours in TURNS {
                let side = usize::from(!ours);
                sums[side] += measure(ours, run * 2 + times[side]).await?;
                times[side] += 1;
            }
            for (side, sum) in sides.iter_mut().zip(sums) {
                side.push(sum / 2.0);
            }
        }
        let [ours, other] = sides;
        Ok((ours, other))
    }

    /// Many adapters of which a tenth fits host memory, users by Zipf's law, beside one adapter.
    async fn zipf(&self, many: usize) -> anyhow::Result<Row> {
        let (hot, cold) = (self.cache(many / 10, BATCH * 2)?, self.cache(many / 10, BATCH * 2)?);
        // Enough that the beginning, where all clients miss at once, counts for little.
        let requests = if self.quick { 64 } else { 192 };
        // Slots and host memory are full before anything counts.
        self.traffic(&cold).touch(many, many / 2, u64::MAX).await?;
        let (ours, other) = self
            .in_turns(async |ours, seed| {
                let (cache, users) = if ours { (&cold, many) } else { (&hot, 1) };
                self.traffic(cache).zipf(users, requests, seed).await
            })
            .await?;
        let name = format!(
            "throughput, {many} adapters on disk, host memory for {}, Zipf(1), tok/s (other side: 1 adapter)",
            many / 10
        );
        Ok(Row::paired(name, &ours, &other).goal(Goal::AtLeast(0.95)))
    }

    /// Sixteen users of all ranks, beside sixteen of the mean rank.
    async fn ranks(&self) -> anyhow::Result<Row> {
        let ranks: Vec<usize> = (0..BATCH).map(|at| 4 << (at % 5)).collect();
        let mean = (ranks.iter().sum::<usize>() as f64 / BATCH as f64).round() as usize;
        for (at, rank) in ranks.iter().enumerate() {
            publish(&self.store, &self.base, &user("mixed", at)?, &weights(&self.base, *rank, at as u64))
                .await?;
            publish(&self.store, &self.base, &user("mean", at)?, &weights(&self.base, mean, at as u64))
                .await?;
        }
        let cache = self.cache(BATCH * 8, BATCH * 16)?;
        let traffic = self.traffic(&cache);
        let answer = if self.quick { 48 } else { 128 };
        let (ours, other) = self
            .in_turns(async |ours, _| {
                let group = if ours { "mixed" } else { "mean" };
                Ok(traffic.together(group, BATCH, answer).await?.rate())
            })
            .await?;
        let name =
            format!("throughput, 16 users of ranks 4 to 64 mixed, tok/s (other side: all of rank {mean})");
        Ok(Row::paired(name, &ours, &other).goal(Goal::AtLeast(0.97)))
    }

    /// Cold loads all the time, beside eight hot users: the gaps between the tokens of these, and the time in which a user
    /// whose adapter is cold too gets a token.
    async fn cold_loads(&self, many: usize) -> anyhow::Result<[Row; 2]> {
        let cache = self.cache(BATCH, BATCH * 2)?;
        let traffic = self.traffic(&cache);
        let answer = if self.quick { 64 } else { 256 };
        let (cold, half) = (BATCH..many / 2, many / 2..many);
        let gaps = async || anyhow::Ok(traffic.together("user", 8, answer).await?.gaps());
        let (mut ours, mut other) = (Vec::new(), Vec::new());
        let (mut first, mut hot) = (Vec::new(), Vec::new());
        for _ in 0..self.runs {
            // All eight get a token in each step, so that one percent of one turn is two steps or three: too few to say
            // how long they are.
            let (mut beside, mut quiet) = (Vec::new(), Vec::new());
            for _ in 0..if self.quick { 1 } else { 4 } {
                // What comes of the loads is of no interest; the hot users hold all they need.
                let loads = traffic.loads(cold.clone());
                beside.extend(gaps().await?);
                loads.stop().await;
                quiet.extend(gaps().await?);
            }
            ours.extend(percentile(&beside, 0.99));
            other.extend(percentile(&quiet, 0.99));
            let (loads, single) = (traffic.loads(cold.clone()), traffic.single_tokens(half.clone()));
            gaps().await?;
            first.extend(median(&single.stop().await));
            loads.stop().await;
            let single = traffic.single_tokens(BATCH - 1..BATCH);
            gaps().await?;
            hot.extend(median(&single.stop().await));
        }
        let name = "p99 from token to token of 8 hot users while cold adapters load, ms (other side: quiet)";
        let p99 = Row::paired(name, &ours, &other).goal(Goal::AtMost(1.1));
        let name = "time to first token of a cold user beside them, ms (other side: quiet, of a hot user)";
        Ok([p99, Row::paired(name, &first, &hot)])
    }

    /// Time to the first token of users who are twice as many as there are slots, beside users who have one.
    async fn first_token(&self) -> anyhow::Result<Row> {
        let slots = BATCH;
        let cache = self.cache(slots * 4, slots)?;
        let traffic = self.traffic(&cache);
        let rounds = if self.quick { 1 } else { 4 };
        let (mut ours, mut other) = (Vec::new(), Vec::new());
        for _ in 0..self.runs {
            ours.extend(median(&traffic.first_tokens(slots * 2, 4, rounds).await?));
            other.extend(median(&traffic.first_tokens(slots, 4, rounds * 2).await?));
        }
        let name = "time to first token, working set twice the slots, ms (other side: all hot)";
        Ok(Row::paired(name, &ours, &other).goal(Goal::AtMost(1.5)))
    }

    /// From the end of a publish to the first token of the new generation, beside one step and one upload.
    async fn publish(&self) -> anyhow::Result<Row> {
        let (mut ours, mut other) = (Vec::new(), Vec::new());
        let ada = user("published", 0)?;
        let mut head = publish(&self.store, &self.base, &ada, &weights(&self.base, RANK, 0)).await?;
        let cache = self.cache(8, 8)?;
        let traffic = self.traffic(&cache);
        let times = if self.quick { 3 } else { self.runs * 5 };
        for at in 1..=times {
            let lease = cache.acquire(&ada).await?.context("it was published")?;
            let step = ask(&self.engine, &lease, 1).await?.first_token();
            drop(lease);
            // An upload: from the store into a slot, nobody else under way.
            let empty = self.cache(8, 8)?;
            let start = Instant::now();
            empty.acquire(&ada).await?;
            let upload = start.elapsed().as_secs_f64() * 1e3;
            let new = weights(&self.base, RANK, at as u64);
            let files;
            (head, files) = publish_after(&self.store, &self.base, &ada, &new, Some(head)).await?;
            let start = Instant::now();
            cache.announce(&ada, &head, Some(files));
            ours.push(traffic.first_token_of(&ada, start).await?);
            other.push(step + upload);
        }
        let name =
            "publish to the first token of the new generation, ms (other side: 1 step + load and upload)";
        Ok(Row::paired(name, &ours, &other).goal(Goal::AtMost(1.0)))
    }
}

fn main() -> anyhow::Result<()> {
    let has = |wanted: &str| std::env::args().any(|arg| arg == wanted);
    let quick = has("--quick");
    let folder = tempfile::tempdir()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let bench = Bench::new(quick, folder.path()).await?;
        let many = if quick { 200 } else { 1000 };
        eprintln!("{many} adapters are published");
        let cache = bench.cache(BATCH, BATCH)?;
        for number in 0..many {
            let (weights, user) = (weights(&bench.base, RANK, number as u64), user("user", number)?);
            let (head, files) = publish_after(&bench.store, &bench.base, &user, &weights, None).await?;
            // As the server does.
            cache.announce(&user, &head, Some(files));
            while cache.residency().packed <= number as u64 {
                tokio::task::yield_now().await;
            }
        }
        let all = !["zipf", "ranks", "cold", "first", "publish", "idle"].into_iter().any(has);
        let wants = |section| all || has(section);
        let mut rows = Vec::new();
        if wants("zipf") {
            rows.push(bench.zipf(many).await?);
        }
        if wants("ranks") {
            rows.push(bench.ranks().await?);
        }
        if wants("cold") {
            rows.extend(bench.cold_loads(many).await?);
        }
        if wants("first") {
            rows.push(bench.first_token().await?);
        }
        if wants("publish") {
            rows.push(bench.publish().await?);
        }
        if wants("idle") {
            rows.push(idle::row(if quick { 20_000 } else { 100_000 }).await?);
        }
        for row in rows {
            println!("{}", row.json());
        }
        bench.store.close().await;
        Ok(())
    })
}
