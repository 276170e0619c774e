//! Erased content leaves the database's file to the byte.
//!
//! SQLite's `secure_delete` overwrites the cells of deleted rows and the pages that become free. But when a tree is
//! balanced, rows move to other pages, or within one, and copies of them stay behind in the unallocated space of their
//! old page, where no later delete finds them. So after every erasure the unallocated space of all pages of all trees is
//! looked at, and overwritten where it is not zero (SQLite's "Database File Format", sections 1.6 and 2.3.1). `VACUUM`
//! would do it too, but holds up every writer for as long as it takes to write the whole database anew: 13 s for a
//! gigabyte, where this reads it once and writes what was found.

use std::ops::Range;

use sha2::{Digest as _, Sha256};

use crate::sql::{self, Connection};
use crate::{Store, StoreError};

/// Pages that are overwritten in one transaction, so that other writers have their turns between.
const BATCH: usize = 64;
/// How often pages are looked at again that others have written in the meantime.
const ROUNDS: usize = 10;

impl Store {
    /// To be called within every transaction that erases content: if the process dies before it was wiped, the next
    /// opening does it.
    pub(crate) async fn mark_erasure(db: &mut Connection) -> Result<(), StoreError> {
        let erasures = sql::pages::erasures(db).await?;
        sql::pages::set_erasures(db, erasures.checked_add(1).unwrap_or(1)).await
    }

    /// Wipes what marked transactions have erased, out of the database and its write-ahead log, if that has not been
    /// done yet.
    pub(crate) async fn wipe(&self) {
        let left = "traces of what was erased stay in the database's file until the next erasure or opening";
        match self.wipe_database().await {
            Ok(true) => {}
            Ok(false) => tracing::warn!("{left}: pages of it are written all the time"),
            Err(error) => tracing::warn!(%error, "{left}"),
        }
        // The log keeps old pages until it starts over.
        match sqlx::query_scalar("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(self.writer()).await {
            Ok(0i64) => {}
            Ok(_) => {
                tracing::warn!("erased rows stay in the write-ahead log until it starts over: it is in use")
            }
            Err(error) => {
                tracing::warn!(%error, "erased rows stay in the write-ahead log until it starts over")
            }
        }
    }

