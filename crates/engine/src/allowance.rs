//! How much of the prompts a step takes in beside those who decode: as much as it has time for.
//!
//! Chunked prefill (Agrawal et al., Sarathi-Serve, 2024) bounds the tokens of a step by what was profiled on the machine
//! beforehand. Here it is measured as the steps go: what a step takes without prompts, for each number of sequences that
//! decode, and what a prompt's token adds. Where steps wait for memory a few rows more cost next to nothing, and prompts
//! go in large pieces; where they are bound by arithmetic, each row costs its share, and the pieces are small.

use crate::buckets::{BUCKETS, bucket};

/// By how much prompts may lengthen a step, as a share of what it takes without: few then take half as long again.
const STRETCH: f64 = 0.4;
/// A step takes in at most so many tokens of prompts for each sequence that decodes, however little they seem to cost.
const MOST: f64 = 2.0;
/// What a step takes without prompts is known for so many steps with some.
const FRESH: u64 = 64;
/// Between two steps that leave prompts out only to learn that, there are at least so many with some.
const APART: u64 = 16;
/// What a new measurement counts beside the earlier ones.
const WEIGHT: f64 = 0.125;
/// The same where the earlier ones are old, or too long: what disturbs a step makes it longer.
const QUICK: f64 = 0.5;
/// A step that took more than so many times as long as expected was disturbed by something else.
const DISTURBED: f64 = 1.25;

/// What steps without prompts take.
#[derive(Debug, Clone, Copy)]
struct Quiet {
    seconds: f64,
    /// When it was measured last, in steps with prompts.
    at: u64,
}

/// A rule on step times, without clock.
#[derive(Debug)]
pub(crate) struct Allowance {
    /// By sequences that decode.
    quiet: [Option<Quiet>; BUCKETS],
    /// Seconds that a prompt's token adds if it looks back on nothing.
    price: Option<f64>,
    /// Steps with prompts beside sequences that decode.
    steps: u64,
    /// How many of them there were when a step without was measured last.
    rested: u64,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { quiet: [None; BUCKETS], price: None, steps: 0, rested: 0 }
    }
}

impl Allowance {
    /// Tokens of prompts, in those that look back on nothing, that a step has time for beside so many who decode: at
    /// least one, and half as many as decode where nothing has been measured.
    pub(crate) fn tokens(&self, decoding: usize) -> f64 {
        let quiet = self.quiet[bucket(decoding)];
        let measured = quiet.zip(self.price).map(|(quiet, price)| STRETCH * quiet.seconds / price);
        measured.unwrap_or(decoding as f64 / 2.0).clamp(1.0, Self::most(decoding))
    }

    /// The most that [`Self::tokens`] can become.
    pub(crate) fn most(decoding: usize) -> f64 {
        MOST * decoding.max(1) as f64
    }

    /// Whether the next step is to take in no prompts, because it is no longer known what it takes without.
    pub(crate) fn rests(&self, decoding: usize) -> bool {
        let known = self.quiet[bucket(decoding)].is_some_and(|quiet| self.steps - quiet.at <= FRESH);
        !known && self.steps - self.rested >= APART
    }

    /// A step took so many seconds in which so many decoded, and the prompts' tokens cost as much as so many that look back
    /// on nothing.
    pub(crate) fn measured(&mut self, decoding: usize, prompts: f64, seconds: f64) {
        if decoding == 0 {
            return;
        }
        if prompts > 0.0 {
            self.steps += 1;
            return self.learn_price(decoding, prompts, seconds);
        }
        self.rested = self.steps;
        let at = self.steps;
        let quiet = self.quiet[bucket(decoding)].get_or_insert(Quiet { seconds, at });
        let old = at - quiet.at > FRESH;
        let weight = if old || seconds < quiet.seconds { QUICK } else { WEIGHT };
        quiet.seconds += weight * (seconds.min(DISTURBED * quiet.seconds) - quiet.seconds);
        quiet.at = at;
    }

