//! Times a generation request and counts how it ends.

use std::time::{Duration, Instant};

use telemetry::{GenerationOutcome, Metrics};

use crate::generation::Piece;

/// Counts one generation request when dropped: as cancelled (or rejected, if the engine has not taken it yet), unless
/// it was told otherwise.
pub(crate) struct Meter {
    metrics: Metrics,
    start: Instant,
    submitted: Option<Duration>,
    first_token: Option<Instant>,
    /// Answers that have not ended.
    open: usize,
    outcome: GenerationOutcome,
}

impl Meter {
    /// A request for `answers` answers has come.
    pub(crate) fn new(metrics: Metrics, answers: usize) -> Self {
        Self {
            metrics,
            start: Instant::now(),
            submitted: None,
            first_token: None,
            open: answers,
            outcome: GenerationOutcome::Rejected,
        }
    }

    /// The engine has taken it.
    pub(crate) fn submitted(mut self) -> Self {
        self.submitted = Some(self.start.elapsed());
        self.outcome = GenerationOutcome::Cancelled;
        self
    }

    /// Time from the request to the engine.
    pub(crate) fn queued(&self) -> Duration {
        self.submitted.unwrap_or_default()
    }

    /// A part of an answer is there.
    pub(crate) fn piece(&mut self, piece: &Piece) {
        let first = *self.first_token.get_or_insert_with(|| {
            self.metrics.first_token(self.start.elapsed().as_secs_f64());
            Instant::now()
        });
        let Some(end) = &piece.end else { return };
        if end.usage.completion_tokens > 1 {
            let gaps = f64::from(end.usage.completion_tokens - 1);
            self.metrics.per_token(first.elapsed().as_secs_f64() / gaps);
        }
        self.open = self.open.saturating_sub(1);
        if self.open == 0 {
            self.outcome = GenerationOutcome::Completed;
        }
    }

    /// An answer was given up.
    pub(crate) fn failed(&mut self) {
        self.outcome = GenerationOutcome::Failed;
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.metrics.generation(self.outcome);
        tracing::debug!(outcome = ?self.outcome, seconds = self.start.elapsed().as_secs_f64(), "generation over");
    }
}
