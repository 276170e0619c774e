//! The table `requests`: answers to uploads that carried an idempotency key.

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use types::{JobId, Timestamp};

use super::{Connection, UserKey, count, hash};
use crate::StoreError;

/// What a request was, and what was answered.
pub(crate) struct Request {
    pub(crate) hash: [u8; 32],
    pub(crate) accepted: u64,
    pub(crate) duplicates: u64,
    pub(crate) total_items: u64,
    pub(crate) job: Option<JobId>,
}

fn request(row: &SqliteRow) -> Result<Request, StoreError> {
    let job: Option<&str> = row.try_get("job")?;
    Ok(Request {
        hash: hash(row, "hash")?,
        accepted: count(row, "accepted")?,
        duplicates: count(row, "duplicates")?,
        total_items: count(row, "total_items")?,
        job: job.map(str::parse).transpose().map_err(|error| StoreError::unreadable("job", error))?,
    })
}

pub(crate) async fn find(
    db: &mut Connection,
    user: UserKey,
    key: &str,
) -> Result<Option<Request>, StoreError> {
    let row = sqlx::query("SELECT * FROM requests WHERE user_id = $1 AND key = $2")
        .bind(user.0)
        .bind(key)
        .fetch_optional(db)
        .await?;
    row.as_ref().map(request).transpose()
}

pub(crate) async fn insert(
    db: &mut Connection,
    user: UserKey,
    key: &str,
    request: &Request,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO requests (user_id, key, hash, accepted, duplicates, total_items, job, created_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(user.0)
    .bind(key)
    .bind(request.hash.as_slice())
    .bind(request.accepted as i64)
    .bind(request.duplicates as i64)
    .bind(request.total_items as i64)
    .bind(request.job.as_ref().map(JobId::as_str))
    .bind(now.0)
    .execute(db)
    .await?;
    Ok(())
}

/// Deletes the user's answers from before `time`.
pub(crate) async fn delete_before(
    db: &mut Connection,
    user: UserKey,
    time: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM requests WHERE user_id = $1 AND created_at < $2")
        .bind(user.0)
        .bind(time.0)
        .execute(db)
        .await?;
    Ok(())
}
