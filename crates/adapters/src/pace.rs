//! How fast adapters are made ready: at once when nobody is being served, else in short pieces with rests between.
//!
//! The model's threads take part in rounds of some hundred microseconds. Work beside them on a busy processor holds up a
//! round for as long as it has a core, whatever its priority: the scheduler moves in steps of milliseconds. So it is the
//! work that keeps itself short.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use store::thread_time;

/// Whether requests run at this moment.
pub type Busy = Arc<dyn Fn() -> bool + Send + Sync>;

/// While requests run, a load takes one part in so many of one core. What it takes is at most added to the time of a step.
const PARTS: u32 = 32;
/// Where several loads are to be made, all of them together take so many times as much: whoever waits for one is missing
/// in the batch, and then more is gained than lost.
const SEVERAL: u32 = 6;
/// Work at a stretch.
const STRETCH: Duration = Duration::from_micros(250);
/// Work that is not counted before there is so much of it.
const PIECE: Duration = Duration::from_micros(50);
/// Work that goes at once when there was none for a while.
const SAVED: Duration = Duration::from_micros(500);
/// What a load takes of a core beside its pieces: a look into the database, and being handed from thread to thread.
const HANDED: Duration = Duration::from_micros(250);
/// What a piece counts for at most, so that nobody waits for long after one (and where time is not that of a core, see
/// [`thread_time`], one that took longer waited for a core itself).
const MOST: Duration = Duration::from_millis(5);

/// One load, as long as it lives.
pub(crate) struct Underway<'a>(&'a AtomicUsize);

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The pace of all work of a cache.
pub(crate) struct Pace {
    busy: Busy,
    parts: u32,
    /// Loads that are under way or wait for their turn.
    loads: AtomicUsize,
    /// Up to when the work that was done has been rested for.
    paid: Mutex<Instant>,
}

impl Pace {
    pub(crate) fn new(busy: Busy) -> Self {
        Self { busy, parts: PARTS, loads: AtomicUsize::new(0), paid: Mutex::new(Instant::now()) }
    }

