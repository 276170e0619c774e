//! Whether an update has made old items worse than it may.

use train::Loss;

/// Compares the losses of the same old items under the new weights with those under the head, and with those that they had
/// when everything was last learnt from fresh weights (`baseline`), where these are known: several updates together may
/// make them no worse than one may. `most` is the largest rise, as a share. Items with no loss on one side, or cut to
/// another length then, are left out; where nothing is left there is no drift.
pub(crate) fn has_drifted(
    head: &[Option<Loss>],
    baseline: &[Option<Loss>],
    new: &[Option<Loss>],
    most: f64,
) -> bool {
    let is_worse = |before: &[Option<Loss>]| {
        let both = before.iter().zip(new).filter_map(|(before, new)| before.as_ref().zip(new.as_ref()));
        let alike = both.filter(|(before, new)| before.tokens == new.tokens);
        let (before, new): (Vec<_>, Vec<_>) = alike.unzip();
        // Nothing to measure on gives NaN.
        let [before, new] = [before, new].map(Loss::bits_per_token);
        let is_kept = new <= before * (1.0 + most);
        before.is_finite() && !is_kept
    };
    is_worse(head) || is_worse(baseline)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(nats: &[f64]) -> Vec<Option<Loss>> {
        nats.iter().map(|&nats| Some(Loss { nats, tokens: 2 })).collect()
    }

    #[test]
    fn an_update_may_lose_a_little() {
        let drifted = |new: &[f64]| has_drifted(&losses(&[1.0, 3.0]), &[None, None], &losses(new), 0.05);
        assert!(!drifted(&[1.0, 3.0]) && !drifted(&[1.15, 3.0]) && !drifted(&[0.1, 0.1]));
        assert!(drifted(&[1.25, 3.0]) && drifted(&[f64::NAN, 3.0]));
        assert!(!has_drifted(&[], &[], &[], 0.05), "nothing to measure on");
    }

    #[test]
    fn small_losses_add_up() {
        let (baseline, rise) = (losses(&[1.0, 3.0]), 1.049_f64);
        let after = |updates: i32| losses(&[1.0, 3.0].map(|nats| nats * rise.powi(updates)));
        assert!(!has_drifted(&baseline, &baseline, &after(1), 0.05));
        assert!(has_drifted(&after(1), &baseline, &after(2), 0.05));
        // Negative control: each for itself, eight of them pass.
        assert!((0..8).all(|at| !has_drifted(&after(at), &[None, None], &after(at + 1), 0.05)));
        // Only what is known of both speaks, and only if it is as long.
        let known = [baseline[0], None];
        assert!(has_drifted(&after(1), &known, &after(2), 0.05));
        let cut = [Some(Loss { nats: 0.1, tokens: 1 }), None];
        assert!(!has_drifted(&after(1), &cut, &after(2), 0.05));
        // Nor may an update that follows a good one undo what that has gained.
        assert!(has_drifted(&losses(&[0.5, 1.5]), &baseline, &losses(&[0.9, 2.9]), 0.05));
    }
}
