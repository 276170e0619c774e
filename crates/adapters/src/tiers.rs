//! What is resident in which tier and who waits for what: the rules of the cache, without clock, threads or I/O.
//!
//! An adapter comes from the store (a load, slow, one at a time per adapter) into host memory (least recently used out
//! first, bounded in bytes), and from there into a slot (a placement: it takes pages of the device pool). A slot that is
//! leased is never evicted. Who waits for a load waits alone; who waits for pages is served by age. What waits for pages
//! is host memory too: beyond its bound the youngest give theirs up and are loaded again when their turn is near. The
//! oldest keeps its own whatever the bound, so that somebody always goes on.
//!
//! Heads are remembered with a stamp that the store changes whenever a head moves. Nothing becomes resident as the
//! head unless the stamp is still the one under which the head was read.

mod host;

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

use lru::LruCache;

pub(crate) use crate::flight::Hosted;
use crate::flight::{Flight, RemoveIf as _, Stage};
pub(crate) use crate::verdict::{Counts, Landed, Load, Placement, Request};

#[derive(Debug)]
struct Known<G> {
    head: Option<G>,
    stamp: u64,
}

#[derive(Debug)]
struct Slot<G, D> {
    number: u64,
    generation: G,
    payload: D,
}

/// Pages in use: by a slot, or by what was one until its adapter moved on and is still leased.
#[derive(Debug)]
struct Held {
    pages: usize,
    pins: usize,
    retired: bool,
}

/// Sizes of the tiers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) host_bytes: usize,
    pub(crate) pages: usize,
    /// Requests that may wait.
    pub(crate) waiting: usize,
    /// Heads that are remembered.
    pub(crate) heads: usize,
}

/// The state of all tiers. `K` names an adapter, `G` a generation of it; `H` is what host memory holds and `D` a slot.
#[derive(Debug)]
pub(crate) struct Tiers<K: Hash + Eq, G, H, D> {
    sizes: Sizes,
    heads: LruCache<K, Known<G>>,
    /// What nobody waits for, or has a slot beside it.
    host: LruCache<K, (G, Hosted<H>)>,
    /// Bytes of that and of what is on its way to a slot.
    host_bytes: usize,
    slots: LruCache<K, Slot<G, D>>,
    held: HashMap<u64, Held>,
    free: usize,
    flights: HashMap<K, Flight<G, H>>,
    /// Tickets by age.
    waiting: BTreeMap<u64, K>,
    next: u64,
    counts: Counts,
    /// Host memory that is no longer needed, to be freed where nobody waits.
    trash: Vec<H>,
    #[cfg(test)]
    pub(crate) fault: Option<tests::Fault>,
}

impl<K: Clone + Eq + Hash, G: Copy + Eq, H: Clone, D> Tiers<K, G, H, D> {
    pub(crate) fn new(sizes: Sizes) -> Self {
        Self {
            sizes,
            heads: LruCache::unbounded(),
            host: LruCache::unbounded(),
            host_bytes: 0,
            slots: LruCache::unbounded(),
            held: HashMap::new(),
            free: sizes.pages,
            flights: HashMap::new(),
            waiting: BTreeMap::new(),
            next: 0,
            counts: Counts::default(),
            trash: Vec::new(),
            #[cfg(test)]
            fault: None,
        }
    }

    #[cfg(test)]
    fn broken(&self, fault: tests::Fault) -> bool {
        self.fault == Some(fault)
    }

