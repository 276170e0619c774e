//! Processor time of this process's threads, as Linux counts it.

use std::fs::{read_dir, read_to_string};
use std::path::Path;

/// Seconds that the calling thread has had.
pub(crate) fn own() -> f64 {
    of(Path::new("/proc/thread-self"))
}

/// Seconds that the threads of such a name have had, those that have ended left out.
pub(crate) fn named(name: &str) -> f64 {
    let threads = read_dir("/proc/self/task").into_iter().flatten().flatten().map(|thread| thread.path());
    let is_named =
        |thread: &Path| read_to_string(thread.join("comm")).is_ok_and(|comm| comm.trim_end() == name);
    threads.filter(|thread| is_named(thread)).map(|thread| of(&thread)).sum()
}

/// Not a number where the system does not say.
fn of(thread: &Path) -> f64 {
    let counted = read_to_string(thread.join("schedstat")).unwrap_or_default();
    let nanoseconds = counted.split_whitespace().next().and_then(|first| first.parse::<f64>().ok());
    nanoseconds.map_or(f64::NAN, |nanoseconds| nanoseconds / 1e9)
}
