//! A guest beside the engine: work of low priority, as training is, that is lent threads and given pauses while
//! requests run.
//!
//! A step with few rows waits for memory more than for arithmetic: half of the threads do it in less than twice the time.
//! The engine measures in how much, and while a guest is there it leaves half of the threads' cores to it in every step
//! that then takes not much longer than the longest steps of late would take if nothing were given: whoever is served
//! gets most tokens later, but hardly waits longer for any than before. The longest steps are those that take in prompts;
//! they are not made longer, while the others may take up to [`STRETCH`] times as long. Where that is less than the floor,
//! the engine pauses between steps. It pauses for nothing else: a pause gives all cores for about a millisecond, too short
//! for a guest to spread its work, and who arrives within it meets a longer step after it.
//!
//! What is given makes more requests run at once, and those make steps longer: a rule that took that for the measure
//! would give ever more, the less there is. So steps count with the rows that they would have had (`Host::undelayed`).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::buckets::{BUCKETS, bucket, fewest};

/// The longest steps of late: this share of all tokens came of shorter ones.
const LONGEST: f64 = 0.99;
/// The last so many tokens are those of late.
const LATE: f64 = 2000.0;
/// What lending costs a step, where it has never been measured.
const GUESS: f64 = 1.6;
/// Of the steps that could lend, one in so many does not, so that what they take on all threads stays known; and of
/// those that would take too long, one in so many lends.
const MEASURE: u32 = 32;
/// What a new measurement counts beside the earlier ones.
const WEIGHT: f64 = 0.125;
/// The same for the rows of a step and the time from step to step.
const SLOW: f64 = 1.0 / 64.0;
/// How much longer than the longest steps of late one that takes in no prompt may take by lending.
const STRETCH: f64 = 1.5;
/// A shorter pause is of no use.
const LEAST_PAUSE: f64 = 1e-3;
/// Seconds of all threads that are remembered as given too much or too little: in dense moments the floor can be put off.
const MEMORY: f64 = 2.0;

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
    /// Tokens of late that would have come of such steps if nothing had been given.
    tokens: f64,
}

/// What a step does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    /// Of prompts and answers.
    pub(crate) all: usize,
    /// Of them, those that give a token.
    pub(crate) tokens: usize,
}

impl Rows {
    /// Whether there are some of prompts.
    fn take_in_prompts(self) -> bool {
        self.all > self.tokens
    }
}

/// What the guest is given: a rule on step times, without clock or threads.
#[derive(Debug)]
pub(crate) struct Host {
    threads: usize,
    floor: f64,
    times: [Times; BUCKETS],
    /// Seconds that the longest steps of late would take if nothing had been given.
    longest: f64,
    /// What lending costs a step.
    cost: f64,
    /// Rows of a step, and seconds from step to step.
    rows: f64,
    between: f64,
    /// Seconds of a thread that the guest has not had of the floor.
    due: f64,
}

impl Host {
    /// `floor` is the share of the threads' time, from 0 to 0.9, that a guest gets while requests run.
    pub(crate) fn new(threads: usize, floor: f64) -> Self {
        let floor = floor.clamp(0.0, 0.9);
        let times = [Times::default(); BUCKETS];
        let (longest, rows, between) = (0.0, 0.0, 0.0);
        Self { threads, floor, times, longest, cost: GUESS, rows, between, due: 0.0 }
    }

    fn of(&mut self, rows: usize) -> &mut Times {
        &mut self.times[bucket(rows)]
    }

    /// Seconds that a step of so many rows takes if it lends; `None` if what it takes on all threads is unknown.
    fn lending(&self, rows: usize) -> Option<f64> {
        let times = &self.times[bucket(rows)];
        times.all.map(|all| times.lending.unwrap_or(all * self.cost))
    }

    /// Seconds that a step of so many rows takes on all threads: on the line between the next that are known.
    fn alone(&self, rows: f64) -> Option<f64> {
        let split = bucket(rows as usize) + 1;
        let known = |(at, times): (usize, &Times)| Some((fewest(at) as f64, times.all?));
        let mut times = self.times.iter().enumerate();
        let below = times.by_ref().take(split).filter_map(known).last();
        let above = times.find_map(known);
        match (below, above) {
            (Some((few, short)), Some((many, long))) => {
                Some(short + (long - short) * (rows - few) / (many - few))
            }
            (below, above) => below.or(above).map(|(_, seconds)| seconds),
        }
    }

