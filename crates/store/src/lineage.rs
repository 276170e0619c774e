//! What becomes of generations once they are published: listed, pinned, made head again, deleted.

use types::{AdapterId, GenerationId};

use crate::sql::generations::Generation;
use crate::sql::users::User;
use crate::sql::{self, Connection, UserKey};
use crate::{Expected, GenerationCursor, GenerationRecord, Page, Store, StoreError};

impl Store {
    /// Moves the head to a generation that the user has (a rollback), or to none (back to the base),
    /// if it is still `expected_head`. The files of the new head are checked first.
    ///
    /// # Errors
    /// [`StoreError::HeadMoved`] if the head is another one; for `to`, the errors of
    /// [`Store::fetch`].
    pub async fn set_head(
        &self,
        adapter: &AdapterId,
        to: Option<GenerationId>,
        expected_head: impl Into<Expected>,
    ) -> Result<(), StoreError> {
        if let Some(to) = &to {
            self.fetch(adapter, to).await?;
        }
        let (store, adapter, expected_head) = (self.clone(), adapter.clone(), expected_head.into());
        // A commit whose caller has gone must be counted too.
        Self::to_the_end(async move {
            let _moving = store.moving(&adapter);
            let mut tx = store.write().await?;
            let user = find_user(&mut tx, &adapter).await?;
            if let Some(to) = &to
                && sql::generations::find(&mut tx, user, to).await?.is_none()
            {
                return Err(StoreError::not_found("generation", to));
            }
            move_head(&mut tx, &adapter, expected_head, to).await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    /// The user's generations, newest first; empty if there is no such user.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn generations(&self, adapter: &AdapterId) -> Result<Vec<GenerationRecord>, StoreError> {
        let mut tx = self.read().await?;
        let Some(user) = sql::users::find(&mut tx, adapter).await? else { return Ok(Vec::new()) };
        let found = sql::generations::list(&mut tx, user.key, None, None).await?;
        Ok(found.into_iter().map(|(_, generation)| generation.into_record(user.head)).collect())
    }

    /// One page of the user's generations, newest first; `None` if there is no such user. `limit` is at least 1
    /// (0 counts as 1).
    ///
    /// # Errors
    /// If the database fails.
    pub async fn generations_page(
        &self,
        adapter: &AdapterId,
        after: Option<GenerationCursor>,
        limit: u32,
    ) -> Result<Option<Page<GenerationRecord, GenerationCursor>>, StoreError> {
        let limit = limit.max(1);
        let mut tx = self.read().await?;
        let Some(user) = sql::users::find(&mut tx, adapter).await? else { return Ok(None) };
        let more = limit.saturating_add(1);
        let found = sql::generations::list(&mut tx, user.key, after, Some(more)).await?;
        let page = Page::cut(found, limit, |(place, _)| *place);
        let entries = page.entries.into_iter().map(|(_, generation)| generation.into_record(user.head));
        Ok(Some(Page { entries: entries.collect(), next: page.next }))
    }

    /// Pins a generation, so that it is not deleted, or unpins it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if the user has no such generation.
    pub async fn pin(
        &self,
        adapter: &AdapterId,
        id: &GenerationId,
        pinned: bool,
    ) -> Result<GenerationRecord, StoreError> {
        let mut tx = self.write().await?;
        let (user, mut generation) = find_both(&mut tx, adapter, id).await?;
        sql::generations::pin(&mut tx, user.key, id, pinned).await?;
        tx.commit().await?;
        generation.pinned = pinned;
        Ok(generation.into_record(user.head))
    }

    /// Deletes a generation that is neither the head nor pinned.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if the user has no such generation, [`StoreError::IsHead`], [`StoreError::Pinned`];
    /// nothing is changed then. If a file cannot be deleted, it stays until the store is opened again.
    pub async fn delete_generation(&self, adapter: &AdapterId, id: &GenerationId) -> Result<(), StoreError> {
        let (store, adapter, id) = (self.clone(), adapter.clone(), *id);
        Self::to_the_end(async move {
            let mut tx = store.write().await?;
            let (user, generation) = find_both(&mut tx, &adapter, &id).await?;
            if user.head == Some(id) {
                return Err(StoreError::IsHead { id });
            }
            if generation.pinned {
                return Err(StoreError::Pinned { id });
            }
            delete(&mut tx, &adapter, user.key, &generation).await?;
            tx.commit().await?;
            store.discard(&generation.folder).await
        })
        .await
    }

    /// Deletes all generations, pinned ones too; the user's history stays. Of a shared adapter nothing stays. `false`
    /// if there is nothing to delete.
    ///
    /// # Errors
    /// If the rows cannot be deleted (then nothing is), or if a file cannot be: it stays until the store is opened
    /// again.
    pub async fn erase_adapter(&self, adapter: &AdapterId) -> Result<bool, StoreError> {
        if adapter.user().is_none() {
            return self.erase_user(adapter).await;
        }
        let (store, adapter) = (self.clone(), adapter.clone());
        Self::to_the_end(async move {
            let _moving = store.moving(&adapter);
            let mut tx = store.write().await?;
            let Some(user) = sql::users::find(&mut tx, &adapter).await? else { return Ok(false) };
            let all = sql::generations::list(&mut tx, user.key, None, None).await?;
            move_head(&mut tx, &adapter, Expected::Any, None).await?;
            for (_, generation) in &all {
                delete(&mut tx, &adapter, user.key, generation).await?;
            }
            tx.commit().await?;
            for (_, generation) in &all {
                store.discard(&generation.folder).await?;
            }
            Ok(!all.is_empty())
        })
        .await
    }

    /// Deletes the user's older generations but keeps the pinned ones, of the others the `keep` newest, and
    /// the head, and says how many were deleted. Their files go too, so nobody may still need to fetch them.
    ///
    /// # Errors
    /// If the rows cannot be deleted (then nothing is), or if a file cannot be: it stays until the
    /// store is opened again.
    pub async fn prune_generations(&self, adapter: &AdapterId, keep: usize) -> Result<usize, StoreError> {
        let (store, adapter) = (self.clone(), adapter.clone());
        Self::to_the_end(async move {
            let mut tx = store.write().await?;
            let Some(user) = sql::users::find(&mut tx, &adapter).await? else { return Ok(0) };
            let all = sql::generations::list(&mut tx, user.key, None, None).await?;
            let loose = all.into_iter().map(|(_, generation)| generation).filter(|g| !g.pinned);
            let old: Vec<_> = loose.skip(keep).filter(|g| Some(g.id) != user.head).collect();
            for generation in &old {
                delete(&mut tx, &adapter, user.key, generation).await?;
            }
            tx.commit().await?;
            for generation in &old {
                store.discard(&generation.folder).await?;
            }
            Ok(old.len())
        })
        .await
    }
}

async fn find_user(db: &mut Connection, adapter: &AdapterId) -> Result<UserKey, StoreError> {
    let user = sql::users::find(db, adapter).await?;
    Ok(user.ok_or_else(|| StoreError::not_found("user", adapter))?.key)
}

/// A generation and its owner.
async fn find_both(
    db: &mut Connection,
    adapter: &AdapterId,
    id: &GenerationId,
) -> Result<(User, Generation), StoreError> {
    let missing = || StoreError::not_found("generation", id);
    let user = sql::users::find(db, adapter).await?.ok_or_else(missing)?;
    let generation = sql::generations::find(db, user.key, id).await?.ok_or_else(missing)?;
    Ok((user, generation))
}

/// Deletes the row of a generation and notes that its files are to go.
async fn delete(
    db: &mut Connection,
    adapter: &AdapterId,
    user: UserKey,
    generation: &Generation,
) -> Result<(), StoreError> {
    sql::garbage::insert(db, adapter, &generation.folder).await?;
    sql::generations::delete(db, user, &generation.id).await
}

/// Compare-and-set of the head.
pub(crate) async fn move_head(
    db: &mut Connection,
    adapter: &AdapterId,
    expected: Expected,
    to: Option<GenerationId>,
) -> Result<(), StoreError> {
    let user = sql::users::find(db, adapter).await?.ok_or_else(|| StoreError::not_found("user", adapter))?;
    let admitted = expected.admits(user.head);
    if !admitted || !sql::users::move_head(db, user.key, user.head.as_ref(), to.as_ref()).await? {
        return Err(StoreError::HeadMoved { current: user.head });
    }
    Ok(())
}
