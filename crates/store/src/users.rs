//! Users and shared adapters: at a glance, as a list, and erased.

use types::{AdapterId, AdapterName, TenantId, UserId};

use crate::sql::{self, Connection};
use crate::{GenerationRecord, Page, PauseScope, SharedRecord, Store, StoreError, UserRecord};

impl Store {
    /// A user at a glance.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn user(&self, adapter: &AdapterId) -> Result<Option<UserRecord>, StoreError> {
        let mut tx = self.read().await?;
        let Some(user) = sql::users::find(&mut tx, adapter).await? else { return Ok(None) };
        Ok(Some(record(&mut tx, adapter.clone(), user).await?))
    }

    /// Users of a tenant, by name. `limit` is at least 1 (0 counts as 1).
    ///
    /// # Errors
    /// If the database fails.
    pub async fn users(
        &self,
        tenant: &TenantId,
        after: Option<&UserId>,
        limit: u32,
    ) -> Result<Page<UserRecord, UserId>, StoreError> {
        let limit = limit.max(1);
        let mut tx = self.read().await?;
        let mut found = Vec::new();
        for (name, user) in sql::users::list(&mut tx, tenant, after, limit.saturating_add(1)).await? {
            let id = AdapterId::new(tenant.clone(), name.clone());
            found.push((name, record(&mut tx, id, user).await?));
        }
        let page = Page::cut(found, limit, |(name, _)| name.clone());
        let entries = page.entries.into_iter().map(|(_, user)| user).collect();
        Ok(Page { entries, next: page.next })
    }

    /// Shared adapters of a tenant, by name. `limit` is at least 1 (0 counts as 1).
    ///
    /// # Errors
    /// If the database fails.
    pub async fn shared_adapters(
        &self,
        tenant: &TenantId,
        after: Option<&AdapterName>,
        limit: u32,
    ) -> Result<Page<SharedRecord, AdapterName>, StoreError> {
        let limit = limit.max(1);
        let mut tx = self.read().await?;
        let mut found = Vec::new();
        for (name, owner) in sql::users::list_shared(&mut tx, tenant, after, limit.saturating_add(1)).await? {
            let head = head(&mut tx, &owner).await?;
            found.push(SharedRecord { name, head, created_at: owner.created_at });
        }
        Ok(Page::cut(found, limit, |adapter| adapter.name.clone()))
    }

    /// Erases a user: history, jobs, generations, files; of a shared adapter all there is. `false` if there is
    /// nothing to erase.
    ///
    /// A worker that holds the user's job can neither report, finish nor publish afterwards. A user
    /// of the same name who comes later starts from nothing.
    ///
    /// # Errors
    /// If the rows cannot be deleted (then nothing is), or if they are but a file cannot be: calling
    /// again tries again, and so does the next opening of the store.
    pub async fn erase_user(&self, adapter: &AdapterId) -> Result<bool, StoreError> {
        let (store, adapter) = (self.clone(), adapter.clone());
        Self::to_the_end(async move {
            let _moving = store.moving(&adapter);
            let mut tx = store.write().await?;
            let user = sql::users::find(&mut tx, &adapter).await?;
            if let Some(user) = &user {
                sql::garbage::insert_all(&mut tx, user.key).await?;
                sql::users::delete(&mut tx, user.key).await?;
                Self::mark_erasure(&mut tx).await?;
                if let Some(own) = PauseScope::of(&adapter) {
                    sql::claims::resume(&mut tx, &own).await?;
                }
            }
            let folders = sql::garbage::of_user(&mut tx, &adapter).await?;
            tx.commit().await?;
            store.interrupt();
            for folder in &folders {
                store.discard(folder).await?;
            }
            store.wipe().await;
            Ok(user.is_some() || !folders.is_empty())
        })
        .await
    }
}

/// The generation that new requests of the owner get.
pub(crate) async fn head(
    db: &mut Connection,
    owner: &sql::users::User,
) -> Result<Option<GenerationRecord>, StoreError> {
    let Some(head) = &owner.head else { return Ok(None) };
    let found = sql::generations::find(db, owner.key, head).await?;
    Ok(found.map(|generation| generation.into_record(Some(*head))))
}

async fn record(
    db: &mut Connection,
    id: AdapterId,
    user: sql::users::User,
) -> Result<UserRecord, StoreError> {
    Ok(UserRecord {
        id,
        history: user.history,
        head: head(db, &user).await?,
        job: sql::jobs::latest(db, user.key).await?,
        created_at: user.created_at,
    })
}
