//! The rules of the tiers against a plain model of them, and over many schedules of threads.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::*;

/// Bugs that the tests must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Slots are evicted however they are leased.
    EvictLeased,
    /// What was loaded becomes the head, whatever has been published meanwhile.
    StaleLoad,
    /// Who came last gets room first.
    YoungestFirst,
    /// Every request for an adapter that is being loaded loads it too.
    SecondLoad,
    /// Nobody who waits for room is told that a slot is no longer leased.
    SilentRelease,
    /// Host memory is never made room in.
    OverBudget,
    /// What waits for pages keeps its host memory, however much that is.
    KeepsUnplaced,
    /// What gave up its host memory is not loaded again.
    Forgets,
}

const KEYS: u8 = 5;
const PAGES: usize = 4;
const SIZES: Sizes = Sizes { host_bytes: 25, pages: PAGES, waiting: 12, heads: 3 };

fn pages_of(key: u8) -> usize {
    1 + key as usize % 3
}

fn hosted(key: u8, generation: u64) -> Hosted<(u8, u64)> {
    Hosted { payload: (key, generation), bytes: 10, pages: pages_of(key) }
}

#[derive(Debug, Clone)]
enum Op {
    Request(u8),
    Prefetch(u8),
    Publish(u8),
    /// In time or not: then the head has moved since.
    Announce(u8, bool),
    Forget(u8),
    Load(u8, bool),
    Place(u8),
    Drop(u8),
    Leave(u8),
}

fn op() -> impl Strategy<Value = Op> {
    let key = || 0..KEYS;
    prop_oneof![
        8 => key().prop_map(Op::Request),
        1 => key().prop_map(Op::Prefetch),
        2 => key().prop_map(Op::Publish),
        2 => (key(), prop::bool::weighted(0.2)).prop_map(|(key, late)| Op::Announce(key, late)),
        1 => key().prop_map(Op::Forget),
        6 => (any::<u8>(), prop::bool::weighted(0.9)).prop_map(|(at, works)| Op::Load(at, works)),
        6 => any::<u8>().prop_map(Op::Place),
        4 => any::<u8>().prop_map(Op::Drop),
        1 => any::<u8>().prop_map(Op::Leave),
    ]
}

/// The store, what is under way, and who has what.
struct World {
    tiers: Tiers<u8, u64, (u8, u64), (u8, u64)>,
    /// Generation and stamp of each adapter's head; 0 is none.
    heads: [(u64, u64); KEYS as usize],
    loads: Vec<(Load<u8, u64>, bool)>,
    placements: Vec<Placement<u8, (u8, u64)>>,
    /// Slot and adapter of every lease.
    leases: Vec<(u64, u8)>,
    /// Adapter of every waiting ticket.
    tickets: HashMap<u64, u8>,
}

/// Whether host memory is counted as it is, and within its bound: beyond it there is only what is being placed and the
/// oldest that waits for pages.
fn within<K, G, H, D>(tiers: &Tiers<K, G, H, D>, bound: usize) -> bool
where
    K: Clone + Eq + std::hash::Hash,
{
    let (mut bytes, mut ready) = (tiers.host.iter().map(|(_, (_, hosted))| hosted.bytes).sum::<usize>(), 0);
    for flight in tiers.flights.values() {
        if let Stage::Ready(hosted) | Stage::Placing(hosted) = &flight.stage {
            bytes += hosted.bytes;
        }
        ready += usize::from(matches!(flight.stage, Stage::Ready(_)));
    }
    bytes == tiers.host_bytes && (bytes <= bound || (tiers.host.is_empty() && ready <= 1))
}

macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}

impl World {
    fn new(fault: Option<Fault>) -> Self {
        let mut tiers = Tiers::new(SIZES);
        tiers.fault = fault;
        Self {
            tiers,
            heads: [(1, 0); KEYS as usize],
            loads: Vec::new(),
            placements: Vec::new(),
            leases: Vec::new(),
            tickets: HashMap::new(),
        }
    }