    /// `false` if others wrote the same pages in every round.
    async fn wipe_database(&self) -> Result<bool, StoreError> {
        // Whoever waits here finds nothing more to do if the one before has seen his erasure too.
        let _one_at_a_time = self.wiping().lock().await;
        for _ in 0..ROUNDS {
            let mut tx = self.read().await?;
            let erasures = sql::pages::erasures(&mut tx).await?;
            if erasures == 0 {
                return Ok(true);
            }
            let mut found = Vec::new();
            let see = |number, page: &[u8]| {
                let is_wiped =
                    unallocated(page).is_none_or(|space| page[space].iter().all(|byte| *byte == 0));
                if !is_wiped {
                    found.push((number, Sha256::digest(page)));
                }
            };
            sql::pages::each_of_trees(&mut tx, see).await?;
            tx.commit().await?;
            let mut all = true;
            for batch in found.chunks(BATCH) {
                let mut tx = self.write().await?;
                for (number, seen) in batch {
                    let page = sql::pages::read(&mut tx, *number).await?;
                    // A page that somebody has written may not be one of a tree any more.
                    let Some(mut page) = page.filter(|page| Sha256::digest(page) == *seen) else {
                        all = false;
                        continue;
                    };
                    if let Some(space) = unallocated(&page) {
                        page[space].fill(0);
                        sql::pages::write(&mut tx, *number, &page).await?;
                    }
                }
                tx.commit().await?;
            }
            if all {
                let mut tx = self.write().await?;
                // Whoever has erased more since comes here himself.
                if sql::pages::erasures(&mut tx).await? == erasures {
                    sql::pages::set_erasures(&mut tx, 0).await?;
                    tx.commit().await?;
                }
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Where a page of a tree has its unallocated space: between the array of cell pointers and the first cell. `None` if it
/// is no such page.
fn unallocated(page: &[u8]) -> Option<Range<usize>> {
    /// The first page begins with the file's header, which no other page can begin with.
    const FILE_HEADER: &[u8] = b"SQLite format 3\0";
    let start = if page.starts_with(FILE_HEADER) { 100 } else { 0 };
    let header = page.get(start..start + 8)?;
    let size = match header[0] {
        0x02 | 0x05 => 12, // interior
        0x0a | 0x0d => 8,  // leaf
        _ => return None,
    };
    let number = |at: usize| usize::from(u16::from_be_bytes([header[at], header[at + 1]]));
    let from = start + size + 2 * number(3);
    // Of a page of 65,536 bytes without cells, the start of the cells does not fit into 16 bits.
    let to = if number(5) == 0 { 65536 } else { number(5) };
    (from <= to && to <= page.len()).then_some(from..to)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::fs;
    use std::path::Path;
    use std::sync::Arc;

    use types::{AdapterId, ManualClock, NewItem};

    use super::*;

    const SECRET: &str = "the-quick-brown-secret";

    fn user(name: &str) -> AdapterId {
        AdapterId::new("acme".parse().unwrap(), name.parse().unwrap())
    }

    async fn open(folder: &Path) -> Store {
        Store::open(folder, Arc::new(ManualClock::default())).await.unwrap()
    }

    fn text(output: String) -> NewItem {
        NewItem { id: None, input: None, output, created_at: None, metadata: None }
    }

    /// Items of two users in turns, small and long; alice's ids and outputs hold the secret. The ids arrive in no order,
    /// so that their index is split everywhere.
    async fn upload(store: &Store) {
        for i in 0..40u64 {
            let item = |j: u64, id: &str, output: String| {
                let id = format!("{id}-{}", (i * 40 + j).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                NewItem { id: Some(id.parse().unwrap()), ..text(output) }
            };
            for j in 0..40 {
                let alices = vec![item(j, SECRET, SECRET.repeat(1 + (i * j) as usize % 37))];
                let bobs = vec![item(j, "bob", "bob stays here ".repeat(1 + (i + j) as usize % 19))];
                store.append(&user("alice"), None, [0; 32], alices).await.unwrap();
                store.append(&user("bob"), None, [0; 32], bobs).await.unwrap();
            }
        }
    }

    /// How often the secret is in the database's file, all of whose log has been folded in.
    async fn secrets(store: &Store, folder: &Path) -> usize {
        let busy: i64 =
            sqlx::query_scalar("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(store.writer()).await.unwrap();
        assert_eq!(busy, 0);
        let file = fs::read(folder.join("atelier.db")).unwrap();
        file.windows(SECRET.len()).filter(|window| *window == SECRET.as_bytes()).count()
    }

    /// A store after such an upload, alice's rows erased as `erase_user` does it, up to the commit.
    async fn with_erased_rows(folder: &Path) -> Store {
        let store = open(folder).await;
        upload(&store).await;
        let mut tx = store.write().await.unwrap();
        let alice = sql::users::find(&mut tx, &user("alice")).await.unwrap().unwrap();
        sql::users::delete(&mut tx, alice.key).await.unwrap();
        Store::mark_erasure(&mut tx).await.unwrap();
        tx.commit().await.unwrap();
        store
    }

    /// No secret is left, and nothing else is gone.
    async fn assert_wiped(store: &Store, folder: &Path) {
        assert_eq!(secrets(store, folder).await, 0);
        let check: String =
            sqlx::query_scalar("PRAGMA integrity_check").fetch_one(store.writer()).await.unwrap();
        assert_eq!(check, "ok");
        assert_eq!(store.history_stats(&user("bob")).await.unwrap().items, 1600);
    }

    #[tokio::test]
    async fn copies_that_the_library_leaves_are_wiped() {
        let folder = tempfile::tempdir().unwrap();
        let store = with_erased_rows(folder.path()).await;
        // The control: the library alone leaves some.
        assert_ne!(secrets(&store, folder.path()).await, 0);
        assert!(store.wipe_database().await.unwrap());
        assert_wiped(&store, folder.path()).await;
        assert_eq!(sql::pages::erasures(&mut store.reader().await.unwrap()).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_death_before_wiping_is_made_up_for_at_the_next_opening() {
        let folder = tempfile::tempdir().unwrap();
        let store = with_erased_rows(folder.path()).await;
        store.close().await;
        drop(store);
        let store = open(folder.path()).await;
        assert_wiped(&store, folder.path()).await;
    }

    #[tokio::test]
    async fn what_earlier_versions_have_left_is_wiped_too() {
        let folder = tempfile::tempdir().unwrap();
        let store = with_erased_rows(folder.path()).await;
        let as_before = "PRAGMA user_version = 0; DELETE FROM _sqlx_migrations WHERE version = 6";
        sqlx::raw_sql(as_before).execute(store.writer()).await.unwrap();
        assert_ne!(secrets(&store, folder.path()).await, 0);
        store.close().await;
        drop(store);
        let store = open(folder.path()).await;
        assert_wiped(&store, folder.path()).await;
    }

    /// Uploads go on, and every erasure has left when it is acknowledged.
    #[tokio::test]
    async fn wiping_and_writing_go_on_together() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path()).await;
        upload(&store).await;
        let erased = {
            let store = store.clone();
            async move { store.erase_user(&user("alice")).await.unwrap() }
        };
        let written = async {
            for i in 0..200 {
                let item = text(format!("carol {i}"));
                store.append(&user("carol"), None, [0; 32], vec![item]).await.unwrap();
            }
        };
        let (erased, ()) = tokio::join!(erased, written);
        assert!(erased);
        assert_wiped(&store, folder.path()).await;
        assert_eq!(store.history_stats(&user("carol")).await.unwrap().items, 200);
    }

    /// A page with `cells` cells, whose content begins at `content`.
    fn page(kind: u8, cells: u16, content: u16) -> Vec<u8> {
        let mut page = vec![kind, 0, 0];
        page.extend(cells.to_be_bytes());
        page.extend(content.to_be_bytes());
        page.resize(512, 0);
        page
    }

    #[test]
    fn unallocated_space_lies_between_pointers_and_cells() {
        assert_eq!(unallocated(&page(0x0d, 3, 400)), Some(14..400), "leaf of a table");
        assert_eq!(unallocated(&page(0x0a, 0, 512)), Some(8..512), "leaf of an index, empty");
        assert_eq!(unallocated(&page(0x02, 3, 400)), Some(18..400), "inside an index");
        assert_eq!(unallocated(&page(0x05, 194, 400)), Some(400..400), "inside a table, full");
        let mut first = page(0, 0, 0);
        first[..16].copy_from_slice(b"SQLite format 3\0");
        let leaf = page(0x0d, 2, 500);
        first[100..108].copy_from_slice(&leaf[..8]);
        assert_eq!(unallocated(&first), Some(112..500), "after the file's header");
        let mut large = page(0x0d, 0, 0);
        large.resize(65536, 0);
        assert_eq!(unallocated(&large), Some(8..65536));
    }

    #[test]
    fn what_is_no_page_of_a_tree_has_none() {
        for (kind, cells, content) in [(0, 3, 400), (0x0d, 200, 400), (0x0d, 3, 513), (0x0d, 0, 0)] {
            assert_eq!(unallocated(&page(kind, cells, content)), None, "{kind} {cells} {content}");
        }
        assert_eq!(unallocated(&[0x0d; 7]), None);
    }
}
