//! What was learnt from which items, at what cost, and how well.

use sha2::{Digest as _, Sha256};
use types::{AdapterId, GenerationId, HistoryItem};

use crate::records::{Cost, Progress};
use crate::{Manifest, OldLoss, Page, Store, StoreError, sql};

/// The hash that stands for an item in manifests: SHA-256 over its id, its time and its texts (not its metadata, which
/// nothing learns from), each text after its length.
#[must_use]
pub fn item_hash(item: &HistoryItem) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut add = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    add(item.id.as_str().as_bytes());
    add(&item.created_at.0.to_le_bytes());
    add(item.output.as_bytes());
    if let Some(input) = &item.input {
        add(input.as_bytes());
    }
    hash.finalize().into()
}

impl Store {
    /// Which items have gone into a generation's weights; `None` if it has not learnt from the user's items, or there
    /// is no such generation.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn manifest(
        &self,
        adapter: &AdapterId,
        generation: &GenerationId,
    ) -> Result<Option<Manifest>, StoreError> {
        let mut tx = self.read().await?;
        let Some(user) = sql::users::find(&mut tx, adapter).await? else { return Ok(None) };
        sql::lessons::manifest(&mut tx, user.key, generation).await
    }

    /// How well old items were known when everything that a generation knows was last learnt from fresh weights; empty if
    /// that is not known.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn baseline(
        &self,
        adapter: &AdapterId,
        generation: &GenerationId,
    ) -> Result<Vec<OldLoss>, StoreError> {
        let mut tx = self.read().await?;
        let Some(user) = sql::users::find(&mut tx, adapter).await? else { return Ok(Vec::new()) };
        sql::lessons::baseline(&mut tx, user.key, generation).await
    }

    /// How many updates there were since the user's last training from fresh weights, whatever came of either; those that
    /// were called off do not count.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn updates_since_full(&self, adapter: &AdapterId) -> Result<u32, StoreError> {
        let mut tx = self.read().await?;
        let Some(user) = sql::users::find(&mut tx, adapter).await? else { return Ok(0) };
        let updates = sql::lessons::updates_since_full(&mut tx, user.key).await?;
        Ok(u32::try_from(updates).unwrap_or(u32::MAX))
    }

    /// How the user's trainings went; `None` if there is no such user. `limit` is at least 1 (0 counts as 1).
    ///
    /// # Errors
    /// If the database fails.
    pub async fn progress(
        &self,
        adapter: &AdapterId,
        after: Option<i64>,
        limit: u32,
    ) -> Result<Option<Progress>, StoreError> {
        let limit = limit.max(1);
        let mut tx = self.read().await?;
        let Some(user) = sql::users::find(&mut tx, adapter).await? else { return Ok(None) };
        let after = after.unwrap_or(i64::MIN);
        let found = sql::lessons::progress(&mut tx, user.key, after, limit.saturating_add(1)).await?;
        let page = Page::cut(found, limit, |(place, _)| *place);
        let [updates, from_scratch] = sql::lessons::costs(&mut tx, user.key).await?;
        let cost = |(trainings, tokens, seconds)| Cost { trainings, tokens, seconds };
        let entries = page.entries.into_iter().map(|(_, point)| point).collect();
        let points = Page { entries, next: page.next };
        Ok(Some(Progress { points, updates: cost(updates), from_scratch: cost(from_scratch) }))
    }
}
