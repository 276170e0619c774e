//! What only a folder on disk can show: reopening, the lock, damage, left-overs, erasure to the byte.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sqlx::{ConnectOptions as _, Connection as _};
use store::{AdapterFile, Lesson, NewGeneration, PauseScope, Selection, Store, StoreError};
use types::{AdapterId, GenerationId, JobOutcome, JobState, ManualClock, NewItem, Timestamp};
use uuid::Uuid;

async fn open(folder: &Path) -> Store {
    try_open(folder).await.unwrap()
}

async fn try_open(folder: &Path) -> Result<Store, StoreError> {
    Store::open(folder, Arc::new(ManualClock::new(Timestamp(1_790_000_000_000)))).await
}

fn user(name: &str) -> AdapterId {
    AdapterId::new("acme".parse().unwrap(), name.parse().unwrap())
}

fn text(output: &str) -> NewItem {
    NewItem { id: None, input: None, output: output.to_owned(), created_at: None, metadata: None }
}

fn generation(seed: u8) -> NewGeneration {
    NewGeneration {
        id: GenerationId::from_bytes([seed; 32]),
        parent: None,
        base: [7; 32],
        config: b"{}".to_vec().into(),
        weights: vec![seed; 5000].into(),
        meta: serde_json::json!({}),
    }
}

fn outcome() -> JobOutcome {
    JobOutcome {
        published: true,
        generation: None,
        gate: None,
        reason: String::new(),
        trained_tokens: 0,
        seconds: 0.0,
    }
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found
}

/// The files whose content holds `needle`.
fn holding(folder: &Path, needle: &[u8]) -> Vec<PathBuf> {
    let holds = |path: &PathBuf| fs::read(path).unwrap().windows(needle.len()).any(|window| window == needle);
    files(folder).into_iter().filter(holds).collect()
}

/// Runs SQL on the database from outside.
async fn sql(folder: &Path, statements: &'static str) {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(folder.join("atelier.db"));
    let mut outside = options.connect().await.unwrap();
    sqlx::raw_sql(statements).execute(&mut outside).await.unwrap();
    outside.close().await.unwrap();
}

#[tokio::test]
async fn everything_is_there_after_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("new/data");
    let alice = user("a+b@c.d-e_f");
    let mut expected = None;
    for closed in [true, false] {
        let store = open(&folder).await;
        if let Some((user, files)) = expected {
            assert_eq!(store.user(&alice).await.unwrap(), user);
            assert_eq!(store.fetch(&alice, &generation(1).id).await.unwrap(), files);
            assert!(store.append(&alice, Some("key"), [1; 32], vec![text("b")]).await.unwrap().replayed);
            break;
        }
        store.append(&alice, Some("key"), [1; 32], vec![text("a"), text("b")]).await.unwrap();
        let claimed = store.claim("worker", 1000, 3).await.unwrap().unwrap();
        let finish = Some((claimed.fence, outcome()));
        store.publish(&alice, generation(1), None, finish).await.unwrap();
        let files = store.fetch(&alice, &generation(1).id).await.unwrap();
        expected = Some((store.user(&alice).await.unwrap(), files));
        if closed {
            store.close().await;
            assert!(store.user(&alice).await.is_err());
        }
    }
}

#[tokio::test]
async fn a_folder_is_opened_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path()).await;
    let second = try_open(folder.path()).await;
    assert!(matches!(second.err(), Some(StoreError::InUse { folder: named }) if named == folder.path()));
    // A clone is the same store; dropping one handle of two frees nothing.
    drop(store.clone());
    assert!(try_open(folder.path()).await.is_err());
    drop(store);
    let store = open(folder.path()).await;
    store.close().await;
    open(folder.path()).await;
}

#[tokio::test]
async fn what_cannot_be_opened_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(matches!(try_open(&file).await.err(), Some(StoreError::Folder { .. })));
    fs::write(folder.path().join("atelier.db"), "this is not a database".repeat(100)).unwrap();
    assert!(matches!(try_open(folder.path()).await.err(), Some(StoreError::Database(_))));

    let newer = tempfile::tempdir().unwrap();
    open(newer.path()).await.close().await;
    sql(newer.path(), "INSERT INTO _sqlx_migrations VALUES (9999, 'later', 0, TRUE, x'00', 0)").await;
    assert!(matches!(try_open(newer.path()).await.err(), Some(StoreError::Migration(_))));
}

