//! Where a trained generation comes from: written down when it is published, and shown as long as it is there.

use serde::{Deserialize, Serialize};

use crate::{GateReport, ItemId, TrainingOptions};

/// How a generation was made and judged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// What has gone into it, by this training and those it went on from.
    pub history: Option<HistoryRange>,
    /// Every hyper-parameter, asked for or not, but the seed.
    pub recipe: TrainingOptions,
    /// Seed of initial weights, order and dropout.
    pub seed: u64,
    /// The comparison that it was published for.
    pub gate: Option<GateReport>,
    /// How the training went.
    pub training: TrainingCourse,
}

impl Provenance {
    /// What asks for the same training again: every hyper-parameter, the seed among them.
    #[must_use]
    pub fn options(&self) -> TrainingOptions {
        TrainingOptions { seed: Some(self.seed), ..self.recipe.clone() }
    }
}

/// A part of a history, in its order: by time, then by arrival.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryRange {
    /// The oldest item.
    pub first: ItemId,
    /// The newest item.
    pub last: ItemId,
    /// Number of items.
    pub items: u64,
}

/// How a training went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingCourse {
    /// From fresh weights; otherwise on from the parent.
    pub from_scratch: bool,
    /// Trainings since fresh weights, this one included if it is none.
    pub updates: u32,
    /// Items that were learnt for the first time.
    pub new_items: u64,
    /// Items that the parent had learnt, learnt again.
    pub replayed_items: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Tokens that went through training, all epochs and attempts.
    pub trained_tokens: u64,
}
