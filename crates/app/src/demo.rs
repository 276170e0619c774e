//! The demo: three real people's histories in, three adapters out, and a table that shows whose words each predicts.
#![expect(clippy::print_stdout, reason = "a demo talks to its user")]

mod client;
mod users;

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use model::BaseModel;
use peft::AdapterWeights;
use serde_json::Value;
use text::Tokenizer;
use train::{Loss, evaluate};
use types::{Example, HistoryItem};

use self::client::Api;
pub use self::users::{Person, histories, ratings};

/// The question that everybody is asked at the end.
const QUESTION: &str = "PRINCE HENRY: What will you do for your country, and when?";

/// A running server, and what the demo needs besides.
pub struct DemoContext {
    /// The server's base model, shared.
    pub base: Arc<BaseModel>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Where the server listens.
    pub address: SocketAddr,
    /// The base's name in the API.
    pub model_name: String,
    /// Folder for what is fetched.
    pub cache: PathBuf,
}

/// Runs the demo against a server that listens already.
///
/// # Errors
/// When something cannot be fetched or the server refuses, and when a user's own adapter does not predict the user's
/// items better than the base and every other user's adapter.
pub async fn run(context: &DemoContext) -> anyhow::Result<()> {
    let cache = context.cache.clone();
    let people = tokio::task::spawn_blocking(move || users::all(&cache)).await??;
    let api = Api::new(context.address);
    println!("\nThree people, whose older words are uploaded and whose newest are kept back:");
    let mut jobs = Vec::new();
    for person in &people {
        let (uploaded, kept) = person.split();
        println!(
            "  {:9} {} ({} items uploaded, {} kept back)",
            person.id,
            person.who,
            uploaded.len(),
            kept.len()
        );
        jobs.push(api.upload(person.id, uploaded).await.with_context(|| format!("upload of {}", person.id))?);
    }
    println!("\nThe worker trains them, one after another:");
    for (person, job) in people.iter().zip(jobs) {
        let Some(job) = job else { continue };
        let mut progress = Progress::new(person.id)?;
        let reason = api.wait(&job, |job| progress.follow(job)).await;
        progress.bar.finish_and_clear();
        println!("  {:9} {}", person.id, reason.with_context(|| format!("training of {}", person.id))?);
    }
    let table = measure(context, &api, &people).await?;
    table.print();
    println!("\n\"{QUESTION}\"");
    for user in [None].into_iter().chain(people.iter().map(|person| Some(person.id))) {
        let answer = api.chat(&context.model_name, user, QUESTION).await?;
        println!("  {:9} [{}] {}", user.unwrap_or("base"), answer.generation, answer.text);
    }
    print_curl_lines(context);
    table.check()
}

/// How far one person's training is: a bar on a terminal, elsewhere a line per quarter.
struct Progress {
    name: &'static str,
    bar: ProgressBar,
    lines: bool,
    quarters: u64,
}

impl Progress {
    fn new(name: &'static str) -> anyhow::Result<Self> {
        let bar = ProgressBar::new(1).with_message(name);
        bar.set_style(ProgressStyle::with_template("  {msg:9} {bar:30} {pos}/{len} steps, {elapsed}")?);
        // The bar draws on stderr and hides itself where that is not a terminal.
        Ok(Self { name, bar, lines: !std::io::stderr().is_terminal(), quarters: 0 })
    }

    fn follow(&mut self, job: &Value) {
        let (step, steps) = (job["progress"]["step"].as_u64(), job["progress"]["steps"].as_u64());
        let (Some(step), Some(steps @ 1..)) = (step, steps) else { return };
        self.bar.set_length(steps);
        self.bar.set_position(step);
        // The last quarter needs no line: the outcome follows at once.
        let quarters = (step * 4 / steps).min(3);
        if self.lines && quarters > self.quarters {
            self.quarters = quarters;
            println!("  {:9} {step}/{steps} steps", self.name);
        }
    }
}

