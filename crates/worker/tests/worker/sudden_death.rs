//! A process that works is killed at fifty moments, and what it publishes in the end is the same to the bit.
//!
//! The process is this test binary, started again with [`FOLDER`] set. It prints a line for each thing that it is about to
//! do or has done; the parent counts them, and kills it some time after one of them.
#![cfg(unix)]
#![expect(clippy::print_stderr, reason = "where the kills fell depends on the machine")]
#![expect(
    clippy::disallowed_methods,
    reason = "the child is told by its environment; a random moment is a random sleep"
)]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::BaseModel;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use sha2::{Digest as _, Sha256};
use store::{AdapterFiles, Store};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use train::{Control, StepReport, TrainError, TrainJob, Trained, Verdict};
use types::{AdapterId, GenerationId, SystemClock};
use worker::{Jointly, Settings, Trainer, Worker};

use crate::rig::{Rig, done, item, settings, user};

/// The data folder of the child process.
const FOLDER: &str = "ATELIER_WORKER_DEATH_FOLDER";
/// Makes the child go on from a checkpoint as if it had a step less: the negative control.
const FAULT: &str = "ATELIER_WORKER_DEATH_FAULT";
const KILLS: usize = 50;
/// Steps of a training, as in `kills.rs`, and from one checkpoint to the next.
const STEPS: u32 = 24;
const EVERY: u32 = 3;
/// Where a checkpoint has the number of its steps, and where their losses begin.
const STEPS_AT: usize = 40;
const LOSSES_AT: usize = 60;

/// One write per line, past the test harness, which keeps what `println!` prints.
fn say(line: &str) {
    std::io::stdout().lock().write_all(format!("\n{line}\n").as_bytes()).unwrap();
}

/// Trains as the worker does, with a checkpoint every few steps, and tells what it does.
struct Talks {
    tell: fn(&str),
    fault: bool,
}

fn steps_of(checkpoint: &[u8]) -> u32 {
    let (steps, _) = checkpoint[STEPS_AT..].split_first_chunk().unwrap();
    u32::from_le_bytes(*steps)
}

/// The checkpoint with the weights that it has and a step less, so that the last one's batch is learnt again.
fn a_step_less(checkpoint: &[u8]) -> Vec<u8> {
    let steps = steps_of(checkpoint) - 1;
    let loss = LOSSES_AT + 8 * steps as usize;
    let mut bytes = checkpoint[..checkpoint.len() - 32].to_vec();
    bytes[STEPS_AT..STEPS_AT + 4].copy_from_slice(&steps.to_le_bytes());
    bytes.drain(loss..loss + 8);
    let sum = Sha256::digest(&bytes);
    bytes.extend(sum);
    bytes
}

impl Trainer for Talks {
    fn train(
        &self,
        base: &BaseModel,
        jobs: &[TrainJob<'_>],
        control: &mut dyn Control,
    ) -> Vec<Result<Trained, TrainError>> {
        let [job] = jobs else { panic!("one job at a time") };
        (self.tell)(&format!("training {}", job.resume.map_or(0, steps_of)));
        let changed = job.resume.filter(|_| self.fault).map(a_step_less);
        let job = TrainJob { resume: changed.as_deref().or(job.resume), ..*job };
        let result = Jointly.train(base, &[job], &mut Telling { tell: self.tell, inner: control });
        (self.tell)("judging");
        result
    }
}

struct Telling<'a> {
    tell: fn(&str),
    inner: &'a mut dyn Control,
}

impl Control for Telling<'_> {
    fn step(&mut self, job: usize, report: StepReport) -> Verdict {
        assert_eq!(report.steps, STEPS);
        (self.tell)(&format!("step {}", report.step));
        self.inner.step(job, report)
    }

    fn checkpoint(&mut self, job: usize, step: u32, make: &mut dyn FnMut() -> Vec<u8>) {
        if step.is_multiple_of(EVERY) {
            (self.tell)(&format!("saving {step}"));
            self.inner.checkpoint(job, step, make);
            (self.tell)(&format!("saved {step}"));
        }
    }

    fn breathe(&mut self) {
        self.inner.breathe();
    }
}