    fn head(&self, key: u8) -> (u64, u64) {
        self.heads[key as usize]
    }

    /// Does what the cache does then: it looks for room after everything but a publish, which it does not see, a
    /// prefetch, and a lease that nobody waited for.
    fn apply(&mut self, op: &Op) -> Result<(), String> {
        let mut looks = true;
        match *op {
            Op::Request(key) => self.request(key, None)?,
            Op::Prefetch(key) => {
                if let Request::Wait { load: Some(load), .. } = self.tiers.prefetch(&key, self.head(key).1) {
                    self.load(load)?;
                }
                looks = false;
            }
            Op::Publish(key) => {
                looks = false;
                let (generation, stamp) = &mut self.heads[key as usize];
                (*generation, *stamp) = (*stamp + 2, *stamp + 1);
            }
            Op::Announce(key, late) => {
                let (head, stamp) = self.head(key);
                let head = head.saturating_sub(u64::from(late));
                let was_used = self.tiers.has_slot(&key);
                self.drop_loads(key, Some(head));
                let again = self.tiers.invalidate(&key, Some(head));
                if was_used && let Some(load) = self.tiers.fetch(&key, head, stamp) {
                    self.load(load)?;
                }
                self.again(key, again)?;
            }
            Op::Forget(key) => {
                self.drop_loads(key, None);
                let again = self.tiers.invalidate(&key, None);
                self.again(key, again)?;
            }
            Op::Load(at, works) if !self.loads.is_empty() => {
                let (load, _) = self.loads.remove(at as usize % self.loads.len());
                let result = works.then(|| hosted(load.key, load.generation));
                let landed = self.tiers.loaded(load.number, &load.key, result, self.head(load.key).1);
                self.landed(load.key, landed)?;
            }
            Op::Place(at) if !self.placements.is_empty() => {
                let Placement { number, key, payload, pages } =
                    self.placements.remove(at as usize % self.placements.len());
                let landed = self.tiers.placed(number, &key, Some(payload), pages, self.head(key).1);
                self.landed(key, landed)?;
            }
            Op::Drop(at) if !self.leases.is_empty() => {
                let (slot, _) = self.leases.remove(at as usize % self.leases.len());
                looks = self.tiers.unpin(slot);
            }
            Op::Leave(at) if !self.tickets.is_empty() => {
                let mut tickets: Vec<u64> = self.tickets.keys().copied().collect();
                tickets.sort_unstable();
                let ticket = tickets[at as usize % tickets.len()];
                self.tickets.remove(&ticket);
                self.tiers.leave(ticket);
            }
            _ => {}
        }
        if looks {
            self.pump()?;
        }
        self.check()
    }

    fn request(&mut self, key: u8, ticket: Option<u64>) -> Result<(), String> {
        let (generation, stamp) = self.head(key);
        self.drop_loads(key, Some(generation));
        let mut answer = self.tiers.request(&key, stamp, ticket);
        if answer == Request::Ask {
            let again = self.tiers.learn(&key, (generation > 0).then_some(generation), stamp);
            self.again(key, again)?;
            answer = self.tiers.request(&key, stamp, ticket);
        }
        match answer {
            Request::Ask => Err("asked for a head that it was told".into()),
            Request::Base => Ok(()),
            Request::Busy => {
                ensure!(self.tickets.len() >= SIZES.waiting, "busy with {} tickets", self.tickets.len());
                Ok(())
            }
            Request::Ready { slot, generation } => self.lease(key, slot, generation),
            Request::Wait { ticket, load } => {
                self.tickets.insert(ticket, key);
                load.map_or(Ok(()), |load| self.load(load))
            }
        }
    }

    fn load(&mut self, load: Load<u8, u64>) -> Result<(), String> {
        let same = |(other, wanted): &(Load<u8, u64>, bool)| {
            *wanted && (other.key, other.generation) == (load.key, load.generation)
        };
        ensure!(!self.loads.iter().any(same), "two loads of {load:?}");
        self.loads.push((load, true));
        Ok(())
    }

