//! The load driver: users who ask over HTTP, each with an adapter, and when their tokens came.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use atelier::service::cores;
use indicatif::ProgressBar;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use reqwest::Client;
use serde_json::{Value, json};
use text::{Special, Tokenizer};
use tokio::task::JoinSet;

use crate::adapters::user;
use crate::cpu;
use crate::events::Events;
use crate::row::percentile;
use crate::server::MODEL;

/// Skew of the Zipf popularity.
const SKEW: f64 = 1.5;

/// Which users ask.
#[derive(Clone, Copy)]
pub(crate) enum Popularity {
    /// Every one in turn.
    Distinct,
    /// Any one, all equally often.
    Uniform,
    /// Any one, the k-th as often as `1 / k^1.5`.
    Zipf,
    /// Always the same one.
    Identical,
}

impl Popularity {
    pub(crate) const ALL: [Self; 4] = [Self::Distinct, Self::Uniform, Self::Zipf, Self::Identical];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Distinct => "distinct",
            Self::Uniform => "uniform",
            Self::Zipf => "Zipf 1.5",
            Self::Identical => "identical",
        }
    }

    /// The user of a request.
    fn pick(self, request: usize, users: usize, rng: &mut StdRng) -> usize {
        match self {
            Self::Distinct => request % users,
            Self::Uniform => rng.random_range(0..users),
            Self::Zipf => {
                let weight = |rank: usize| (rank as f64).powf(-SKEW);
                let mut left = rng.random_range(0.0..1.0) * (1..=users).map(weight).sum::<f64>();
                let beyond = (1..=users).position(|rank| {
                    left -= weight(rank);
                    left < 0.0
                });
                beyond.unwrap_or(users - 1)
            }
            Self::Identical => 0,
        }
    }
}

/// When they ask.
#[derive(Clone, Copy)]
pub(crate) enum Arrival {
    /// As many clients as users; each asks again when it has its answer.
    Closed,
    /// At random, this many requests per second, whatever the answers do.
    Poisson(f64),
}

/// What is asked of a server.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) users: usize,
    pub(crate) requests: usize,
    pub(crate) popularity: Popularity,
    pub(crate) arrival: Arrival,
    /// Tokens of a prompt and of an answer.
    pub(crate) prompt: usize,
    pub(crate) answer: u32,
}

/// Whom it is asked of.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    Atelier(SocketAddr),
    LlamaServer(SocketAddr),
}

impl Target {
    fn url(self) -> String {
        match self {
            Self::Atelier(address) => format!("http://{address}/v1/completions"),
            Self::LlamaServer(address) => format!("http://{address}/completion"),
        }
    }

    fn body(self, asker: usize, prompt: &str, answer: u32) -> Value {
        match self {
            Self::Atelier(_) => json!({
                "model": format!("{MODEL}:{}", user(asker)), "prompt": prompt, "max_tokens": answer, "temperature": 0,
                "ignore_eos": true, "stream": true, "stream_options": { "include_usage": true },
            }),
            Self::LlamaServer(_) => json!({
                "prompt": prompt, "n_predict": answer, "temperature": 0, "top_k": 1, "ignore_eos": true,
                "stream": true, "cache_prompt": false, "lora": [{ "id": asker, "scale": 1.0 }],
            }),
        }
    }

    /// Whether the event brings text, and how many tokens the answer has, if the event says so.
    fn read(self, event: &Value) -> anyhow::Result<(bool, Option<u64>)> {
        ensure!(event["error"].is_null(), "the server answered {event}");
        Ok(match self {
            Self::Atelier(_) => {
                let text = event["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty());
                (text, event["usage"]["completion_tokens"].as_u64())
            }
            Self::LlamaServer(_) => {
                let text = event["content"].as_str().is_some_and(|text| !text.is_empty());
                let total = event["tokens_predicted"].as_u64();
                (text, total.filter(|_| event["stop"] == true))
            }
        })
    }
}

/// Texts of a known number of tokens.
pub(crate) struct Prompts(Vec<String>);

impl Prompts {
    /// From words of the vocabulary that are one token each, also within a text.
    pub(crate) fn new(tokenizer: &Tokenizer) -> anyhow::Result<Self> {
        let is_word = |text: &str| {
            let letters = text.strip_prefix(' ').unwrap_or_default();
            letters.len() >= 4 && letters.bytes().all(|c| c.is_ascii_lowercase())
        };
        let mut words = Vec::new();
        for id in (0..tokenizer.vocab_size() as u32).step_by(7) {
            let text = tokenizer.token_text(id).into_owned();
            if is_word(&text) && tokenizer.encode(&text, Special::Literal)? == [id] {
                words.push(text);
            }
        }
        ensure!(words.len() >= 100, "the vocabulary has only {} plain words", words.len());
        let prompts = Self(words);
        let sample = prompts.text(64, &mut StdRng::seed_from_u64(0));
        let tokens = tokenizer.encode(&sample, Special::Literal)?.len();
        ensure!(tokens == 64, "64 words are {tokens} tokens");
        Ok(prompts)
    }

