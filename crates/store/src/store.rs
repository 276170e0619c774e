//! Opening and closing: the data folder, its lock, the connections, the schema.

use std::fmt;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Connection as _, Sqlite, Transaction};
use tokio::sync::{Mutex, watch};
use tracing::Instrument as _;
use types::{AdapterId, Clock, Timestamp};

use crate::beats::Beats;
use crate::blobs::Blobs;
use crate::moves::{HeadMoves, Moving};
use crate::{StoreError, disk, sql};

/// The database's file in the data folder.
const DATABASE: &str = "atelier.db";
/// The file whose lock says that a process has the data folder open.
const LOCK: &str = "atelier.lock";
/// Older versions can lose a commit when two connections write and checkpoint at once.
const OLDEST_SQLITE: (u32, u32, u32) = (3, 51, 3);
const OLDEST_SQLITE_TEXT: &str = "3.51.3";
/// Readers beside the one writer.
const READERS: u32 = 4;
/// How long a statement waits for another program (a backup, say) that has locked the database.
const BUSY: Duration = Duration::from_secs(10);
/// How long a caller waits for its turn on a connection.
const TURN: Duration = Duration::from_secs(30);

/// The store of one data folder. A cheap handle; the last one dropped gives the folder free.
///
/// Methods may be cancelled (their future dropped) at any point: what they change, they change in
/// one transaction, or they run on to their end.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    /// One connection: SQLite has one writer, and a queue in front of it beats a busy loop.
    writer: SqlitePool,
    readers: SqlitePool,
    blobs: Blobs,
    clock: Arc<dyn Clock>,
    moves: HeadMoves,
    beats: Beats,
    /// Held as long as the store lives.
    lock: Option<File>,
    /// Counts what may have taken a job from its worker.
    interrupts: watch::Sender<u64>,
    /// Held while erased content is wiped.
    wiping: Mutex<()>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the data folder, which is created if missing.
    ///
    /// Nobody else can have it open, so what an earlier process left behind is put right here: jobs
    /// it was running can be claimed at once (their attempts still count), and files that no
    /// generation owns are deleted.
    ///
    /// # Errors
    /// [`StoreError::InUse`] if another process (or another `Store` of this one) has it open;
    /// [`StoreError::Migration`] if a newer program has written it; otherwise what the disk says.
    pub async fn open(folder: &Path, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        let lock = lock_folder(folder)?;
        let options = connect_options()
            .filename(folder.join(DATABASE))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal);
        let writer = connect(1, options.clone()).await?;
        prepare(&writer).await?;
        let readers = connect(READERS, options.create_if_missing(false).read_only(true)).await?;
        let blobs = Blobs::in_folder(folder).await?;
        let inner = Inner {
            writer,
            readers,
            blobs,
            clock,
            moves: HeadMoves::new(),
            beats: Beats::default(),
            lock: Some(lock),
            interrupts: watch::Sender::default(),
            wiping: Mutex::default(),
        };
        let store = Self { inner: Arc::new(inner) };
        store.recover().await?;
        Ok(store)
    }

    /// A store that lives in memory and dies with its last handle, for tests and trials.
    ///
    /// # Errors
    /// If SQLite cannot be started.
    pub async fn in_memory(clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        // A memory database belongs to its connection, so there is one, for reading too.
        let writer = connect(1, connect_options()).await?;
        prepare(&writer).await?;
        let readers = writer.clone();
        let inner = Inner {
            writer,
            readers,
            blobs: Blobs::in_memory(),
            clock,
            moves: HeadMoves::new(),
            beats: Beats::default(),
            lock: None,
            interrupts: watch::Sender::default(),
            wiping: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Closes the connections (which folds the write-ahead log into the database) and gives the
    /// folder free. Every later call on any handle fails. Dropping the handles is safe too, but
    /// leaves the folding to the next opening.
    pub async fn close(&self) {
        self.inner.readers.close().await;
        self.inner.writer.close().await;
        if let Some(Err(error)) = self.inner.lock.as_ref().map(File::unlock) {
            tracing::warn!(%error, "cannot unlock the data folder");
        }
    }

    /// Changes whenever a job may have been taken from its worker, or paused: the worker then looks at its
    /// [`Store::standing`], and need not do so all the time.
    #[must_use]
    pub fn interrupts(&self) -> watch::Receiver<u64> {
        self.inner.interrupts.subscribe()
    }

    pub(crate) fn interrupt(&self) {
        self.inner.interrupts.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// A number that is another one after every move of this adapter's head: a publish, a rollback, an erasure.
    ///
    /// It changes before the call that moves the head returns. So a head that was read after this number is still the
    /// head as long as the number is the same, or is being moved just now. All moves go through this store, because
    /// nobody else can have the folder open.
    #[must_use]
    pub fn head_moves(&self, adapter: &AdapterId) -> u64 {
        self.inner.moves.of(adapter)
    }

    /// To be held around every transaction that may move a head.
    pub(crate) fn moving(&self, adapter: &AdapterId) -> Moving<'_> {
        self.inner.moves.moving(adapter)
    }

    pub(crate) fn beats(&self) -> &Beats {
        &self.inner.beats
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.inner.clock.now()
    }

    pub(crate) fn blobs(&self) -> &Blobs {
        &self.inner.blobs
    }

    pub(crate) fn writer(&self) -> &SqlitePool {
        &self.inner.writer
    }

    pub(crate) fn wiping(&self) -> &Mutex<()> {
        &self.inner.wiping
    }

    /// A transaction that may write. Dropped without a commit, it leaves no trace.
    pub(crate) async fn write(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        // IMMEDIATE takes the write lock now: taking it later can fail without waiting.
        Ok(self.inner.writer.begin_with("BEGIN IMMEDIATE").await?)
    }

    /// A connection for one statement that reads.
    pub(crate) async fn reader(&self) -> Result<PoolConnection<Sqlite>, StoreError> {
        Ok(self.inner.readers.acquire().await?)
    }

    /// A transaction that reads one state of the database.
    pub(crate) async fn read(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        Ok(self.inner.readers.begin().await?)
    }

    /// Runs `work` to its end even if the caller goes away: for work that spans rows and files.
    pub(crate) async fn to_the_end<T: Send + 'static>(
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        match tokio::spawn(work.in_current_span()).await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(StoreError::Stopped),
            },
        }
    }

    async fn recover(&self) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        let orphans = sql::jobs::expire_running(&mut tx).await?;
        let garbage = sql::garbage::all(&mut tx).await?;
        tx.commit().await?;
        if orphans > 0 {
            tracing::info!(orphans, "jobs of an earlier process will be taken up again");
        }
        for folder in garbage {
            // One folder that cannot be deleted must not keep the server down.
            if let Err(error) = self.discard(&folder).await {
                tracing::warn!(%error, folder, "cannot delete left-over adapter files");
            }
        }
        // The earlier process may have died between erasing and this.
        self.wipe().await;
        Ok(())
    }
}