    /// Loads under way of other generations are no longer waited for.
    fn drop_loads(&mut self, key: u8, keep: Option<u64>) {
        let others = |load: &Load<u8, u64>| load.key == key && Some(load.generation) != keep;
        self.loads.iter_mut().filter(|(load, _)| others(load)).for_each(|(_, wanted)| *wanted = false);
    }

    fn lease(&mut self, key: u8, slot: u64, generation: u64) -> Result<(), String> {
        let head = self.head(key).0;
        ensure!(generation == head, "{key}: generation {generation} while {head} is head");
        let payload = self.tiers.slot_mut(&key, slot).copied();
        ensure!(payload == Some((key, generation)), "{key}: the slot holds {payload:?}");
        self.leases.push((slot, key));
        Ok(())
    }

    fn again(&mut self, key: u8, tickets: Vec<u64>) -> Result<(), String> {
        for ticket in tickets {
            ensure!(self.tickets.remove(&ticket) == Some(key), "a ticket of somebody else");
            self.request(key, Some(ticket))?;
        }
        Ok(())
    }

    fn landed(&mut self, key: u8, landed: Landed<u64>) -> Result<(), String> {
        match landed {
            Landed::Quiet => Ok(()),
            Landed::Again(tickets) => self.again(key, tickets),
            Landed::Failed(tickets) => {
                for ticket in tickets {
                    ensure!(self.tickets.remove(&ticket) == Some(key), "a ticket of somebody else");
                }
                Ok(())
            }
            Landed::Ready { slot, generation, tickets } => {
                for ticket in tickets {
                    ensure!(self.tickets.remove(&ticket) == Some(key), "a ticket of somebody else");
                    self.lease(key, slot, generation)?;
                }
                Ok(())
            }
        }
    }

    fn pump(&mut self) -> Result<(), String> {
        let ready = |tiers: &Tiers<u8, u64, (u8, u64), (u8, u64)>| -> Vec<(u64, u8)> {
            let at_hand =
                |key: &u8| matches!(tiers.flights.get(key).map(|f| &f.stage), Some(Stage::Ready(_)));
            tiers.waiting.iter().filter(|(_, key)| at_hand(key)).map(|(at, key)| (*at, *key)).collect()
        };
        let before = ready(&self.tiers);
        let begun = self.tiers.pump();
        // By age: what has begun is the oldest that could.
        let mut order: Vec<u8> = Vec::new();
        for (_, key) in before {
            if !order.contains(&key) {
                order.push(key);
            }
        }
        let keys: Vec<u8> = begun.iter().map(|placement| placement.key).collect();
        ensure!(order.starts_with(&keys), "{keys:?} have overtaken others of {order:?}");
        for placement in begun {
            ensure!(placement.payload.0 == placement.key, "another's weights");
            self.placements.push(placement);
        }
        self.tiers.returns().into_iter().try_for_each(|load| self.load(load))
    }

