//! Our side in process: the model on its thread, and when each token of a batch came.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use atelier::service::{self, io_threads};
use atelier::settings::{Cli, Command, ServiceArgs};
use clap::Parser;
use engine::{Engine, Event, Generate, ModelEngine, TokenStream};
use model::{BaseModel, LoadOptions};
use peft::Lease;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use text::Tokenizer;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;
use types::SamplingParams;

use crate::progress::progress;

/// Longest sequence of the benchmark.
const CONTEXT: usize = 2048;

/// A model file in our engine.
pub(crate) struct Ours {
    pub(crate) base: Arc<BaseModel>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) engine: ModelEngine,
    /// Where tokens are read and HTTP is served, as in `atelier serve`.
    pub(crate) runtime: Runtime,
}

/// One sequence to generate.
pub(crate) struct Job {
    pub(crate) prompt: usize,
    pub(crate) answer: u32,
    pub(crate) adapter: Option<Lease>,
}

/// When the tokens of a batch came, by sequence.
pub(crate) struct Batch {
    start: Instant,
    tokens: Vec<Vec<Instant>>,
}

/// What `atelier serve` has by default.
pub(crate) fn served() -> anyhow::Result<ServiceArgs> {
    match Cli::try_parse_from(["atelier", "serve"])?.command {
        Command::Serve(args) => Ok(*args),
        _ => bail!("serve is not serve"),
    }
}

impl Ours {
    /// Loads a model file and starts the engine on it.
    pub(crate) fn start(file: &Path) -> anyhow::Result<Self> {
        let loaded = model::load(file, LoadOptions { max_context: Some(CONTEXT) })
            .with_context(|| format!("cannot load {}", file.display()))?;
        let tokenizer = Tokenizer::new(&loaded.tokenizer.context("the file has no tokenizer")?)?;
        let base = Arc::new(loaded.model);
        let engine = ModelEngine::start(Arc::clone(&base), service::engine_settings(&served()?, &tokenizer))?;
        let runtime = Builder::new_multi_thread().worker_threads(io_threads(None)).enable_all().build()?;
        runtime.spawn(engine.carry());
        let ours = Self { base, tokenizer, engine, runtime };
        ours.settle()?;
        Ok(ours)
    }

    /// Uses every KV block once: the system clears memory when it is first written to, which a server that has run for a while
    /// has behind it, and the peer's at its start.
    fn settle(&self) -> anyhow::Result<()> {
        let progress = progress("filling the KV pool", self.engine.stats().kv_blocks);
        while self.engine.stats().prefix_evictions == 0 {
            self.run((0..4).map(|_| Job { prompt: CONTEXT - 8, answer: 1, adapter: None }).collect())?;
            progress.set_position(self.engine.stats().kv_blocks_idle as u64);
        }
        progress.finish_and_clear();
        Ok(())
    }

    /// Runs sequences that arrive together to their end.
    pub(crate) fn run(&self, jobs: Vec<Job>) -> anyhow::Result<Batch> {
        self.runtime.block_on(self.run_all(jobs))
    }

    /// As [`Ours::run`], while sequences of `company` keep arriving, the next when the one before has its token; also the
    /// seconds that each of them waited for it.
    pub(crate) fn run_beside(&self, jobs: Vec<Job>, company: usize) -> anyhow::Result<(Batch, Vec<f64>)> {
        let mut waits = Vec::new();
        let batch = self.runtime.block_on(async {
            tokio::select! {
                batch = self.run_all(jobs) => batch,
                ended = keep_busy(&self.engine, company, &mut waits) => {
                    let Err(error) = ended;
                    Err(error)
                }
            }
        })?;
        Ok((batch, waits))
    }

    async fn run_all(&self, jobs: Vec<Job>) -> anyhow::Result<Batch> {
        let start = Instant::now();
        let mut readers = JoinSet::new();
        for job in jobs {
            readers.spawn(read(submit(&self.engine, job)?));
        }
        let mut tokens = Vec::new();
        while let Some(read) = readers.join_next().await {
            tokens.push(read??);
        }
        Ok(Batch { start, tokens })
    }
}

fn submit(engine: &ModelEngine, job: Job) -> anyhow::Result<TokenStream> {
    let params = SamplingParams {
        max_tokens: job.answer,
        temperature: 0.0,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    Ok(engine.submit(Generate {
        prompt: fresh_prompt(job.prompt),
        adapter: job.adapter,
        params,
        tenant: "bench".parse()?,
        group: None,
        deadline: None,
    })?)
}

async fn keep_busy(engine: &ModelEngine, prompt: usize, waits: &mut Vec<f64>) -> anyhow::Result<Infallible> {
    loop {
        let asked = Instant::now();
        read(submit(engine, Job { prompt, answer: 1, adapter: None })?).await?;
        waits.push(asked.elapsed().as_secs_f64());
    }
}

async fn read(mut stream: TokenStream) -> anyhow::Result<Vec<Instant>> {
    let mut tokens = Vec::new();
    while let Some(event) = stream.next().await {
        match event {
            Event::Token(_) => tokens.push(Instant::now()),
            Event::Finished { .. } => {}
            Event::Failed { reason, .. } => bail!("a sequence failed: {reason}"),
        }
    }
    Ok(tokens)
}

/// Tokens that no prompt before had, so that nothing can be reused.
pub(crate) fn fresh_prompt(count: usize) -> Vec<u32> {
    static PROMPTS: AtomicU64 = AtomicU64::new(0);
    let mut rng = StdRng::seed_from_u64(PROMPTS.fetch_add(1, Ordering::Relaxed));
    (0..count).map(|_| rng.random_range(1_000..40_000)).collect()
}

impl Batch {
    /// Tokens per second from the moment when all sequences had their first token until the first one ended.
    pub(crate) fn decode_rate(&self) -> f64 {
        let begin = self.tokens.iter().filter_map(|tokens| tokens.first()).max();
        let end = self.tokens.iter().filter_map(|tokens| tokens.last()).min();
        let Some((begin, end)) = begin.zip(end).filter(|(begin, end)| begin < end) else { return f64::NAN };
        let counted = self.tokens.iter().flatten().filter(|&at| begin < at && at <= end).count();
        counted as f64 / (*end - *begin).as_secs_f64()
    }

    /// Seconds from the start to the first token of the first sequence that got one.
    pub(crate) fn first_token(&self) -> f64 {
        let first = self.tokens.iter().filter_map(|tokens| tokens.first()).min();
        first.map_or(f64::NAN, |first| (*first - self.start).as_secs_f64())
    }

    /// Seconds from the start to the last token.
    pub(crate) fn wall(&self) -> f64 {
        let last = self.tokens.iter().filter_map(|tokens| tokens.last()).max();
        last.map_or(f64::NAN, |last| (*last - self.start).as_secs_f64())
    }

    /// Milliseconds between tokens, of all sequences.
    pub(crate) fn gaps(&self) -> Vec<f64> {
        let gaps = |tokens: &Vec<Instant>| {
            tokens.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect::<Vec<_>>()
        };
        self.tokens.iter().flat_map(gaps).collect()
    }
}
