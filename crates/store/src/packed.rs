//! Packed files: what others make of a generation's files and want back sooner than they could make it again.

use std::sync::Arc;

use bytes::Bytes;
use types::{AdapterId, GenerationId};

use crate::reading::{Rest, fingerprint};
use crate::sql::generations::Packed;
use crate::{Store, StoreError, sql};

/// The file's name in the folder of its generation.
const FILE: &str = "packed";

impl Store {
    /// What [`Store::keep_packed`] has last kept of a generation, if that was for this `packing`; length and SHA-256 are
    /// checked. One that is missing or damaged counts as none.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn packed(
        &self,
        adapter: &AdapterId,
        id: &GenerationId,
        packing: &[u8; 32],
        rest: Arc<Rest>,
    ) -> Result<Option<Bytes>, StoreError> {
        let found = sql::generations::find_of(&mut *self.reader().await?, adapter, Some(id)).await?;
        let Some((folder, packed)) = found.and_then(|found| Some((found.folder, found.packed?))) else {
            return Ok(None);
        };
        if packed.packing != *packing {
            return Ok(None);
        }
        match self.blobs().read(&folder, FILE, packed.file.bytes, rest).await {
            Ok(Some((file, bytes))) if file == packed.file => return Ok(Some(bytes)),
            Ok(_) => tracing::warn!(generation = %id, "a packed adapter is missing or damaged"),
            Err(error) => tracing::warn!(generation = %id, %error, "a packed adapter cannot be read"),
        }
        Ok(None)
    }

    /// Keeps `bytes` beside the files of a generation, in place of what was kept before; they are gone when the generation
    /// is. `packing` says what they are good for. Not synced: a power cut may take them. False if there is no such
    /// generation.
    ///
    /// # Errors
    /// If the database fails or the file cannot be written.
    pub async fn keep_packed(
        &self,
        adapter: &AdapterId,
        id: &GenerationId,
        packing: [u8; 32],
        bytes: Bytes,
        rest: Arc<Rest>,
    ) -> Result<bool, StoreError> {
        let (store, adapter, id) = (self.clone(), adapter.clone(), *id);
        Self::to_the_end(async move {
            let (file, bytes) = fingerprint(bytes, rest).await?;
            // Whoever deletes a folder has changed its row before, and cannot do so as long as this goes on.
            let mut tx = store.write().await?;
            let Some(found) = sql::generations::find_of(&mut tx, &adapter, Some(&id)).await? else {
                return Ok(false);
            };
            store.blobs().add(&found.folder, FILE, bytes).await?;
            sql::generations::set_packed(&mut tx, &adapter, &id, &Packed { packing, file }).await?;
            tx.commit().await?;
            Ok(true)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::fs;
    use std::path::Path;

    use types::{ManualClock, Timestamp};

    use super::*;
    use crate::NewGeneration;
    use crate::reading::at_once;

    const PACKING: [u8; 32] = [3; 32];

    async fn open(folder: &Path) -> Store {
        Store::open(folder, Arc::new(ManualClock::new(Timestamp(0)))).await.unwrap()
    }

    fn alice() -> AdapterId {
        AdapterId::new("acme".parse().unwrap(), "alice".parse().unwrap())
    }

    /// Publishes a generation; its folder.
    async fn publish(store: &Store) -> (GenerationId, String) {
        let id = GenerationId::from_bytes([1; 32]);
        let (config, weights) = (Bytes::from_static(b"{}"), Bytes::from_static(b"weights"));
        let generation =
            NewGeneration { id, parent: None, base: [7; 32], config, weights, meta: serde_json::json!({}) };
        store.publish(&alice(), generation, None, None).await.unwrap();
        let found = sql::generations::find_of(&mut store.reader().await.unwrap(), &alice(), None).await;
        (id, found.unwrap().unwrap().folder)
    }

    async fn keep(store: &Store, id: &GenerationId) -> bool {
        store.keep_packed(&alice(), id, PACKING, Bytes::from_static(b"packed"), at_once()).await.unwrap()
    }

    #[tokio::test]
    async fn what_is_damaged_or_missing_counts_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path()).await;
        let (id, place) = publish(&store).await;
        let file = folder.path().join(place).join(FILE);
        let packed = async || store.packed(&alice(), &id, &PACKING, at_once()).await.unwrap();
        for damaged in [Some(&b"pocked"[..]), Some(b"packe"), Some(b"packed too"), None] {
            assert!(keep(&store, &id).await);
            assert_eq!(packed().await.unwrap(), &b"packed"[..]);
            match damaged {
                Some(bytes) => fs::write(&file, bytes).unwrap(),
                None => fs::remove_file(&file).unwrap(),
            }
            assert_eq!(packed().await, None, "{damaged:?}");
        }
    }

    /// Keeping and erasing at the same time: nothing of the user is left on disk.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn nothing_is_kept_of_who_is_erased_meanwhile() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path()).await;
        let left = || fs::read_dir(folder.path().join("adapters")).unwrap().count();
        for _ in 0..30 {
            let (id, _) = publish(&store).await;
            let keeper = tokio::spawn({
                let store = store.clone();
                async move { while keep(&store, &id).await {} }
            });
            assert!(store.erase_user(&alice()).await.unwrap());
            keeper.await.unwrap();
            assert_eq!(left(), 0);
        }
        // Negative control: without a look at the row.
        let (_, place) = publish(&store).await;
        assert!(store.erase_user(&alice()).await.unwrap());
        store.blobs().add(&place, FILE, Bytes::from_static(b"packed")).await.unwrap();
        assert_eq!(left(), 1);
    }
}