    /// Asks for an adapter. `stamp` is the store's now; `ticket` keeps the age of a request that asks again.
    pub(crate) fn request(&mut self, key: &K, stamp: u64, ticket: Option<u64>) -> Request<K, G> {
        let Some(head) = self.head(key, stamp) else { return Request::Ask };
        let Some(generation) = head else { return Request::Base };
        if let Some(slot) = self.slots.get(key).filter(|slot| slot.generation == generation) {
            let slot = slot.number;
            self.host.promote(key);
            self.counts.slot_hits += u64::from(ticket.is_none());
            self.pin(slot, 1);
            return Request::Ready { slot, generation };
        }
        if ticket.is_none() && self.waiting.len() >= self.sizes.waiting {
            return Request::Busy;
        }
        let (number, hosted) = (self.number(), self.is_hosted(key, generation));
        let load = self.fly(key, generation, stamp);
        if ticket.is_none() {
            let count = if hosted { &mut self.counts.host_hits } else { &mut self.counts.misses };
            *count += 1;
        }
        let ticket = ticket.unwrap_or(number);
        self.waiting.insert(ticket, key.clone());
        Request::Wait { ticket, load }
    }

    /// As [`Tiers::request`] for one who does not wait yet: the adapter comes into host memory.
    pub(crate) fn prefetch(&mut self, key: &K, stamp: u64) -> Request<K, G> {
        let Some(head) = self.head(key, stamp) else { return Request::Ask };
        let Some(generation) = head else { return Request::Base };
        match self.fetch(key, generation, stamp) {
            None => Request::Busy,
            load => Request::Wait { ticket: self.number(), load },
        }
    }

    /// Brings a generation into host memory that is said to be the head; who asks for the adapter still asks for its
    /// head first. `None` if there is nothing to do or no room.
    pub(crate) fn fetch(&mut self, key: &K, generation: G, stamp: u64) -> Option<Load<K, G>> {
        let on_its_way = self.flights.get(key).is_some_and(|flight| flight.generation == generation);
        let there = self.slots.peek(key).is_some_and(|slot| slot.generation == generation);
        let is_full = self.flights.len() >= self.sizes.waiting;
        let is_idle = !on_its_way && !there && !self.is_hosted(key, generation) && !is_full;
        if is_idle { self.fly(key, generation, stamp) } else { None }
    }

    /// Remembers a head that was read after `stamp`; the tickets must ask again.
    #[must_use]
    pub(crate) fn learn(&mut self, key: &K, head: Option<G>, stamp: u64) -> Vec<u64> {
        if self.heads.peek(key).is_some_and(|known| known.stamp > stamp) {
            return Vec::new();
        }
        self.heads.put(key.clone(), Known { head, stamp });
        if self.heads.len() > self.sizes.heads {
            self.heads.pop_lru();
        }
        self.invalidate(key, head)
    }

    /// Whatever is not of this generation is no longer the head: it is not served again. The tickets must ask again.
    #[must_use]
    pub(crate) fn invalidate(&mut self, key: &K, keep: Option<G>) -> Vec<u64> {
        if self.host.peek(key).is_some_and(|(generation, _)| Some(*generation) != keep) {
            self.unhost(key);
        }
        if self.slots.peek(key).is_some_and(|slot| Some(slot.generation) != keep) {
            self.retire(key);
        }
        if self.flights.get(key).is_none_or(|flight| Some(flight.generation) == keep) {
            return Vec::new();
        }
        if let Some(hosted) = self.flights.remove(key).and_then(Flight::into_hosted) {
            self.host_bytes -= hosted.bytes;
            self.trash.push(hosted.payload);
        }
        self.take_tickets(key)
    }

    /// A load is over; `None` if it failed. `stamp` is the store's now.
    #[must_use]
    pub(crate) fn loaded(
        &mut self,
        number: u64,
        key: &K,
        result: Option<Hosted<H>>,
        stamp: u64,
    ) -> Landed<G> {
        let Some(flight) = self.flights.get_mut(key).filter(|flight| flight.number == number) else {
            self.trash.extend(result.map(|hosted| hosted.payload));
            return Landed::Quiet;
        };
        let fresh = flight.stamp == stamp;
        #[cfg(test)]
        let fresh = fresh || self.fault == Some(tests::Fault::StaleLoad);
        let generation = flight.generation;
        let Some(hosted) = result.filter(|_| fresh) else {
            self.flights.remove(key);
            let tickets = self.take_tickets(key);
            return if fresh { Landed::Failed(tickets) } else { Landed::Again(tickets) };
        };
        if self.waiting.values().any(|waits| waits == key) {
            self.host_bytes += hosted.bytes;
            flight.stage = Stage::Ready(hosted);
            self.unhost(key);
            self.fit();
        } else {
            self.flights.remove(key);
            self.keep(key, generation, hosted);
        }
        Landed::Quiet
    }

