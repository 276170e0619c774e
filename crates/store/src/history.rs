//! Histories: uploads and pages.

use types::{AdapterId, HistoryItem, HistoryStats, ItemId, NewItem, Timestamp, TrainingOptions};
use uuid::{NoContext, Uuid};

use crate::records::HistoryCursor;
use crate::sql::requests::Request;
use crate::sql::{self, Connection, UserKey};
use crate::{Appended, Demand, Fence, Page, Store, StoreError};

/// How long an upload can be repeated with its idempotency key: seven days.
const KEEP_ANSWERS_MILLIS: i64 = 7 * 24 * 60 * 60 * 1000;

impl Store {
    /// Adds items to a user's history and makes sure that a job will train on them: all in one
    /// transaction. The user is created if need be.
    ///
    /// An item without an id gets a UUID version 7. An item whose id the user has already is a
    /// duplicate and skipped; what the upload leaves out (`created_at`) is not compared. If the user
    /// has a queued job, that job trains on the new items too; otherwise one is enqueued. If nothing
    /// is new, no job is enqueued.
    ///
    /// A repeated request (same `idempotency_key`, same `request_hash`) changes nothing and gets the
    /// stored answer, for seven days. Keys are the user's own: another user may use the same one.
    ///
    /// # Errors
    /// [`StoreError::IdempotencyConflict`] if the key was used with another hash,
    /// [`StoreError::ItemConflict`] if an id is there with other content, [`StoreError::Invalid`] for a
    /// shared adapter; nothing is stored then.
    pub async fn append(
        &self,
        adapter: &AdapterId,
        idempotency_key: Option<&str>,
        request_hash: [u8; 32],
        items: Vec<NewItem>,
    ) -> Result<Appended, StoreError> {
        self.append_for(adapter, idempotency_key, request_hash, items, None).await
    }

    /// [`Store::append`], with hyper-parameters for the job in place of the tenant's. If nothing is new, they are not
    /// used.
    ///
    /// # Errors
    /// Those of [`Store::append`].
    pub async fn append_for(
        &self,
        adapter: &AdapterId,
        idempotency_key: Option<&str>,
        request_hash: [u8; 32],
        items: Vec<NewItem>,
        training: Option<TrainingOptions>,
    ) -> Result<Appended, StoreError> {
        if adapter.user().is_none() {
            return Err(StoreError::Invalid {
                field: "user",
                reason: "is a shared adapter, which has no history",
            });
        }
        let now = self.now();
        let mut tx = self.write().await?;
        let user = sql::users::ensure(&mut tx, adapter, now).await?;
        if let Some(key) = idempotency_key {
            let oldest = now.plus_millis(-KEEP_ANSWERS_MILLIS);
            sql::requests::delete_before(&mut tx, user.key, oldest).await?;
            if let Some(request) = sql::requests::find(&mut tx, user.key, key).await? {
                return replay(&mut tx, adapter, key, request_hash, request).await;
            }
        }

        let offered = items.len() as u64;
        let mut new = HistoryStats::default();
        for item in items {
            let bytes = item.output.len() + item.input.as_ref().map_or(0, String::len);
            if add_item(&mut tx, user.key, item, now).await? {
                new.items += 1;
                new.bytes += bytes as u64;
            }
        }
        sql::users::grow(&mut tx, user.key, new).await?;
        let job = match new.items {
            0 => sql::jobs::latest(&mut tx, user.key).await?,
            _ => {
                let demand = Demand { new_items: new.items, training, ..Demand::default() };
                Some(self.queued_job(&mut tx, user.key, &demand).await?)
            }
        };
        let answer = Appended {
            accepted: new.items,
            duplicates: offered - new.items,
            total_items: user.history.items + new.items,
            job,
            replayed: false,
        };
        if let Some(key) = idempotency_key {
            let request = Request {
                hash: request_hash,
                accepted: answer.accepted,
                duplicates: answer.duplicates,
                total_items: answer.total_items,
                job: answer.job.as_ref().map(|job| job.id.clone()),
            };
            sql::requests::insert(&mut tx, user.key, key, &request, now).await?;
        }
        tx.commit().await?;
        Ok(answer)
    }

