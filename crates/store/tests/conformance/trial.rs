//! What every property gets: a store, its clock, and short ways to make values.

use std::path::Path;
use std::sync::Arc;

use store::{Appended, Claimed, NewGeneration, Selection, Store, StoreError};
use types::{AdapterId, Clock as _, GenerationId, JobOutcome, ManualClock, NewItem, Timestamp};

pub(crate) const LEASE: i64 = 30_000;
pub(crate) const ATTEMPTS: u32 = 3;

/// An empty store.
#[derive(Clone)]
pub(crate) struct Trial {
    pub(crate) store: Store,
    pub(crate) clock: Arc<ManualClock>,
}

impl Trial {
    pub(crate) async fn on_disk(folder: &Path) -> Self {
        let clock = new_clock();
        Self { store: Store::open(folder, clock.clone()).await.unwrap(), clock }
    }

    pub(crate) async fn in_memory() -> Self {
        let clock = new_clock();
        Self { store: Store::in_memory(clock.clone()).await.unwrap(), clock }
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Appends without an idempotency key.
    pub(crate) async fn append(&self, adapter: &AdapterId, items: Vec<NewItem>) -> Appended {
        self.store.append(adapter, None, [0; 32], items).await.unwrap()
    }

    pub(crate) async fn claim(&self) -> Option<Claimed> {
        self.store.claim("worker", LEASE, ATTEMPTS).await.unwrap()
    }

    /// Appends an item and claims the job.
    pub(crate) async fn running_job(&self, adapter: &AdapterId) -> Claimed {
        self.append(adapter, vec![text("something to learn")]).await;
        let claimed = self.claim().await.unwrap();
        assert_eq!(&claimed.job.adapter, adapter);
        claimed
    }

    /// Publishes without a job and returns the new head.
    pub(crate) async fn publish(
        &self,
        adapter: &AdapterId,
        generation: NewGeneration,
        expected: Option<GenerationId>,
    ) -> GenerationId {
        self.store.publish(adapter, generation, expected, None).await.unwrap().id
    }

    /// Forgets the whole history; the number of items, or `None` if there is no such user.
    pub(crate) async fn forget_all(&self, adapter: &AdapterId) -> Option<u64> {
        let forgotten = self.store.forget_items(adapter, &Selection::All).await.unwrap();
        forgotten.map(|forgotten| forgotten.items)
    }

    pub(crate) async fn head(&self, adapter: &AdapterId) -> Option<GenerationId> {
        self.store.head(adapter).await.unwrap().map(|head| head.id)
    }

    /// The items of a history, by id.
    pub(crate) async fn ids(&self, adapter: &AdapterId) -> Vec<String> {
        let all = self.store.all_history(adapter).await.unwrap();
        all.into_iter().map(|item| item.id.to_string()).collect()
    }
}

fn new_clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::new(Timestamp(1_790_000_000_000)))
}

pub(crate) fn adapter(tenant: &str, user: &str) -> AdapterId {
    AdapterId::new(tenant.parse().unwrap(), user.parse().unwrap())
}

pub(crate) fn alice() -> AdapterId {
    adapter("acme", "alice@example.org")
}

pub(crate) fn bob() -> AdapterId {
    adapter("acme", "bob")
}

/// A shared adapter.
pub(crate) fn shared(tenant: &str, name: &str) -> AdapterId {
    AdapterId::shared(tenant.parse().unwrap(), name.parse().unwrap())
}

/// An item with nothing but an output.
pub(crate) fn text(output: &str) -> NewItem {
    NewItem { id: None, input: None, output: output.to_owned(), created_at: None, metadata: None }
}

/// An item with an id and a time.
pub(crate) fn item(id: &str, created_at: i64) -> NewItem {
    let id = Some(id.parse().unwrap());
    NewItem { id, created_at: Some(Timestamp(created_at)), input: Some("in".to_owned()), ..text("out") }
}

/// A generation whose files and id follow from `seed`.
pub(crate) fn generation(seed: u8) -> NewGeneration {
    NewGeneration {
        id: GenerationId::from_bytes([seed; 32]),
        parent: None,
        base: [7; 32],
        config: format!("{{\"r\": {seed}}}").into_bytes().into(),
        weights: (0..10_000u32).map(|i| (i as u8).wrapping_mul(seed)).collect(),
        meta: serde_json::json!({"items": seed, "gate": {"new_bits": 1.25}}),
    }
}

pub(crate) fn outcome(published: Option<GenerationId>) -> JobOutcome {
    JobOutcome {
        published: published.is_some(),
        generation: published,
        gate: None,
        reason: "better than the base".to_owned(),
        trained_tokens: 1234,
        seconds: 5.5,
    }
}

/// Asserts that a call was refused as coming from a worker that has lost its job.
pub(crate) fn assert_fenced<T: std::fmt::Debug>(result: Result<T, StoreError>) {
    assert!(matches!(result, Err(StoreError::Fenced { .. })), "not fenced: {result:?}");
}
