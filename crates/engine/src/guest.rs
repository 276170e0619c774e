//! A guest beside the engine: work of low priority, as training is, that is lent threads and given pauses while
//! requests run.
//!
//! A step with few rows waits for memory more than for arithmetic: half of the threads do it in little more time. The
//! engine measures in how much, and while a guest is there it leaves half of the threads' cores to it in every step that
//! then takes no longer than the longest steps of late take on all threads: whoever is served gets some tokens later, but
//! hardly waits longer for any than before. Where that is less than the guest's share of the time, the engine pauses
//! between steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// The longest steps of late: this share of all is shorter.
const LONGEST: f64 = 0.98;
/// How fast what is taken for the longest follows them, as a share of itself.
const FOLLOW: f64 = 0.1;
/// What a step that lends may take, beside the longest of late: requests that stay longer also meet more others.
const COST: f64 = 0.85;
/// What lending costs a step at least, where it has not been measured.
const GUESS: f64 = 1.2;
/// Of the steps that could lend, one in so many does not, so that what they take on all threads stays known; and of
/// those that would take too long, one in so many lends.
const MEASURE: u32 = 32;
/// What a new measurement counts beside the earlier ones.
const WEIGHT: f64 = 0.125;
/// A pause shorter than this is saved up.
const LEAST_PAUSE: f64 = 1e-3;
/// Seconds of all threads that are remembered as given too much or too little.
const MEMORY: f64 = 0.1;

/// Says to the engine whether a guest is there. Clones speak of the same.
#[derive(Debug, Clone, Default)]
pub struct Guest(Arc<AtomicUsize>);

impl Guest {
    /// The guest is there until the visit is dropped.
    #[must_use]
    pub fn visit(&self) -> Visit {
        self.0.fetch_add(1, Ordering::Relaxed);
        Visit(Arc::clone(&self.0))
    }