fn connect_options() -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .foreign_keys(true)
        .busy_timeout(BUSY)
        .synchronous(SqliteSynchronous::Full)
        // On macOS a plain fsync leaves data in the drive's cache; elsewhere these do nothing.
        .pragma("fullfsync", "ON")
        .pragma("checkpoint_fullfsync", "ON")
        .pragma("secure_delete", "ON")
}

async fn connect(connections: u32, options: SqliteConnectOptions) -> Result<SqlitePool, StoreError> {
    let pool = SqlitePoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(TURN)
        .idle_timeout(None)
        .max_lifetime(None)
        // Testing here as well as on release would be a point at which a cancelled caller takes the
        // connection down with it, and with it a database in memory.
        .test_before_acquire(false)
        // SQLite itself rolls back on some errors; the driver then believes for ever that a
        // transaction is open. Such a connection is replaced.
        .before_acquire(|connection, _| Box::pin(async move { Ok(!connection.is_in_transaction()) }))
        .connect_with(options)
        .await?;
    Ok(pool)
}

/// Checks the library and brings the schema up to date.
async fn prepare(writer: &SqlitePool) -> Result<(), StoreError> {
    let found: String = sqlx::query_scalar("SELECT sqlite_version()").fetch_one(writer).await?;
    check_version(&found)?;
    if !sql::pages::can_be_reached(&mut *writer.acquire().await?).await? {
        return Err(StoreError::NoPages);
    }
    sqlx::migrate!("migrations/sqlite").run(writer).await?;
    Ok(())
}

