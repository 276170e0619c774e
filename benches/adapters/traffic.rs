//! Requests of many users: each leases its adapter and is answered, and it is noted when each token came.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use adapters::AdapterCache;
use anyhow::{Context, bail};
use engine::{Engine, Event, Generate, ModelEngine};
use peft::Lease;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::{JoinHandle, JoinSet};
use types::{AdapterId, SamplingParams};

use crate::BATCH;
use crate::users::user;

const PROMPT: usize = 24;
const ANSWER: u32 = 32;

/// Where requests go.
#[derive(Clone)]
pub(crate) struct Traffic {
    pub(crate) cache: AdapterCache,
    pub(crate) engine: ModelEngine,
}

/// When the tokens of an answer came.
pub(crate) struct Answer {
    start: Instant,
    tokens: Vec<Instant>,
}

impl Answer {
    /// Milliseconds to the first token.
    pub(crate) fn first_token(&self) -> f64 {
        self.tokens.first().map_or(f64::NAN, |first| (*first - self.start).as_secs_f64() * 1e3)
    }
}

/// Answers that began together.
pub(crate) struct Answers(Vec<Answer>);

impl Answers {
    /// Tokens per second from when all had their first token until the first one ended.
    pub(crate) fn rate(&self) -> f64 {
        let begin = self.0.iter().filter_map(|answer| answer.tokens.first()).max();
        let end = self.0.iter().filter_map(|answer| answer.tokens.last()).min();
        let Some((begin, end)) = begin.zip(end).filter(|(begin, end)| begin < end) else { return f64::NAN };
        let all = self.0.iter().flat_map(|answer| &answer.tokens);
        let counted = all.filter(|&at| begin < at && at <= end).count();
        counted as f64 / (*end - *begin).as_secs_f64()
    }

    /// Milliseconds from token to token.
    pub(crate) fn gaps(&self) -> Vec<f64> {
        let gaps = |answer: &Answer| {
            answer.tokens.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect::<Vec<_>>()
        };
        self.0.iter().flat_map(gaps).collect()
    }
}

/// One answer of `max_tokens` tokens to a prompt that nobody had before.
pub(crate) async fn ask(engine: &ModelEngine, lease: &Lease, max_tokens: u32) -> anyhow::Result<Answer> {
    static PROMPTS: AtomicU64 = AtomicU64::new(0);
    let mut rng = StdRng::seed_from_u64(PROMPTS.fetch_add(1, Ordering::Relaxed));
    let params =
        SamplingParams { max_tokens, temperature: 0.0, ignore_eos: true, ..SamplingParams::default() };
    let start = Instant::now();
    let mut stream = engine.submit(Generate {
        prompt: (0..PROMPT).map(|_| rng.random_range(1_000..40_000)).collect(),
        adapter: Some(lease.clone()),
        params,
        tenant: "bench".parse()?,
        group: None,
        deadline: None,
    })?;
    let mut tokens = Vec::new();
    while let Some(event) = stream.next().await {
        match event {
            Event::Token(_) => tokens.push(Instant::now()),
            Event::Finished { .. } => {}
            Event::Failed { reason, .. } => bail!("a sequence failed: {reason}"),
        }
    }
    Ok(Answer { start, tokens })
}

/// Users by Zipf's law with exponent 1, each with the length of the answer. These differ, or the side where nobody waits
/// for an adapter would go in step from prompt to prompt.
fn zipf_requests(users: usize, requests: usize, seed: u64) -> Vec<(usize, u32)> {
    let mut sums = Vec::with_capacity(users);
    for rank in 1..=users {
        sums.push(sums.last().copied().unwrap_or(0.0) + 1.0 / rank as f64);
    }
    let total = sums.last().copied().unwrap_or(1.0);
    let mut rng = StdRng::seed_from_u64(seed);
    let mut draw = || {
        let user = sums.partition_point(|sum| *sum < rng.random_range(0.0..total)).min(users - 1);
        (user, rng.random_range(ANSWER / 2..=ANSWER * 3 / 2))
    };
    (0..requests).map(|_| draw()).collect()
}

/// What is done for one user after the other, all the time.
pub(crate) struct Rounds {
    task: JoinHandle<()>,
    /// What was measured each time.
    found: Arc<Mutex<Vec<f64>>>,
}