fn tuned() -> Settings {
    Settings { checkpoint_millis: 0, max_attempts: u32::MAX, ..settings() }
}

async fn open(folder: &Path) -> Store {
    Store::open(folder, Arc::new(SystemClock)).await.unwrap()
}

/// The child process; does nothing in an ordinary test run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let trainer = Talks { tell: say, fault: std::env::var_os(FAULT).is_some() };
    let (base, tokenizer) = testkit::tiny_model();
    let announce = |_: &AdapterId, _: &GenerationId, _: AdapterFiles| say("published");
    let store = open(Path::new(&folder)).await;
    let worker = Worker::new(store, base, tokenizer, tuned(), Arc::new(announce));
    let worker = worker.with_trainer(Arc::new(trainer));
    worker.run(Arc::new(Notify::new()), CancellationToken::new()).await.unwrap(); // ends only by an error
}

/// A child at work.
struct Life {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    said: Vec<String>,
}

impl Life {
    fn begin(folder: &Path, fault: bool) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "sudden_death::child", "--nocapture"]).env(FOLDER, folder);
        if fault {
            command.env(FAULT, "1");
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines, said: Vec::new() }
    }

    fn hear(&mut self, line: String) {
        let known = ["training ", "step ", "saving ", "saved ", "judging", "published"];
        if known.iter().any(|known| line.starts_with(known)) {
            self.said.push(line);
        }
    }

    /// Waits until it has said something that begins so for so many times.
    fn until(&mut self, begins: &str, times: usize) {
        while self.said.iter().filter(|line| line.starts_with(begins)).count() < times {
            let line = self.lines.next().expect("the child ended by itself").unwrap();
            self.hear(line);
        }
    }

    /// Kills it, and returns all that it has said.
    fn end(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        assert_eq!(self.child.wait().unwrap().signal(), Some(9), "the child ended by itself");
        while let Some(line) = self.lines.next() {
            self.hear(line.unwrap());
        }
        self.said
    }
}

async fn upload(store: &Store, id: &AdapterId) {
    let items = (0..20).map(|at| item(at, "ahoy and welcome aboard".into())).collect();
    assert!(store.append(id, None, [0; 32], items).await.unwrap().job.is_some());
}

async fn generations(store: &Store, id: &AdapterId) -> Vec<GenerationId> {
    store.generations(id).await.unwrap().iter().map(|generation| generation.id).collect()
}

fn count_files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { count_files(&path) } else { 1 }).sum()
}

/// What a child publishes that is killed after its checkpoint of some steps, if of any, and how long it then took from the
/// end of the training to having published.
async fn published(killed_after: Option<u32>, fault: bool) -> (GenerationId, Duration) {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path()).await;
    upload(&store, &user("ada")).await;
    store.close().await;
    if let Some(step) = killed_after {
        let mut life = Life::begin(folder.path(), fault);
        life.until(&format!("saved {step}"), 1);
        life.end();
    }
    let mut life = Life::begin(folder.path(), fault);
    life.until("judging", 1);
    assert_eq!(life.said[0], format!("training {}", killed_after.unwrap_or(0)));
    let judging = Instant::now();
    life.until("published", 1);
    let took = judging.elapsed();
    life.end();
    let store = open(folder.path()).await;
    let all = generations(&store, &user("ada")).await;
    store.close().await;
    assert_eq!(all.len(), 1);
    (all[0], took)
}

/// When to kill: after a line has come so many times, and then some share of the time that judging and publishing take.
fn moment(random: &mut StdRng) -> (&'static str, usize, f64) {
    match random.random_range(0..10) {
        0 => ("step ", 0, random.random_range(0.0..1.0)),
        // Another step comes next.
        1..4 => ("step ", [1, 2, 4, 5, 7][random.random_range(0..5)], 0.0),
        4 => ("step ", random.random_range(1..=7), random.random_range(0.0..0.2)),
        5..7 => ("saving ", random.random_range(1..=3), random.random_range(0.0..0.2)),
        _ => ("judging", 1, random.random_range(0.0..1.1)),
    }
}

/// What a child was at that said this last.
fn activity(last: Option<&String>) -> &'static str {
    match last.map(|line| line.split(' ').next().unwrap_or_default()) {
        None => "opening the store",
        Some("saving") => "writing a checkpoint",
        Some("judging") => "gate or publishing",
        Some("published") => "between two jobs",
        Some(_) => "training",
    }
}

