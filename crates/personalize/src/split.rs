//! Which items are learnt from and which are held out to judge the result.

use types::HistoryItem;

/// How much is held out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Holdout {
    /// Share of the items.
    pub share: f64,
    /// At least so many items.
    pub min: usize,
    /// At most so many items.
    pub max: usize,
}

/// A history in two parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Split {
    /// The older items.
    pub train: Vec<HistoryItem>,
    /// The newest items.
    pub heldout: Vec<HistoryItem>,
}

/// Holds out the newest items, by time and then by order of arrival: what is judged lies in the future of what
/// is learnt. `items` are in that order.
#[must_use]
pub fn split(mut items: Vec<HistoryItem>, holdout: Holdout) -> Split {
    let wanted = (items.len() as f64 * holdout.share).round() as usize;
    let count = wanted.max(holdout.min).min(holdout.max).min(items.len());
    let heldout = items.split_off(items.len() - count);
    Split { train: items, heldout }
}

#[cfg(test)]
mod tests {
    use types::{ItemId, Timestamp};

    use super::*;

    #[test]
    fn the_newest_are_held_out() {
        let item = |at: i64| HistoryItem {
            id: format!("i{at}").parse::<ItemId>().unwrap_or_else(|e| panic!("{e}")),
            input: None,
            output: "text".into(),
            created_at: Timestamp(at),
            metadata: None,
        };
        let sizes = |items: i64, holdout| {
            let parts = split((0..items).map(item).collect(), holdout);
            assert!(parts.train.iter().all(|a| parts.heldout.iter().all(|b| a.created_at < b.created_at)));
            (parts.train.len(), parts.heldout.len())
        };
        let holdout = Holdout { share: 0.2, min: 2, max: 10 };
        assert_eq!(sizes(20, holdout), (16, 4));
        assert_eq!(sizes(5, holdout), (3, 2));
        assert_eq!(sizes(100, holdout), (90, 10));
        assert_eq!(sizes(1, holdout), (0, 1));
    }
}
