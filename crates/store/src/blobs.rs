//! Adapter files in the blob store: written once, synced before they are named, deleted for good.

use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use bytes::Bytes;
use futures::TryStreamExt as _;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _, PutMode, PutOptions};
use tokio::sync::Mutex;
use types::{AdapterId, GenerationId, JobId};
use uuid::Uuid;

use crate::reading::{self, Rest};
use crate::{Fingerprint, StoreError, disk};

/// All adapter files are below this folder.
const ROOT: &str = "adapters";

/// The blob store.
pub(crate) struct Blobs {
    store: Arc<dyn ObjectStore>,
    /// The same for files that may be lost.
    unsynced: Arc<dyn ObjectStore>,
    /// The folder on this machine, if it is one: then there are folders to sync and to remove.
    root: Option<PathBuf>,
    /// Folders are made and removed one at a time, so that none is removed as empty while a file
    /// is about to be written into it.
    turn: Mutex<()>,
}

impl Blobs {
    /// Files in `folder`, on this machine's disk.
    pub(crate) async fn in_folder(folder: &FilePath) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Folder { folder: folder.to_owned(), source };
        let root = folder.canonicalize().map_err(failed)?;
        fs::create_dir_all(root.join(ROOT)).map_err(failed)?;
        disk::sync_up_to(&root, &root.join(ROOT)).map_err(failed)?;
        let unsynced = LocalFileSystem::new_with_prefix(&root)?;
        let store = unsynced.clone().with_fsync(true);
        let (store, unsynced) = (Arc::new(store), Arc::new(unsynced));
        Ok(Self { store, unsynced, root: Some(root), turn: Mutex::new(()) })
    }

    /// Files in memory.
    pub(crate) fn in_memory() -> Self {
        let store = Arc::new(InMemory::new());
        Self { unsynced: Arc::clone(&store) as _, store, root: None, turn: Mutex::new(()) }
    }

    /// A name for a folder that nobody has used or will use again.
    ///
    /// The last part differs for every attempt to publish. So whoever fails may delete its folder
    /// without a thought for others that publish the same generation.
    pub(crate) fn new_folder(adapter: &AdapterId, generation: &GenerationId) -> String {
        format!("{ROOT}/{}/{}/{generation}/{}", adapter.tenant, adapter.owner, Uuid::new_v4().simple())
    }

    /// The same for a job's checkpoint. No generation's id looks like this.
    pub(crate) fn new_checkpoint_folder(adapter: &AdapterId, job: &JobId) -> String {
        format!("{ROOT}/{}/{}/job-{job}/{}", adapter.tenant, adapter.owner, Uuid::new_v4().simple())
    }

    /// Writes the files of a new folder. When this returns, files and folder names are on disk.
    pub(crate) async fn write<const N: usize>(
        &self,
        folder: &str,
        files: [(&str, Bytes); N],
    ) -> Result<(), StoreError> {
        let _turn = self.turn.lock().await;
        for (name, bytes) in files {
            let options = PutOptions::from(PutMode::Create);
            self.store.put_opts(&parse(folder)?.join(name), bytes.into(), options).await?;
        }
        if let Some(root) = self.root.clone() {
            // The blob store syncs the folders that it has created itself; a folder that another
            // call has just created may not be on disk yet.
            on_disk(root.join(folder), move |folder| disk::sync_up_to(&root, folder)).await?;
        }
        Ok(())
    }

    /// Writes a file that can be made anew into a folder that is there and stays for the time being. After a power cut it
    /// may be missing, or hold anything.
    pub(crate) async fn add(&self, folder: &str, name: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.unsynced.put(&parse(folder)?.join(name), bytes.into()).await?;
        Ok(())
    }

    /// Reads a file that must have `bytes` bytes, in pieces, and says what it is; `None` if it is missing or has another
    /// length.
    pub(crate) async fn read(
        &self,
        folder: &str,
        name: &str,
        bytes: u64,
        rest: Arc<Rest>,
    ) -> Result<Option<(Fingerprint, Bytes)>, StoreError> {
        let path = parse(folder)?.join(name);
        if let Some(root) = &self.root {
            // The blob store would open the file on one thread, to be read on another.
            let path = root.join(path.as_ref());
            let failed = |source| StoreError::Folder { folder: path.clone(), source };
            return reading::read(path.clone(), bytes, rest).await?.map_err(failed);
        }
        let found = match self.store.get(&path).await {
            Ok(found) if found.meta.size == bytes => found,
            Ok(_) | Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        reading::fingerprint(found.bytes().await?, rest).await.map(Some)
    }

    /// Deletes a folder that [`Blobs::new_folder`] has named. It is no error if it is gone already.
    pub(crate) async fn delete(&self, folder: &str) -> Result<(), StoreError> {
        let path = parse(folder)?;
        let _turn = self.turn.lock().await;
        let Some(root) = self.root.clone() else {
            let found = self.store.list(Some(&path)).map_ok(|file| file.location);
            self.store.delete_stream(Box::pin(found)).try_collect::<Vec<_>>().await?;
            return Ok(());
        };
        // Not through the blob store: it hides the half-written files that a crash leaves behind.
        on_disk(root.join(path.as_ref()), move |folder| disk::remove_below(&root.join(ROOT), folder)).await
    }
}

/// A folder name as it came back from the database.
fn parse(folder: &str) -> Result<Path, StoreError> {
    let path = Path::parse(folder).map_err(|error| StoreError::unreadable("folder", error))?;
    if path.parts().count() < 5 || path.parts().next().is_none_or(|first| first.as_ref() != ROOT) {
        return Err(StoreError::unreadable("folder", format!("{folder:?} is not a folder of adapter files")));
    }
    Ok(path)
}

/// Runs file work where it may block.
async fn on_disk(
    folder: PathBuf,
    work: impl FnOnce(&FilePath) -> io::Result<()> + Send + 'static,
) -> Result<(), StoreError> {
    let run = move || work(&folder).map_err(|source| StoreError::Folder { folder, source });
    tokio::task::spawn_blocking(run).await.map_err(|_| StoreError::Stopped)?
}