    /// Placements that can begin now, by age of those who wait.
    #[must_use]
    pub(crate) fn pump(&mut self) -> Vec<Placement<K, H>> {
        let mut placements = Vec::new();
        let queue: Vec<K> = self.waiting.values().cloned().collect();
        #[cfg(test)]
        let queue: Vec<K> =
            if self.broken(tests::Fault::YoungestFirst) { queue.into_iter().rev().collect() } else { queue };
        for key in queue {
            let Some(flight) = self.flights.get(&key) else { continue };
            let (Stage::Ready(hosted), number) = (&flight.stage, flight.number) else { continue };
            let hosted = hosted.clone();
            if !self.make_room(hosted.pages) {
                // Whoever is younger waits too, or one that needs many pages would wait for ever.
                break;
            }
            self.free -= hosted.pages;
            let (payload, pages) = (hosted.payload.clone(), hosted.pages);
            if let Some(flight) = self.flights.get_mut(&key) {
                flight.stage = Stage::Placing(hosted);
            }
            placements.push(Placement { number, key, payload, pages });
        }
        placements
    }

    /// A placement of `pages` pages is over; `None` if it failed. `stamp` is the store's now.
    #[must_use]
    pub(crate) fn placed(
        &mut self,
        number: u64,
        key: &K,
        payload: Option<D>,
        pages: usize,
        stamp: u64,
    ) -> Landed<G> {
        let Some(flight) = self.flights.remove_if(key, |flight| flight.number == number) else {
            // Its adapter has moved on meanwhile.
            drop(payload);
            self.free += pages;
            return Landed::Quiet;
        };
        let fresh = flight.stamp == stamp;
        #[cfg(test)]
        let fresh = fresh || self.fault == Some(tests::Fault::StaleLoad);
        let (generation, tickets) = (flight.generation, self.take_tickets(key));
        self.give_back(key, flight);
        let Some(payload) = payload.filter(|_| fresh) else {
            self.free += pages;
            return if fresh { Landed::Failed(tickets) } else { Landed::Again(tickets) };
        };
        self.retire(key);
        self.counts.placements += 1;
        self.held.insert(number, Held { pages, pins: tickets.len(), retired: false });
        self.slots.put(key.clone(), Slot { number, generation, payload });
        Landed::Ready { slot: number, generation, tickets }
    }

    /// A lease on a slot is gone; true if somebody may have waited for that.
    #[must_use]
    pub(crate) fn unpin(&mut self, slot: u64) -> bool {
        let Some(held) = self.held.get_mut(&slot) else { return false };
        held.pins = held.pins.saturating_sub(1);
        if held.pins > 0 {
            return false;
        }
        if held.retired {
            self.free += held.pages;
            self.held.remove(&slot);
        }
        #[cfg(test)]
        if self.broken(tests::Fault::SilentRelease) {
            return false;
        }
        !self.waiting.is_empty()
    }

    /// Who held this ticket no longer waits; true if it waited for pages.
    pub(crate) fn leave(&mut self, ticket: u64) -> bool {
        let Some(key) = self.waiting.remove(&ticket) else { return false };
        let Some(flight) = self.flights.get(&key) else { return false };
        let wants_pages = flight.wants_pages();
        if wants_pages && !flight.is_loading() && !self.waiting.values().any(|waits| *waits == key) {
            self.flights.remove(&key).into_iter().for_each(|flight| self.give_back(&key, flight));
        }
        wants_pages
    }

