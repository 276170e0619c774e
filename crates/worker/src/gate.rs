//! The held-out comparison that decides whether a generation becomes head.

use train::Loss;
use types::GateReport;

use crate::paired::chance;
use crate::settings::GateRules;

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

/// What the gate says.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// Whether the new generation becomes head.
    pub publish: bool,
    /// The comparison; absent if a loss is no number.
    pub report: Option<GateReport>,
    /// Why, for people.
    pub reason: String,
}

impl Judgement {
    /// The head stays, without a comparison.
    pub(crate) fn no(reason: impl Into<String>) -> Self {
        Self { publish: false, report: None, reason: reason.into() }
    }
}

/// Whether the new generation is better than the base and than the head, by more than a trifle, by a paired test over the
/// held-out items of the loss of whole answers. A loss that is not a number never wins, nor does a lead that too few
/// items show.
#[must_use]
pub fn judge(measured: &Measured, rules: &GateRules) -> Judgement {
    let Measured { train_items, base, head, new } = measured;
    if new.is_empty() {
        return Judgement::no("no held-out item has an answer to judge by");
    }
    let bits = Loss::bits_per_token;
    let (base_bits, head_bits, new_bits) = (bits(base), head.as_deref().map(bits), bits(new));
    if ![base_bits, head_bits.unwrap_or(0.0), new_bits].iter().all(|bits| bits.is_finite()) {
        return Judgement::no("the loss on held-out items is not a finite number");
    }
    let versus = |other: &[Loss]| {
        let goal = |other: &Loss| other.nats * (1.0 - rules.min_gain);
        let differences: Vec<f64> =
            other.iter().zip(new).map(|(other, new)| goal(other) - new.nats).collect();
        // Different items cannot be compared.
        if other.len() == new.len() { chance(&differences) } else { 1.0 }
    };
    let (p_base, p_head) = (versus(base), head.as_deref().map(versus));
    let publish = p_base <= rules.level && p_head.is_none_or(|p| p <= rules.level);
    let against = |name: &str, other: f64, p: f64| match (new_bits < other, p <= rules.level) {
        (true, false) if new_bits > other * (1.0 - rules.min_gain) => {
            format!("hardly ahead of the {name} ({other:.3})")
        }
        (true, true) => format!("better than the {name} ({other:.3}, p {p:.2e})"),
        (true, false) => format!("ahead of the {name} ({other:.3}), but that may be chance (p {p:.3})"),
        (false, _) => format!("not better than the {name} ({other:.3})"),
    };
    let mut reason = format!("{new_bits:.3} bits per held-out token, {}", against("base", base_bits, p_base));
    if let Some((bits, p)) = head_bits.zip(p_head) {
        reason = format!("{reason} and {}", against("current adapter", bits, p));
    }
    if 0.5f64.powi(i32::try_from(new.len()).unwrap_or(i32::MAX)) > rules.level {
        reason =
            format!("{reason}; {} held-out items are too few to tell: more history is needed", new.len());
    }
    let report = GateReport {
        train_items: *train_items,
        heldout_items: new.len(),
        heldout_tokens: new.iter().map(|loss| loss.tokens).sum(),
        base_bits,
        head_bits,
        new_bits,
        p_base: Some(p_base),
        p_head,
        verdict: reason.clone(),
    };
    Judgement { publish, report: Some(report), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: GateRules = GateRules { level: 0.05, min_gain: 0.005, max_norm: 10.0 };

    fn losses(nats: &[f64]) -> Vec<Loss> {
        nats.iter().map(|&nats| Loss { nats, tokens: 2 }).collect()
    }

    fn judged(base: &[f64], head: Option<&[f64]>, new: &[f64]) -> Judgement {
        judge(
            &Measured { train_items: 1, base: losses(base), head: head.map(losses), new: losses(new) },
            &RULES,
        )
    }

    #[test]
    fn only_what_is_surely_better_than_base_and_head_is_published() {
        let publish = |base: &[f64], head: Option<&[f64]>, new: &[f64]| judged(base, head, new).publish;
        let (four, three) = ([4.0; 6], [3.0; 6]);
        assert!(publish(&four, None, &three));
        assert!(!publish(&four, None, &four), "equal is not better");
        assert!(!publish(&four, None, &[3.99; 6]), "a trifle");
        assert!(publish(&four, None, &[3.97; 6]));
        assert!(!publish(&four, None, &[f64::NAN, 1.0, 1.0, 1.0, 1.0, 1.0]));
        assert!(!publish(&four, None, &[f64::INFINITY, 1.0, 1.0, 1.0, 1.0, 1.0]));
        assert!(publish(&four, Some(&three), &[2.0; 6]));
        assert!(!publish(&four, Some(&[2.0; 6]), &three));
        assert!(!publish(&four, Some(&[9.0; 6]), &[5.0; 6]), "better than the head, but not than the base");
        assert!(!publish(&four, Some(&four[..3]), &three), "different items");
        assert!(!publish(&[], None, &[]), "nothing held out");
        assert!(!publish(&four, None, &[0.0, 0.0, 4.1, 4.1, 4.1, 4.1]), "two of six");
    }

    #[test]
    fn the_reason_is_said() {
        let says =
            |judged: &Judgement, words: &str| assert!(judged.reason.contains(words), "{}", judged.reason);
        says(&judged(&[4.0; 4], None, &[1.0; 4]), "4 held-out items are too few to tell");
        says(&judged(&[4.0; 6], Some(&[2.0; 6]), &[3.0; 6]), "not better than the current adapter");
        says(&judged(&[4.0; 6], None, &[0.0, 0.0, 4.1, 4.1, 4.1, 4.1]), "may be chance");
        says(&judged(&[4.0; 6], None, &[3.99; 6]), "hardly ahead of the base");
        says(&judged(&[4.0; 6], None, &[f64::NAN; 6]), "not a finite number");
        assert!(judged(&[4.0; 6], None, &[f64::NAN; 6]).report.is_none());
    }
}
