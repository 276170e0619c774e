//! The table `users`: the owners of adapters. A shared adapter's row has a name that begins with an `@`.

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use types::{AdapterId, AdapterName, GenerationId, HistoryStats, JobId, TenantId, Timestamp, UserId};

use super::{Connection, UserKey, count, generation_or_none, id, rows, time};
use crate::StoreError;

/// A row.
pub(crate) struct User {
    pub(crate) key: UserKey,
    pub(crate) history: HistoryStats,
    pub(crate) head: Option<GenerationId>,
    pub(crate) created_at: Timestamp,
}

fn user(row: &SqliteRow) -> Result<User, StoreError> {
    Ok(User {
        key: UserKey(row.try_get("id")?),
        history: HistoryStats { items: count(row, "items")?, bytes: count(row, "bytes")? },
        head: generation_or_none(row, "head")?,
        created_at: time(row, "created_at")?,
    })
}

pub(crate) async fn find(db: &mut Connection, adapter: &AdapterId) -> Result<Option<User>, StoreError> {
    let row = sqlx::query("SELECT * FROM users WHERE tenant = $1 AND name = $2")
        .bind(adapter.tenant.as_str())
        .bind(adapter.owner.to_string())
        .fetch_optional(db)
        .await?;
    row.as_ref().map(user).transpose()
}

/// The user's row, made if there is none.
pub(crate) async fn ensure(
    db: &mut Connection,
    adapter: &AdapterId,
    now: Timestamp,
) -> Result<User, StoreError> {
    sqlx::query(
        "INSERT INTO users (tenant, name, created_at) VALUES ($1, $2, $3) ON CONFLICT (tenant, name) DO NOTHING",
    )
    .bind(adapter.tenant.as_str())
    .bind(adapter.owner.to_string())
    .bind(now.0)
    .execute(&mut *db)
    .await?;
    find(db, adapter).await?.ok_or_else(|| StoreError::not_found("user", adapter))
}

/// Counts a job that has published nothing for its user.
pub(crate) async fn turn_down(db: &mut Connection, job: &JobId, now: Timestamp) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE users SET rejections = rejections + 1, rejected_at = $2
         WHERE id = (SELECT user_id FROM jobs WHERE id = $1)",
    )
    .bind(job.as_str())
    .bind(now.0)
    .execute(db)
    .await?;
    Ok(())
}

/// Begins the count anew: a job has published something.
pub(crate) async fn accept(db: &mut Connection, user: UserKey) -> Result<(), StoreError> {
    sqlx::query("UPDATE users SET rejections = 0 WHERE id = $1").bind(user.0).execute(db).await?;
    Ok(())
}

/// Users of a tenant by name, from after `after`.
pub(crate) async fn list(
    db: &mut Connection,
    tenant: &TenantId,
    after: Option<&UserId>,
    limit: u32,
) -> Result<Vec<(UserId, User)>, StoreError> {
    // What begins with an @ lies between the @ and the letter that follows it.
    let found = sqlx::query(
        "SELECT * FROM users WHERE tenant = $1 AND name > $2 AND (name < '@' OR name >= 'A')
         ORDER BY name LIMIT $3",
    )
    .bind(tenant.as_str())
    .bind(after.map_or("", UserId::as_str))
    .bind(rows(limit))
    .fetch_all(db)
    .await?;
    found.iter().map(|row| Ok((id(row, "name")?, user(row)?))).collect()
}

/// Shared adapters of a tenant by name, from after `after`.
pub(crate) async fn list_shared(
    db: &mut Connection,
    tenant: &TenantId,
    after: Option<&AdapterName>,
    limit: u32,
) -> Result<Vec<(AdapterName, User)>, StoreError> {
    let found = sqlx::query(
        "SELECT *, substr(name, 2) AS shared FROM users WHERE tenant = $1 AND name > $2 AND name < 'A'
         ORDER BY name LIMIT $3",
    )
    .bind(tenant.as_str())
    .bind(format!("@{}", after.map_or("", AdapterName::as_str)))
    .bind(rows(limit))
    .fetch_all(db)
    .await?;
    found.iter().map(|row| Ok((id(row, "shared")?, user(row)?))).collect()
}

/// Adds to the figures of the user's history.
pub(crate) async fn grow(db: &mut Connection, user: UserKey, by: HistoryStats) -> Result<(), StoreError> {
    sqlx::query("UPDATE users SET items = items + $2, bytes = bytes + $3 WHERE id = $1")
        .bind(user.0)
        .bind(by.items as i64)
        .bind(by.bytes as i64)
        .execute(db)
        .await?;
    Ok(())
}

/// Takes from the figures of the user's history.
pub(crate) async fn shrink(db: &mut Connection, user: UserKey, by: HistoryStats) -> Result<(), StoreError> {
    sqlx::query("UPDATE users SET items = items - $2, bytes = bytes - $3 WHERE id = $1")
        .bind(user.0)
        .bind(by.items as i64)
        .bind(by.bytes as i64)
        .execute(db)
        .await?;
    Ok(())
}

/// Compare-and-set of the head; `false` if the head is not `expected`.
pub(crate) async fn move_head(
    db: &mut Connection,
    user: UserKey,
    expected: Option<&GenerationId>,
    to: Option<&GenerationId>,
) -> Result<bool, StoreError> {
    let done = sqlx::query("UPDATE users SET head = $3 WHERE id = $1 AND head IS NOT DISTINCT FROM $2")
        .bind(user.0)
        .bind(expected.map(|id| id.as_bytes().as_slice()))
        .bind(to.map(|id| id.as_bytes().as_slice()))
        .execute(db)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// Deletes the user with all rows of all tables that belong to it.
pub(crate) async fn delete(db: &mut Connection, user: UserKey) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM users WHERE id = $1").bind(user.0).execute(db).await?;
    Ok(())
}