/// Bits per answer token: a row per person's kept-back items, a column for the base and for each person's adapter.
struct Table {
    names: Vec<&'static str>,
    base: Vec<f64>,
    adapters: Vec<Vec<f64>>,
}

async fn measure(context: &DemoContext, api: &Api, people: &[Person]) -> anyhow::Result<Table> {
    let mut adapters = Vec::new();
    for person in people {
        let (config, weights) =
            api.adapter(person.id).await.with_context(|| format!("the adapter of {}", person.id))?;
        adapters.push(AdapterWeights::parse(&config, &weights, &context.base.shape())?);
    }
    let example = |item: &HistoryItem| personalize::example(&context.tokenizer, item);
    let kept = |person: &Person| person.split().1.iter().map(example).collect::<Result<Vec<Example>, _>>();
    let kept: Vec<Vec<Example>> = people.iter().map(kept).collect::<Result<_, _>>()?;
    let base = Arc::clone(&context.base);
    let names = people.iter().map(|person| person.id).collect();
    tokio::task::spawn_blocking(move || {
        let sides: Vec<Option<&AdapterWeights>> =
            std::iter::once(None).chain(adapters.iter().map(Some)).collect();
        let (mut by_base, mut by_adapters) = (Vec::new(), Vec::new());
        for examples in &kept {
            let losses = evaluate(&base, &sides, examples, 2048, 512, &mut || ())?;
            let mut bits = losses.iter().map(|losses| Loss::bits_per_token(losses.iter().flatten()));
            by_base.extend(bits.next());
            by_adapters.push(bits.collect());
        }
        Ok(Table { names, base: by_base, adapters: by_adapters })
    })
    .await?
}

impl Table {
    fn print(&self) {
        println!(
            "\nBits per token on the items kept back (lower is better, the user's own adapter in brackets):"
        );
        let heads: String = self.names.iter().map(|name| format!("{name:>12}")).collect();
        println!("  {:12}{:>10}{heads}", "items of", "base");
        for (row, name) in self.names.iter().enumerate() {
            let cell = |(column, bits): (usize, &f64)| {
                if column == row {
                    format!("{:>12}", format!("[{bits:.3}]"))
                } else {
                    format!("{bits:>11.3} ")
                }
            };
            let cells: String = self.adapters[row].iter().enumerate().map(cell).collect();
            println!("  {name:12}{:>10.3}{cells}", self.base[row]);
        }
    }

    /// Whether every own adapter beats the base and the others.
    fn check(&self) -> anyhow::Result<()> {
        for (row, name) in self.names.iter().enumerate() {
            let own = self.adapters[row][row];
            ensure!(own < self.base[row], "{name}'s adapter is not better than the base on {name}'s items");
            for (column, other) in self.names.iter().enumerate().filter(|(column, _)| *column != row) {
                let better = own < self.adapters[row][column];
                ensure!(better, "{name}'s adapter is not better than {other}'s on {name}'s items");
            }
        }
        Ok(())
    }
}

fn print_curl_lines(context: &DemoContext) {
    let (url, model) = (format!("http://{}", context.address), &context.model_name);
    println!(
        r#"
Try it:
  curl -s {url}/v1/chat/completions -H 'content-type: application/json' -d '{{"model":"{model}","user":"falstaff","messages":[{{"role":"user","content":"PRINCE HENRY: Where is the money, Jack?"}}],"max_tokens":60}}'
  curl -sN {url}/v1/completions -H 'content-type: application/json' -d '{{"model":"{model}:lincoln","prompt":"The Union","max_tokens":60,"stream":true}}'
  curl -s {url}/v1/users/viewer
  curl -s {url}/v1/users/ada/history -H 'content-type: application/json' -d '{{"items":[{{"input":"Good morning!","output":"Good morrow to you."}}]}}'
  curl -s {url}/v1/users/falstaff/adapter
  curl -s {url}/v1/models"#
    );
}
