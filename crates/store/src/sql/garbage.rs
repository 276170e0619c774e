//! The table `garbage`: blob folders that no generation owns.

use types::AdapterId;

use super::{Connection, UserKey};
use crate::StoreError;

/// Notes that files are about to be written to `folder`.
pub(crate) async fn insert_pending(
    db: &mut Connection,
    adapter: &AdapterId,
    folder: &str,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO garbage (folder, tenant, name, pending) VALUES ($1, $2, $3, 1)")
        .bind(folder)
        .bind(adapter.tenant.as_str())
        .bind(adapter.owner.to_string())
        .execute(db)
        .await?;
    Ok(())
}

/// Notes that the files of one of the user's generations are to be deleted.
pub(crate) async fn insert(db: &mut Connection, adapter: &AdapterId, folder: &str) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO garbage (folder, tenant, name, pending) VALUES ($1, $2, $3, 0)")
        .bind(folder)
        .bind(adapter.tenant.as_str())
        .bind(adapter.owner.to_string())
        .execute(db)
        .await?;
    Ok(())
}

/// Notes that the files of all generations of the user are to be deleted.
pub(crate) async fn insert_all(db: &mut Connection, user: UserKey) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO garbage (folder, tenant, name, pending)
         SELECT g.folder, u.tenant, u.name, 0 FROM generations g JOIN users u ON u.id = g.user_id WHERE u.id = $1",
    )
    .bind(user.0)
    .execute(db)
    .await?;
    Ok(())
}

/// A generation owns the folder now, or it is deleted.
pub(crate) async fn delete(db: &mut Connection, folder: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM garbage WHERE folder = $1").bind(folder).execute(db).await?;
    Ok(())
}

/// Folders of the user that are to be deleted, without those that a publish is writing.
pub(crate) async fn of_user(db: &mut Connection, adapter: &AdapterId) -> Result<Vec<String>, StoreError> {
    let folders =
        sqlx::query_scalar("SELECT folder FROM garbage WHERE tenant = $1 AND name = $2 AND pending = 0")
            .bind(adapter.tenant.as_str())
            .bind(adapter.owner.to_string())
            .fetch_all(db)
            .await?;
    Ok(folders)
}

pub(crate) async fn all(db: &mut Connection) -> Result<Vec<String>, StoreError> {
    Ok(sqlx::query_scalar("SELECT folder FROM garbage").fetch_all(db).await?)
}