    /// A load begins, or begins to wait for its turn.
    pub(crate) fn load(&self) -> Underway<'_> {
        self.loads.fetch_add(1, Ordering::Relaxed);
        if (self.busy)() {
            // The next piece rests for it.
            self.rest(HANDED, Instant::now());
        }
        Underway(&self.loads)
    }

    fn parts(&self) -> u32 {
        if self.loads.load(Ordering::Relaxed) > 1 { self.parts / SEVERAL } else { self.parts }
    }

    /// Called after a piece of work with the time that it took: rests if it is time to.
    #[expect(
        clippy::disallowed_methods,
        reason = "it is time that has to pass; the thread does nothing else"
    )]
    pub(crate) fn worked(&self, time: Duration) {
        if (self.busy)() {
            std::thread::sleep(self.rest(time, Instant::now()));
        }
    }

    /// To be called between the pieces of work that begins now.
    pub(crate) fn rests(&self) -> impl FnMut() {
        let (mut begun, mut start) = (Instant::now(), thread_time());
        move || {
            // To ask for the core's time costs as much as many a piece.
            if begun.elapsed() >= PIECE {
                self.worked(thread_time().saturating_sub(start));
                (begun, start) = (Instant::now(), thread_time());
            }
        }
    }

    /// How long to rest after work that took `time`.
    fn rest(&self, time: Duration, now: Instant) -> Duration {
        let parts = self.parts();
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(SAVED * parts).unwrap_or(now);
        *paid = (*paid).max(earliest) + time.min(MOST) * parts;
        Some(*paid - now).filter(|rest| *rest >= STRETCH * parts).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    /// The part of the time that work takes, of several who work as much as they may: each does a piece, rests, goes on.
    fn share(pace: &Pace, workers: usize, pieces: u32) -> f64 {
        let begun = Instant::now() + Duration::from_secs(3600);
        // What they have saved is used up first.
        while pace.rest(PIECE, begun).is_zero() {}
        let begun = *pace.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = vec![begun; workers];
        for _ in 0..pieces {
            let first = free.iter_mut().min().expect("somebody works");
            let now = *first + PIECE;
            *first = now + pace.rest(PIECE, now);
        }
        let ended = free.into_iter().max().expect("somebody works");
        (PIECE * pieces).as_secs_f64() / (ended - begun).as_secs_f64()
    }

    fn keeps_its_share(pace: &Pace) -> bool {
        [1, 2, 4].into_iter().all(|workers| share(pace, workers, 10_000) < 1.02 / f64::from(PARTS))
    }

    #[test]
    fn all_work_together_keeps_its_share() {
        let pace = Pace::new(Arc::new(|| true));
        assert!(keeps_its_share(&pace));
        assert!(share(&pace, 1, 10_000) > 0.95 / f64::from(PARTS), "it is not starved either");
        let greedy = Pace { parts: PARTS / 2, ..Pace::new(Arc::new(|| true)) };
        assert!(!keeps_its_share(&greedy), "negative control");
    }

    #[test]
    fn several_loads_have_a_multiple_of_the_share_of_one() {
        let pace = Pace::new(Arc::new(|| true));
        let first = pace.load();
        assert!(keeps_its_share(&pace));
        let second = pace.load();
        for workers in [1, 2, 4] {
            let share = share(&pace, workers, 10_000) * f64::from(PARTS / SEVERAL);
            assert!((0.95..1.02).contains(&share), "{workers}: {share}");
        }
        drop(first);
        assert!(keeps_its_share(&pace));
        drop(second);
        assert_eq!(pace.loads.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn work_comes_in_short_stretches() {
        let pace = Pace::new(Arc::new(|| true));
        let mut now = Instant::now() + Duration::from_secs(3600);
        let mut stretches = Vec::new();
        let mut stretch = Duration::ZERO;
        while stretches.len() < 20 {
            now += PIECE;
            stretch += PIECE;
            let rest = pace.rest(PIECE, now);
            if !rest.is_zero() {
                stretches.push(std::mem::take(&mut stretch));
            }
            now += rest;
        }
        assert!(stretches[0] >= SAVED && stretches[0] <= SAVED + 3 * STRETCH, "{stretches:?}");
        assert!(stretches[1..].iter().all(|stretch| *stretch <= STRETCH + 2 * PIECE), "{stretches:?}");
    }

    #[test]
    fn who_had_to_wait_for_a_core_does_not_rest_for_it() {
        let pace = Pace::new(Arc::new(|| true));
        let now = Instant::now() + Duration::from_secs(3600);
        assert!(pace.rest(Duration::from_secs(60), now) <= MOST * PARTS);
    }

    #[test]
    fn work_is_counted_in_pieces() {
        let looks = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&looks);
        let pace = Pace::new(Arc::new(move || {
            seen.fetch_add(1, Ordering::Relaxed);
            false
        }));
        let mut between = pace.rests();
        for pieces in 1..=20 {
            let begun = Instant::now();
            while begun.elapsed() < PIECE {
                std::hint::spin_loop();
            }
            between();
            assert_eq!(looks.load(Ordering::Relaxed), pieces);
        }
        let (begun, before) = (Instant::now(), looks.load(Ordering::Relaxed));
        (0..1_000).for_each(|_| between());
        let most = begun.elapsed().as_nanos() / PIECE.as_nanos();
        assert!((looks.load(Ordering::Relaxed) - before) as u128 <= most, "short ones are counted together");
    }

    #[test]
    fn nobody_rests_while_nobody_is_served() {
        let busy = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&busy);
        let pace = Pace::new(Arc::new(move || seen.load(Ordering::Relaxed)));
        let paid = || *pace.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let before = paid();
        pace.worked(Duration::from_secs(3600));
        assert_eq!(paid(), before, "an hour of work costs nothing");
        busy.store(true, Ordering::Relaxed);
        pace.worked(PIECE);
        assert!(paid() > before);
    }
}