    fn text(&self, tokens: usize, rng: &mut StdRng) -> String {
        (0..tokens).map(|_| self.0[rng.random_range(0..self.0.len())].as_str()).collect()
    }
}

/// How a server did.
#[derive(Default)]
pub(crate) struct Report {
    /// Seconds from the first request to the last token.
    pub(crate) wall: f64,
    /// Seconds of a processor that the driver took of them.
    pub(crate) driver: f64,
    tokens: u64,
    /// Seconds to the first token, of each request.
    first: Vec<f64>,
    /// Milliseconds between pieces of text.
    gaps: Vec<f64>,
}

impl Report {
    /// Takes an answer in, which must have so many tokens.
    fn add(&mut self, target: Target, raw: &Raw, answer: u32) -> anyhow::Result<()> {
        let (mut events, mut pieces, mut tokens) = (Events::default(), Vec::new(), None);
        let mut begin = 0;
        for &(came, end) in &raw.chunks {
            for event in events.push(&raw.body[begin..end])? {
                let (text, total) = target.read(&event)?;
                pieces.extend(text.then_some(came));
                tokens = total.or(tokens);
            }
            begin = end;
        }
        let tokens = tokens.context("the answer has no end")?;
        ensure!(tokens == u64::from(answer), "the answer has {tokens} tokens, not {answer}");
        let first = pieces.first().context("the answer has no text")?;
        self.first.push(first.saturating_duration_since(raw.asked).as_secs_f64());
        self.tokens += tokens;
        self.gaps.extend(pieces.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3));
        Ok(())
    }

    /// Generated tokens per second.
    pub(crate) fn throughput(&self) -> f64 {
        self.tokens as f64 / self.wall
    }

    /// Seconds of a processor in percent of what all cores had in that time.
    pub(crate) fn share(&self, seconds: f64) -> f64 {
        100.0 * seconds / (self.wall * cores() as f64)
    }

    /// Seconds to the first token that this share of the requests did not exceed.
    pub(crate) fn first_token(&self, share: f64) -> f64 {
        percentile(&self.first, share).unwrap_or(f64::NAN)
    }

    /// Milliseconds between tokens that this share of the gaps did not exceed.
    pub(crate) fn gap(&self, share: f64) -> f64 {
        percentile(&self.gaps, share).unwrap_or(f64::NAN)
    }
}

/// A request to come.
struct Planned {
    asker: usize,
    prompt: String,
    /// How long after the start; `None` when the one before has its answer.
    due: Option<Duration>,
}

/// What came of a request, and when; it is read when all is over, so that the clients take little of the machine.
struct Raw {
    asked: Instant,
    body: Vec<u8>,
    /// How much of the body was there at which time.
    chunks: Vec<(Instant, usize)>,
}

/// Runs a load against a server; `seed` settles users, prompts and arrivals.
pub(crate) fn run(
    target: Target,
    load: &Load,
    prompts: &Prompts,
    seed: u64,
    bar: &ProgressBar,
) -> anyhow::Result<Report> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = Client::builder().no_proxy().pool_max_idle_per_host(0).build()?;
        let mut clients = JoinSet::new();
        let (start, busy) = (Instant::now(), cpu::own());
        for queue in plan(load, prompts, seed) {
            let (client, bar, answer) = (client.clone(), bar.clone(), load.answer);
            clients.spawn(async move {
                let mut answers = Vec::new();
                for planned in queue {
                    answers.push(ask(&client, target, planned, answer, start).await?);
                    bar.inc(1);
                }
                anyhow::Ok(answers)
            });
        }
        let mut all = Vec::new();
        while let Some(answers) = clients.join_next().await {
            all.extend(answers??);
        }
        let (wall, driver) = (start.elapsed().as_secs_f64(), cpu::own() - busy);
        let mut report = Report { wall, driver, ..Report::default() };
        for raw in all {
            report.add(target, &raw, load.answer)?;
        }
        Ok(report)
    })
}

/// The clients' requests, by client.
fn plan(load: &Load, prompts: &Prompts, seed: u64) -> Vec<Vec<Planned>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut clients: Vec<Vec<Planned>> = Vec::new();
    let mut at = 0.0;
    for request in 0..load.requests {
        let asker = load.popularity.pick(request, load.users, &mut rng);
        let prompt = prompts.text(load.prompt, &mut rng);
        let due = match load.arrival {
            Arrival::Closed => None,
            Arrival::Poisson(per_second) => {
                at -= rng.random_range(f64::MIN_POSITIVE..1.0).ln() / per_second;
                Some(Duration::from_secs_f64(at))
            }
        };
        let planned = Planned { asker, prompt, due };
        match clients.get_mut(request % load.users) {
            Some(client) if due.is_none() => client.push(planned),
            _ => clients.push(vec![planned]),
        }
    }
    clients
}

async fn ask(
    client: &Client,
    target: Target,
    planned: Planned,
    answer: u32,
    start: Instant,
) -> anyhow::Result<Raw> {
    let asked = match planned.due {
        Some(due) => start + due,
        None => Instant::now(),
    };
    tokio::time::sleep_until(asked.into()).await;
    let body = target.body(planned.asker, &planned.prompt, answer);
    let mut response = client.post(target.url()).json(&body).send().await?;
    if !response.status().is_success() {
        bail!("the server answered {}: {}", response.status(), response.text().await.unwrap_or_default());
    }
    let (mut body, mut chunks) = (Vec::new(), Vec::new());
    while let Some(bytes) = response.chunk().await? {
        body.extend_from_slice(&bytes);
        chunks.push((Instant::now(), body.len()));
    }
    Ok(Raw { asked, body, chunks })
}
