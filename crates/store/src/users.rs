//! Users: at a glance, as a list, and erased.

use types::{AdapterId, TenantId, UserId};

use crate::sql::{self, Connection};
use crate::{Page, Store, StoreError, UserRecord};

impl Store {
    /// A user at a glance.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn user(&self, adapter: &AdapterId) -> Result<Option<UserRecord>, StoreError> {
        let mut tx = self.read().await?;
        let Some(user) = sql::users::find(&mut tx, adapter).await? else { return Ok(None) };
        Ok(Some(record(&mut tx, &adapter.tenant, user).await?))
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
        for user in sql::users::list(&mut tx, tenant, after, limit.saturating_add(1)).await? {
            found.push(record(&mut tx, tenant, user).await?);
        }
        Ok(Page::cut(found, limit, |user| user.id.user.clone()))
    }

    /// Erases a user: history, jobs, generations, files. `false` if there is nothing to erase.
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
            let mut tx = store.write().await?;
            let user = sql::users::find(&mut tx, &adapter).await?;
            if let Some(user) = &user {
                sql::garbage::insert_all(&mut tx, user.key).await?;
                sql::users::delete(&mut tx, user.key).await?;
                sql::claims::forget_pause(&mut tx, &adapter).await?;
            }
            let folders = sql::garbage::of_user(&mut tx, &adapter).await?;
            tx.commit().await?;
            store.interrupt();
            for folder in &folders {
                store.discard(folder).await?;
            }
            store.forget().await;
            Ok(user.is_some() || !folders.is_empty())
        })
        .await
    }
}

async fn record(
    db: &mut Connection,
    tenant: &TenantId,
    user: sql::users::User,
) -> Result<UserRecord, StoreError> {
    let head = match &user.head {
        Some(head) => sql::generations::find(db, user.key, head).await?,
        None => None,
    };
    Ok(UserRecord {
        id: AdapterId::new(tenant.clone(), user.name),
        history: user.history,
        head: head.map(sql::generations::Generation::into_record),
        job: sql::jobs::latest(db, user.key).await?,
        created_at: user.created_at,
    })
}
