//! Randomness without state: every draw is a function of the job's seed and of what it is for, so that neither other
//! jobs nor an interruption change it.

use kernels::Thinning;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

/// What a draw is for.
const ORDER: u64 = 1;
const WEIGHTS: u64 = 2;
const DROPOUT: u64 = 3;

/// One number out of several (the finaliser of splitmix64, Steele et al. 2014).
fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(0x9e37_79b9_7f4a_7c15, |state: u64, part| {
        let mut z = (state ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// The order of `count` examples in an epoch.
pub(crate) fn order(seed: u64, epoch: u32, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut StdRng::seed_from_u64(mix(&[seed, ORDER, u64::from(epoch)])));
    order
}

/// The stream of initial weights.
pub(crate) fn weights(seed: u64) -> StdRng {
    StdRng::seed_from_u64(mix(&[seed, WEIGHTS]))
}

/// The dropout of one step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropout {
    seed: u64,
    step: u32,
    /// Values drawn below it are dropped.
    threshold: u32,
    /// What is left is scaled up by this.
    kept: f32,
}

impl Dropout {
    /// `None` when nothing is dropped.
    pub(crate) fn new(seed: u64, step: u32, share: f64) -> Option<Self> {
        let threshold = (share * f64::from(u32::MAX)) as u32;
        (threshold > 0).then(|| Self { seed, step, threshold, kept: (1.0 / (1.0 - share)) as f32 })
    }

    /// What it does to a row: that at `position` of an example, at the site with index `site`.
    pub(crate) fn of_row(&self, site: usize, (example, position): (u32, u32)) -> Thinning {
        let key = mix(&[
            self.seed,
            DROPOUT,
            u64::from(self.step) << 32 | site as u64,
            u64::from(example) << 32 | u64::from(position),
        ]);
        Thinning { key, threshold: self.threshold, kept: self.kept }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use kernels::thin_out;

    use super::*;

    #[test]
    fn dropout_drops_its_share_and_differs_by_everything() {
        let mask = |seed, step, site, row| {
            let mut values = vec![0.0; 4096];
            let dropout = Dropout::new(seed, step, 0.25).unwrap();
            thin_out(dropout.of_row(site, row), &[1.0; 4096], &mut values, false);
            values
        };
        let first = mask(1, 2, 3, (4, 5));
        assert_eq!(first, mask(1, 2, 3, (4, 5)));
        let dropped = first.iter().filter(|v| **v == 0.0).count() as f64 / 4096.0;
        assert!((dropped - 0.25).abs() < 0.03, "{dropped}");
        assert!(first.iter().all(|&v| v == 0.0 || (v - 4.0 / 3.0).abs() < 1e-6));
        for other in [
            mask(0, 2, 3, (4, 5)),
            mask(1, 0, 3, (4, 5)),
            mask(1, 2, 0, (4, 5)),
            mask(1, 2, 3, (0, 5)),
            mask(1, 2, 3, (4, 0)),
        ] {
            let same = first.iter().zip(&other).filter(|(a, b)| **a == 0.0 && **b == 0.0).count() as f64;
            assert!((same / 4096.0 - 0.0625).abs() < 0.02, "masks are not independent: {same}");
        }
        // Added to what is there, it is the same mask.
        let mut sums = first.clone();
        thin_out(Dropout::new(1, 2, 0.25).unwrap().of_row(3, (4, 5)), &[1.0; 4096], &mut sums, true);
        assert!(sums.iter().zip(&first).all(|(sum, first)| *sum == 2.0 * first));
        assert!(Dropout::new(1, 2, 0.0).is_none());
    }
}
