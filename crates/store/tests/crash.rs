//! Kills a process that writes, at random moments, and asserts that nothing it acknowledged is lost.
//!
//! The process is this test binary, started again with [`FOLDER`] set. It prints one line for each
//! thing the store has acknowledged.
#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(
    clippy::disallowed_methods,
    reason = "the child is told by its environment; a random moment is a random sleep"
)]

use std::collections::{HashMap, HashSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use sqlx::ConnectOptions as _;
use store::{Expected, NewGeneration, Selection, Store, StoreError};
use tokio::task::JoinSet;
use types::{AdapterId, GenerationId, ItemId, JobOutcome, NewItem, SystemClock};
use uuid::Uuid;

/// The data folder of the child process.
const FOLDER: &str = "ATELIER_STORE_CRASH_FOLDER";
/// Makes the child say "done" before it is: the negative control.
const LIES: &str = "ATELIER_STORE_CRASH_LIES";
const ROUNDS: usize = 20;
const USERS: [&str; 3] = ["ann", "ben", "cho"];
/// Who forgets everything, again and again.
const FORGETS: &str = "dee";

fn user(name: &str) -> AdapterId {
    AdapterId::new("acme".parse().unwrap(), name.parse().unwrap())
}

fn shared() -> AdapterId {
    AdapterId::shared("acme".parse().unwrap(), "style".parse().unwrap())
}

/// A generation that is named at random; its weights follow from its name.
fn generation(parent: Option<GenerationId>) -> NewGeneration {
    let mut id = [0; 32];
    id[..16].copy_from_slice(Uuid::new_v4().as_bytes());
    NewGeneration {
        id: GenerationId::from_bytes(id),
        parent,
        base: [0; 32],
        config: b"{}".to_vec().into(),
        weights: id.repeat(2000).into(),
        meta: serde_json::json!({}),
    }
}

fn random() -> u64 {
    Uuid::new_v4().as_u64_pair().1
}

async fn open(folder: &Path) -> Store {
    Store::open(folder, Arc::new(SystemClock)).await.unwrap()
}

/// One write per line, past the test harness, which keeps what `println!` prints.
fn say(line: &str) {
    std::io::stdout().lock().write_all(format!("\n{line}\n").as_bytes()).unwrap();
}

/// Uploads for ever.
async fn upload(store: Store, name: &str, lies: bool) {
    for size in (1..=5).cycle() {
        let ids: Vec<ItemId> = (0..size).map(|_| Uuid::new_v4().to_string().parse().unwrap()).collect();
        let item = |id: &ItemId| NewItem {
            id: Some(id.clone()),
            input: None,
            output: "x".repeat(700),
            created_at: None,
            metadata: None,
        };
        let acknowledge = || ids.iter().for_each(|id| say(&format!("item {name} {id}")));
        if lies {
            acknowledge();
        }
        store.append(&user(name), None, [0; 32], ids.iter().map(item).collect()).await.unwrap();
        if !lies {
            acknowledge();
        }
    }
}

/// Claims and publishes for ever.
async fn work(store: Store) {
    loop {
        let Some(claimed) = store.claim("child", 60_000, u32::MAX).await.unwrap() else {
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        };
        let adapter = &claimed.job.adapter;
        let head = store.head(adapter).await.unwrap().map(|head| head.id);
        let generation = generation(head);
        let outcome = JobOutcome {
            published: true,
            generation: Some(generation.id),
            gate: None,
            reason: String::new(),
            trained_tokens: 0,
            seconds: 0.0,
        };
        match store.publish(adapter, generation, head, Some((claimed.fence, outcome))).await {
            Ok(published) => say(&format!("head {} {}", adapter.owner, published.id)),
            // Its history was forgotten meanwhile.
            Err(StoreError::Fenced { .. } | StoreError::HeadMoved { .. }) if *adapter == user(FORGETS) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Uploads an item, lets it be learnt, and forgets it with what has learnt from it.
async fn forget(store: Store, lies: bool) {
    let forgetful = user(FORGETS);
    loop {
        let item =
            NewItem { id: None, input: None, output: "secret".into(), created_at: None, metadata: None };
        store.append(&forgetful, None, [0; 32], vec![item]).await.unwrap();
        let head = loop {
            match store.head(&forgetful).await.unwrap() {
                Some(head) => break head.id,
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        if lies {
            say(&format!("forgot {FORGETS} {head}"));
        }
        store.forget_items(&forgetful, &Selection::All).await.unwrap().unwrap();
        if !lies {
            say(&format!("forgot {FORGETS} {head}"));
        }
    }
}

/// Imports a shared adapter over and over, and deletes what it has replaced.
async fn replace(store: Store) {
    loop {
        let old: Vec<_> = store.generations(&shared()).await.unwrap().iter().map(|g| g.id).collect();
        let new = store.publish(&shared(), generation(None), Expected::Any, None).await.unwrap();
        say(&format!("import style {}", new.id));
        for old in old {
            store.delete_generation(&shared(), &old).await.unwrap();
            say(&format!("delete style {old}"));
        }
    }
}

/// The child process; does nothing in an ordinary test run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let lies = std::env::var_os(LIES).is_some();
    let store = open(Path::new(&folder)).await;
    let mut tasks = JoinSet::new();
    for name in USERS {
        tasks.spawn(upload(store.clone(), name, lies));
    }
    tasks.spawn(replace(store.clone()));
    tasks.spawn(forget(store.clone(), lies));
    tasks.spawn(work(store));
    tasks.join_next().await.unwrap().unwrap(); // they end only by a panic
}

/// Runs a child on the folder, kills it, and returns the lines it had time to print.
fn run_and_kill(folder: &Path, lies: bool, round: usize) -> Vec<String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture"]).env(FOLDER, folder);
    if lies {
        command.env(LIES, "1");
    }
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut said = Vec::new();
    // Some children are killed while they open the store, the others once they are at work.
    if let Some(first) = [None, Some("item "), Some("head ")][round % 3] {
        while !said.last().is_some_and(|line: &String| line.starts_with(first)) {
            said.push(lines.next().expect("the child ended by itself"));
        }
    }
    let reader = std::thread::scope(|scope| {
        let reader = scope.spawn(|| lines.collect::<Vec<_>>());
        std::thread::sleep(Duration::from_micros(random() % 80_000));
        child.kill().unwrap();
        reader.join().unwrap()
    });
    assert_eq!(child.wait().unwrap().signal(), Some(9), "the child ended by itself");
    said.extend(reader);
    said
}

/// What was acknowledged and is not there.
async fn lost(folder: &Path, said: &[String]) -> Vec<String> {
    let store = open(folder).await;
    let mut items = HashMap::new();
    for name in USERS {
        let all = store.all_history(&user(name)).await.unwrap();
        assert_eq!(store.history_stats(&user(name)).await.unwrap().items, all.len() as u64);
        items.insert(name, all.into_iter().map(|item| item.id.to_string()).collect::<HashSet<_>>());
    }
    let mut lost = Vec::new();
    let imported = said.iter().rfind(|line| line.starts_with("import "));
    for line in said {
        let mut words = line.split(' ');
        let (Some(what), Some(name), Some(id), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            continue;
        };
        let there = match what {
            "item" => items[name].contains(id),
            // Those before it may have been deleted without a word.
            "import" if Some(line) == imported => store.fetch(&shared(), &id.parse().unwrap()).await.is_ok(),
            "delete" => {
                let found = store.fetch(&shared(), &id.parse().unwrap()).await;
                matches!(found, Err(StoreError::NotFound { what: "generation", .. }))
            }
            // What is forgotten is neither served nor kept, whatever came after the answer.
            "forgot" => {
                let is_head =
                    store.head(&user(name)).await.unwrap().is_some_and(|head| head.id.to_string() == id);
                let found = store.fetch(&user(name), &id.parse().unwrap()).await;
                !is_head && matches!(found, Err(StoreError::NotFound { .. }))
            }
            "head" if name == FORGETS => continue,
            "head" => store.fetch(&user(name), &id.parse().unwrap()).await.is_ok(),
            _ => continue,
        };
        if !there {
            lost.push(line.clone());
        }
    }
    store.close().await;
    lost
}

/// What must hold after any crash, whatever was acknowledged.
async fn assert_sound(folder: &Path) {
    let store = open(folder).await;
    let mut files = 0;
    for adapter in USERS.map(user).into_iter().chain([shared(), user(FORGETS)]) {
        let generations = store.generations(&adapter).await.unwrap();
        for generation in &generations {
            let fetched = store.fetch(&adapter, &generation.id).await.unwrap();
            assert_eq!(fetched.weights, generation.id.as_bytes().repeat(2000));
        }
        let head = store.head(&adapter).await.unwrap();
        assert_eq!(head.as_ref(), generations.first(), "the head is the last one published");
        files += 2 * generations.len();
    }
    // No file without a generation, no half-written one.
    assert_eq!(count_files(&folder.join("adapters")), files);
    // Every open job can be had at once.
    let open_jobs = store.queue_stats().await.unwrap();
    let mut claimed = Vec::new();
    while let Some(job) = store.claim("parent", 60_000, u32::MAX).await.unwrap() {
        claimed.push(job);
    }
    assert!(claimed.len() as u64 >= open_jobs.running && claimed.len() <= USERS.len() + 1);
    for job in claimed {
        store.release(&job.fence).await.unwrap();
    }
    store.close().await;
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(folder.join("atelier.db"));
    let mut outside = options.connect().await.unwrap();
    let check: String = sqlx::query_scalar("PRAGMA integrity_check").fetch_one(&mut outside).await.unwrap();
    assert_eq!(check, "ok");
    let broken = sqlx::query("PRAGMA foreign_key_check").fetch_all(&mut outside).await.unwrap();
    assert_eq!(broken.len(), 0);
}

fn count_files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { count_files(&path) } else { 1 }).sum()
}

#[tokio::test]
async fn what_was_acknowledged_survives_kills() {
    let folder = tempfile::tempdir().unwrap();
    let mut said = Vec::new();
    for round in 0..ROUNDS {
        said.extend(run_and_kill(folder.path(), false, round));
        assert_eq!(lost(folder.path(), &said).await, [""; 0], "round {round}");
        assert_sound(folder.path()).await;
    }
}

#[tokio::test]
async fn a_store_that_acknowledges_too_early_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let mut said = Vec::new();
    for round in 1..=ROUNDS {
        said.extend(run_and_kill(folder.path(), true, round));
        if !lost(folder.path(), &said).await.is_empty() {
            return;
        }
    }
    panic!("{ROUNDS} kills, and no loss was noticed");
}
