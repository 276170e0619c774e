//! Who does the work of a kernel: the rayon pool the caller runs in, or a team of threads that spin between the short
//! phases of a step.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};

use rayon::prelude::*;

use crate::apart::Apart;

/// Runs independent tasks on several threads.
pub trait Workers: Sync {
    /// Threads that may work at once.
    fn threads(&self) -> usize;

    /// Calls `body` once for every number below `tasks`, and returns when all calls have ended.
    fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync));
}

/// The rayon pool the caller runs in.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rayon;

impl Workers for Rayon {
    fn threads(&self) -> usize {
        rayon::current_num_threads()
    }

    fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        (0..tasks).into_par_iter().for_each(body);
    }
}

/// Turns of the waiting loop before a thread goes to sleep: about a quarter of a millisecond.
const SPINS: u32 = 20_000;

/// The lowest bit of the state: work may be joined. The rest counts: the joined threads in 15 bits, then the rounds.
const OPEN: u64 = 1;
const JOINED: u64 = 2;
const ROUND: u64 = 1 << 16;

/// A fixed set of threads for work that comes in many short rounds. A round begins with one store and ends when the
/// tasks are done: a thread that the operating system has put aside is not waited for unless it has begun a task.
#[derive(Debug)]
pub struct Team {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
    /// A round is going on. Helpers never look at it.
    busy: AtomicBool,
}

/// A team's only round.
struct Round<'a>(&'a AtomicBool);

impl<'a> Round<'a> {
    /// # Panics
    /// When there is one already.
    fn begin(busy: &'a AtomicBool) -> Self {
        assert!(!busy.swap(true, Ordering::Acquire), "a team's round within a round");
        Self(busy)
    }
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

#[derive(Debug, Default)]
struct Shared {
    apart: Apart,
    state: AtomicU64,
    /// Threads that have left the round they joined.
    left: AtomicUsize,
    /// By thread.
    parts: Box<[Part]>,
    /// How many of them are in use.
    used: AtomicUsize,
    tasks: AtomicUsize,
    /// The round's closure: a pointer to a `&(dyn Fn(usize) + Sync)` on the leader's stack.
    body: AtomicPtr<()>,
    panicked: AtomicBool,
    sleepers: AtomicUsize,
    /// Helpers from this index on sit out.
    helpers: AtomicUsize,
    stop: AtomicBool,
}

/// The next task of a thread's part of a round, on a cache line (or two that are fetched together) of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Part(AtomicUsize);

impl Shared {
    /// Takes tasks until there are none: of the thread's own part, so that it reads memory in one run, then of the others'.
    fn work(&self, thread: usize, body: &(dyn Fn(usize) + Sync)) {
        let (tasks, used) = (self.tasks.load(Ordering::Relaxed), self.used.load(Ordering::Relaxed));
        for part in (0..used).map(|at| (thread + at) % used) {
            let end = (part + 1) * tasks / used;
            loop {
                let task = self.parts[part].0.fetch_add(1, Ordering::Relaxed);
                if task >= end {
                    break;
                }
                body(task);
            }
        }
    }

    /// Deals a round's tasks out to so many threads.
    fn deal(&self, tasks: usize, threads: usize) {
        self.tasks.store(tasks, Ordering::Relaxed);
        self.used.store(threads, Ordering::Relaxed);
        let parts = self.parts.iter().take(threads).enumerate();
        parts.for_each(|(at, part)| part.0.store(at * tasks / threads, Ordering::Relaxed));
    }

