//! Seeded faults: what the tests make panic inside the thread.

/// Where, and about which sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    /// When it is taken in.
    Taking(u64),
    /// After a plan in which it runs.
    Planning(u64),
    /// Before its third token and those after it are chosen.
    Sampling(u64),
    /// After blocks of it were published.
    Publishing(u64),
    /// While the thread recovers from another fault.
    Recovering,
}

/// Panics where a fault was seeded.
pub(crate) fn strike(seeded: &[Fault], here: Fault) {
    assert!(!seeded.contains(&here), "a seeded fault: {here:?}");
}
