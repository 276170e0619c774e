//! Training beside serving, through the real server: what those who are being served feel, what training keeps of its
//! rate, and how long a first upload takes to a personalised answer.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use atelier::service::{Service, io_threads};
use atelier::settings::ServiceArgs;
use clap::Parser;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use reqwest::Client;
use serde_json::{Value, json};
use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio::task::JoinSet;

use crate::events::Events;
use crate::histories::Items;
use crate::row::{Goal, Row, percentile};

/// Clients that ask without a pause, to find out what the server can do.
const CLIENTS: usize = 8;
/// Tokens of an answer.
const ANSWER: u32 = 48;
/// Items of the upload whose answer is waited for.
const UPLOAD: usize = 50;
/// Seconds that upload may take.
const ALLOWED: f64 = 60.0;
/// Passes over the history that keeps the trainer busy; it is cancelled in the end.
const PASSES: u32 = 20;
/// Items of an optimiser step of that training: short ones, as its rate is known at their ends.
const BATCH: u32 = 4;
/// How often training's progress is looked at.
const GLANCE: Duration = Duration::from_millis(50);

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    service: ServiceArgs,
}

#[derive(Clone)]
struct Site {
    client: Client,
    base: String,
    model: String,
}

/// The rows.
pub(crate) fn rows(histories: &[Items], seconds: u64, runs: usize) -> anyhow::Result<Vec<Row>> {
    let folder = tempfile::tempdir().context("a data folder")?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(io_threads(None)).enable_all().build()?;
    runtime.block_on(measure(folder.path(), histories, seconds, runs))
}

async fn measure(data: &Path, histories: &[Items], seconds: u64, runs: usize) -> anyhow::Result<Vec<Row>> {
    let args = Cli::parse_from(["bench", "--listen", "127.0.0.1:0", "--no-prefix-cache"]).service;
    let service = Service::start(&args, data).await?;
    let site = Site {
        // The server closes a connection that rests for ten seconds.
        client: Client::builder().no_proxy().pool_idle_timeout(Duration::from_secs(5)).build()?,
        base: format!("http://{}", service.address),
        model: service.model_name.clone(),
    };
    let mut rows = vec![first_answer(&site, histories, runs).await?];
    rows.extend(beside(&site, &histories[0], seconds, runs).await?);
    service.stop().await?;
    Ok(rows)
}

