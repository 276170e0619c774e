//! `/v1/jobs/{id}`: how a training job stands, and calling it off.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use types::{GateReport, Job, JobId, JobOutcome, JobState};
use utoipa::ToSchema;

use crate::app::App;
use crate::auth::Principal;
use crate::error::{ApiError, Code, ErrorBody};
use crate::routes::PathId;
use crate::routes::items::seconds;
use crate::routes::training::WireTraining;

/// A training job.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WireJob {
    id: String,
    /// `job`.
    object: &'static str,
    user: String,
    /// `queued`, `running`, `succeeded` (see `outcome`), `failed` or `cancelled` (see `error`).
    status: &'static str,
    /// How often a worker has taken it since it last got further than ever before.
    attempts: u32,
    /// Unix seconds.
    created_at: f64,
    #[schema(required)]
    started_at: Option<f64>,
    #[schema(required)]
    finished_at: Option<f64>,
    #[schema(required)]
    progress: Option<WireProgress>,
    #[schema(required)]
    outcome: Option<WireOutcome>,
    /// Why it failed or was cancelled; while it waits for another attempt, why the last one failed.
    #[schema(required)]
    error: Option<String>,
    /// While it waits for another attempt: not before, Unix seconds.
    #[schema(required)]
    retry_at: Option<f64>,
    /// A pause of the server, the tenant or the user holds it.
    paused: bool,
    /// What happens next, for people.
    next: &'static str,
    /// Learns the whole history from fresh weights.
    from_scratch: bool,
    /// What was asked for in place of the defaults.
    #[schema(required)]
    training: Option<WireTraining>,
}

/// How far a job is.
#[derive(Debug, Serialize, ToSchema)]
struct WireProgress {
    step: u32,
    steps: u32,
    /// Mean loss of the last step, nats per answer token.
    #[schema(required)]
    loss: Option<f64>,
}

/// What a job came to.
#[derive(Debug, Serialize, ToSchema)]
struct WireOutcome {
    /// Whether the new generation became head.
    published: bool,
    #[schema(required)]
    generation: Option<String>,
    #[schema(required)]
    gate: Option<WireGate>,
    /// Why, for people.
    reason: String,
    /// Tokens that went through training, all epochs.
    trained_tokens: u64,
    seconds: f64,
}

/// The held-out comparison, in bits per answer token.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WireGate {
    train_items: usize,
    heldout_items: usize,
    heldout_tokens: usize,
    base_bits: f64,
    #[schema(required)]
    head_bits: Option<f64>,
    new_bits: f64,
    /// How likely such a lead over the base is by chance, from a paired test over the held-out items.
    #[schema(required)]
    p_base: Option<f64>,
    /// The same over the head.
    #[schema(required)]
    p_head: Option<f64>,
    /// Held-out items that the comparison with the head rests on: those that it has not learnt, if they are enough.
    #[schema(required)]
    head_items: Option<usize>,
    verdict: String,
}

impl From<GateReport> for WireGate {
    fn from(gate: GateReport) -> Self {
        let GateReport {
            train_items,
            heldout_items,
            heldout_tokens,
            base_bits,
            head_bits,
            new_bits,
            p_base,
            p_head,
            head_items,
            verdict,
        } = gate;
        Self {
            train_items,
            heldout_items,
            heldout_tokens,
            base_bits,
            head_bits,
            new_bits,
            p_base,
            p_head,
            head_items,
            verdict,
        }
    }
}

impl From<JobOutcome> for WireOutcome {
    fn from(outcome: JobOutcome) -> Self {
        Self {
            published: outcome.published,
            generation: outcome.generation.map(|id| id.to_string()),
            gate: outcome.gate.map(WireGate::from),
            reason: outcome.reason,
            trained_tokens: outcome.trained_tokens,
            seconds: outcome.seconds,
        }
    }
}

/// What happens next.
fn next(job: &Job) -> &'static str {
    match job.state {
        JobState::Queued if job.paused => {
            "it waits until the pause is lifted, and then goes on from where it was"
        }
        JobState::Queued if job.retry_at.is_some() => {
            "it is tried again at retry_at, or when its turn comes then"
        }
        JobState::Queued if job.held_up => "it waits for another job of the user, which runs",
        JobState::Queued => {
            "it waits for its turn, for more items, or a while because nothing came of the last trainings"
        }
        JobState::Running if job.paused => "it stops at its next step, and waits until the pause is lifted",
        JobState::Running => {
            "when it has trained, the result is compared with the base and the current adapter"
        }
        JobState::Succeeded => "nothing: it is done",
        JobState::Failed | JobState::Cancelled => {
            "nothing: new items, or POST /v1/users/{user}/train, make another job"
        }
    }
}

impl From<Job> for WireJob {
    fn from(job: Job) -> Self {
        Self {
            next: next(&job),
            retry_at: job.retry_at.map(seconds),
            paused: job.paused,
            id: job.id.into(),
            object: "job",
            user: job.adapter.owner.to_string(),
            status: job.state.as_str(),
            attempts: job.attempts,
            created_at: seconds(job.created_at),
            started_at: job.started_at.map(seconds),
            finished_at: job.finished_at.map(seconds),
            progress: job.progress.map(|progress| WireProgress {
                step: progress.step,
                steps: progress.steps,
                loss: Some(progress.loss).filter(|loss| loss.is_finite()),
            }),
            outcome: job.outcome.map(WireOutcome::from),
            error: job.error,
            from_scratch: job.from_scratch,
            training: job.training.map(WireTraining::from),
        }
    }
}

/// Looks at a training job.
#[utoipa::path(
    get,
    path = "/v1/jobs/{id}",
    tag = "learn",
    params(("id" = String, Path, description = "The job's id, from the upload's answer")),
    responses(
        (status = 200, description = "The job", body = WireJob),
        (status = 401, description = "The API key is missing or wrong", body = ErrorBody),
        (status = 404, description = "No such job", body = ErrorBody),
    )
)]
pub(crate) async fn job(
    State(app): State<App>,
    principal: Principal,
    PathId(id): PathId,
) -> Result<Json<WireJob>, ApiError> {
    let parsed: JobId = id.parse().map_err(|_| unknown_job(&id))?;
    let job = app.store.job(&principal.tenant, &parsed).await?.ok_or_else(|| unknown_job(&id))?;
    Ok(Json(job.into()))
}

fn unknown_job(id: &str) -> ApiError {
    ApiError::new(Code::JobNotFound, format!("there is no job {id:?}")).param("id")
}

/// Calls a job off. One that waits does not run; one that runs stops at its next step and publishes nothing. Cancelling
/// again changes nothing.
#[utoipa::path(
    post,
    path = "/v1/jobs/{id}/cancel",
    tag = "learn",
    params(("id" = String, Path, description = "The job's id")),
    responses(
        (status = 200, description = "Cancelled", body = WireJob),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 409, description = "The job has ended otherwise", body = ErrorBody),
    )
)]
pub(crate) async fn cancel(
    State(app): State<App>,
    principal: Principal,
    PathId(id): PathId,
) -> Result<Json<WireJob>, ApiError> {
    let parsed: JobId = id.parse().map_err(|_| unknown_job(&id))?;
    let job = app.store.cancel(&principal.tenant, &parsed).await?.ok_or_else(|| unknown_job(&id))?;
    if job.state != JobState::Cancelled {
        let message = format!("the job {id} has ended: {}", job.state.as_str());
        return Err(ApiError::new(Code::JobEnded, message).param("id"));
    }
    Ok(Json(job.into()))
}
