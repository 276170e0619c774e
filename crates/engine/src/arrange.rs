//! The order of a step's rows. What is computed does not depend on it, how fast it is does.

use crate::scheduler::Work;

/// Puts decoding sequences with the same adapter side by side, whose rows then share the reading of it, spreads those without
/// one evenly between them, so that every thread prepares as many rows with adapters, and puts prompts last.
///
/// `adapter` says which one a sequence has: any number but 0, which is none.
pub(crate) fn arrange(work: &mut [Work], spare: &mut Vec<(usize, Work)>, adapter: impl Fn(&Work) -> usize) {
    spare.clear();
    spare.extend(work.iter().map(|work| (adapter(work), *work)));
    if spare.iter().all(|(adapter, _)| *adapter == 0) {
        return;
    }
    spare.sort_unstable_by_key(|&(adapter, Work { id, tokens, .. })| {
        (tokens > 1, if tokens > 1 { 0 } else { adapter }, id)
    });
    let singles = spare.partition_point(|(_, work)| work.tokens <= 1);
    let (singles, prompts) = spare.split_at(singles);
    let (without, with) = singles.split_at(singles.partition_point(|(adapter, _)| *adapter == 0));
    let (mut bare, mut adapted) = (0, 0);
    for to in &mut work[..singles.len()] {
        let within = adapted > 0 && with.get(adapted).is_some_and(|next| next.0 == with[adapted - 1].0);
        let due = (bare + adapted + 1) * without.len() / singles.len() > bare;
        if bare < without.len() && (adapted == with.len() || (due && !within)) {
            *to = without[bare].1;
            bare += 1;
        } else {
            *to = with[adapted].1;
            adapted += 1;
        }
    }
    for (to, (_, prompt)) in work[singles.len()..].iter_mut().zip(prompts) {
        *to = *prompt;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(sequences: &[(usize, usize)]) -> Vec<u64> {
        let of = |(id, &(_, tokens))| Work { id: id as u64, tokens, sample: true };
        let mut work: Vec<Work> = sequences.iter().enumerate().map(of).collect();
        arrange(&mut work, &mut Vec::new(), |work| sequences[work.id as usize].0);
        work.iter().map(|work| work.id).collect()
    }

    #[test]
    fn adapters_are_together_and_those_without_between_them() {
        // (adapter, tokens)
        assert_eq!(order(&[(0, 1), (0, 9), (0, 1)]), [0, 1, 2], "without adapters the order stays");
        assert_eq!(order(&[(7, 1), (5, 1), (7, 1), (5, 1)]), [1, 3, 0, 2]);
        assert_eq!(order(&[(0, 1), (0, 1), (5, 1), (7, 1)]), [2, 0, 3, 1]);
        assert_eq!(
            order(&[(0, 1), (5, 1), (0, 1), (5, 1)]),
            [1, 3, 0, 2],
            "one adapter's rows stay together"
        );
        assert_eq!(order(&[(5, 30), (0, 1), (7, 1), (0, 20), (7, 1)]), [2, 4, 1, 0, 3], "prompts come last");
    }

    #[test]
    fn every_sequence_is_there_once() {
        for seed in 0..500usize {
            let random = |at: usize| ((seed * 31 + at * 17 + 7) * 2_654_435_761 % 4_294_967_296) >> 13;
            let sequences: Vec<_> =
                (0..random(99) % 40).map(|at| (random(at) % 5, 1 + random(at + 50) % 3 / 2 * 40)).collect();
            let mut ids = order(&sequences);
            ids.sort_unstable();
            assert_eq!(ids, (0..sequences.len() as u64).collect::<Vec<_>>());
        }
    }
}