impl Rounds {
    /// Ends them; what was measured.
    pub(crate) async fn stop(self) -> Vec<f64> {
        self.task.abort();
        let _aborted = self.task.await;
        std::mem::take(&mut self.found.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Traffic {
    /// Begins to do something for these users in turn, over and over.
    fn rounds<F: Future<Output = anyhow::Result<f64>> + Send + 'static>(
        &self,
        users: Range<usize>,
        each: impl Fn(Self, AdapterId) -> F + Send + 'static,
    ) -> Rounds {
        let traffic = self.clone();
        let found = Arc::new(Mutex::new(Vec::new()));
        let list = Arc::clone(&found);
        let task = tokio::spawn(async move {
            for number in users.cycle() {
                let Ok(id) = user("user", number) else { return };
                // One that fails is missing among the measurements.
                if let Ok(measured) = each(traffic.clone(), id).await {
                    list.lock().unwrap_or_else(PoisonError::into_inner).push(measured);
                }
            }
        });
        Rounds { task, found }
    }

    /// Leases the adapters of these users in turn: the milliseconds to each lease.
    pub(crate) fn loads(&self, users: Range<usize>) -> Rounds {
        self.rounds(users, async |traffic, id| {
            let start = Instant::now();
            drop(traffic.cache.acquire(&id).await?.context("it was published")?);
            Ok(start.elapsed().as_secs_f64() * 1e3)
        })
    }

    /// Answers one token to these users in turn: the milliseconds to each.
    pub(crate) fn single_tokens(&self, users: Range<usize>) -> Rounds {
        self.rounds(users, async |traffic, id| traffic.first_token_of(&id, Instant::now()).await)
    }

    async fn request(&self, id: &AdapterId, max_tokens: u32) -> anyhow::Result<Answer> {
        let start = Instant::now();
        let lease = self.cache.acquire(id).await?.with_context(|| format!("{} has no adapter", id.owner))?;
        let answer = ask(&self.engine, &lease, max_tokens).await?;
        Ok(Answer { start, ..answer })
    }

    /// Milliseconds from `start` to a user's first token.
    pub(crate) async fn first_token_of(&self, id: &AdapterId, start: Instant) -> anyhow::Result<f64> {
        let answer = self.request(id, 1).await?;
        Ok(Answer { start, ..answer }.first_token())
    }

    /// The first `count` users of a group at once; their adapters are there before it begins.
    pub(crate) async fn together(&self, group: &str, count: usize, answer: u32) -> anyhow::Result<Answers> {
        let mut leases = Vec::new();
        for number in 0..count {
            leases.push(self.cache.acquire(&user(group, number)?).await?.context("it was published")?);
        }
        let mut asked = JoinSet::new();
        for lease in leases {
            let engine = self.engine.clone();
            asked.spawn(async move { ask(&engine, &lease, answer).await });
        }
        let mut answers = Vec::new();
        while let Some(answer) = asked.join_next().await {
            answers.push(answer??);
        }
        Ok(Answers(answers))
    }

    /// Leases the adapters of such requests, one after the other: memory holds then what it holds after them.
    pub(crate) async fn touch(&self, users: usize, requests: usize, seed: u64) -> anyhow::Result<()> {
        for (number, _) in zipf_requests(users, requests, seed) {
            drop(self.cache.acquire(&user("user", number)?).await?);
        }
        Ok(())
    }

    /// Tokens per second of a full batch of clients whose users are drawn by Zipf's law with exponent 1, until the first
    /// of them finds no more to ask.
    pub(crate) async fn zipf(&self, users: usize, requests: usize, seed: u64) -> anyhow::Result<f64> {
        let queue = Arc::new(zipf_requests(users, requests, seed));
        let next = Arc::new(AtomicUsize::new(0));
        let start = Instant::now();
        let mut clients = JoinSet::new();
        for _ in 0..BATCH {
            let (traffic, queue, next) = (self.clone(), Arc::clone(&queue), Arc::clone(&next));
            clients.spawn(async move {
                let mut tokens = Vec::new();
                while let Some((number, answer)) = queue.get(next.fetch_add(1, Ordering::Relaxed)) {
                    tokens.extend(traffic.request(&user("user", *number)?, *answer).await?.tokens);
                }
                anyhow::Ok((tokens, Instant::now()))
            });
        }
        let (mut tokens, mut end) = (Vec::new(), None);
        while let Some(client) = clients.join_next().await {
            let (more, ended) = client??;
            tokens.extend(more);
            end = Some(end.map_or(ended, |end: Instant| end.min(ended)));
        }
        let end = end.context("there are clients")?;
        let counted = tokens.iter().filter(|at| **at <= end).count();
        Ok(counted as f64 / (end - start).as_secs_f64())
    }

    /// Milliseconds to the first token of users who take turns, a few at a time, after a round that is not counted.
    pub(crate) async fn first_tokens(
        &self,
        users: usize,
        clients: usize,
        rounds: usize,
    ) -> anyhow::Result<Vec<f64>> {
        let mut all = Vec::new();
        for round in 0..=rounds {
            for first in (0..users).step_by(clients) {
                let mut asked = JoinSet::new();
                for number in first..(first + clients).min(users) {
                    let (traffic, id) = (self.clone(), user("user", number)?);
                    asked.spawn(async move { traffic.request(&id, 4).await });
                }
                while let Some(answer) = asked.join_next().await {
                    let answer = answer??;
                    all.extend((round > 0).then(|| answer.first_token()));
                }
            }
        }
        Ok(all)
    }
}
