//! Host memory: what stays there, what makes room, and what comes back.

use std::collections::HashSet;
use std::hash::Hash;

use super::Tiers;
use crate::flight::{Flight, Hosted, Stage};
use crate::verdict::Load;

impl<K: Clone + Eq + Hash, G: Copy + Eq, H: Clone, D> Tiers<K, G, H, D> {
    /// Adapters and their bytes in host memory.
    pub(crate) fn host(&self) -> (usize, usize) {
        let on_their_way = self.flights.values().filter(|flight| flight.is_hosted()).count();
        (self.host.len() + on_their_way, self.host_bytes)
    }

    pub(crate) fn has_host(&self, key: &K) -> bool {
        self.host.contains(key) || self.flights.get(key).is_some_and(Flight::is_hosted)
    }

    pub(super) fn is_hosted(&self, key: &K, generation: G) -> bool {
        let flight = self.flights.get(key).filter(|flight| flight.is_hosted());
        let found = self.host.peek(key).map(|(hosted, _)| *hosted).or(flight.map(|flight| flight.generation));
        found == Some(generation)
    }

    /// Puts an adapter into host memory and makes room there.
    pub(super) fn keep(&mut self, key: &K, generation: G, hosted: Hosted<H>) {
        self.unhost(key);
        self.host_bytes += hosted.bytes;
        self.host.put(key.clone(), (generation, hosted));
        self.fit();
    }

    /// What a flight has in host memory stays there after it.
    pub(super) fn give_back(&mut self, key: &K, flight: Flight<G, H>) {
        let generation = flight.generation;
        if let Some(hosted) = flight.into_hosted() {
            self.host_bytes -= hosted.bytes;
            self.keep(key, generation, hosted);
        }
    }

    /// Makes room in host memory: first goes what nobody waits for, least recently used first, then what waits for
    /// pages, youngest first and never the oldest.
    pub(super) fn fit(&mut self) {
        #[cfg(test)]
        if self.broken(super::tests::Fault::OverBudget) {
            return;
        }
        while self.host_bytes > self.sizes.host_bytes
            && let Some((_, (_, old))) = self.host.pop_lru()
        {
            self.host_bytes -= old.bytes;
            self.counts.host_evictions += 1;
            self.trash.push(old.payload);
        }
        #[cfg(test)]
        if self.broken(super::tests::Fault::KeepsUnplaced) {
            return;
        }
        if self.host_bytes <= self.sizes.host_bytes {
            return;
        }
        let is_ready = |key: &&K| matches!(self.flights.get(*key).map(|f| &f.stage), Some(Stage::Ready(_)));
        let mut seen = HashSet::new();
        let by_age = self.waiting.values().filter(is_ready).filter(|key| seen.insert(*key));
        let younger: Vec<K> = by_age.skip(1).cloned().collect();
        for key in younger.into_iter().rev() {
            if self.host_bytes <= self.sizes.host_bytes {
                break;
            }
            let Some(flight) = self.flights.get_mut(&key) else { continue };
            let bytes = flight.claims();
            if let Stage::Ready(old) = std::mem::replace(&mut flight.stage, Stage::Parked { bytes }) {
                self.host_bytes -= bytes;
                self.counts.host_evictions += 1;
                self.trash.push(old.payload);
            }
        }
    }

    pub(super) fn unhost(&mut self, key: &K) {
        if let Some((_, old)) = self.host.pop(key) {
            self.host_bytes -= old.bytes;
            self.trash.push(old.payload);
        }
    }

    /// Loads of those that gave up their host memory while they waited for pages: the first of all who wait for pages,
    /// and others by age as far as host memory goes.
    #[must_use]
    pub(crate) fn returns(&mut self) -> Vec<Load<K, G>> {
        #[cfg(test)]
        if self.broken(super::tests::Fault::Forgets) {
            return Vec::new();
        }
        let mut claims: usize = self.flights.values().map(Flight::claims).sum();
        let (mut first, mut loads) = (true, Vec::new());
        for key in self.waiting.values() {
            let Some(flight) = self.flights.get_mut(key) else { continue };
            if let Stage::Parked { bytes } = flight.stage {
                if !first && claims + bytes > self.sizes.host_bytes {
                    break;
                }
                claims += bytes;
                flight.stage = Stage::Returning { bytes };
                loads.push(Load { number: flight.number, key: key.clone(), generation: flight.generation });
            }
            first &= !flight.wants_pages();
        }
        loads
    }
}