    /// One page of a user's history, in the order (`created_at`, arrival); `None` if there is no such
    /// user. `limit` is at least 1 (0 counts as 1).
    ///
    /// # Errors
    /// If the database fails.
    pub async fn history(
        &self,
        adapter: &AdapterId,
        after: Option<HistoryCursor>,
        limit: u32,
    ) -> Result<Option<Page<HistoryItem, HistoryCursor>>, StoreError> {
        let limit = limit.max(1);
        let mut tx = self.read().await?;
        let Some(user) = sql::users::find(&mut tx, adapter).await? else { return Ok(None) };
        let after = after.unwrap_or(HistoryCursor::START);
        let more = limit.saturating_add(1);
        let found = sql::items::list(&mut tx, user.key, after, Some(more)).await?;
        let page = Page::cut(found, limit, |(place, _)| *place);
        let entries = page.entries.into_iter().map(|(_, item)| item).collect();
        Ok(Some(Page { entries, next: page.next }))
    }

    /// A user's whole history, in the order (`created_at`, arrival); empty if there is no such user.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn all_history(&self, adapter: &AdapterId) -> Result<Vec<HistoryItem>, StoreError> {
        let mut tx = self.read().await?;
        let Some(user) = sql::users::find(&mut tx, adapter).await? else { return Ok(Vec::new()) };
        let found = sql::items::list(&mut tx, user.key, HistoryCursor::START, None).await?;
        Ok(found.into_iter().map(|(_, item)| item).collect())
    }

    /// What a claimed job is to learn from: the history as it was when the job was claimed first, so that another
    /// claim reads the same. Items that have been erased since are not in it, nor are those that came since.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if the worker has lost the job.
    pub async fn history_of(&self, fence: &Fence) -> Result<Vec<HistoryItem>, StoreError> {
        let mut tx = self.read().await?;
        let last = sql::jobs::last_item(&mut tx, fence).await?;
        let (user, last) = last.ok_or_else(|| crate::jobs::fenced(fence))?;
        let found = sql::items::list(&mut tx, user, HistoryCursor::START, None).await?;
        Ok(found.into_iter().filter(|(place, _)| place.seq <= last).map(|(_, item)| item).collect())
    }

    /// How much history a user has; nothing if there is no such user.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn history_stats(&self, adapter: &AdapterId) -> Result<HistoryStats, StoreError> {
        let mut tx = self.read().await?;
        Ok(sql::users::find(&mut tx, adapter).await?.map(|user| user.history).unwrap_or_default())
    }
}

/// The stored answer, if this is the same request again.
async fn replay(
    db: &mut Connection,
    adapter: &AdapterId,
    key: &str,
    hash: [u8; 32],
    request: Request,
) -> Result<Appended, StoreError> {
    if request.hash != hash {
        return Err(StoreError::IdempotencyConflict { key: key.to_owned() });
    }
    let job = match &request.job {
        Some(id) => sql::jobs::find(db, &adapter.tenant, id).await?,
        None => None,
    };
    Ok(Appended {
        accepted: request.accepted,
        duplicates: request.duplicates,
        total_items: request.total_items,
        job,
        replayed: true,
    })
}

/// Adds an item; `false` if it is a duplicate.
async fn add_item(
    db: &mut Connection,
    user: UserKey,
    new: NewItem,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let dated = new.created_at.is_some();
    let item = HistoryItem {
        id: new.id.unwrap_or_else(|| item_id(now)),
        input: new.input,
        output: new.output,
        created_at: new.created_at.unwrap_or(now),
        metadata: new.metadata,
    };
    if sql::items::insert(db, user, &item).await? {
        return Ok(true);
    }
    let stored = sql::items::find(db, user, &item.id).await?;
    if !stored.is_some_and(|stored| same(&stored, &item, dated)) {
        return Err(StoreError::ItemConflict { id: item.id });
    }
    Ok(false)
}

/// Whether an upload repeats a stored item.
fn same(stored: &HistoryItem, item: &HistoryItem, dated: bool) -> bool {
    // As text, a number compares as it was written; as a value, the order of keys does not count.
    let text = |item: &HistoryItem| item.metadata.as_ref().map(serde_json::Value::to_string);
    stored.input == item.input
        && stored.output == item.output
        && (!dated || stored.created_at == item.created_at)
        && (stored.metadata == item.metadata || text(stored) == text(item))
}

fn item_id(now: Timestamp) -> ItemId {
    ordered_uuid(now).parse().expect("a uuid is a valid item id")
}

/// A UUID version 7 (RFC 9562): sorts by time, cannot be guessed.
pub(crate) fn ordered_uuid(now: Timestamp) -> String {
    let millis = now.0.max(0) as u64;
    let time = uuid::Timestamp::from_unix(NoContext, millis / 1000, (millis % 1000) as u32 * 1_000_000);
    Uuid::new_v7(time).to_string()
}
