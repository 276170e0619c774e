//! The table `generations`.

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use types::{GenerationId, Timestamp};

use super::{Connection, UserKey, count, generation_or_none, hash, json_or_none, time};
use crate::{GenerationRecord, StoreError};

/// A row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Generation {
    pub(crate) id: GenerationId,
    pub(crate) parent: Option<GenerationId>,
    pub(crate) base: [u8; 32],
    pub(crate) folder: String,
    pub(crate) config: Fingerprint,
    pub(crate) weights: Fingerprint,
    pub(crate) meta: serde_json::Value,
    pub(crate) created_at: Timestamp,
}

/// What a file must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    pub(crate) bytes: u64,
    pub(crate) sha256: [u8; 32],
}

impl Generation {
    pub(crate) fn into_record(self) -> GenerationRecord {
        GenerationRecord {
            id: self.id,
            parent: self.parent,
            base: self.base,
            bytes: self.config.bytes + self.weights.bytes,
            meta: self.meta,
            created_at: self.created_at,
        }
    }
}

fn generation(row: &SqliteRow) -> Result<Generation, StoreError> {
    Ok(Generation {
        id: GenerationId::from_bytes(hash(row, "id")?),
        parent: generation_or_none(row, "parent")?,
        base: hash(row, "base")?,
        folder: row.try_get("folder")?,
        config: Fingerprint { bytes: count(row, "config_bytes")?, sha256: hash(row, "config_sha256")? },
        weights: Fingerprint { bytes: count(row, "weights_bytes")?, sha256: hash(row, "weights_sha256")? },
        meta: json_or_none(row, "meta")?.unwrap_or_default(),
        created_at: time(row, "created_at")?,
    })
}

pub(crate) async fn find(
    db: &mut Connection,
    user: UserKey,
    id: &GenerationId,
) -> Result<Option<Generation>, StoreError> {
    let row = sqlx::query("SELECT * FROM generations WHERE user_id = $1 AND id = $2")
        .bind(user.0)
        .bind(id.as_bytes().as_slice())
        .fetch_optional(db)
        .await?;
    row.as_ref().map(generation).transpose()
}

/// The user's generations, newest first.
pub(crate) async fn list(db: &mut Connection, user: UserKey) -> Result<Vec<Generation>, StoreError> {
    let found = sqlx::query("SELECT * FROM generations WHERE user_id = $1 ORDER BY seq DESC")
        .bind(user.0)
        .fetch_all(db)
        .await?;
    found.iter().map(generation).collect()
}

pub(crate) async fn insert(
    db: &mut Connection,
    user: UserKey,
    generation: &Generation,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO generations (user_id, id, parent, base, folder, config_bytes, config_sha256,
             weights_bytes, weights_sha256, meta, created_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
    )
    .bind(user.0)
    .bind(generation.id.as_bytes().as_slice())
    .bind(generation.parent.as_ref().map(|id| id.as_bytes().as_slice()))
    .bind(generation.base.as_slice())
    .bind(generation.folder.as_str())
    .bind(generation.config.bytes as i64)
    .bind(generation.config.sha256.as_slice())
    .bind(generation.weights.bytes as i64)
    .bind(generation.weights.sha256.as_slice())
    .bind(generation.meta.to_string())
    .bind(generation.created_at.0)
    .execute(db)
    .await?;
    Ok(())
}

/// Points a generation to another copy of its files.
pub(crate) async fn move_to(
    db: &mut Connection,
    user: UserKey,
    id: &GenerationId,
    folder: &str,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE generations SET folder = $3 WHERE user_id = $1 AND id = $2")
        .bind(user.0)
        .bind(id.as_bytes().as_slice())
        .bind(folder)
        .execute(db)
        .await?;
    Ok(())
}

pub(crate) async fn delete(db: &mut Connection, user: UserKey, id: &GenerationId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM generations WHERE user_id = $1 AND id = $2")
        .bind(user.0)
        .bind(id.as_bytes().as_slice())
        .execute(db)
        .await?;
    Ok(())
}
