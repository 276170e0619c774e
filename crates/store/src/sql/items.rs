//! The table `items`: users' histories.

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use types::{HistoryItem, ItemId};

use super::{Connection, UserKey, id, json_or_none, rows, time};
use crate::StoreError;
use crate::records::HistoryCursor;

fn item(row: &SqliteRow) -> Result<HistoryItem, StoreError> {
    Ok(HistoryItem {
        id: id(row, "id")?,
        input: row.try_get("input")?,
        output: row.try_get("output")?,
        created_at: time(row, "created_at")?,
        metadata: json_or_none(row, "metadata")?,
    })
}

fn place(row: &SqliteRow) -> Result<HistoryCursor, StoreError> {
    Ok(HistoryCursor { created_at: time(row, "created_at")?, seq: row.try_get("seq")? })
}

/// Adds an item; `false` if the user has one with this id.
pub(crate) async fn insert(
    db: &mut Connection,
    user: UserKey,
    item: &HistoryItem,
) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "INSERT INTO items (user_id, id, input, output, metadata, created_at) VALUES ($1, $2, $3, $4, $5, $6)
         ON CONFLICT (user_id, id) DO NOTHING",
    )
    .bind(user.0)
    .bind(item.id.as_str())
    .bind(item.input.as_deref())
    .bind(item.output.as_str())
    .bind(item.metadata.as_ref().map(serde_json::Value::to_string))
    .bind(item.created_at.0)
    .execute(db)
    .await?;
    Ok(done.rows_affected() == 1)
}

pub(crate) async fn find(
    db: &mut Connection,
    user: UserKey,
    id: &ItemId,
) -> Result<Option<HistoryItem>, StoreError> {
    let row = sqlx::query("SELECT * FROM items WHERE user_id = $1 AND id = $2")
        .bind(user.0)
        .bind(id.as_str())
        .fetch_optional(db)
        .await?;
    row.as_ref().map(item).transpose()
}

/// Items after a place, in the order (created_at, arrival), each with its own place.
pub(crate) async fn list(
    db: &mut Connection,
    user: UserKey,
    after: HistoryCursor,
    limit: Option<u32>,
) -> Result<Vec<(HistoryCursor, HistoryItem)>, StoreError> {
    let found = sqlx::query(
        "SELECT * FROM items WHERE user_id = $1 AND (created_at, seq) > ($2, $3)
         ORDER BY created_at, seq LIMIT $4",
    )
    .bind(user.0)
    .bind(after.created_at.0)
    .bind(after.seq)
    .bind(limit.map_or(i64::MAX, rows))
    .fetch_all(db)
    .await?;
    found.iter().map(|row| Ok((place(row)?, item(row)?))).collect()
}

/// Deletes one item.
pub(crate) async fn delete_one(db: &mut Connection, user: UserKey, seq: i64) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM items WHERE user_id = $1 AND seq = $2")
        .bind(user.0)
        .bind(seq)
        .execute(db)
        .await?;
    Ok(())
}