    pub(crate) fn is_there(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

/// A guest's visit.
#[derive(Debug)]
pub struct Visit(Arc<AtomicUsize>);

impl Drop for Visit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Seconds of steps of about the same number of rows.
#[derive(Debug, Clone, Copy, Default)]
struct Times {
    all: Option<f64>,
    lending: Option<f64>,
    steps: u32,
}

/// What the guest is given: a rule on step times, without clock or threads.
#[derive(Debug)]
pub(crate) struct Host {
    threads: usize,
    floor: f64,
    times: [Times; 24],
    /// Seconds that the longest steps of late take on all threads.
    longest: f64,
    /// Seconds of a thread that the guest has not had of its share.
    owed: f64,
}

impl Host {
    /// `floor` is the share of the threads' time, from 0 to 0.9, that a guest gets while requests run.
    pub(crate) fn new(threads: usize, floor: f64) -> Self {
        let floor = floor.clamp(0.0, 0.9);
        Self { threads, floor, times: [Times::default(); 24], longest: 0.0, owed: 0.0 }
    }

    /// The times of steps of about so many rows: two entries for each power of two.
    fn of(&mut self, rows: usize) -> &mut Times {
        let rows = rows.max(1);
        let power = rows.ilog2();
        let upper = power > 0 && rows >= 3 << (power - 1);
        let last = self.times.len() - 1;
        &mut self.times[(2 * power as usize + usize::from(upper)).min(last)]
    }

    /// Threads that a step of so many rows runs on while a guest is there.
    pub(crate) fn threads(&mut self, rows: usize) -> usize {
        let most = self.longest * COST;
        let times = self.of(rows);
        times.steps = times.steps.wrapping_add(1);
        let measure = times.steps.is_multiple_of(MEASURE);
        let lends = match (times.all, times.lending) {
            (None, _) => false,
            (Some(all), None) => all * GUESS <= most,
            (Some(_), Some(lending)) if lending <= most => !measure,
            (Some(all), Some(_)) => measure && all * GUESS <= most,
        };
        if lends { self.threads.div_ceil(2) } else { self.threads }
    }

    /// A step of so many rows on so many threads took so many seconds.
    pub(crate) fn measured(&mut self, rows: usize, threads: usize, seconds: f64) {
        let lent = threads < self.threads;
        let times = self.of(rows);
        let mean = if lent { &mut times.lending } else { &mut times.all };
        *mean = Some(mean.map_or(seconds, |mean| mean + WEIGHT * (seconds - mean)));
        // Of a step that has lent too it counts what it takes on all threads.
        let alone = times.all.unwrap_or(seconds);
        let change = if alone > self.longest { LONGEST } else { LONGEST - 1.0 };
        self.longest = if self.longest > 0.0 { self.longest * (1.0 + FOLLOW * change) } else { alone };
    }

    /// The pause that is due, and is taken, after a step on so many threads that took so many seconds.
    pub(crate) fn pause(&mut self, threads: usize, seconds: f64) -> Option<Duration> {
        let lent = (self.threads - threads) as f64;
        self.owe(seconds * (self.threads as f64 * self.floor - lent));
        // A pause gives all threads, and its own time counts.
        let all = self.threads as f64 * (1.0 - self.floor);
        let pause = (self.owed / all).min(2.0 * seconds * self.floor / (1.0 - self.floor));
        if pause < LEAST_PAUSE {
            return None;
        }
        self.owe(-pause * all);
        Some(Duration::from_secs_f64(pause))
    }

    /// The engine had nothing to do for so many seconds.
    pub(crate) fn idle(&mut self, seconds: f64) {
        self.owe(-seconds * self.threads as f64);
    }

    fn owe(&mut self, seconds: f64) {
        let most = MEMORY * self.threads as f64;
        self.owed = (self.owed + seconds).clamp(-most, most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Milliseconds of a step on all of two threads, and on one: the arithmetic of a row beside the memory's time.
    fn takes(rows: usize, threads: usize) -> f64 {
        let (memory, row) = (5.0, 1.6);
        f64::max(memory, rows as f64 * row / threads as f64) * 1e-3
    }

    /// Runs steps of so many rows, and says what the guest got: the share of the steps that lent, and of the threads'
    /// time in all.
    fn run(host: &mut Host, steps: impl IntoIterator<Item = usize>) -> (f64, f64) {
        let (mut lent, mut all, mut given, mut time) = (0.0, 0.0, 0.0, 0.0);
        for rows in steps {
            let threads = host.threads(rows);
            let seconds = takes(rows, threads);
            host.measured(rows, threads, seconds);
            let pause = host.pause(threads, seconds).unwrap_or_default().as_secs_f64();
            lent += f64::from(u8::from(threads < 2));
            all += 1.0;
            given += seconds * (2 - threads) as f64 + pause * 2.0;
            time += (seconds + pause) * 2.0;
        }
        (lent / all, given / time)
    }

    #[test]
    fn short_steps_lend_where_others_are_long() {
        let mut host = Host::new(2, 0.2);
        // A prompt now and then, and few who decode.
        let mixed = || (0..2000).map(|step| if step % 12 == 0 { 20 } else { 3 });
        run(&mut host, mixed());
        let (lent, share) = run(&mut host, mixed());
        assert!(lent > 0.8, "{lent}");
        assert!(share > 0.35, "{share}");
        assert_eq!(host.threads(20), 2, "what is long already is not made longer");
    }

    #[test]
    fn when_all_steps_are_alike_nobody_waits_longer_than_the_floor_asks_for() {
        for floor in [0.1, 0.2, 0.5] {
            let mut host = Host::new(2, floor);
            run(&mut host, [16; 2000]);
            let (lent, share) = run(&mut host, [16; 2000]);
            assert_eq!(lent, 0.0, "a step of sixteen rows would take twice as long");
            assert!((share - floor).abs() < 0.01, "{share} of {floor}");
        }
    }

    #[test]
    fn one_thread_is_shared_by_pauses() {
        let mut host = Host::new(1, 0.2);
        let mut paused = 0.0;
        for _ in 0..1000 {
            assert_eq!(host.threads(1), 1);
            host.measured(1, 1, 5e-3);
            paused += host.pause(1, 5e-3).unwrap_or_default().as_secs_f64();
        }
        assert!((paused / (paused + 5.0) - 0.2).abs() < 0.01, "{paused}");
    }

    #[test]
    fn a_floor_of_nothing_asks_for_no_pause_and_idle_time_counts() {
        let mut host = Host::new(2, 0.0);
        assert!((0..1000).all(|_| host.pause(2, 0.01).is_none()));
        let mut host = Host::new(2, 0.2);
        host.idle(10.0);
        let until = (0..1000).position(|_| host.pause(2, 0.01).is_some());
        assert!(until.is_some_and(|steps| steps > 40), "{until:?}");
    }

    #[test]
    fn a_guest_is_there_until_its_last_visit_ends() {
        let guest = Guest::default();
        let (first, second) = (guest.visit(), guest.clone().visit());
        drop(first);
        assert!(guest.is_there());
        drop(second);
        assert!(!guest.is_there());
    }
}