/// The step that a training may go on from after a life, given where it might before.
fn may_resume_from(said: &[String], before: Vec<u32>) -> Vec<u32> {
    let mut from = before;
    for line in said {
        let (what, step) = line.split_once(' ').unwrap_or((line, ""));
        let step = || step.parse().unwrap();
        match what {
            "training" => from = vec![step()],
            "saving" => from.push(step()),
            "saved" => from = vec![step()],
            // It may have published without having said so, and goes on with the next.
            "judging" => from.push(0),
            "published" => from = vec![0],
            _ => {}
        }
    }
    from
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_killed_fifty_times_publishes_the_same() {
    let (expected, judging) = published(None, false).await;
    let folder = tempfile::tempdir().unwrap();
    let adapters = folder.path().join("adapters");
    let mut random = StdRng::seed_from_u64(11);
    let mut users = Vec::new();
    let mut tally: BTreeMap<&str, usize> = BTreeMap::new();
    let mut unfinished: BTreeMap<&str, usize> = BTreeMap::new();
    let mut from = vec![0];
    let mut store = open(folder.path()).await;
    for _ in 0..KILLS {
        // One job at least is waiting behind the one under way, so that every line comes.
        loop {
            let stats = store.queue_stats().await.unwrap();
            if stats.queued + stats.running >= 2 {
                break;
            }
            users.push(user(&format!("user-{}", users.len())));
            upload(&store, &users[users.len() - 1]).await;
        }
        store.close().await;

        let (line, times, share) = moment(&mut random);
        let mut life = Life::begin(folder.path(), false);
        life.until(line, times);
        std::thread::sleep(judging.mul_f64(share));
        let said = life.end();
        if let Some(begun) = said.first() {
            let step = begun.strip_prefix("training ").unwrap().parse().unwrap();
            assert!(from.contains(&step), "went on from step {step} of {from:?}");
        }
        from = may_resume_from(&said, from);

        let left = count_files(&adapters);
        store = open(folder.path()).await;
        let kept = count_files(&adapters);
        let mut heads = 0;
        for id in &users {
            let all = generations(&store, id).await;
            assert!(all.is_empty() || all == [expected], "{all:?}");
            heads += all.len();
        }
        let sound = 2 * heads..=2 * heads + 1;
        assert!(sound.contains(&kept), "adapters, and one checkpoint at most: {kept} of {heads}");
        let activity = activity(said.last());
        *tally.entry(activity).or_default() += 1;
        if left > kept {
            *unfinished.entry(activity).or_default() += 1;
        }
    }
    eprintln!("{KILLS} kills over {} users: {tally:?}; files to be swept after: {unfinished:?}", users.len());
    assert_eq!(tally.values().sum::<usize>(), KILLS);
    for activity in ["training", "writing a checkpoint", "gate or publishing"] {
        assert!(tally.contains_key(activity), "no kill while {activity}: {tally:?}");
    }

    // What is left is done in peace.
    let rig = Rig::over(store);
    let (worker, stop) = rig.start_with(tuned(), Arc::new(Talks { tell: |_| (), fault: false }));
    for id in &users {
        let job = rig.store.latest_job(id).await.unwrap().unwrap();
        let outcome = rig.until(&job, done).await.outcome.unwrap();
        assert_eq!((outcome.published, outcome.generation), (true, Some(expected)));
        assert_eq!(generations(&rig.store, id).await, [expected], "the id is a hash of the weights");
        assert_eq!(rig.head(id).await, Some(expected));
    }
    stop.cancel();
    worker.await.unwrap().unwrap();
    assert_eq!(count_files(&adapters), 2 * users.len(), "adapters, and no checkpoint");
}

/// Negative control of the one above, and of its seeded fault.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_training_that_goes_on_a_step_too_early_is_noticed() {
    let (expected, _) = published(None, true).await;
    assert_eq!(published(Some(6), false).await.0, expected, "without the fault a kill changes nothing");
    assert_ne!(published(Some(6), true).await.0, expected, "with it the last step is done twice");
}
