//! Every SQL statement, one file per table; another database gets its own folder beside this one.
//!
//! The functions take a connection and the row ids of the caller's transaction, and decide nothing:
//! rules that span tables are in the modules above.

pub(crate) mod checkpoints;
pub(crate) mod claims;
pub(crate) mod garbage;
pub(crate) mod generations;
pub(crate) mod items;
pub(crate) mod jobs;
pub(crate) mod lessons;
pub(crate) mod pages;
pub(crate) mod requests;
pub(crate) mod users;

use std::str::FromStr;

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use types::{GenerationId, Timestamp};

use crate::StoreError;

pub(crate) type Connection = sqlx::SqliteConnection;

/// What has been noted in `progress` of the cost, in this column, of the job in a row with this name.
macro_rules! booked {
    ($column:literal, $job:literal) => {
        concat!(
            "(SELECT COALESCE(sum(p.",
            $column,
            "), 0) FROM progress p
              WHERE p.user_id = ",
            $job,
            ".user_id AND p.job = ",
            $job,
            ".id)"
        )
    };
}
pub(crate) use booked;

/// Names one life of a user; see the schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UserKey(i64);

/// A count or a size; the schema never holds negative ones.
fn count(row: &SqliteRow, column: &'static str) -> Result<u64, StoreError> {
    let value: i64 = row.try_get(column)?;
    u64::try_from(value).map_err(|error| StoreError::unreadable(column, error))
}

fn time(row: &SqliteRow, column: &'static str) -> Result<Timestamp, StoreError> {
    Ok(Timestamp(row.try_get(column)?))
}

fn time_or_none(row: &SqliteRow, column: &'static str) -> Result<Option<Timestamp>, StoreError> {
    Ok(row.try_get::<Option<i64>, _>(column)?.map(Timestamp))
}

fn hash(row: &SqliteRow, column: &'static str) -> Result<[u8; 32], StoreError> {
    let bytes: &[u8] = row.try_get(column)?;
    bytes.try_into().map_err(|error| StoreError::unreadable(column, error))
}

fn generation_or_none(row: &SqliteRow, column: &'static str) -> Result<Option<GenerationId>, StoreError> {
    let bytes: Option<&[u8]> = row.try_get(column)?;
    let parse = |bytes: &[u8]| bytes.try_into().map(GenerationId::from_bytes);
    bytes.map(parse).transpose().map_err(|error| StoreError::unreadable(column, error))
}

/// An identifier; ids are checked before they are stored, so a bad one means a damaged row.
fn id<T: FromStr<Err: ToString>>(row: &SqliteRow, column: &'static str) -> Result<T, StoreError> {
    let text: &str = row.try_get(column)?;
    text.parse().map_err(|error: T::Err| StoreError::unreadable(column, error))
}

fn json_or_none<T: serde::de::DeserializeOwned>(
    row: &SqliteRow,
    column: &'static str,
) -> Result<Option<T>, StoreError> {
    let text: Option<&str> = row.try_get(column)?;
    text.map(serde_json::from_str).transpose().map_err(|error| StoreError::unreadable(column, error))
}

/// A number of rows, as SQL has it.
fn rows(limit: u32) -> i64 {
    i64::from(limit)
}
