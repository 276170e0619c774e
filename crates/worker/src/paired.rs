//! A paired test: whether one adapter's lead over another on the same items is more than chance.

/// Up to so many differences every assignment of signs is counted.
const EXACT: usize = 14;
/// Beyond it, so many are drawn.
const DRAWS: u32 = 20_000;

/// How likely a sum at least this large is if every difference might as well have had the other sign (Fisher's
/// randomisation test for pairs, one-sided). `differences` are positive where the new one is better.
///
/// It assumes nothing of the differences but that they are symmetric about 0 when there is no lead. Up to 14 pairs it
/// is exact, and its smallest value is 2^-n; beyond, 20,000 assignments are drawn, always the same. No pair, or one
/// that is not finite, gives 1.
#[must_use]
pub fn chance(differences: &[f64]) -> f64 {
    if differences.is_empty() || differences.iter().any(|difference| !difference.is_finite()) {
        return 1.0;
    }
    let seen: f64 = differences.iter().sum();
    // Sums in another order differ in their last bits.
    let slack = 1e-12 * differences.iter().map(|difference| difference.abs()).sum::<f64>();
    let at_least = |sign: &mut dyn FnMut(usize) -> bool| {
        let signed = differences.iter().enumerate().map(|(at, d)| if sign(at) { *d } else { -*d });
        signed.sum::<f64>() >= seen - slack
    };
    if differences.len() <= EXACT {
        let all = 1u32 << differences.len();
        let as_large = (0..all).filter(|signs| at_least(&mut |at| signs >> at & 1 == 1)).count();
        return as_large as f64 / f64::from(all);
    }
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut bit = |_| {
        // xorshift64 (Marsaglia 2003); its high bits are the better ones.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 63 == 1
    };
    let as_large = (0..DRAWS).filter(|_| at_least(&mut bit)).count();
    (as_large as f64 + 1.0) / f64::from(DRAWS + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_samples_are_exact() {
        assert_eq!(chance(&[1.0, 2.0, 3.0, 4.0, 5.0]), 1.0 / 32.0);
        assert_eq!(chance(&[0.5]), 0.5);
        // 1 + 2 - 3 = 0: of the eight sums, five are at least 0 (two of them are 0).
        assert_eq!(chance(&[1.0, 2.0, -3.0]), 5.0 / 8.0);
        assert_eq!(chance(&[0.0; 6]), 1.0);
        assert_eq!(chance(&[-1.0; 6]), 1.0);
        assert_eq!(chance(&[]), 1.0);
        assert_eq!(chance(&[1.0, f64::NAN, 1.0]), 1.0);
        assert_eq!(chance(&[1.0, f64::INFINITY]), 1.0);
    }

    #[test]
    fn drawn_and_exact_agree() {
        // 14 pairs exactly, and the same with pairs that decide nothing, drawn.
        let pairs = [1.0, -0.5, 2.0, 0.3, -1.0, 0.7, 0.2, 1.5, -0.1, 0.4, 0.9, -0.8, 0.6, 0.1];
        let exact = chance(&pairs);
        let drawn = chance(&[&pairs[..], &[0.0; 6]].concat());
        assert!((exact - drawn).abs() < 0.01, "{exact} {drawn}");
    }

    #[test]
    fn mere_chance_passes_no_more_often_than_the_level_says() {
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
        };
        let runs = 2_000;
        let passed =
            (0..runs).filter(|_| chance(&std::array::from_fn::<f64, 8, _>(|_| random())) <= 0.05).count();
        // 5 % of 2,000 is 100, with a standard deviation of 10.
        assert!((50..=150).contains(&passed), "{passed} of {runs}");
    }
}