fn check_version(found: &str) -> Result<(), StoreError> {
    let mut parts = found.split('.').map(|part| part.parse().unwrap_or(0));
    let mut part = || parts.next().unwrap_or(0);
    if (part(), part(), part()) < OLDEST_SQLITE {
        return Err(StoreError::OldSqlite { found: found.to_owned(), needed: OLDEST_SQLITE_TEXT });
    }
    Ok(())
}

/// Creates the folder and takes its lock.
fn lock_folder(folder: &Path) -> Result<File, StoreError> {
    let failed = |source| StoreError::Folder { folder: folder.to_owned(), source };
    disk::create_private(folder).map_err(failed)?;
    let lock =
        File::options().write(true).create(true).truncate(false).open(folder.join(LOCK)).map_err(failed)?;
    lock.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => StoreError::InUse { folder: folder.to_owned() },
        TryLockError::Error(source) => failed(source),
    })?;
    Ok(lock)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use types::{AdapterId, ManualClock, NewItem};

    use super::*;

    async fn append(store: &Store, output: &str) -> Result<u64, StoreError> {
        let user = AdapterId::new("acme".parse().unwrap(), "alice".parse().unwrap());
        let output = output.to_owned();
        let item = NewItem { id: None, input: None, output, created_at: None, metadata: None };
        Ok(store.append(&user, None, [0; 32], vec![item]).await?.total_items)
    }

    #[test]
    fn old_sqlite_is_refused() {
        assert!(check_version("3.51.3").is_ok());
        assert!(check_version("3.52.0").is_ok());
        assert!(check_version("4.0.0").is_ok());
        for old in ["3.51.2", "3.50.10", "2.99.99", "", "x"] {
            assert!(matches!(check_version(old), Err(StoreError::OldSqlite { .. })), "{old:?}");
        }
    }

    #[tokio::test]
    async fn a_full_disk_is_an_error_that_passes() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), Arc::new(ManualClock::default())).await.unwrap();
        assert_eq!(append(&store, "a").await.unwrap(), 1);
        for _ in 0..3 {
            // No more pages than there are. The setting goes with the connection, see `connect`.
            let limit = sqlx::query("PRAGMA max_page_count = 1");
            limit.fetch_one(&store.inner.writer).await.unwrap();
            let full = append(&store, &"b".repeat(1_000_000)).await;
            assert!(matches!(full, Err(StoreError::DiskFull { .. })), "{full:?}");
        }
        assert_eq!(append(&store, "c").await.unwrap(), 2);
    }

    #[tokio::test]
    async fn a_transaction_that_sqlite_ended_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), Arc::new(ManualClock::default())).await.unwrap();
        let mut tx = store.write().await.unwrap();
        sqlx::raw_sql("ROLLBACK").execute(&mut *tx).await.unwrap(); // as SQLite does on an I/O error
        drop(tx);
        assert_eq!(append(&store, "a").await.unwrap(), 1);
    }

    #[tokio::test]
    async fn commits_are_synced() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), Arc::new(ManualClock::default())).await.unwrap();
        let get = async |pragma| {
            let value: String = sqlx::query_scalar(pragma).fetch_one(&store.inner.writer).await.unwrap();
            value
        };
        assert_eq!(get("SELECT journal_mode FROM pragma_journal_mode").await, "wal");
        assert_eq!(get("SELECT CAST(synchronous AS TEXT) FROM pragma_synchronous").await, "2");
        assert_eq!(get("SELECT CAST(foreign_keys AS TEXT) FROM pragma_foreign_keys").await, "1");
        assert_eq!(get("SELECT CAST(secure_delete AS TEXT) FROM pragma_secure_delete").await, "1");
    }
}
