//! Folders on this machine's disk: made, synced and removed so that a power cut undoes none of it.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::path::Path;

/// Creates a folder that only this user can read, with the folders above it that are missing.
pub(crate) fn create_private(folder: &Path) -> io::Result<()> {
    let folder = std::path::absolute(folder)?;
    let found = folder.ancestors().find(|above| above.exists()).unwrap_or(&folder);
    if found == folder && folder.is_dir() {
        return Ok(());
    }
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(&folder)?;
    sync_up_to(found, &folder)
}

/// Syncs `folder` and the folders above it, up to `top`: a new folder is on disk when the folder that
/// it stands in is.
pub(crate) fn sync_up_to(top: &Path, folder: &Path) -> io::Result<()> {
    folder.ancestors().take_while(|above| above.starts_with(top)).try_for_each(sync)
}

fn sync(folder: &Path) -> io::Result<()> {
    // Elsewhere a folder cannot be opened as a file.
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// Removes `folder` with all it holds, and the folders above it that become empty, below `top`. It is
/// no error if it is gone already.
pub(crate) fn remove_below(top: &Path, folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    for above in folder.ancestors().skip(1) {
        // Fails if the folder is not empty, or was removed before.
        let keep = above == top || (fs::remove_dir(above).is_err() && above.exists());
        if keep {
            return sync(above);
        }
    }
    Ok(())
}
