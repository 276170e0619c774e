//! What the rules of the tiers answer, and what they count.

/// Counters since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counts {
    /// Requests that found a slot.
    pub(crate) slot_hits: u64,
    /// Requests that found the adapter in host memory.
    pub(crate) host_hits: u64,
    /// Requests that needed the store, or waited with one that did.
    pub(crate) misses: u64,
    pub(crate) placements: u64,
    pub(crate) slot_evictions: u64,
    pub(crate) host_evictions: u64,
}

/// A load to start: from the store into host memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Load<K, G> {
    pub(crate) number: u64,
    pub(crate) key: K,
    pub(crate) generation: G,
}

/// A placement to carry out: from host memory into pages, which are set aside for it.
#[derive(Debug)]
pub(crate) struct Placement<K, H> {
    pub(crate) number: u64,
    pub(crate) key: K,
    pub(crate) payload: H,
    pub(crate) pages: usize,
}

/// The answer to a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Request<K, G> {
    /// The head is not known: read it, [`crate::tiers::Tiers::learn`] it, and ask again.
    Ask,
    /// The user has no adapter.
    Base,
    /// This slot has it; it is pinned once more.
    Ready { slot: u64, generation: G },
    /// It will be there; a load may have to be started.
    Wait { ticket: u64, load: Option<Load<K, G>> },
    /// Too many wait.
    Busy,
}

/// What has become of tickets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Landed<G> {
    /// Nothing to tell anyone.
    Quiet,
    /// The head may have moved: ask again, with the old ticket.
    Again(Vec<u64>),
    /// It could not be had.
    Failed(Vec<u64>),
    /// The slot is there, pinned once for each.
    Ready { slot: u64, generation: G, tickets: Vec<u64> },
}
