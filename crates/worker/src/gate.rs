//! The held-out comparison that decides whether a generation becomes head.

use train::Loss;
use types::GateReport;

/// The losses on the same held-out items, in the same order.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Items trained on.
    pub train_items: usize,
    /// Under the base alone.
    pub base: Vec<Loss>,
    /// Under the head, if there is one.
    pub head: Option<Vec<Loss>>,
    /// Under the new generation.
    pub new: Vec<Loss>,
}

/// Whether the new generation is better than the base and than the head, in bits per held-out answer token.
/// A loss that is not a number never wins.
#[must_use]
pub fn judge(measured: &Measured) -> (bool, GateReport) {
    let base_bits = Loss::bits_per_token(&measured.base);
    let head_bits = measured.head.as_deref().map(Loss::bits_per_token);
    let new_bits = Loss::bits_per_token(&measured.new);
    let better_than = |other: f64| new_bits < other;
    let against = |name: &str, other: f64| {
        let sign = if better_than(other) { "better than" } else { "not better than" };
        format!("{sign} the {name} ({other:.3})")
    };
    let publish = new_bits.is_finite() && better_than(base_bits) && head_bits.is_none_or(better_than);
    let mut verdict = format!("{new_bits:.3} bits per held-out token, {}", against("base", base_bits));
    if let Some(head_bits) = head_bits {
        verdict = format!("{verdict} and {}", against("current adapter", head_bits));
    }
    let report = GateReport {
        train_items: measured.train_items,
        heldout_items: measured.new.len(),
        heldout_tokens: measured.new.iter().map(|loss| loss.tokens).sum(),
        base_bits,
        head_bits,
        new_bits,
        p_base: None,
        p_head: None,
        verdict,
    };
    (publish, report)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(nats: &[f64]) -> Vec<Loss> {
        nats.iter().map(|&nats| Loss { nats, tokens: 2 }).collect()
    }

    #[test]
    fn only_what_is_better_than_base_and_head_is_published() {
        let publish = |base: &[f64], head: Option<&[f64]>, new: &[f64]| {
            let head = head.map(losses);
            judge(&Measured { train_items: 1, base: losses(base), head, new: losses(new) }).0
        };
        assert!(publish(&[4.0, 4.0], None, &[3.0, 4.0]));
        assert!(!publish(&[4.0, 4.0], None, &[4.0, 4.0]), "equal is not better");
        assert!(!publish(&[4.0, 4.0], None, &[f64::NAN, 1.0]));
        assert!(publish(&[4.0, 4.0], Some(&[3.0, 3.0]), &[2.0, 3.0]));
        assert!(!publish(&[4.0, 4.0], Some(&[2.0, 2.0]), &[2.0, 3.0]));
        assert!(!publish(&[4.0, 4.0], Some(&[9.0, 9.0]), &[5.0, 4.0]));
        assert!(!publish(&[], None, &[]), "nothing held out");
    }
}