    /// How many rows a step would have if nothing had been given, as a share of those that it has: who waits longer for
    /// tokens meets more others, in proportion, and more of them arrive from step to step.
    fn undelayed(&self) -> f64 {
        let mut share = 1.0;
        for _ in 0..8 {
            share = self.alone(self.rows * share).map_or(1.0, |alone| (alone / self.between).min(1.0));
        }
        share
    }

    /// Seconds that the longest steps of late would take if nothing had been given.
    fn longest(&self) -> Option<f64> {
        let all: f64 = self.times.iter().map(|times| times.tokens).sum();
        let mut longer = 0.0;
        let at = self.times.iter().rposition(|times| {
            longer += times.tokens;
            longer > all * (1.0 - LONGEST)
        });
        self.alone(fewest(at?) as f64)
    }

    /// Threads that a step runs on while a guest is there.
    pub(crate) fn threads(&mut self, rows: Rows) -> usize {
        let most = self.longest * if rows.take_in_prompts() { 1.0 } else { STRETCH };
        let cost = self.cost;
        let lending = self.lending(rows.all);
        let times = self.of(rows.all);
        times.steps = times.steps.wrapping_add(1);
        let measure = times.steps.is_multiple_of(MEASURE);
        let may_measure = measure && times.all.is_some_and(|all| all * cost <= most);
        let lends = lending.is_some_and(|lending| if lending <= most { !measure } else { may_measure });
        if lends { self.threads.div_ceil(2) } else { self.threads }
    }

    /// A step on so many threads took so many seconds.
    pub(crate) fn measured(&mut self, rows: Rows, threads: usize, seconds: f64) {
        let lent = threads < self.threads;
        let times = self.of(rows.all);
        let mean = if lent { &mut times.lending } else { &mut times.all };
        *mean = Some(mean.map_or(seconds, |mean| mean + WEIGHT * (seconds - mean)));
        if let (Some(all), Some(lending)) = (times.all, times.lending) {
            self.cost += WEIGHT * (lending / all - self.cost);
        }
        self.rows += SLOW * (rows.all as f64 - self.rows);
        self.between += SLOW * (seconds - self.between);
        // A step of fewer rows counts, if what was given has made them more.
        let fewer = (rows.all as f64 * self.undelayed()) as usize;
        let kept = (-(rows.tokens as f64) / LATE).exp();
        self.times.iter_mut().for_each(|times| times.tokens *= kept);
        self.of(fewer).tokens += rows.tokens as f64;
        self.longest = self.longest().unwrap_or(seconds);
    }

    /// The pause that is due after a step on so many threads that took so many seconds.
    pub(crate) fn pause(&mut self, threads: usize, seconds: f64) -> Option<Duration> {
        let lent = (self.threads - threads) as f64;
        self.give(lent * seconds, seconds);
        // Half of what is remembered is for what comes in between.
        let is_due = self.due >= MEMORY * self.threads as f64 / 2.0;
        let pause = LEAST_PAUSE.max(2.0 * seconds * self.floor / (1.0 - self.floor));
        is_due.then(|| Duration::from_secs_f64(pause))
    }

    /// A pause of so many seconds was taken.
    pub(crate) fn paused(&mut self, seconds: f64) {
        self.give(self.threads as f64 * seconds, seconds);
        self.between += SLOW * seconds;
    }

    /// The engine had nothing to do for so many seconds.
    pub(crate) fn idle(&mut self, seconds: f64) {
        // Time without requests asks for nothing, and counts in full.
        self.give(self.threads as f64 * seconds, 0.0);
    }

