//! The database file page by page, through SQLite's virtual tables `dbstat` and `sqlite_dbpage`, and the mark that says
//! that erased content may be in it still.

use futures::TryStreamExt as _;

use super::Connection;
use crate::StoreError;

/// Whether the library was built with what is used here.
pub(crate) async fn can_be_reached(db: &mut Connection) -> Result<bool, StoreError> {
    let both = "SELECT sqlite_compileoption_used('ENABLE_DBPAGE_VTAB')
                AND sqlite_compileoption_used('ENABLE_DBSTAT_VTAB')";
    Ok(sqlx::query_scalar(both).fetch_one(db).await?)
}

/// How many erasures have been committed since all that was erased had left the file; 0 if nothing has to leave it.
/// It is kept where SQLite lets an application keep a number, and goes with the transaction as everything else does.
pub(crate) async fn erasures(db: &mut Connection) -> Result<i32, StoreError> {
    Ok(sqlx::query_scalar("PRAGMA user_version").fetch_one(db).await?)
}

pub(crate) async fn set_erasures(db: &mut Connection, erasures: i32) -> Result<(), StoreError> {
    // A pragma takes no parameters.
    let statement = sqlx::AssertSqlSafe(format!("PRAGMA user_version = {erasures}"));
    sqlx::query(statement).execute(db).await?;
    Ok(())
}

/// Calls `see` with the number and the content of every page of a table or an index that is not full.
pub(crate) async fn each_of_trees(
    db: &mut Connection,
    mut see: impl FnMut(i64, &[u8]),
) -> Result<(), StoreError> {
    let statement = "SELECT pageno, data FROM dbstat CROSS JOIN sqlite_dbpage ON pgno = pageno
                     WHERE pagetype IN ('internal', 'leaf') AND unused > 0";
    let mut pages = sqlx::query_as::<_, (i64, Vec<u8>)>(statement).fetch(db);
    while let Some((number, data)) = pages.try_next().await? {
        see(number, &data);
    }
    Ok(())
}

pub(crate) async fn read(db: &mut Connection, number: i64) -> Result<Option<Vec<u8>>, StoreError> {
    let statement = sqlx::query_scalar("SELECT data FROM sqlite_dbpage WHERE pgno = $1");
    Ok(statement.bind(number).fetch_optional(db).await?)
}

pub(crate) async fn write(db: &mut Connection, number: i64, data: &[u8]) -> Result<(), StoreError> {
    let statement = sqlx::query("UPDATE sqlite_dbpage SET data = $1 WHERE pgno = $2");
    statement.bind(data).bind(number).execute(db).await?;
    Ok(())
}