    /// A helper's life: join a round, work, leave, wait for the next.
    fn serve(&self, index: usize) {
        self.apart.register(index);
        let mut seen = 0;
        let mut idle = 0u32;
        while !self.stop.load(Ordering::Acquire) {
            if self.sits_out(index) {
                // Whoever calls it back unparks it.
                std::thread::park();
                continue;
            }
            let state = self.state.load(Ordering::Acquire);
            let round = state / ROUND;
            if state & OPEN != 0 && round != seen {
                let joined = self.state.compare_exchange_weak(
                    state,
                    state + JOINED,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if joined.is_ok() {
                    seen = round;
                    idle = 0;
                    // SAFETY: the leader keeps the closure alive until everyone who joined has left.
                    let body =
                        unsafe { *self.body.load(Ordering::Relaxed).cast::<&(dyn Fn(usize) + Sync)>() };
                    if catch_unwind(AssertUnwindSafe(|| self.work(index + 1, body))).is_err() {
                        self.panicked.store(true, Ordering::Relaxed);
                    }
                    self.left.fetch_add(1, Ordering::Release);
                }
                continue;
            }
            idle += 1;
            if idle < SPINS {
                std::hint::spin_loop();
            } else {
                self.sleep(state, index);
                idle = 0;
            }
        }
    }

    fn sits_out(&self, index: usize) -> bool {
        index >= self.helpers.load(Ordering::Acquire)
    }

    /// Sleeps until the state changes or it is to sit out. The leader looks for sleepers after it changes the state, the sleeper at the
    /// state after it counts itself among them: one of the two sees the other.
    fn sleep(&self, state: u64, index: usize) {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.state.load(Ordering::SeqCst) == state
            && !self.stop.load(Ordering::SeqCst)
            && !self.sits_out(index)
        {
            std::thread::park();
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Team {
    /// A team of `threads` threads, the caller of [`Workers::run`] being one of them.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let threads = threads.max(1);
        let helpers = threads - 1;
        let shared = Shared {
            apart: Apart::new(threads),
            helpers: AtomicUsize::new(helpers),
            parts: (0..threads).map(|_| Part::default()).collect(),
            ..Shared::default()
        };
        let shared = Arc::new(shared);
        let start = |index| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("team-{index}")).spawn(move || shared.serve(index - 1))
        };
        let threads = (1..threads).map(start).collect::<Result<Vec<_>, _>>()?;
        let handles = threads.iter().map(|thread| thread.thread().clone()).collect();
        Ok(Self { shared, threads, handles, busy: AtomicBool::new(false) })
    }

    /// Has the caller and `threads - 1` others do what follows, at most as many as there are; the rest sleep, without a
    /// turn of the waiting loop, and leave their cores to somebody else. What is computed does not depend on it.
    pub fn keep(&self, threads: usize) {
        let helpers = (threads.max(1) - 1).min(self.threads.len());
        if helpers > 0 {
            self.shared.apart.keep();
        }
        let before = self.shared.helpers.swap(helpers, Ordering::AcqRel);
        // Those who sleep between rounds and now sit out are no longer among the sleepers.
        self.handles[before.min(helpers)..before.max(helpers)].iter().for_each(Thread::unpark);
    }

    /// Its threads, those that sit out among them.
    #[must_use]
    pub fn size(&self) -> usize {
        self.threads.len() + 1
    }

    #[cfg(all(test, target_os = "linux"))]
    pub(crate) fn apart(&self) -> &Apart {
        &self.shared.apart
    }

    fn wake(&self) {
        if self.shared.sleepers.load(Ordering::SeqCst) > 0 {
            self.handles[..self.threads() - 1].iter().for_each(Thread::unpark);
        }
    }
}

impl Workers for Team {
    fn threads(&self) -> usize {
        self.shared.helpers.load(Ordering::Relaxed) + 1
    }