#[cfg(unix)]
#[tokio::test]
async fn the_folder_is_private() {
    use std::os::unix::fs::PermissionsExt as _;
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("data");
    let _store = open(&folder).await;
    assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o777, 0o700);
}

#[tokio::test]
async fn a_job_of_a_dead_process_is_taken_up_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let alice = user("alice");
    let (mut job, mut fences) = (None, Vec::new());
    for attempt in 1..=3 {
        let store = open(folder.path()).await;
        if attempt == 1 {
            store.append(&alice, None, [0; 32], vec![text("a")]).await.unwrap();
        }
        let claimed = store.claim("worker", i64::MAX, 3).await.unwrap().unwrap();
        assert_eq!(claimed.job.attempts, attempt);
        assert_eq!(job.get_or_insert(claimed.job.id.clone()), &claimed.job.id);
        for old in &fences {
            assert!(matches!(store.beat(old, None, 1).await, Err(StoreError::Fenced { .. })));
        }
        store.beat(&claimed.fence, None, i64::MAX).await.unwrap();
        fences.push(claimed.fence);
        // A newer job of the same user waits for its turn.
        store.append(&alice, None, [0; 32], vec![text("more")]).await.unwrap();
    }
    // A job that kills its process every time is given up, and the next one runs.
    let store = open(folder.path()).await;
    let next = store.claim("worker", i64::MAX, 3).await.unwrap().unwrap();
    assert_ne!(Some(&next.job.id), job.as_ref());
    let dead = store.job(&alice.tenant, &job.unwrap()).await.unwrap().unwrap();
    assert_eq!(dead.state, JobState::Failed);
}

#[tokio::test]
async fn damage_is_noticed_and_repaired() {
    let folder = tempfile::tempdir().unwrap();
    let alice = user("alice");
    let store = open(folder.path()).await;
    let (one, two) = (generation(1).id, generation(2).id);
    store.publish(&alice, generation(1), None, None).await.unwrap();
    store.publish(&alice, generation(2), Some(one), None).await.unwrap();

    let damages: [(&str, fn(&Path)); 5] = [
        ("flipped bit", |path| {
            let mut bytes = fs::read(path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(path, bytes).unwrap();
        }),
        ("cut short", |path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
        }),
        ("too long", |path| {
            let mut bytes = fs::read(path).unwrap();
            bytes.push(0);
            fs::write(path, bytes).unwrap();
        }),
        ("empty", |path| fs::write(path, "").unwrap()),
        ("missing", |path| fs::remove_file(path).unwrap()),
    ];
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        for (what, damage) in damages {
            let of_one = |path: &PathBuf| path.to_string_lossy().contains(&one.to_string());
            let path = files(folder.path()).into_iter().find(|path| of_one(path) && path.ends_with(name));
            damage(&path.unwrap());
            let fetched = store.fetch(&alice, &one).await;
            let named = matches!(&fetched, Err(StoreError::Corrupt { generation, reason })
                if *generation == one && reason.contains(name));
            assert!(named, "{what} {name}: {fetched:?}");
            let rest = Arc::new(|_| {});
            assert_eq!(
                store.fetch_gently(&alice, &one, rest).await.is_ok(),
                fetched.is_ok(),
                "{what} {name}"
            );
            // The other file can be had by itself.
            for (file, is) in [
                (AdapterFile::Config, "adapter_config.json"),
                (AdapterFile::Weights, "adapter_model.safetensors"),
            ] {
                let alone = store.fetch_file(&alice, &one, file).await;
                assert_eq!(alone.is_ok(), is != name, "{what} {name}: {is} {alone:?}");
            }
            // It cannot become head, and the other generation is untouched.
            let moved = store.set_head(&alice, Some(one), Some(two)).await;
            assert!(matches!(moved, Err(StoreError::Corrupt { .. })));
            assert_eq!(store.head(&alice).await.unwrap().unwrap().id, two);
            store.fetch(&alice, &two).await.unwrap();
            // Publishing the same bytes again mends it.
            store.publish(&alice, generation(1), Some(two), None).await.unwrap();
            assert_eq!(store.fetch(&alice, &one).await.unwrap().weights, generation(1).weights);
            store.set_head(&alice, Some(two), Some(one)).await.unwrap();
        }
    }
    assert_eq!(files(&folder.path().join("adapters")).len(), 4);
}

