//! Merge rules for a SentencePiece BPE vocabulary, which stores scores instead.

use std::collections::HashMap;

/// One way to put a piece together from two others.
struct Merge<'a> {
    left: &'a str,
    right: &'a str,
    score: f32,
    /// Characters in the left and the right part: longer parts go first among equals.
    lengths: (usize, usize),
}

/// The merges, best first, that make BPE behave as SentencePiece does with these scores: every split of every piece
/// into two other pieces, ordered by the score of the whole (as in Hugging Face's conversion of slow tokenizers).
///
/// `pieces` are the ordinary pieces with their scores, in the order of their ids. Control, byte and user-defined
/// tokens take no part, so no text can merge into one of them.
pub(crate) fn merges(pieces: &[(&str, f32)]) -> Vec<(String, String)> {
    let rank: HashMap<&str, usize> = pieces.iter().enumerate().map(|(id, &(text, _))| (text, id)).collect();
    let mut merges = Vec::new();
    for &(text, score) in pieces {
        let first = merges.len();
        let total = text.chars().count();
        for (count, (at, _)) in text.char_indices().enumerate().skip(1) {
            let (left, right) = text.split_at(at);
            if rank.contains_key(left) && rank.contains_key(right) {
                merges.push(Merge { left, right, score, lengths: (count, total - count) });
            }
        }
        merges[first..].sort_by_key(|merge: &Merge<'_>| (rank[merge.left], rank[merge.right]));
    }
    merges.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.lengths.cmp(&a.lengths)));
    merges.into_iter().map(|merge| (merge.left.to_owned(), merge.right.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_scores_come_first_and_all_splits_are_there() {
        let pieces =
            [("a", -9.0), ("b", -9.0), ("c", -9.0), ("ab", -2.0), ("bc", -1.0), ("abc", -3.0), ("xy", -0.5)];
        let merges = merges(&pieces);
        let merges: Vec<_> = merges.iter().map(|(l, r)| (l.as_str(), r.as_str())).collect();
        assert_eq!(merges, [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]);
    }
}
