//! A head that cannot be read keeps nobody from learning.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use peft::generation_id;
use store::{NewGeneration, Store};
use types::{JobState, SystemClock};

use crate::rig::{Rig, done, item, settings, user};

const WORDS: &str = "ahoy and welcome aboard";

/// The files of weights below a folder.
fn weights(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let below = entries.flat_map(|path| if path.is_dir() { weights(&path) } else { vec![path] });
    below.filter(|path| path.ends_with("adapter_model.safetensors")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_whose_file_is_damaged_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let rig = Rig::over(Store::open(folder.path(), Arc::new(SystemClock)).await.unwrap());
    let (worker, stop) = rig.start(settings());
    let ada = user("ada");
    let job = rig.upload(&ada, 0..20, |_| WORDS.into()).await;
    assert!(rig.until(&job, done).await.outcome.unwrap().published);
    let head = rig.head(&ada).await.unwrap();
    let [file] = &weights(&folder.path().join("adapters"))[..] else { panic!("one head, one file") };
    let mut bytes = fs::read(file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(file, bytes).unwrap();
    assert!(rig.store.fetch(&ada, &head).await.is_err());

    // With as little new as would be an update: the head has no say.
    let job = rig.upload(&ada, 20..40, |_| WORDS.into()).await;
    let job = rig.until(&job, done).await;
    assert_eq!((job.state, job.attempts), (JobState::Succeeded, 1), "{job:?}");
    let outcome = job.outcome.unwrap();
    assert!(outcome.published && outcome.gate.unwrap().head_bits.is_none(), "{}", outcome.reason);
    assert!(outcome.reason.contains("the current adapter cannot be read"), "{}", outcome.reason);
    assert!(outcome.reason.contains("sha-256"), "{}", outcome.reason);
    let new = rig.head(&ada).await.unwrap();
    assert!(new != head && rig.store.fetch(&ada, &new).await.is_ok());
    let last = rig.store.progress(&ada, None, 9).await.unwrap().unwrap().points.entries.pop().unwrap();
    assert!(last.from_scratch);
    stop.cancel();
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_that_is_no_adapter_is_replaced() {
    let rig = Rig::new().await;
    let (base, config, weights) = (*rig.base.hash(), b"{}".to_vec(), b"no tensors".to_vec());
    let id = generation_id(&base, &config, &weights);
    let meta = serde_json::json!({});
    let odd = NewGeneration { id, parent: None, base, config: config.into(), weights: weights.into(), meta };
    let ada = user("ada");
    rig.store.publish(&ada, odd, None, None).await.unwrap();
    let (worker, stop) = rig.start(settings());
    let items = (0..20).map(|at| item(at, WORDS.into())).collect();
    let job = rig.upload_items(&ada, items).await;
    let job = rig.until(&job, done).await;
    let outcome = job.outcome.unwrap_or_else(|| panic!("{:?}", job.error));
    assert!(outcome.published, "{}", outcome.reason);
    assert!(outcome.reason.contains("the current adapter cannot be read"), "{}", outcome.reason);
    assert_ne!(rig.head(&ada).await, Some(id));
    stop.cancel();
    worker.await.unwrap().unwrap();
}
