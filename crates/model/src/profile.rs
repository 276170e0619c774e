//! Where the time of forward passes goes: for measuring, and off otherwise.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kernels::{Team, Workers};

/// A part of a pass, named after what its products are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Checks and input embeddings.
    Embedding,
    /// Queries, keys and values.
    Qkv,
    /// Rotation, storing, and attention itself.
    Attention,
    /// The attention's output.
    O,
    /// The two inner products of the feed-forward part.
    GateUp,
    /// The outer one.
    Down,
    /// The output layer.
    Head,
}

impl Phase {
    /// All of them, in the order they come in.
    pub const ALL: [Self; 7] =
        [Self::Embedding, Self::Qkv, Self::Attention, Self::O, Self::GateUp, Self::Down, Self::Head];
}

/// What passes have spent in a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PhaseTime {
    /// Which.
    pub phase: Phase,
    /// In all.
    pub whole: Duration,
    /// In making rows ready for products: norm or gate, quantisation, the way down through adapters.
    pub preparing: Duration,
}

/// A stop watch for each phase. Its hands belong to the thread that runs passes.
#[derive(Debug)]
pub(crate) struct Watch {
    start: Instant,
    phase: AtomicUsize,
    /// When the phase began, and how many rounds of work it has had.
    since: AtomicU64,
    rounds: AtomicUsize,
    whole: [AtomicU64; Phase::ALL.len()],
    preparing: [AtomicU64; Phase::ALL.len()],
}

impl Watch {
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            phase: AtomicUsize::new(0),
            since: AtomicU64::new(0),
            rounds: AtomicUsize::new(0),
            whole: Default::default(),
            preparing: Default::default(),
        }
    }

    pub(crate) fn times(&self) -> [PhaseTime; Phase::ALL.len()] {
        let time = |nanos: &AtomicU64| Duration::from_nanos(nanos.load(Ordering::Relaxed));
        Phase::ALL.map(|phase| PhaseTime {
            phase,
            whole: time(&self.whole[phase as usize]),
            preparing: time(&self.preparing[phase as usize]),
        })
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Starts a phase, or goes on without one that counts.
    fn turn(&self, to: Option<Phase>) {
        let now = self.now();
        let since = self.since.swap(now, Ordering::Relaxed);
        let last = self.phase.swap(to.map_or(usize::MAX, |phase| phase as usize), Ordering::Relaxed);
        if let Some(whole) = self.whole.get(last) {
            whole.fetch_add(now - since, Ordering::Relaxed);
        }
        self.rounds.store(0, Ordering::Relaxed);
    }

    fn round(&self, work: impl FnOnce()) {
        let (phase, is_first) =
            (self.phase.load(Ordering::Relaxed), self.rounds.fetch_add(1, Ordering::Relaxed) == 0);
        let before = self.now();
        work();
        // In every other phase it is the first half of a fused layer.
        let preparing = self.preparing.get(phase).filter(|_| is_first && phase != Phase::Attention as usize);
        preparing.into_iter().for_each(|nanos| {
            nanos.fetch_add(self.now() - before, Ordering::Relaxed);
        });
    }
}

/// A team at work on a pass, and who watches it.
pub(crate) struct Timed<'a> {
    pub(crate) team: &'a Team,
    pub(crate) watch: Option<&'a Watch>,
}

impl Timed<'_> {
    pub(crate) fn begin(&self, phase: Phase) {
        self.watch.into_iter().for_each(|watch| watch.turn(Some(phase)));
    }
}

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        self.watch.into_iter().for_each(|watch| watch.turn(None));
    }
}

impl Workers for Timed<'_> {
    fn threads(&self) -> usize {
        self.team.threads()
    }

    fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        match self.watch {
            None => self.team.run(tasks, body),
            Some(watch) => watch.round(|| self.team.run(tasks, body)),
        }
    }
}
