//! Reading and hashing in short pieces, with rests between them.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use crate::{Fingerprint, StoreError};

/// Called after a piece of work with the core's time that it took.
pub type Rest = dyn Fn(Duration) + Send + Sync;

/// The core's time that the calling thread has had: what it waited for a core does not count. Elsewhere than on Linux it
/// does.
#[must_use]
pub fn thread_time() -> Duration {
    #[cfg(target_os = "linux")]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        time.try_into().unwrap_or_default()
    }
    #[cfg(not(target_os = "linux"))]
    {
        static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
        START.get_or_init(std::time::Instant::now).elapsed()
    }
}

/// Bytes that are read and hashed at a time.
const PIECE: usize = 64 << 10;

/// No rest between pieces.
pub(crate) fn at_once() -> Arc<Rest> {
    Arc::new(|_| {})
}

/// Length and hash of `bytes`, worked out where it may take a while.
pub(crate) async fn fingerprint(bytes: Bytes, rest: Arc<Rest>) -> Result<(Fingerprint, Bytes), StoreError> {
    blocking(move || {
        let mut hash = Sha256::new();
        for piece in bytes.chunks(PIECE) {
            let start = thread_time();
            hash.update(piece);
            rest(thread_time().saturating_sub(start));
        }
        (found(bytes.len(), hash), bytes)
    })
    .await
}

/// The content of a file of `bytes` bytes and what it is; `None` if it is missing or has another length. One that grows
/// meanwhile is read a byte further only.
pub(crate) async fn read(
    path: PathBuf,
    bytes: u64,
    rest: Arc<Rest>,
) -> Result<io::Result<Option<(Fingerprint, Bytes)>>, StoreError> {
    blocking(move || {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        if file.metadata()?.len() != bytes {
            return Ok(None);
        }
        let mut file = file.take(bytes.saturating_add(1));
        let mut content = Vec::with_capacity(usize::try_from(bytes).unwrap_or_default());
        let mut hash = Sha256::new();
        loop {
            let (start, before) = (thread_time(), content.len());
            file.by_ref().take(PIECE as u64).read_to_end(&mut content)?;
            let piece = &content[before..];
            if piece.is_empty() {
                return Ok(Some((found(content.len(), hash), content.into())));
            }
            hash.update(piece);
            rest(thread_time().saturating_sub(start));
        }
    })
    .await
}

fn found(bytes: usize, hash: Sha256) -> Fingerprint {
    Fingerprint { bytes: bytes as u64, sha256: hash.finalize().into() }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| StoreError::Stopped)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A counter of rests, and what is called at each.
    fn counted() -> (Arc<AtomicUsize>, Arc<Rest>) {
        let count = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&count);
        (
            count,
            Arc::new(move |_| {
                seen.fetch_add(1, Ordering::Relaxed);
            }),
        )
    }

    #[tokio::test]
    async fn a_file_is_read_in_pieces_and_hashed_as_a_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        for len in [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5] {
            let bytes: Vec<u8> = (0..len).map(|at| (at * 31 % 251) as u8).collect();
            std::fs::write(&path, &bytes).expect("it is written");
            let file = async |bytes, rest| read(path.clone(), bytes, rest).await.expect("it runs");
            let (rests, rest) = counted();
            let (found, content) = file(len as u64, rest).await.expect("it is read").expect("it is there");
            assert_eq!(rests.load(Ordering::Relaxed), len.div_ceil(PIECE), "{len} bytes");
            assert!(content == bytes, "{len} bytes");
            let (expected, bytes) = fingerprint(bytes.into(), at_once()).await.expect("it runs");
            assert_eq!(found, expected);
            assert_eq!(found.sha256, <[u8; 32]>::from(Sha256::digest(&bytes)), "in pieces as at once");
            for other in [len.wrapping_sub(1), len + 1] {
                let other = file(other as u64, at_once()).await.expect("it is read");
                assert_eq!(other, None, "it has another length");
            }
        }
        let missing = read(folder.path().join("other"), 0, at_once()).await.expect("it runs");
        assert_eq!(missing.expect("that is no fault"), None);
    }
}