#[tokio::test]
async fn erased_content_leaves_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (alice, bob) = (user("alice"), user("bob"));
    let store = open(folder).await;
    let secret = "the-quick-brown-secret";
    let weights = b"weights-made-of-secrets".to_vec();
    let upload = async || {
        // Interleaved and of all sizes, so that pages are split, shared and overflown.
        for i in 0..100 {
            let long = secret.repeat(1 + i * i);
            let item = NewItem { input: Some(format!("{i} {secret}")), ..text(&long) };
            let metadata = Some(serde_json::json!({ "tag": secret }));
            let id = Some(format!("{secret}-{}", Uuid::new_v4()).parse().unwrap());
            let tagged = NewItem { id, metadata, ..text("tagged") };
            store.append(&alice, None, [0; 32], vec![item, tagged]).await.unwrap();
            let kept = vec![text(&"bob-stays-here ".repeat(1 + i))];
            store.append(&bob, None, [0; 32], kept).await.unwrap();
        }
    };
    upload().await;
    assert_ne!(holding(folder, secret.as_bytes()), [""; 0].map(PathBuf::from));
    store.forget_items(&alice, &Selection::All).await.unwrap();
    assert_eq!(holding(folder, secret.as_bytes()), [""; 0].map(PathBuf::from));

    upload().await;
    let new = NewGeneration { weights: weights.clone().into(), ..generation(1) };
    store.publish(&alice, new, None, None).await.unwrap();
    store.publish(&bob, generation(2), None, None).await.unwrap();
    assert_eq!(holding(folder, &weights).len(), 1);
    assert!(store.erase_user(&alice).await.unwrap());
    for needle in [secret.as_bytes(), &weights, b"alice"] {
        assert_eq!(holding(folder, needle), [""; 0].map(PathBuf::from));
    }
    assert!(!folder.join("adapters/acme/alice").exists());
    assert_ne!(holding(folder, b"bob-stays-here"), [""; 0].map(PathBuf::from));
    store.fetch(&bob, &generation(2).id).await.unwrap();
}

/// What was forgotten stays so, whatever the process comes to right after the answer.
#[tokio::test]
async fn a_forgotten_history_stays_forgotten_across_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let alice = user("alice");
    let store = open(folder.path()).await;
    store.append(&alice, None, [0; 32], vec![text("a")]).await.unwrap();
    let claimed = store.claim("worker", 1000, 3).await.unwrap().unwrap();
    let (one, finish) = (generation(1).id, (claimed.fence, outcome()));
    store.publish_lesson(&alice, generation(1), None, finish, Lesson::default()).await.unwrap();
    store.append(&alice, None, [0; 32], vec![text("b")]).await.unwrap();
    let running = store.claim("worker", 1000, 3).await.unwrap().unwrap();
    let forgotten = store.forget_items(&alice, &Selection::All).await.unwrap().unwrap();
    assert_eq!((forgotten.head, &forgotten.generations[..], forgotten.job), (None, &[one][..], None));
    // No farewell: the connections go as they do when the process dies.
    drop(store);
    let store = open(folder.path()).await;
    assert_eq!(store.head(&alice).await.unwrap(), None);
    assert_eq!(store.generations(&alice).await.unwrap(), []);
    assert_eq!(store.claim("worker", 1000, 3).await.unwrap(), None, "no job goes on, none is taken up again");
    let finish = Some((running.fence, outcome()));
    assert!(store.publish(&alice, generation(2), None, finish).await.is_err());
    assert_eq!(files(&folder.path().join("adapters")).len(), 0);
}

#[tokio::test]
async fn a_pause_of_the_server_holds_across_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (alice, operator) = (user("alice"), "ops".parse().unwrap());
    let store = open(folder.path()).await;
    store.append(&alice, None, [0; 32], vec![text("a")]).await.unwrap();
    store.pause(&PauseScope::Server, &operator, Some("a new disk")).await.unwrap();
    let pause = store.pauses(&alice.tenant, None).await.unwrap().server.unwrap();
    drop(store);
    let store = open(folder.path()).await;
    let again = store.pauses(&alice.tenant, None).await.unwrap().server.unwrap();
    assert_eq!((&again, again.since.is_some(), again.by.as_ref()), (&pause, true, Some(&operator)));
    assert_eq!(again.reason.as_deref(), Some("a new disk"));
    assert_eq!(store.claim("worker", 1000, 3).await.unwrap(), None);
    store.resume(&PauseScope::Server).await.unwrap();
    assert!(store.claim("worker", 1000, 3).await.unwrap().is_some());
}

