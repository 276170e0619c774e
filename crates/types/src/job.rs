//! A training job as the outside sees it.

use serde::{Deserialize, Serialize};

use crate::{AdapterId, GenerationId, JobId, Timestamp, TrainingOptions};

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waits for a worker.
    Queued,
    /// A worker holds it.
    Running,
    /// Done: published, or kept back by the gate (see the outcome).
    Succeeded,
    /// Gave up; `error` says why.
    Failed,
    /// Called off, by request or because what it learnt from was erased; `error` says which.
    Cancelled,
}

impl JobState {
    /// The state's name on the wire and in the store.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Queued or running.
    #[must_use]
    pub fn is_open(self) -> bool {
        matches!(self, Self::Queued | Self::Running)
    }
}

/// How far a running job is.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct JobProgress {
    /// Optimiser steps done.
    pub step: u32,
    /// Optimiser steps in all.
    pub steps: u32,
    /// Mean training loss of the last step, nats per answer token.
    pub loss: f64,
    /// Tokens that have gone through training since the job was claimed.
    pub tokens: u64,
}

/// The held-out comparison that decides whether a generation becomes head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GateReport {
    /// Items trained on.
    pub train_items: usize,
    /// Newest items held out.
    pub heldout_items: usize,
    /// Answer tokens in the held-out items.
    pub heldout_tokens: usize,
    /// Bits per held-out answer token under the base alone.
    pub base_bits: f64,
    /// The same under the head that was live when the job began, which may have learnt some of the items; absent if there
    /// was none.
    pub head_bits: Option<f64>,
    /// The same under the new generation.
    pub new_bits: f64,
    /// Paired test against the base: how likely such a lead is if the two are equally good, 0 to 1.
    #[serde(default)]
    pub p_base: Option<f64>,
    /// The same against the head; absent if there was none.
    #[serde(default)]
    pub p_head: Option<f64>,
    /// Held-out items that the comparison with the head rests on; absent if there was none. Those that the head has learnt
    /// are left out, unless too few are left to tell.
    #[serde(default)]
    pub head_items: Option<usize>,
    /// Why it was published or held back, for people.
    pub verdict: String,
}

/// What a finished job came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobOutcome {
    /// Whether the new generation became head.
    pub published: bool,
    /// The generation that was made, if it was published.
    pub generation: Option<GenerationId>,
    /// The comparison, if training reached it.
    pub gate: Option<GateReport>,
    /// Why, in one sentence.
    pub reason: String,
    /// Tokens that went through training, all epochs and attempts.
    pub trained_tokens: u64,
    /// Seconds from claim to finish, all attempts.
    pub seconds: f64,
}

/// One training run for one adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// Whose adapter.
    pub adapter: AdapterId,
    /// Where it stands.
    pub state: JobState,
    /// How often it has been claimed since it last got on: a checkpoint of more steps than before begins the count again.
    pub attempts: u32,
    /// When it was enqueued.
    pub created_at: Timestamp,
    /// When it was last claimed.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// How far it is.
    pub progress: Option<JobProgress>,
    /// What it came to.
    pub outcome: Option<JobOutcome>,
    /// Why it failed or was cancelled; while it waits for another attempt, why the last one failed.
    pub error: Option<String>,
    /// While it waits for another attempt: not before.
    pub retry_at: Option<Timestamp>,
    /// A pause holds it: it is not taken up, or stops at its next step and keeps what it has done.
    pub paused: bool,
    /// It waits for another job of the user that runs.
    pub held_up: bool,
    /// Learns the whole history from fresh weights, whatever there is.
    pub from_scratch: bool,
    /// What was asked for in place of the tenant's defaults.
    pub training: Option<TrainingOptions>,
}
