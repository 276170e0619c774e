//! The table `checkpoints`: how far open jobs had come.

use sqlx::Row as _;
use types::{AdapterId, Timestamp};

use super::{Connection, UserKey, count, hash};
use crate::{Fence, Fingerprint, StoreError};

/// A row, without whose it is.
pub(crate) struct Checkpoint {
    pub(crate) folder: String,
    pub(crate) file: Fingerprint,
    pub(crate) work: [u8; 32],
    /// The furthest step that was ever written down in this work.
    pub(crate) furthest: u32,
}

pub(crate) async fn find(db: &mut Connection, fence: &Fence) -> Result<Option<Checkpoint>, StoreError> {
    let row = sqlx::query("SELECT * FROM checkpoints WHERE job_id = $1")
        .bind(fence.job.as_str())
        .fetch_optional(db)
        .await?;
    let Some(row) = row else { return Ok(None) };
    let file = Fingerprint { bytes: count(&row, "bytes")?, sha256: hash(&row, "sha256")? };
    let (folder, furthest) = (row.try_get("folder")?, row.try_get("furthest")?);
    Ok(Some(Checkpoint { folder, file, work: hash(&row, "work")?, furthest }))
}

/// Puts a checkpoint in the place of the job's earlier one, whose folder becomes garbage.
pub(crate) async fn replace(
    db: &mut Connection,
    adapter: &AdapterId,
    fence: &Fence,
    new: &Checkpoint,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM checkpoints WHERE job_id = $1")
        .bind(fence.job.as_str())
        .execute(&mut *db)
        .await?;
    sqlx::query(
        "INSERT INTO checkpoints (job_id, tenant, name, folder, bytes, sha256, work, furthest, created_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
    )
    .bind(fence.job.as_str())
    .bind(adapter.tenant.as_str())
    .bind(adapter.owner.to_string())
    .bind(new.folder.as_str())
    .bind(new.file.bytes as i64)
    .bind(new.file.sha256.as_slice())
    .bind(new.work.as_slice())
    .bind(new.furthest)
    .bind(now.0)
    .execute(db)
    .await?;
    Ok(())
}

/// Deletes the checkpoints of all jobs of the user.
pub(crate) async fn delete(db: &mut Connection, user: UserKey) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM checkpoints WHERE job_id IN (SELECT id FROM jobs WHERE user_id = $1)")
        .bind(user.0)
        .execute(db)
        .await?;
    Ok(())
}