#[tokio::test]
async fn left_overs_of_a_crash_are_deleted_at_opening() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let store = open(folder).await;
    store.publish(&user("bob"), generation(1), None, None).await.unwrap();
    store.close().await;
    drop(store);
    // A publish that died while it wrote, an erasure that died before it deleted, and a note about a
    // folder that is gone already.
    for path in ["alice/g/one/adapter_model.safetensors#1", "alice/g/two/adapter_config.json"] {
        let path = folder.join("adapters/acme").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "left over").unwrap();
    }
    sql(
        folder,
        "INSERT INTO garbage VALUES ('adapters/acme/alice/g/one', 'acme', 'alice', 1),
             ('adapters/acme/alice/g/two', 'acme', 'alice', 0),
             ('adapters/acme/alice/g/three', 'acme', 'alice', 0),
             ('../../../outside', 'acme', 'alice', 0), ('adapters', 'acme', 'alice', 0)",
    )
    .await;
    let store = open(folder).await;
    assert!(!folder.join("adapters/acme/alice").exists());
    store.fetch(&user("bob"), &generation(1).id).await.unwrap();
    // Notes that name no folder of adapter files are kept, and nothing is deleted for them.
    assert!(store.erase_user(&user("alice")).await.is_err());
}

#[tokio::test]
async fn a_refused_publish_leaves_no_files() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path()).await;
    let publishers = (1..=8).map(|seed| {
        let store = store.clone();
        tokio::spawn(async move { store.publish(&user("alice"), generation(seed), None, None).await.is_ok() })
    });
    for publisher in publishers.collect::<Vec<_>>() {
        publisher.await.unwrap();
    }
    let head = store.head(&user("alice")).await.unwrap().unwrap().id;
    let other = NewGeneration { weights: b"other".to_vec().into(), id: head, ..generation(1) };
    let refused = store.publish(&user("alice"), other, Some(head), None).await;
    assert!(matches!(refused, Err(StoreError::GenerationConflict { .. })));
    let left = files(&folder.path().join("adapters"));
    assert!(left.len() == 2 && left.iter().all(|path| path.to_string_lossy().contains(&head.to_string())));
}

#[tokio::test]
async fn a_blob_store_that_fails_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let alice = user("alice");
    let store = open(folder.path()).await;
    store.append(&alice, None, [0; 32], vec![text("a")]).await.unwrap();
    let claimed = store.claim("worker", 1000, 3).await.unwrap().unwrap();
    let adapters = folder.path().join("adapters");
    fs::remove_dir(&adapters).unwrap();
    fs::write(&adapters, "in the way").unwrap();
    let finish = Some((claimed.fence, outcome()));
    let failed = store.publish(&alice, generation(1), None, finish.clone()).await;
    assert!(matches!(failed, Err(StoreError::Blobs(_))), "{failed:?}");
    assert_eq!(store.head(&alice).await.unwrap(), None);
    assert_eq!(store.generations(&alice).await.unwrap(), []);
    // The job is still the worker's, who may try again.
    fs::remove_file(&adapters).unwrap();
    store.publish(&alice, generation(1), None, finish).await.unwrap();
    store.fetch(&alice, &generation(1).id).await.unwrap();

    // Files that cannot be deleted are reported, and deleted by the next call.
    let moved = folder.path().join("moved");
    fs::rename(&adapters, &moved).unwrap();
    fs::write(&adapters, "in the way").unwrap();
    assert!(store.erase_user(&alice).await.is_err());
    assert_eq!(store.user(&alice).await.unwrap(), None);
    fs::remove_file(&adapters).unwrap();
    fs::rename(&moved, &adapters).unwrap();
    assert_eq!(files(&adapters).len(), 2);
    assert!(store.erase_user(&alice).await.unwrap());
    assert_eq!(files(&adapters).len(), 0);
}