    fn learn_price(&mut self, decoding: usize, prompts: f64, seconds: f64) {
        let most = Self::most(decoding);
        // What a row of a large piece costs says nothing of those of small ones.
        let Some(quiet) = self.quiet[bucket(decoding)].filter(|_| prompts <= most) else { return };
        let least = STRETCH * quiet.seconds / most;
        let price = ((seconds - quiet.seconds) / prompts).max(least);
        let old = *self.price.get_or_insert(price);
        self.price = Some(old + WEIGHT * (price.min(2.0 * old.max(least)) - old));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine on which a step takes so long for each row beyond its first, which takes 4 ms.
    struct Machine {
        row: f64,
        /// Each so many-th step takes twice as long.
        disturbed: usize,
    }

    impl Machine {
        fn takes(&self, rows: f64, step: usize) -> f64 {
            let times = if step.is_multiple_of(self.disturbed) { 2.0 } else { 1.0 };
            times * (4e-3 + self.row * (rows - 1.0))
        }

        /// The allowance after so many quiet steps and so many beside prompts that use all the time there is; also how many of
        /// those took in nothing.
        fn run(&self, allowance: &mut Allowance, decoding: usize, quiet: usize, mixed: usize) -> usize {
            let rows = decoding as f64;
            (1..=quiet).for_each(|step| allowance.measured(decoding, 0.0, self.takes(rows, step)));
            let mut rests = 0;
            for step in 1..=mixed {
                let tokens = if allowance.rests(decoding) { 0.0 } else { allowance.tokens(decoding).floor() };
                rests += usize::from(tokens == 0.0);
                allowance.measured(decoding, tokens, self.takes(rows + tokens, step));
            }
            rests
        }
    }

    const CALM: usize = usize::MAX;

    #[test]
    fn a_step_takes_in_what_it_has_time_for() {
        // By what a row takes, in microseconds: dear rows, as where arithmetic is the bound; some; cheap ones.
        for (row, tokens) in [(550.0, 5.7), (1000.0, 4.4), (200.0, 10.8), (10.0, 16.0), (0.0, 16.0)] {
            let machine = Machine { row: row * 1e-6, disturbed: CALM };
            let mut allowance = Allowance::default();
            machine.run(&mut allowance, 8, 100, 200);
            assert!((allowance.tokens(8) - tokens).abs() < 0.1, "{row}: {}", allowance.tokens(8));
            let stretch = machine.takes(8.0 + allowance.tokens(8).floor(), 1) / machine.takes(8.0, 1);
            assert!(stretch < 1.0 + STRETCH + 1e-6, "{row}: {stretch}");
        }
    }

    #[test]
    fn what_disturbs_some_steps_changes_little() {
        let machine = Machine { row: 550e-6, disturbed: 20 };
        let mut allowance = Allowance::default();
        for _ in 0..20 {
            machine.run(&mut allowance, 8, 10, 200);
            assert!((3.5..7.0).contains(&allowance.tokens(8)), "{}", allowance.tokens(8));
        }
        // Negative control: disturbances that are not told apart from what prompts cost.
        let mut naive = Allowance::default();
        machine.run(&mut naive, 8, 10, 200);
        naive.price = Some(naive.price.expect("a price") + WEIGHT * machine.takes(8.0, 20));
        assert!(naive.tokens(8) < 3.5, "{}", naive.tokens(8));
    }

    #[test]
    fn a_machine_that_becomes_slower_is_followed() {
        let mut allowance = Allowance::default();
        Machine { row: 20e-6, disturbed: CALM }.run(&mut allowance, 8, 100, 200);
        assert_eq!(allowance.tokens(8), 16.0);
        Machine { row: 1e-3, disturbed: CALM }.run(&mut allowance, 8, 100, 200);
        assert!((allowance.tokens(8) - 4.4).abs() < 0.1, "{}", allowance.tokens(8));
        // Also where prompts leave no step without them but those that are left out on purpose.
        Machine { row: 20e-6, disturbed: CALM }.run(&mut allowance, 8, 0, 2000);
        assert!(allowance.tokens(8) > 12.0, "{}", allowance.tokens(8));
    }

    #[test]
    fn nothing_is_known_at_first_and_little_is_left_out_to_learn_it() {
        let mut allowance = Allowance::default();
        assert_eq!((allowance.tokens(8), allowance.tokens(1), allowance.rests(8)), (4.0, 1.0, false));
        let machine = Machine { row: 550e-6, disturbed: CALM };
        let rests = machine.run(&mut allowance, 8, 0, 1300);
        assert!((19..=21).contains(&rests), "one in sixty-five: {rests}");
        assert!((allowance.tokens(8) - 5.7).abs() < 0.3, "{}", allowance.tokens(8));
        // However many different numbers decode.
        let mut allowance = Allowance::default();
        let rests: usize = (0..1600).map(|step| machine.run(&mut allowance, 1 + step % 40, 0, 1)).sum();
        assert!(rests <= 1600 / APART as usize, "{rests}");
    }

    #[test]
    fn large_pieces_say_nothing_of_small_ones() {
        let mut allowance = Allowance::default();
        Machine { row: 550e-6, disturbed: CALM }.run(&mut allowance, 8, 100, 200);
        let before = allowance.tokens(8);
        (0..100).for_each(|_| allowance.measured(8, 64.0, 9e-3));
        assert_eq!(allowance.tokens(8), before);
    }

    #[test]
    fn steps_in_which_nobody_decodes_count_for_nothing() {
        let mut allowance = Allowance::default();
        (0..100).for_each(|_| allowance.measured(0, 256.0, 0.1));
        assert!(allowance.steps == 0 && allowance.price.is_none());
    }
}
