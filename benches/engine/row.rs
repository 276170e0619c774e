//! The lines of the table: what was measured, against whom, and whether the goal holds.

use serde_json::{Value, json};

/// What the ratio of a row should be.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    fn holds(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(goal) => ratio >= goal,
            Self::AtMost(goal) => ratio <= goal,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(goal) => format!(">= {goal}"),
            Self::AtMost(goal) => format!("<= {goal}"),
        }
    }
}

/// One line of the table.
pub(crate) struct Row {
    name: String,
    ours: Vec<f64>,
    peer: Vec<f64>,
    ratio: Option<f64>,
    floor: Option<f64>,
    goal: Option<Goal>,
    /// Why something is missing.
    note: Option<String>,
}

impl Row {
    /// A row whose ratio is that of the medians.
    pub(crate) fn against(name: impl Into<String>, ours: &[f64], peer: &[f64]) -> Self {
        let mut row = Self::alone(name, ours);
        row.peer = peer.to_vec();
        row.ratio = median(ours).zip(median(peer)).map(|(ours, peer)| ours / peer);
        row
    }

    /// A row of Atelier to itself: the ratio is the median over the runs, whose two sides follow each other closely, so
    /// that the machine's moods cancel out.
    pub(crate) fn paired(name: impl Into<String>, ours: &[f64], other: &[f64]) -> Self {
        let ratios: Vec<f64> = ours.iter().zip(other).map(|(ours, other)| ours / other).collect();
        Self { ratio: median(&ratios), ..Self::against(name, ours, other) }
    }

    /// A row without a peer.
    pub(crate) fn alone(name: impl Into<String>, ours: &[f64]) -> Self {
        Self {
            name: name.into(),
            ours: ours.to_vec(),
            peer: Vec::new(),
            ratio: None,
            floor: None,
            goal: None,
            note: None,
        }
    }

    pub(crate) fn goal(self, goal: Goal) -> Self {
        Self { goal: Some(goal), ..self }
    }

    pub(crate) fn floor(self, floor: f64) -> Self {
        Self { floor: Some(floor), ..self }
    }

    pub(crate) fn note(self, note: &str) -> Self {
        Self { note: Some(note.to_owned()), ..self }
    }

    /// The ratio the other way round, for figures of which less is better.
    pub(crate) fn inverse(self) -> Self {
        Self { ratio: self.ratio.map(|ratio| 1.0 / ratio), ..self }
    }

    /// The ratio replaced by ours' share beyond the other side: `(ours - other) / ours`.
    pub(crate) fn share(self) -> Self {
        Self { ratio: self.ratio.map(|ratio| 1.0 - 1.0 / ratio), ..self }
    }

    /// The row as `cargo xtask bench` reads it.
    pub(crate) fn json(&self) -> Value {
        let (low, high) = range(&self.ours).unzip();
        json!({
            "name": self.name,
            "ours": median(&self.ours),
            "low": low,
            "high": high,
            "peer": median(&self.peer),
            "ratio": self.ratio,
            "floor": self.floor,
            "goal": self.goal.map(Goal::text),
            "holds": self.goal.zip(self.ratio).map(|(goal, ratio)| goal.holds(ratio)),
            "note": self.note,
        })
    }
}

/// The middle one; of an even number the lower of the two.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    percentile(values, 0.5)
}

/// The smallest value that at least `share` of the values do not exceed.
pub(crate) fn percentile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

fn range(values: &[f64]) -> Option<(f64, f64)> {
    let low = values.iter().copied().min_by(f64::total_cmp)?;
    let high = values.iter().copied().max_by(f64::total_cmp)?;
    Some((low, high))
}