    fn check(&mut self) -> Result<(), String> {
        let tiers = &self.tiers;
        ensure!(within(tiers, SIZES.host_bytes), "{} bytes in host memory", tiers.host_bytes);
        let placing: usize = self.placements.iter().map(|placement| placement.pages).sum();
        let slots: HashMap<u64, usize> =
            tiers.slots.iter().map(|(key, slot)| (slot.number, pages_of(*key))).collect();
        let leased: HashMap<u64, usize> =
            self.leases.iter().map(|(slot, key)| (*slot, pages_of(*key))).collect();
        let old: usize =
            leased.iter().filter(|(slot, _)| !slots.contains_key(slot)).map(|(_, pages)| pages).sum();
        let used = placing + slots.values().sum::<usize>() + old;
        ensure!(used + tiers.free == PAGES, "{used} pages are in use and {} free", tiers.free);
        for (slot, held) in &tiers.held {
            let leases = self.leases.iter().filter(|(leased, _)| leased == slot).count();
            ensure!(held.pins == leases, "{leases} leases and {} pins", held.pins);
        }
        ensure!(tiers.waiting == self.tickets.iter().map(|(at, key)| (*at, *key)).collect(), "the queue");
        ensure!(tiers.heads.len() <= SIZES.heads, "too many heads are remembered");
        // Nobody has been forgotten: whoever is first in the queue for room has too little, or is being loaded again.
        let first = tiers.waiting.values().filter_map(|key| tiers.flights.get(key)).find(|f| f.wants_pages());
        let wanted = match first.map(|flight| &flight.stage) {
            Some(Stage::Ready(hosted)) => Some(hosted.pages),
            Some(Stage::Parked { .. }) => return Err("the first in the queue is not loaded again".into()),
            _ => None,
        };
        let idle: usize =
            slots.iter().filter(|(slot, _)| !leased.contains_key(slot)).map(|(_, pages)| pages).sum();
        if let Some(wanted) = wanted {
            ensure!(tiers.free + idle < wanted, "a request waits for {wanted} pages that are there");
        }
        Ok(())
    }

    /// Lets all that is under way come to its end: nobody may be left waiting.
    fn drain(&mut self) -> Result<(), String> {
        for _ in 0..1000 {
            if self.tickets.is_empty() && self.placements.is_empty() && self.loads.is_empty() {
                return Ok(());
            }
            for op in [Op::Load(0, true), Op::Place(0), Op::Drop(0)] {
                self.apply(&op)?;
            }
        }
        Err(format!("{} requests wait for ever", self.tickets.len()))
    }
}

fn run(ops: &[Op], fault: Option<Fault>) -> Result<(), String> {
    let mut world = World::new(fault);
    for op in ops {
        world.apply(op)?;
    }
    world.drain()?;
    // All pages are free or in slots that nobody leases.
    while !world.leases.is_empty() {
        world.apply(&Op::Drop(0))?;
    }
    Ok(())
}

fn sequences() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(op(), 1..120)
}

proptest! {
    #![proptest_config(Config { cases: 2000, ..Config::default() })]
    #[test]
    fn the_tiers_keep_their_rules(ops in sequences()) {
        prop_assert_eq!(run(&ops, None), Ok(()));
    }
}

#[test]
fn seeded_bugs_break_the_rules() {
    for fault in [
        Fault::EvictLeased,
        Fault::StaleLoad,
        Fault::YoungestFirst,
        Fault::SecondLoad,
        Fault::SilentRelease,
        Fault::OverBudget,
        Fault::KeepsUnplaced,
        Fault::Forgets,
    ] {
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let config = Config { cases: 2000, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, rng);
        let found = runner.run(&sequences(), |ops| run(&ops, Some(fault)).map_err(TestCaseError::fail));
        assert!(found.is_err(), "{fault:?} was not noticed");
    }
}

mod schedules {
    //! Threads that acquire, publish, announce and let go, in many orders: the steps of the cache's own protocol, each
    //! under the lock that the cache takes, over a pool of pages that can run out.

    use std::collections::HashSet;

    use shuttle::sync::atomic::{AtomicU64, Ordering};
    use shuttle::sync::{Arc, Condvar, Mutex};
    use shuttle::thread;

    use super::*;

    /// Pages that a slot has; they come back with the last handle on them.
    struct Pages {
        owner: (u8, u64),
        count: usize,
        pool: Arc<Mutex<usize>>,
    }

    impl Drop for Pages {
        fn drop(&mut self) {
            *self.pool.lock().expect("locks") += self.count;
        }
    }

    enum Told {
        Again,
        Ready(u64, u64, Arc<Pages>),
    }

    /// One adapter in the store.
    struct Published {
        head: Mutex<u64>,
        stamp: AtomicU64,
        /// The generation whose publish is over.
        over: AtomicU64,
    }

    struct Cache {
        heads: [Published; 3],
        pool: Arc<Mutex<usize>>,
        state: Mutex<State>,
        told: Condvar,
    }

