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
    pub head: Option<HeadMeasured>,
    /// Under the new generation.
    pub new: Vec<Loss>,
}

/// How the head does, and how fair that is.
#[derive(Debug, Clone)]
pub struct HeadMeasured {
    /// Its losses.
    pub losses: Vec<Loss>,
    /// Which of the items it has learnt, or may have.
    pub learnt: Vec<bool>,
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
///
/// What is held out now the head may have learnt once (items that came late with an early time push others out of the
/// newest slice). It is compared on those it has not learnt, if they are enough to tell; otherwise on all, where what it
/// knows is in its favour: it stays rather than go for a lead that is none.
#[must_use]
pub fn judge(measured: &Measured, rules: &GateRules) -> Judgement {
    let Measured { train_items, base, head, new } = measured;
    if new.is_empty() {
        return Judgement::no("no held-out item has an answer to judge by");
    }
    let of_head = head.iter().flat_map(|head| [head.losses.len(), head.learnt.len()]);
    if of_head.chain([base.len()]).any(|len| len != new.len()) {
        return Judgement::no("the losses are not those of the same held-out items");
    }
    let bits = Loss::bits_per_token;
    let head_bits = head.as_ref().map(|head| bits(&head.losses));
    let (base_bits, new_bits) = (bits(base), bits(new));
    if ![base_bits, head_bits.unwrap_or(0.0), new_bits].iter().all(|bits| bits.is_finite()) {
        return Judgement::no("the loss on held-out items is not a finite number");
    }
    let over_base = Duel::new("base", base.clone(), new.clone(), rules);
    let over_head = head.as_ref().map(|head| against_head(head, new, rules));
    let publish = over_base.is_won(rules) && over_head.as_ref().is_none_or(|duel| duel.is_won(rules));
    let mut reason = format!("{new_bits:.3} bits per held-out token, {}", over_base.describe(rules));
    if let Some(duel) = &over_head {
        reason = format!("{reason} and {}", duel.describe(rules));
        if duel.new.len() < new.len() {
            reason = format!("{reason}, on the {} items that it has not learnt", duel.new.len());
        }
    }
    if !can_tell(new.len(), rules) {
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
        p_base: Some(over_base.p),
        p_head: over_head.as_ref().map(|duel| duel.p),
        head_items: over_head.as_ref().map(|duel| duel.new.len()),
        verdict: reason.clone(),
    };
    Judgement { publish, report: Some(report), reason }
}

/// Whether so many items can show any lead at the rules' level.
fn can_tell(items: usize, rules: &GateRules) -> bool {
    0.5f64.powi(i32::try_from(items).unwrap_or(i32::MAX)) <= rules.level
}

/// The comparison with the head, on items that are as new to it, if they can tell.
fn against_head(head: &HeadMeasured, new: &[Loss], rules: &GateRules) -> Duel {
    let fresh = |losses: &[Loss]| -> Vec<Loss> {
        losses.iter().zip(&head.learnt).filter(|(_, learnt)| !**learnt).map(|(loss, _)| *loss).collect()
    };
    let (fresh_head, fresh_new) = (fresh(&head.losses), fresh(new));
    match can_tell(fresh_new.len(), rules) {
        true => Duel::new("current adapter", fresh_head, fresh_new, rules),
        false => Duel::new("current adapter", head.losses.clone(), new.to_vec(), rules),
    }
}

/// The new generation beside another on the same items.
struct Duel {
    name: &'static str,
    other: Vec<Loss>,
    new: Vec<Loss>,
    /// How likely such a lead is by chance.
    p: f64,
}

impl Duel {
    fn new(name: &'static str, other: Vec<Loss>, new: Vec<Loss>, rules: &GateRules) -> Self {
        let goal = |other: &Loss| other.nats * (1.0 - rules.min_gain);
        let differences: Vec<f64> =
            other.iter().zip(&new).map(|(other, new)| goal(other) - new.nats).collect();
        Self { name, other, new, p: chance(&differences) }
    }

    fn is_won(&self, rules: &GateRules) -> bool {
        self.p <= rules.level
    }

    fn describe(&self, rules: &GateRules) -> String {
        let Self { name, p, .. } = self;
        let (other, new) = (Loss::bits_per_token(&self.other), Loss::bits_per_token(&self.new));
        match (new < other, self.is_won(rules)) {
            (true, false) if new > other * (1.0 - rules.min_gain) => {
                format!("hardly ahead of the {name} ({other:.3})")
            }
            (true, true) => format!("better than the {name} ({other:.3}, p {p:.2e})"),
            (true, false) => format!("ahead of the {name} ({other:.3}), but that may be chance (p {p:.3})"),
            (false, _) => format!("not better than the {name} ({other:.3})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: GateRules = GateRules { level: 0.05, min_gain: 0.005, max_norm: 10.0 };

    fn losses(nats: &[f64]) -> Vec<Loss> {
        nats.iter().map(|&nats| Loss { nats, tokens: 2 }).collect()
    }

    fn judged(base: &[f64], head: Option<&[f64]>, new: &[f64]) -> Judgement {
        judged_knowing(base, head.map(|head| (head, vec![false; head.len()])), new)
    }

    fn judged_knowing(base: &[f64], head: Option<(&[f64], Vec<bool>)>, new: &[f64]) -> Judgement {
        let head = head.map(|(head, learnt)| HeadMeasured { losses: losses(head), learnt });
        judge(&Measured { train_items: 1, base: losses(base), head, new: losses(new) }, &RULES)
    }

    /// A head that knows four of ten held-out items by heart, and is worse on the others.
    #[test]
    fn what_the_head_has_learnt_does_not_speak_for_it() {
        let head = [0.1, 0.1, 0.1, 0.1, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0];
        let known = |count: usize| (0..10).map(|at| at < count).collect::<Vec<_>>();
        let judged = |count, new: &[f64]| judged_knowing(&[4.0; 10], Some((&head, known(count))), new);
        let fair = judged(4, &[2.0; 10]);
        assert!(fair.publish, "{}", fair.reason);
        assert!(fair.reason.contains("on the 6 items that it has not learnt"), "{}", fair.reason);
        assert_eq!(fair.report.and_then(|report| report.head_items), Some(6));
        // Negative control: were the four not known to be learnt, it would keep its place by them.
        assert!(!judged(0, &[2.0; 10]).publish);
        // Too few are left: all speak, those it has learnt in its favour.
        let all = judged(7, &[2.0; 10]);
        assert!(!all.publish && !all.reason.contains("has not learnt"), "{}", all.reason);
        assert!(judged(10, &[0.05; 10]).publish, "who beats even that is better");
        // It is no way around the comparison: worse on what is new to both is worse.
        assert!(!judged(4, &[0.0, 0.0, 0.0, 0.0, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5]).publish);
    }

    #[test]
    fn what_is_not_of_the_same_items_is_not_compared() {
        let (ten, nine) = (&[4.0; 10][..], &[3.0; 9][..]);
        let judged = |base, head, flags, new| judged_knowing(base, Some((head, vec![false; flags])), new);
        assert!(judged(ten, &[3.0; 10], 10, &[2.0; 10]).publish);
        for other in [
            judged(ten, nine, 9, &[2.0; 10]),
            judged(ten, nine, 10, &[2.0; 10]),
            judged(&[4.0; 9], &[3.0; 10], 10, &[2.0; 10]),
            // One flag too many: every one after the item that has no loss would be another's.
            judged(&[4.0; 9], nine, 10, &[2.0; 9]),
        ] {
            assert!(!other.publish && other.reason.contains("the same held-out items"), "{}", other.reason);
            assert!(other.report.is_none());
        }
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