/// Fifty items of a new user, until the user's own adapter answers.
async fn first_answer(site: &Site, histories: &[Items], runs: usize) -> anyhow::Result<Row> {
    let mut walls = Vec::new();
    let mut stages = String::new();
    for run in 0..runs {
        let user = format!("newcomer-{run}");
        let items: Items = histories.iter().skip(run).flatten().take(UPLOAD).cloned().collect();
        ensure!(items.len() == UPLOAD, "only {} items", items.len());
        let start = Instant::now();
        let job = site.upload(&user, &items, json!({})).await?;
        let uploaded = start.elapsed().as_secs_f64();
        let (mut begun, mut trained) = (None, None);
        let ended = loop {
            let now = site.job(&job).await?;
            let at = start.elapsed().as_secs_f64();
            if now["status"] == "running" {
                begun.get_or_insert(at);
            }
            if now["progress"]["step"]
                .as_u64()
                .is_some_and(|step| Some(step) == now["progress"]["steps"].as_u64())
            {
                trained.get_or_insert(at);
            }
            match now["status"].as_str() {
                Some("succeeded") => {
                    ensure!(
                        now["outcome"]["published"] == true,
                        "not published: {}",
                        now["outcome"]["reason"]
                    );
                    break at;
                }
                Some("failed" | "cancelled") => bail!("the job came to {now}"),
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        let generation = site.ask(&user, &items[0].0, 8).await?.generation;
        ensure!(generation.len() == 64, "answered by {generation:?}");
        walls.push(start.elapsed().as_secs_f64());
        let (begun, trained) = (begun.unwrap_or(uploaded), trained.unwrap_or(ended));
        stages = format!(
            "upload {uploaded:.2} s, debounce and queue {:.1} s, training {:.1} s, gate and publish {:.1} s, answer {:.2} s",
            begun - uploaded,
            trained - begun,
            ended - trained,
            walls[run] - ended
        );
    }
    let name =
        "upload of 50 items to the first answer by the user's own adapter, s (other: the 60 s allowed)";
    Ok(Row::against(name, &walls, &[ALLOWED]).goal(Goal::AtMost(1.0)).note(&stages))
}

/// Users who ask at half of what the server can do, with and without a training beside them.
async fn beside(site: &Site, items: &Items, seconds: u64, runs: usize) -> anyhow::Result<Vec<Row>> {
    let most = site.closed(Duration::from_secs(seconds / 2)).await?;
    let rate = most / f64::from(ANSWER) / 2.0;
    let load = |seed| site.poisson(rate, Duration::from_secs(seconds), seed);
    let (mut with, mut without, mut kept, mut lone) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for run in 0..runs as u64 {
        without.push(percentile(&load(run).await?, 0.99).context("no gaps")?);
        let options = json!({ "epochs": PASSES, "batch": BATCH });
        let job = site.upload(&format!("learner-{run}"), items, options).await?;
        let before = site.trained().await?;
        while site.trained().await? == before {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let quiet = async {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            Ok(())
        };
        lone.push(site.pace(quiet).await?.1);
        let (gaps, pace) = site.pace(load(run)).await?;
        with.push(percentile(&gaps, 0.99).context("no gaps")?);
        kept.push(pace);
        ensure!(site.job(&job).await?["status"] == "running", "the training ended before the measurement");
        site.post(&format!("/v1/jobs/{job}/cancel"), &json!({})).await?;
    }
    let at = format!("at half load ({rate:.1} requests of {ANSWER} tokens a second)");
    Ok(vec![
        Row::paired(format!("p99 between tokens {at}, training on / off, ms"), &with, &without)
            .goal(Goal::AtMost(1.25)),
        Row::paired(format!("training, tokens a second {at} / alone"), &kept, &lone).goal(Goal::AtLeast(0.5)),
    ])
}

struct Answer {
    generation: String,
    /// Milliseconds between tokens.
    gaps: Vec<f64>,
}

impl Site {
    async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let response = self.client.post(format!("{}{path}", self.base)).json(body).send().await?;
        let (status, text) = (response.status(), response.text().await?);
        ensure!(status.is_success(), "{path} was answered with {status}: {text}");
        serde_json::from_str(&text).with_context(|| format!("{path} was answered with {text}"))
    }

    /// Uploads a history; the job that learns from it.
    async fn upload(&self, user: &str, items: &Items, training: Value) -> anyhow::Result<String> {
        let item = |(at, (input, output)): (usize, &(String, String))| json!({ "id": format!("i{at}"), "input": input, "output": output, "created_at": 1_700_000_000 + at });
        let items: Vec<Value> = items.iter().enumerate().map(item).collect();
        let body = json!({ "items": items, "training": training });
        let answer = self.post(&format!("/v1/users/{user}/history"), &body).await?;
        answer["job"]["id"].as_str().map(str::to_owned).with_context(|| format!("no job: {answer}"))
    }

    async fn job(&self, job: &str) -> anyhow::Result<Value> {
        let response = self.client.get(format!("{}/v1/jobs/{job}", self.base)).send().await?;
        Ok(response.error_for_status()?.json().await?)
    }

    /// Tokens that training has gone through.
    async fn trained(&self) -> anyhow::Result<f64> {
        let response = self.client.get(format!("{}/metrics", self.base)).send().await?;
        let text = response.error_for_status()?.text().await?;
        let value = text.lines().find_map(|line| line.strip_prefix("atelier_training_tokens_total "));
        value.and_then(|value| value.parse().ok()).context("the metrics do not say what has been trained")
    }

    /// What `beside` gives, and the tokens a second that training goes through meanwhile: from the end of its first
    /// optimiser step to the end of the last.
    async fn pace<T>(&self, beside: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<(T, f64)> {
        let (running, mut ended) = oneshot::channel::<()>();
        let beside = async {
            let result = beside.await;
            drop(running);
            result
        };
        let watch = async {
            let mut last = self.trained().await?;
            let mut ends = Vec::new();
            while ended.try_recv() == Err(TryRecvError::Empty) {
                tokio::time::sleep(GLANCE).await;
                let now = self.trained().await?;
                if now > last {
                    ends.push((Instant::now(), now));
                    last = now;
                }
            }
            let [(from, before), .., (to, after)] = ends[..] else { bail!("no two optimiser steps ended") };
            Ok((after - before) / (to - from).as_secs_f64())
        };
        tokio::try_join!(beside, watch)
    }

    async fn ask(&self, user: &str, prompt: &str, answer: u32) -> anyhow::Result<Answer> {
        let body = json!({
            "model": self.model, "user": user, "prompt": prompt, "max_tokens": answer, "temperature": 0,
            "ignore_eos": true, "stream": true, "logprobs": 0,
        });
        let mut response = self
            .client
            .post(format!("{}/v1/completions", self.base))
            .json(&body)
            .send()
            .await?
            .error_for_status()?;
        let generation = response.headers().get("x-atelier-generation").and_then(|value| value.to_str().ok());
        let generation = generation.unwrap_or_default().to_owned();
        let (mut gaps, mut last, mut events) = (Vec::new(), None::<Instant>, Events::default());
        while let Some(bytes) = response.chunk().await? {
            let now = Instant::now();
            let of = |event: &Value| event["choices"][0]["logprobs"]["tokens"].as_array().map_or(0, Vec::len);
            let tokens: usize = events.push(&bytes)?.iter().map(of).sum();
            // The tokens that make one character come together: they share the time.
            if let (Some(last), 1..) = (last, tokens) {
                let gap = (now - last).as_secs_f64() * 1e3 / tokens as f64;
                gaps.extend(std::iter::repeat_n(gap, tokens));
            }
            if tokens > 0 {
                last = Some(now);
            }
        }
        Ok(Answer { generation, gaps })
    }

    /// Tokens per second with some clients that never pause.
    async fn closed(&self, time: Duration) -> anyhow::Result<f64> {
        let start = Instant::now();
        let mut clients = JoinSet::new();
        for client in 0..CLIENTS {
            let site = self.clone();
            clients.spawn(async move {
                let mut tokens = 0;
                while start.elapsed() < time {
                    site.ask(&format!("client-{client}"), &format!("{client} and {tokens} are"), ANSWER)
                        .await?;
                    tokens += u64::from(ANSWER);
                }
                anyhow::Ok(tokens)
            });
        }
        let mut tokens = 0;
        while let Some(answered) = clients.join_next().await {
            tokens += answered??;
        }
        Ok(tokens as f64 / start.elapsed().as_secs_f64())
    }

    /// The milliseconds between tokens of requests that come at random, `rate` a second.
    async fn poisson(&self, rate: f64, time: Duration, seed: u64) -> anyhow::Result<Vec<f64>> {
        let mut rng = StdRng::seed_from_u64(seed);
        let (start, mut due, mut asks) = (Instant::now(), 0.0, JoinSet::new());
        loop {
            due -= rng.random_range(f64::MIN_POSITIVE..1.0).ln() / rate;
            if due > time.as_secs_f64() {
                break;
            }
            let site = self.clone();
            let at = start + Duration::from_secs_f64(due);
            let prompt = format!("Of {} things, the", rng.random_range(0..1000));
            // Somebody else each time: one user has few requests at once.
            let visitor = format!("visitor-{}", asks.len());
            asks.spawn(async move {
                tokio::time::sleep_until(at.into()).await;
                site.ask(&visitor, &prompt, ANSWER).await
            });
        }
        let mut gaps = Vec::new();
        while let Some(answer) = asks.join_next().await {
            gaps.extend(answer??.gaps);
        }
        Ok(gaps)
    }
}
