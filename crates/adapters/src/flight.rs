//! An adapter on its way from the store to a slot, and what it has in host memory meanwhile.

use std::collections::HashMap;
use std::hash::Hash;

/// An adapter in host memory with its bytes and the pages it takes.
#[derive(Debug, Clone)]
pub(crate) struct Hosted<H> {
    pub(crate) payload: H,
    pub(crate) bytes: usize,
    pub(crate) pages: usize,
}

#[derive(Debug)]
pub(crate) enum Stage<H> {
    Loading,
    /// In host memory; it waits for pages.
    Ready(Hosted<H>),
    /// It waited for pages, and gave up its host memory to others that waited longer.
    Parked {
        bytes: usize,
    },
    /// Loaded again after that.
    Returning {
        bytes: usize,
    },
    /// Pages are set aside and being filled from host memory.
    Placing(Hosted<H>),
}

#[derive(Debug)]
pub(crate) struct Flight<G, H> {
    pub(crate) number: u64,
    pub(crate) generation: G,
    pub(crate) stamp: u64,
    pub(crate) stage: Stage<H>,
}

impl<G, H> Flight<G, H> {
    /// Whether a load for it is under way.
    pub(crate) fn is_loading(&self) -> bool {
        matches!(self.stage, Stage::Loading | Stage::Returning { .. })
    }

    /// Whether it was loaded, and only pages are missing, or were.
    pub(crate) fn wants_pages(&self) -> bool {
        matches!(self.stage, Stage::Ready(_) | Stage::Parked { .. } | Stage::Returning { .. })
    }

    /// Whether it is in host memory.
    pub(crate) fn is_hosted(&self) -> bool {
        matches!(self.stage, Stage::Ready(_) | Stage::Placing(_))
    }

    /// Bytes of host memory that it has or is about to have.
    pub(crate) fn claims(&self) -> usize {
        match &self.stage {
            Stage::Ready(hosted) | Stage::Placing(hosted) => hosted.bytes,
            Stage::Returning { bytes } => *bytes,
            Stage::Loading | Stage::Parked { .. } => 0,
        }
    }

    /// What it has in host memory.
    pub(crate) fn into_hosted(self) -> Option<Hosted<H>> {
        match self.stage {
            Stage::Ready(hosted) | Stage::Placing(hosted) => Some(hosted),
            Stage::Loading | Stage::Parked { .. } | Stage::Returning { .. } => None,
        }
    }
}

/// `HashMap::remove` under a condition.
pub(crate) trait RemoveIf<K, V> {
    fn remove_if(&mut self, key: &K, condition: impl FnOnce(&V) -> bool) -> Option<V>;
}

impl<K: Eq + Hash, V> RemoveIf<K, V> for HashMap<K, V> {
    fn remove_if(&mut self, key: &K, condition: impl FnOnce(&V) -> bool) -> Option<V> {
        if self.get(key).is_some_and(condition) { self.remove(key) } else { None }
    }
}