    /// The guest had so many seconds of a thread within so many of all of them.
    fn give(&mut self, lent: f64, seconds: f64) {
        let all = self.threads as f64;
        let most = MEMORY * all;
        self.due = (self.due + all * seconds * self.floor - lent).clamp(-most, most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a guest costs by being there: it leaves its own in the caches.
    const TRACES: f64 = 1.1;

    /// Seconds of a step on all of two threads, without and with a guest, or on one: as measured with the default model.
    fn takes(rows: usize, threads: usize, guest: bool) -> f64 {
        let slower = match (threads, guest) {
            (1, _) => 1.5,
            (_, true) => TRACES,
            (_, false) => 1.0,
        };
        (7.0 + rows as f64) * 1e-3 * slower
    }

    /// What the guest got, and what it cost.
    #[derive(Default)]
    struct Given {
        lent: f64,
        steps: f64,
        /// Seconds of a thread.
        guest: f64,
        /// Seconds of all threads.
        time: f64,
        /// When the last step ended.
        end: f64,
        /// Seconds from token to token, sorted.
        gaps: Vec<f64>,
    }

    impl Given {
        fn share(&self) -> f64 {
            self.guest / (2.0 * self.time)
        }

        fn p99(&self) -> f64 {
            self.gaps[self.gaps.len() * 99 / 100]
        }

        /// One step.
        fn step(&mut self, host: &mut Host, rows: Rows, visit: bool, arrival: f64) {
            let threads = if visit { host.threads(rows) } else { 2 };
            let seconds = takes(rows.all, threads, visit);
            host.measured(rows, threads, seconds);
            let pause = if visit { host.pause(threads, seconds) } else { None };
            let pause = pause.unwrap_or_default().as_secs_f64();
            self.lent += f64::from(u8::from(threads < 2));
            self.steps += 1.0;
            self.time += seconds;
            self.end = self.time;
            // Who arrives ends the pause.
            let pause = pause.min((arrival - self.time).max(0.0));
            host.paused(pause);
            self.guest += seconds * (2 - threads) as f64 + pause * 2.0;
            self.time += pause;
        }
    }

    /// A guest beside steps of so many rows, of which three at most give a token.
    fn run(host: &mut Host, steps: impl IntoIterator<Item = usize>) -> Given {
        let mut given = Given::default();
        steps
            .into_iter()
            .for_each(|all| given.step(host, Rows { all, tokens: all.min(3) }, true, f64::INFINITY));
        given
    }

    /// Requests that come at random, `rate` a second, with prompts of 8 tokens and answers of 48.
    fn serve(host: &mut Host, rate: f64, visit: bool) -> Given {
        let (mut given, mut random) = (Given::default(), 1u64);
        let mut wait = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            -(((random >> 11) as f64 + 1.0) / (1u64 << 53) as f64).ln() / rate
        };
        // Tokens to go, and when the last one came.
        let (mut running, mut arrival): (Vec<(u32, f64)>, f64) = (Vec::new(), wait());
        while given.time < 300.0 {
            if running.is_empty() && given.time < arrival {
                host.idle(arrival - given.time);
                given.guest += 2.0 * (arrival - given.time);
                given.time = arrival;
            }
            let old = running.len();
            while arrival <= given.time {
                running.push((48, f64::NAN));
                arrival += wait();
            }
            let rows = Rows { all: old + 8 * (running.len() - old), tokens: running.len() };
            given.step(host, rows, visit, arrival);
            let end = given.end;
            for (left, last) in &mut running {
                if !last.is_nan() {
                    given.gaps.push(end - *last);
                }
                *left -= 1;
                *last = end;
            }
            running.retain(|(left, _)| *left > 0);
        }
        given.gaps.sort_by(f64::total_cmp);
        given
    }

    #[test]
    fn at_half_load_training_has_near_half_and_nobody_waits_much_longer() {
        for rate in [3.5, 4.5] {
            let quiet = serve(&mut Host::new(2, 0.2), rate, false);
            let shared = serve(&mut Host::new(2, 0.2), rate, true);
            let ratio = shared.p99() / quiet.p99();
            assert!(ratio < 1.4, "{rate}: {ratio}");
            assert!(shared.share() > 0.45, "{rate}: {}", shared.share());
            // Negative control: a guest who is given more than that costs more.
            let greedy = serve(&mut Host::new(2, 0.6), rate, true).p99() / quiet.p99();
            assert!(greedy > 1.5, "{rate}: {greedy}");
        }
    }

    #[test]
    fn near_the_limit_requests_do_not_pile_up_by_what_is_given() {
        // The last is near the limit with a guest who is given nothing, as what it leaves in the caches slows all steps.
        for (rate, most) in [(7.0, 1.6), (9.0, 1.7), (12.0, 2.1)] {
            let quiet = serve(&mut Host::new(2, 0.05), rate, false);
            let shared = serve(&mut Host::new(2, 0.05), rate, true);
            let ratio = shared.p99() / quiet.p99();
            assert!(ratio < most, "{rate}: {ratio}");
            assert!(shared.share() > 0.05, "{rate}: the floor is kept: {}", shared.share());
            let tokens = shared.gaps.len() as f64 / quiet.gaps.len() as f64;
            assert!(tokens > 0.99, "{rate}: all are served: {tokens}");
        }
    }

    #[test]
    fn short_steps_lend_where_others_are_long() {
        let mut host = Host::new(2, 0.2);
        // A prompt now and then, and few who decode.
        let mixed = || (0..2000).map(|step| if step % 12 == 0 { 20 } else { 3 });
        run(&mut host, mixed());
        let given = run(&mut host, mixed());
        assert!(given.lent / given.steps > 0.8, "{}", given.lent / given.steps);
        assert!(given.share() > 0.4, "{}", given.share());
        assert_eq!(host.threads(Rows { all: 20, tokens: 3 }), 2, "what is long already is not made longer");
    }

    #[test]
    fn when_all_steps_are_alike_nobody_waits_longer_than_the_floor_asks_for() {
        for floor in [0.1, 0.2, 0.5] {
            let mut host = Host::new(2, floor);
            run(&mut host, [16; 2000]);
            let given = run(&mut host, [16; 2000]);
            assert_eq!(given.lent, 0.0, "a step of sixteen rows would take half as long again");
            assert!((given.share() - floor).abs() < 0.01, "{} of {floor}", given.share());
        }
    }

    /// Seconds of pauses beside so many steps of a row and of so many seconds on one thread, after as many for which what is
    /// due may be put off.
    fn pauses(host: &mut Host, steps: usize, seconds: f64) -> f64 {
        let row = Rows { all: 1, tokens: 1 };
        let pauses = (0..2 * steps).map(|_| {
            assert_eq!(host.threads(row), 1);
            host.measured(row, 1, seconds);
            let pause = host.pause(1, seconds).unwrap_or_default().as_secs_f64();
            host.paused(pause);
            pause
        });
        pauses.skip(steps).sum()
    }

    #[test]
    fn one_thread_is_shared_by_pauses() {
        let paused = pauses(&mut Host::new(1, 0.2), 3000, 5e-3);
        assert!((paused / (paused + 15.0) - 0.2).abs() < 0.02, "{paused}");
    }

    #[test]
    fn the_floor_is_kept_beside_steps_so_short_that_their_share_is_less_than_the_least_pause() {
        let paused = pauses(&mut Host::new(1, 0.1), 20_000, 1e-3);
        assert!((paused / (paused + 20.0) - 0.1).abs() < 0.01, "{paused}");
    }

    #[test]
    fn a_floor_of_nothing_asks_for_no_pause_that_is_felt_and_idle_time_counts() {
        let row = Rows { all: 1, tokens: 1 };
        let step = |host: &mut Host| {
            host.measured(row, 2, 0.01);
            let pause = host.pause(2, 0.01).unwrap_or_default().as_secs_f64();
            host.paused(pause);
            pause
        };
        let mut host = Host::new(2, 0.0);
        assert!((0..1000).all(|_| 0.01 + step(&mut host) < 0.01 * 1.02));
        let mut host = Host::new(2, 0.2);
        host.idle(10.0);
        let until = (0..3000).position(|_| 0.01 + step(&mut host) > 0.01 * 1.02);
        assert!(until.is_some_and(|steps| steps > 1000), "{until:?}");
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