    /// What a slot holds, if it is still the adapter's.
    pub(crate) fn slot_mut(&mut self, key: &K, number: u64) -> Option<&mut D> {
        self.slots.peek_mut(key).filter(|slot| slot.number == number).map(|slot| &mut slot.payload)
    }

    /// Host memory that is to be freed.
    pub(crate) fn take_trash(&mut self) -> Vec<H> {
        std::mem::take(&mut self.trash)
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    /// Slots, and pages that are free.
    pub(crate) fn slots(&self) -> (usize, usize) {
        (self.slots.len(), self.free)
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn has_slot(&self, key: &K) -> bool {
        self.slots.contains(key)
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn head(&mut self, key: &K, stamp: u64) -> Option<Option<G>> {
        self.heads.get(key).filter(|known| known.stamp == stamp).map(|known| known.head)
    }

    /// Sets an adapter on its way, unless it is; the load that this takes.
    fn fly(&mut self, key: &K, generation: G, stamp: u64) -> Option<Load<K, G>> {
        if let Some(flight) = self.flights.get_mut(key).filter(|flight| flight.generation == generation) {
            // The head was read again and is the same.
            flight.stamp = stamp;
            #[cfg(test)]
            if self.fault == Some(tests::Fault::SecondLoad) && matches!(flight.stage, Stage::Loading) {
                return Some(Load { number: flight.number, key: key.clone(), generation });
            }
            return None;
        }
        let number = self.number();
        let there = self.host.peek(key).is_some_and(|(hosted, _)| *hosted == generation);
        let hosted = if there { self.host.pop(key) } else { None };
        let stage = hosted.map_or(Stage::Loading, |(_, hosted)| Stage::Ready(hosted));
        let load = matches!(stage, Stage::Loading).then(|| Load { number, key: key.clone(), generation });
        self.flights.insert(key.clone(), Flight { number, generation, stamp, stage });
        load
    }

    fn take_tickets(&mut self, key: &K) -> Vec<u64> {
        self.waiting.extract_if(.., |_, waits| waits == key).map(|(ticket, _)| ticket).collect()
    }

    fn pin(&mut self, slot: u64, times: usize) {
        if let Some(held) = self.held.get_mut(&slot) {
            held.pins += times;
        }
    }

    /// Takes a slot from its adapter; its pages are free when the last lease is gone.
    fn retire(&mut self, key: &K) {
        let Some(slot) = self.slots.pop(key) else { return };
        drop(slot.payload);
        let Some(held) = self.held.get_mut(&slot.number) else { return };
        held.retired = true;
        if held.pins == 0 {
            self.free += held.pages;
            self.held.remove(&slot.number);
        }
    }

    /// Evicts slots that nobody leases, least recently used first, until `pages` are free; evicts none if that would
    /// not do.
    fn make_room(&mut self, pages: usize) -> bool {
        let mut room = self.free;
        let mut victims = Vec::new();
        for (key, slot) in self.slots.iter().rev() {
            if room >= pages {
                break;
            }
            let Some(held) = self.held.get(&slot.number) else { continue };
            let idle = held.pins == 0;
            #[cfg(test)]
            let idle = idle || self.broken(tests::Fault::EvictLeased);
            if idle {
                room += held.pages;
                victims.push(key.clone());
            }
        }
        if room < pages {
            return false;
        }
        for key in &victims {
            self.counts.slot_evictions += 1;
            #[cfg(test)]
            if self.broken(tests::Fault::EvictLeased)
                && let Some(slot) = self.slots.peek(key)
                && let Some(held) = self.held.get_mut(&slot.number)
            {
                held.pins = 0;
            }
            self.retire(key);
        }
        true
    }
}

#[cfg(test)]
#[path = "tiers_tests.rs"]
mod tests;