    struct State {
        tiers: Tiers<u8, u64, (u8, u64), Arc<Pages>>,
        mail: HashMap<u64, Told>,
        /// Loads under way.
        loading: HashSet<(u8, u64)>,
    }

    const HOST_BYTES: usize = 20;

    impl Cache {
        fn new(fault: Option<Fault>) -> Self {
            let mut tiers = Tiers::new(Sizes { host_bytes: HOST_BYTES, pages: 3, waiting: 10, heads: 10 });
            tiers.fault = fault;
            Self {
                heads: [1, 1, 1].map(|head| Published {
                    head: Mutex::new(head),
                    stamp: AtomicU64::new(0),
                    over: AtomicU64::new(head),
                }),
                pool: Arc::new(Mutex::new(3)),
                state: Mutex::new(State { tiers, mail: HashMap::new(), loading: HashSet::new() }),
                told: Condvar::new(),
            }
        }

        fn stamp(&self, key: u8) -> u64 {
            self.heads[key as usize].stamp.load(Ordering::SeqCst)
        }

        fn head(&self, key: u8) -> u64 {
            *self.heads[key as usize].head.lock().expect("locks")
        }

        /// The newest generation whose publish is over.
        fn over(&self, key: u8) -> u64 {
            self.heads[key as usize].over.load(Ordering::SeqCst)
        }

        fn publish(&self, key: u8, announced: bool) {
            let published = &self.heads[key as usize];
            let generation = {
                let mut head = published.head.lock().expect("locks");
                *head += 1;
                *head
            };
            published.stamp.fetch_add(1, Ordering::SeqCst);
            published.over.store(generation, Ordering::SeqCst);
            if !announced {
                return;
            }
            let mut state = self.state.lock().expect("locks");
            let again = state.tiers.invalidate(&key, Some(generation));
            self.land(state, key, Landed::Again(again));
        }

        /// Uses an adapter for a while.
        fn with(&self, key: u8) {
            let oldest = self.over(key);
            let (slot, generation, pages) = self.acquire(key);
            assert!(generation >= oldest, "an old generation was served as the head");
            thread::yield_now();
            assert_eq!(pages.owner, (key, generation), "another's weights");
            drop(pages);
            let mut state = self.state.lock().expect("locks");
            if state.tiers.unpin(slot) {
                self.go_on(state, None);
            }
        }

        fn acquire(&self, key: u8) -> (u64, u64, Arc<Pages>) {
            let mut ticket = None;
            loop {
                let mut state = self.state.lock().expect("locks");
                let stamp = self.stamp(key);
                match state.tiers.request(&key, stamp, ticket) {
                    Request::Ask => {
                        drop(state);
                        let head = self.head(key);
                        let mut state = self.state.lock().expect("locks");
                        let again = state.tiers.learn(&key, Some(head), stamp);
                        self.land(state, key, Landed::Again(again));
                    }
                    Request::Ready { slot, generation } => {
                        let pages = state.tiers.slot_mut(&key, slot).expect("it is there");
                        return (slot, generation, Arc::clone(pages));
                    }
                    Request::Wait { ticket: number, load } => {
                        ticket = Some(number);
                        self.go_on(state, load);
                        let mut state = self.state.lock().expect("locks");
                        let told = loop {
                            match state.mail.remove(&number) {
                                Some(told) => break told,
                                None => state = self.told.wait(state).expect("locks"),
                            }
                        };
                        if let Told::Ready(slot, generation, pages) = told {
                            return (slot, generation, pages);
                        }
                    }
                    other => panic!("{other:?}"),
                }
            }
        }

        /// Places what has room, and loads what is to be loaded.
        fn go_on(&self, mut state: shuttle::sync::MutexGuard<'_, State>, load: Option<Load<u8, u64>>) {
            let begun = state.tiers.pump();
            let loads: Vec<_> = load.into_iter().chain(state.tiers.returns()).collect();
            for load in &loads {
                let first = state.loading.insert((load.key, load.generation));
                assert!(first, "two loads of {load:?}");
            }
            drop(state);
            self.told.notify_all();
            self.place(begun);
            loads.iter().for_each(|load| self.load(load));
        }

