//! The table `generations`.

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use types::{AdapterId, GenerationId, Timestamp};

use super::{Connection, UserKey, count, generation_or_none, hash, json_or_none, rows, time};
use crate::{Fingerprint, GenerationCursor, GenerationRecord, Origin, StoreError};

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
    pub(crate) origin: Origin,
    pub(crate) pinned: bool,
    pub(crate) packed: Option<Packed>,
}

/// A third file beside the two, made of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packed {
    /// What it is good for.
    pub(crate) packing: [u8; 32],
    pub(crate) file: Fingerprint,
}

impl Generation {
    /// `head` is that of its owner.
    pub(crate) fn into_record(self, head: Option<GenerationId>) -> GenerationRecord {
        GenerationRecord {
            id: self.id,
            parent: self.parent,
            base: self.base,
            origin: self.origin,
            config: self.config,
            weights: self.weights,
            meta: self.meta,
            created_at: self.created_at,
            pinned: self.pinned,
            is_head: head == Some(self.id),
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
        origin: origin(row)?,
        pinned: row.try_get("pinned")?,
        packed: packed(row)?,
    })
}

fn packed(row: &SqliteRow) -> Result<Option<Packed>, StoreError> {
    if row.try_get::<Option<&[u8]>, _>("packed_for")?.is_none() {
        return Ok(None);
    }
    let file = Fingerprint { bytes: count(row, "packed_bytes")?, sha256: hash(row, "packed_sha256")? };
    Ok(Some(Packed { packing: hash(row, "packed_for")?, file }))
}

fn origin(row: &SqliteRow) -> Result<Origin, StoreError> {
    let text: &str = row.try_get("origin")?;
    let all = [Origin::Trained, Origin::Imported];
    all.into_iter()
        .find(|origin| origin.as_str() == text)
        .ok_or_else(|| StoreError::unreadable("origin", text))
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

/// One generation of an owner; without an id, the head.
pub(crate) async fn find_of(
    db: &mut Connection,
    adapter: &AdapterId,
    id: Option<&GenerationId>,
) -> Result<Option<Generation>, StoreError> {
    let row = sqlx::query(
        "SELECT generations.* FROM users JOIN generations ON user_id = users.id
         WHERE tenant = $1 AND name = $2 AND generations.id = COALESCE($3, head)",
    )
    .bind(adapter.tenant.as_str())
    .bind(adapter.owner.to_string())
    .bind(id.map(|id| id.as_bytes().as_slice()))
    .fetch_optional(db)
    .await?;
    row.as_ref().map(generation).transpose()
}

/// The user's generations, newest first, from after a place, each with its own place.
pub(crate) async fn list(
    db: &mut Connection,
    user: UserKey,
    after: Option<GenerationCursor>,
    limit: Option<u32>,
) -> Result<Vec<(GenerationCursor, Generation)>, StoreError> {
    let found =
        sqlx::query("SELECT * FROM generations WHERE user_id = $1 AND seq < $2 ORDER BY seq DESC LIMIT $3")
            .bind(user.0)
            .bind(after.map_or(i64::MAX, |after| after.0))
            .bind(limit.map_or(i64::MAX, rows))
            .fetch_all(db)
            .await?;
    found.iter().map(|row| Ok((GenerationCursor(row.try_get("seq")?), generation(row)?))).collect()
}

/// Pins or unpins.
pub(crate) async fn pin(
    db: &mut Connection,
    user: UserKey,
    id: &GenerationId,
    pinned: bool,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE generations SET pinned = $3 WHERE user_id = $1 AND id = $2")
        .bind(user.0)
        .bind(id.as_bytes().as_slice())
        .bind(pinned)
        .execute(db)
        .await?;
    Ok(())
}

pub(crate) async fn insert(
    db: &mut Connection,
    user: UserKey,
    generation: &Generation,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO generations (user_id, id, parent, base, folder, config_bytes, config_sha256,
             weights_bytes, weights_sha256, meta, created_at, origin)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
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
    .bind(generation.origin.as_str())
    .execute(db)
    .await?;
    Ok(())
}

/// Notes the packed file of a generation.
pub(crate) async fn set_packed(
    db: &mut Connection,
    adapter: &AdapterId,
    id: &GenerationId,
    packed: &Packed,
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE generations SET packed_for = $4, packed_bytes = $5, packed_sha256 = $6
         WHERE user_id = (SELECT id FROM users WHERE tenant = $1 AND name = $2) AND id = $3",
    )
    .bind(adapter.tenant.as_str())
    .bind(adapter.owner.to_string())
    .bind(id.as_bytes().as_slice())
    .bind(packed.packing.as_slice())
    .bind(packed.file.bytes as i64)
    .bind(packed.file.sha256.as_slice())
    .execute(db)
    .await?;
    Ok(())
}

/// Points a generation to another copy of its files, which has nothing packed.
pub(crate) async fn move_to(
    db: &mut Connection,
    user: UserKey,
    id: &GenerationId,
    folder: &str,
) -> Result<(), StoreError> {
    let set =
        "UPDATE generations SET folder = $3, packed_for = NULL, packed_bytes = NULL, packed_sha256 = NULL
         WHERE user_id = $1 AND id = $2";
    sqlx::query(set).bind(user.0).bind(id.as_bytes().as_slice()).bind(folder).execute(db).await?;
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
