//! Checkpoints of running jobs: written whole or not at all, gone when the job ends.

use types::AdapterId;

use crate::blobs::Blobs;
use crate::jobs::fenced;
use crate::reading::{at_once, fingerprint};
use crate::sql::checkpoints::Checkpoint;
use crate::{Fence, Store, StoreError, sql};

/// The file's name within its folder.
const FILE: &str = "checkpoint";

impl Store {
    /// Writes down how far a running job is, in place of its earlier checkpoint. `work` is a hash of what the job
    /// learns from and how; `step` is how many steps of it are done. Whether these are more than were ever written down
    /// of this work: then the job is as if claimed for the first time, so that one that always gets on is never given up.
    ///
    /// The file is written and synced first; then one transaction names it, if the worker still holds the job. Runs to
    /// its end even if the caller goes away.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if the worker has lost the job; the earlier checkpoint stays then.
    pub async fn save_checkpoint(
        &self,
        adapter: &AdapterId,
        fence: &Fence,
        work: [u8; 32],
        step: u32,
        bytes: Vec<u8>,
    ) -> Result<bool, StoreError> {
        let (store, adapter, fence) = (self.clone(), adapter.clone(), fence.clone());
        Self::to_the_end(async move {
            let folder = Blobs::new_checkpoint_folder(&adapter, &fence.job);
            let result = store.write_checkpoint(&adapter, &fence, (work, step), bytes, &folder).await;
            if result.is_err()
                && let Err(error) = store.discard(&folder).await
            {
                tracing::warn!(%error, folder, "a checkpoint stays until the store is opened again");
            }
            store.sweep(&adapter).await;
            result
        })
        .await
    }

    async fn write_checkpoint(
        &self,
        adapter: &AdapterId,
        fence: &Fence,
        (work, step): ([u8; 32], u32),
        bytes: Vec<u8>,
        folder: &str,
    ) -> Result<bool, StoreError> {
        let mut tx = self.write().await?;
        if !holds(&mut tx, adapter, fence).await? {
            return Err(fenced(fence));
        }
        sql::garbage::insert_pending(&mut tx, adapter, folder).await?;
        tx.commit().await?;
        let (file, bytes) = fingerprint(bytes.into(), at_once()).await?;
        self.blobs().write(folder, [(FILE, bytes)]).await?;
        let mut tx = self.write().await?;
        if !holds(&mut tx, adapter, fence).await? {
            return Err(fenced(fence));
        }
        let before = sql::checkpoints::find(&mut tx, fence).await?.filter(|before| before.work == work);
        let before = before.map_or(0, |before| before.furthest);
        let checkpoint = Checkpoint { folder: folder.to_owned(), file, work, furthest: before.max(step) };
        sql::checkpoints::replace(&mut tx, adapter, fence, &checkpoint, self.now()).await?;
        sql::garbage::delete(&mut tx, folder).await?;
        if step > before {
            sql::jobs::forgive(&mut tx, fence).await?;
        }
        tx.commit().await?;
        Ok(step > before)
    }

    /// How far a claimed job had come when it was last written down, if that was in the same work. One that is damaged
    /// counts as none: the job begins anew.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn checkpoint(&self, fence: &Fence, work: [u8; 32]) -> Result<Option<Vec<u8>>, StoreError> {
        let found = sql::checkpoints::find(&mut *self.read().await?, fence).await?;
        let Some(found) = found.filter(|found| found.work == work) else { return Ok(None) };
        let read = self.blobs().read(&found.folder, FILE, found.file.bytes, at_once()).await?;
        let Some((file, bytes)) = read else { return Ok(None) };
        if file != found.file {
            tracing::warn!(job = %fence.job, "a checkpoint is damaged: the job begins anew");
            return Ok(None);
        }
        Ok(Some(bytes.into()))
    }

    /// Deletes files of the user that nothing needs any more; what cannot be deleted now is when the store is opened.
    pub(crate) async fn sweep(&self, adapter: &AdapterId) {
        let swept = async {
            let folders = sql::garbage::of_user(&mut *self.read().await?, adapter).await?;
            for folder in folders {
                self.discard(&folder).await?;
            }
            Ok::<_, StoreError>(())
        };
        if let Err(error) = swept.await {
            tracing::warn!(%error, "files that nothing needs stay until the store is opened again");
        }
    }
}

async fn holds(db: &mut sql::Connection, adapter: &AdapterId, fence: &Fence) -> Result<bool, StoreError> {
    let Some(user) = sql::users::find(db, adapter).await? else { return Ok(false) };
    sql::jobs::holds(db, user.key, fence).await
}