        fn load(&self, load: &Load<u8, u64>) {
            let payload =
                Hosted { payload: (load.key, load.generation), bytes: 10, pages: pages_of(load.key) };
            thread::yield_now();
            let mut state = self.state.lock().expect("locks");
            state.loading.remove(&(load.key, load.generation));
            let stamp = self.stamp(load.key);
            let landed = state.tiers.loaded(load.number, &load.key, Some(payload), stamp);
            self.land(state, load.key, landed);
        }

        fn place(&self, begun: Vec<Placement<u8, (u8, u64)>>) {
            for Placement { number, key, payload, pages } in begun {
                let mut free = self.pool.lock().expect("locks");
                assert!(*free >= pages, "the pool has run out of pages that the tiers gave");
                *free -= pages;
                drop(free);
                let body = Arc::new(Pages { owner: payload, count: pages, pool: Arc::clone(&self.pool) });
                let mut state = self.state.lock().expect("locks");
                let (over, stamp) = (self.over(key), self.stamp(key));
                let landed = state.tiers.placed(number, &key, Some(body), pages, stamp);
                if let Landed::Ready { generation, .. } = &landed {
                    assert!(*generation >= over, "an old generation has become resident as the head");
                }
                self.land(state, key, landed);
            }
        }

        fn land(&self, mut state: shuttle::sync::MutexGuard<'_, State>, key: u8, landed: Landed<u64>) {
            match landed {
                Landed::Quiet => {}
                Landed::Failed(_) => panic!("nothing fails here"),
                Landed::Again(tickets) => {
                    state.mail.extend(tickets.into_iter().map(|ticket| (ticket, Told::Again)));
                }
                Landed::Ready { slot, generation, tickets } => {
                    for ticket in tickets {
                        let pages = Arc::clone(state.tiers.slot_mut(&key, slot).expect("it is there"));
                        state.mail.insert(ticket, Told::Ready(slot, generation, pages));
                    }
                }
            }
            assert!(within(&state.tiers, HOST_BYTES), "host memory holds more than it may");
            self.go_on(state, None);
        }
    }

    /// Three readers of adapters that do not fit beside each other, while two of them are published again.
    fn scene(fault: Option<Fault>) {
        let cache = Arc::new(Cache::new(fault));
        let mut threads = Vec::new();
        for keys in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
            let cache = Arc::clone(&cache);
            threads.push(thread::spawn(move || keys.into_iter().for_each(|key| cache.with(key))));
        }
        let publisher = Arc::clone(&cache);
        threads.push(thread::spawn(move || {
            [(1, false), (2, true), (1, true)]
                .into_iter()
                .for_each(|(key, told)| publisher.publish(key, told));
        }));
        threads.into_iter().for_each(|thread| thread.join().expect("joins"));
        let state = cache.state.lock().expect("locks");
        assert!(state.tiers.waiting.is_empty());
        let free = *cache.pool.lock().expect("locks");
        assert_eq!(state.tiers.free, free, "pages are lost");
    }

    #[test]
    fn every_schedule_keeps_the_rules() {
        shuttle::check_random(|| scene(None), 3000);
        shuttle::check_pct(|| scene(None), 2000, 3);
    }

    #[test]
    fn seeded_bugs_show_in_some_schedule() {
        for fault in [
            Fault::EvictLeased,
            Fault::StaleLoad,
            Fault::SecondLoad,
            Fault::SilentRelease,
            Fault::OverBudget,
            Fault::KeepsUnplaced,
        ] {
            let found = catch_unwind(AssertUnwindSafe(|| {
                shuttle::check_random(move || scene(Some(fault)), 3000);
            }));
            assert!(found.is_err(), "{fault:?} was not noticed");
        }
    }
}
