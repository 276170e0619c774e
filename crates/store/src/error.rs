//! What can go wrong in the store.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use types::{GenerationId, ItemId, JobId};

/// Why the store could not do what was asked. Nothing was changed unless the variant says so.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has this data folder open.
    #[error("data folder {} is in use by another process", .folder.display())]
    InUse {
        /// The data folder.
        folder: PathBuf,
    },
    /// The data folder cannot be created, locked or synced.
    #[error("data folder {}: {source}", .folder.display())]
    Folder {
        /// The data folder.
        folder: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The SQLite library is older than the first one that is safe to use.
    #[error("sqlite {found} is too old: at least {needed} is needed")]
    OldSqlite {
        /// The library's version.
        found: String,
        /// The oldest version that is accepted.
        needed: &'static str,
    },
    /// The SQLite library was built without access to its pages, so nothing could be erased for good.
    #[error(
        "sqlite was built without SQLITE_ENABLE_DBPAGE_VTAB: build in the repository, whose .cargo/config.toml asks \
         for it, or with LIBSQLITE3_FLAGS=-DSQLITE_ENABLE_DBPAGE_VTAB"
    )]
    NoPages,
    /// The schema could not be brought up to date (or is newer than this program).
    #[error("database schema: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    /// The idempotency key was used before with another request.
    #[error("idempotency key {key:?} was used before with another request")]
    IdempotencyConflict {
        /// The key.
        key: String,
    },
    /// The user has an item with this id and other content.
    #[error("item {id} exists with other content")]
    ItemConflict {
        /// The item's id.
        id: ItemId,
    },
    /// The job is gone, ended, or was claimed by another worker: the caller must stop working on it.
    #[error("job {job} is no longer held by this worker")]
    Fenced {
        /// The job.
        job: JobId,
    },
    /// The head is not the one the caller expected.
    #[error("the head has moved to {}", .current.map_or_else(|| "none".to_owned(), |id| id.short()))]
    HeadMoved {
        /// The head now.
        current: Option<GenerationId>,
    },
    /// No such thing, or it belongs to somebody else.
    #[error("{what} {id} does not exist")]
    NotFound {
        /// What kind of thing.
        what: &'static str,
        /// Its name.
        id: String,
    },
    /// The user has a generation with this id and other files; ids must be hashes of the content.
    #[error("generation {id} exists with other files")]
    GenerationConflict {
        /// The generation.
        id: GenerationId,
    },
    /// The head cannot be deleted.
    #[error("generation {id} is the head")]
    IsHead {
        /// The generation.
        id: GenerationId,
    },
    /// A pinned generation cannot be deleted.
    #[error("generation {id} is pinned")]
    Pinned {
        /// The generation.
        id: GenerationId,
    },
    /// A generation's file is missing, or is not what was published.
    #[error("generation {generation} is corrupt: {reason}")]
    Corrupt {
        /// The generation.
        generation: GenerationId,
        /// What is wrong with which file.
        reason: String,
    },
    /// A stored row does not parse.
    #[error("stored {what} is unreadable: {reason}")]
    Unreadable {
        /// Table and column.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// A value that cannot be stored.
    #[error("{field} {reason}")]
    Invalid {
        /// Which value.
        field: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The disk is full.
    #[error("the disk is full: {source}")]
    DiskFull {
        /// Who noticed.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The database failed. After a failed commit it is unknown whether the change was made.
    #[error("database: {0}")]
    Database(#[source] sqlx::Error),
    /// The blob store failed.
    #[error("blob store: {0}")]
    Blobs(#[source] object_store::Error),
    /// A background task of the store was stopped: the runtime is shutting down.
    #[error("the store is shutting down")]
    Stopped,
}

impl StoreError {
    pub(crate) fn not_found(what: &'static str, id: impl ToString) -> Self {
        Self::NotFound { what, id: id.to_string() }
    }

    pub(crate) fn unreadable(what: &'static str, reason: impl ToString) -> Self {
        Self::Unreadable { what, reason: reason.to_string() }
    }
}

/// SQLite's primary result code for a full disk.
const SQLITE_FULL: &str = "13";

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        let code = error.as_database_error().and_then(|e| e.code());
        if code.is_some_and(|code| code == SQLITE_FULL) {
            return Self::DiskFull { source: error.into() };
        }
        Self::Database(error)
    }
}

impl From<object_store::Error> for StoreError {
    fn from(error: object_store::Error) -> Self {
        let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
        while let Some(inner) = cause {
            let io = inner.downcast_ref::<io::Error>().map(io::Error::kind);
            if matches!(io, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) {
                return Self::DiskFull { source: error.into() };
            }
            cause = inner.source();
        }
        Self::Blobs(error)
    }
}