    /// # Panics
    /// When a round is going on: a team belongs to one thread.
    fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        let threads = self.threads();
        if tasks <= 1 || threads == 1 {
            (0..tasks).for_each(body);
            return;
        }
        let _round = Round::begin(&self.busy);
        let shared = &*self.shared;
        shared.apart.keep();
        let state = shared.state.load(Ordering::Relaxed);
        shared.deal(tasks, threads);
        shared.left.store(0, Ordering::Relaxed);
        shared.body.store(std::ptr::from_ref(&body).cast_mut().cast(), Ordering::Relaxed);
        let round = state / ROUND + 1;
        shared.state.store((round * ROUND) | OPEN, Ordering::SeqCst);
        self.wake();
        let own = catch_unwind(AssertUnwindSafe(|| shared.work(0, body)));
        if own.is_err() {
            // Nobody shall begin another task of a round that has failed.
            shared.parts.iter().for_each(|part| part.0.store(tasks, Ordering::Relaxed));
        }
        let closed = shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let joined = (closed % ROUND / JOINED) as usize;
        while shared.left.load(Ordering::Acquire) < joined {
            std::hint::spin_loop();
        }
        // Also where the leader panicked: the next round is not to blame.
        let helper_panicked = shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!helper_panicked, "a task of the team panicked");
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.handles.iter().for_each(Thread::unpark);
        for thread in self.threads.drain(..) {
            // A helper catches the panics of its tasks; it has nothing to report.
            let _ended = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_every_round() {
        let team = Team::new(3).unwrap_or_else(|error| panic!("{error}"));
        for round in 0..2_000 {
            let tasks = round % 17;
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            team.run(tasks, &|task| {
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "round {round}");
            if round % 500 == 0 {
                while team.shared.sleepers.load(Ordering::SeqCst) < 2 {
                    std::thread::yield_now();
                }
            }
        }
    }

    #[test]
    fn every_thread_begins_with_its_own_part() {
        let team = Team::new(3).unwrap_or_else(|error| panic!("{error}"));
        let met = std::sync::Barrier::new(3);
        for _ in 0..50 {
            let begun = std::sync::Mutex::new(Vec::new());
            team.run(10, &|task| {
                let place = {
                    let mut begun = begun.lock().unwrap_or_else(|error| panic!("{error}"));
                    begun.push(task);
                    begun.len()
                };
                if place <= 3 {
                    met.wait();
                }
            });
            let mut begun = begun.into_inner().unwrap_or_else(|error| panic!("{error}"));
            begun[..3].sort_unstable();
            assert_eq!(begun[..3], [0, 3, 6]);
        }
    }

    #[test]
    fn threads_that_sit_out_sleep_and_come_back() {
        let team = Team::new(4).unwrap_or_else(|error| panic!("{error}"));
        for round in 0..400 {
            team.keep(1 + round % 5);
            assert_eq!(team.threads(), (1 + round % 5).min(4));
            let seen = std::sync::Mutex::new(std::collections::HashSet::new());
            let done = AtomicUsize::new(0);
            team.run(32, &|_| {
                seen.lock().unwrap_or_else(|error| panic!("{error}")).insert(std::thread::current().id());
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 32);
            let seen = seen.into_inner().unwrap_or_else(|error| panic!("{error}"));
            // One who was about to begin when it was told to sit out may still join.
            assert!(round % 5 > 0 || seen.len() == 1, "{} threads", seen.len());
        }
        // Those who sit out are not woken by rounds: nobody counts as sleeper for them.
        team.keep(1);
        while team.shared.sleepers.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        team.keep(4);
        let met = std::sync::Barrier::new(4);
        team.run(4, &|_| {
            met.wait();
        });
    }

    #[test]
    fn a_round_within_a_round_is_refused_and_the_team_goes_on() {
        let team = Team::new(2).unwrap_or_else(|error| panic!("{error}"));
        let refused = catch_unwind(AssertUnwindSafe(|| team.run(2, &|_| team.run(2, &|_| ()))));
        assert!(refused.is_err());
        // From another thread, too.
        let (begun, done) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            let first = AtomicBool::new(true);
            let (team, begun, done) = (&team, &begun, &done);
            scope.spawn(move || {
                team.run(2, &|_| {
                    if first.swap(false, Ordering::Relaxed) {
                        begun.wait();
                        done.wait();
                    }
                });
            });
            begun.wait();
            let refused = catch_unwind(AssertUnwindSafe(|| team.run(2, &|_| ())));
            done.wait();
            assert!(refused.is_err());
        });
        team.run(2, &|_| ());
    }

    #[test]
    fn a_round_in_which_everybody_panicked_leaves_nothing_to_the_next() {
        let team = Team::new(2).unwrap_or_else(|error| panic!("{error}"));
        for _ in 0..50 {
            let met = std::sync::Barrier::new(2);
            let failed = catch_unwind(AssertUnwindSafe(|| {
                team.run(2, &|_| {
                    met.wait();
                    panic!("seeded");
                });
            }));
            assert!(failed.is_err());
            team.run(2, &|_| ());
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(2).unwrap_or_else(|error| panic!("{error}"));
        for _ in 0..50 {
            let failed = catch_unwind(AssertUnwindSafe(|| {
                team.run(8, &|task| assert!(task != 5, "seeded"));
            }));
            assert!(failed.is_err());
            let done = AtomicUsize::new(0);
            team.run(8, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 8);
        }
    }
}
