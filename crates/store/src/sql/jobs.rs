//! The table `jobs`: the queue.

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use types::{AdapterId, Job, JobId, JobOutcome, JobProgress, JobState, TenantId, Timestamp, UserId};

use super::{Connection, UserKey, booked, count, id, json_or_none, rows, time, time_or_none};
use crate::records::{Demand, Spent};
use crate::{Fence, QueueStats, StoreError};

/// Selects jobs with their owner's name and what holds them; the argument is the rest of the statement.
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT j.*, u.tenant, u.name,
                 j.state IN ('queued', 'running') AND EXISTS (
                     SELECT 1 FROM pauses p WHERE p.tenant IN ('', u.tenant) AND p.name IN ('', u.name)) AS paused,
                 j.state = 'queued' AND EXISTS (
                     SELECT 1 FROM jobs r WHERE r.user_id = j.user_id AND r.state = 'running') AS held_up
             FROM jobs j JOIN users u ON u.id = j.user_id ",
            $rest
        )
    };
}

fn job(row: &SqliteRow) -> Result<Job, StoreError> {
    let (state, error) = (state(row)?, row.try_get::<Option<String>, _>("error")?);
    // A queued job has an error only from an attempt.
    let waits = state == JobState::Queued && error.is_some();
    let retry_at = time_or_none(row, "not_before")?.filter(|_| waits);
    Ok(Job {
        id: id(row, "id")?,
        adapter: AdapterId::new(id(row, "tenant")?, id(row, "name")?),
        state,
        attempts: row.try_get("attempts")?,
        created_at: time(row, "created_at")?,
        started_at: time_or_none(row, "started_at")?,
        finished_at: time_or_none(row, "finished_at")?,
        progress: progress(row)?,
        outcome: json_or_none(row, "outcome")?,
        error,
        retry_at,
        paused: row.try_get("paused")?,
        held_up: row.try_get("held_up")?,
        from_scratch: row.try_get("scratch")?,
        training: json_or_none(row, "training")?,
    })
}

fn state(row: &SqliteRow) -> Result<JobState, StoreError> {
    use JobState::{Cancelled, Failed, Queued, Running, Succeeded};
    let text: &str = row.try_get("state")?;
    let all = [Queued, Running, Succeeded, Failed, Cancelled];
    all.into_iter().find(|state| state.as_str() == text).ok_or_else(|| StoreError::unreadable("state", text))
}

fn progress(row: &SqliteRow) -> Result<Option<JobProgress>, StoreError> {
    let Some(step) = row.try_get("step")? else { return Ok(None) };
    // SQLite keeps a NaN as NULL.
    let loss = row.try_get::<Option<f64>, _>("loss")?.unwrap_or(f64::NAN);
    Ok(Some(JobProgress { step, steps: row.try_get("steps")?, loss, tokens: count(row, "tokens")? }))
}

pub(crate) async fn insert(
    db: &mut Connection,
    user: UserKey,
    id: &JobId,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO jobs (id, user_id, state, not_before, created_at, touched_at)
         VALUES ($1, $2, 'queued', $3, $3, $3)",
    )
    .bind(id.as_str())
    .bind(user.0)
    .bind(now.0)
    .execute(db)
    .await?;
    Ok(())
}

/// Adds to what the user's queued job is to do. What it had read before is read anew.
pub(crate) async fn demand(
    db: &mut Connection,
    user: UserKey,
    demand: &Demand,
    now: Timestamp,
) -> Result<(), StoreError> {
    let training = demand.training.as_ref().map(serde_json::to_string).transpose();
    sqlx::query(
        "UPDATE jobs SET new_items = new_items + $2, touched_at = CASE WHEN $2 > 0 THEN $3 ELSE touched_at END,
             urgent = urgent OR $4, scratch = scratch OR $5, training = COALESCE($6, training), last_item = NULL
         WHERE user_id = $1 AND state = 'queued'",
    )
    .bind(user.0)
    .bind(demand.new_items as i64)
    .bind(now.0)
    .bind(demand.urgent)
    .bind(demand.from_scratch)
    .bind(training.map_err(|error| StoreError::unreadable("training", error))?)
    .execute(db)
    .await?;
    Ok(())
}

pub(crate) async fn find(
    db: &mut Connection,
    tenant: &TenantId,
    id: &JobId,
) -> Result<Option<Job>, StoreError> {
    let row = sqlx::query(select!("WHERE u.tenant = $1 AND j.id = $2"))
        .bind(tenant.as_str())
        .bind(id.as_str())
        .fetch_optional(db)
        .await?;
    row.as_ref().map(job).transpose()
}

pub(crate) async fn queued(db: &mut Connection, user: UserKey) -> Result<Option<Job>, StoreError> {
    let row = sqlx::query(select!("WHERE j.user_id = $1 AND j.state = 'queued'"))
        .bind(user.0)
        .fetch_optional(db)
        .await?;
    row.as_ref().map(job).transpose()
}

pub(crate) async fn latest(db: &mut Connection, user: UserKey) -> Result<Option<Job>, StoreError> {
    let row = sqlx::query(select!("WHERE j.user_id = $1 ORDER BY j.seq DESC LIMIT 1"))
        .bind(user.0)
        .fetch_optional(db)
        .await?;
    row.as_ref().map(job).transpose()
}

/// Jobs of a tenant or of one of its users, newest first, from after `after`.
pub(crate) async fn list(
    db: &mut Connection,
    tenant: &TenantId,
    user: Option<&UserId>,
    after: Option<&JobId>,
    limit: u32,
) -> Result<Vec<Job>, StoreError> {
    let found = sqlx::query(select!(
        "WHERE u.tenant = $1 AND ($2 IS NULL OR u.name = $2)
             AND ($3 IS NULL OR j.seq < (
                 SELECT c.seq FROM jobs c JOIN users v ON v.id = c.user_id WHERE c.id = $3 AND v.tenant = $1))
         ORDER BY j.seq DESC LIMIT $4"
    ))
    .bind(tenant.as_str())
    .bind(user.map(UserId::as_str))
    .bind(after.map(JobId::as_str))
    .bind(rows(limit))
    .fetch_all(db)
    .await?;
    found.iter().map(job).collect()
}

pub(crate) async fn stats(db: &mut Connection) -> Result<QueueStats, StoreError> {
    let row = sqlx::query(
        "SELECT count(*) FILTER (WHERE state = 'queued') AS queued,
                count(*) FILTER (WHERE state = 'running') AS running,
                min(created_at) FILTER (WHERE state = 'queued') AS oldest
         FROM jobs WHERE state IN ('queued', 'running')",
    )
    .fetch_one(db)
    .await?;
    Ok(QueueStats {
        queued: count(&row, "queued")?,
        running: count(&row, "running")?,
        oldest_queued: time_or_none(&row, "oldest")?,
    })
}

/// Whether the fence is the latest one of a running job of this user.
pub(crate) async fn holds(db: &mut Connection, user: UserKey, fence: &Fence) -> Result<bool, StoreError> {
    let row =
        sqlx::query("SELECT 1 FROM jobs WHERE id = $1 AND token = $2 AND state = 'running' AND user_id = $3")
            .bind(fence.job.as_str())
            .bind(fence.token)
            .bind(user.0)
            .fetch_optional(db)
            .await?;
    Ok(row.is_some())
}

/// Extends the lease; `false` if the fence is not the latest.
pub(crate) async fn beat(
    db: &mut Connection,
    fence: &Fence,
    progress: Option<&JobProgress>,
    now: Timestamp,
    lease_millis: i64,
) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE jobs SET lease_until = $3, beat_at = $7, tokens = max(tokens, COALESCE($8, 0)),
             step = COALESCE($4, step), steps = COALESCE($5, steps),
             loss = CASE WHEN $4 IS NULL THEN loss ELSE $6 END
         WHERE id = $1 AND token = $2 AND state = 'running'",
    )
    .bind(fence.job.as_str())
    .bind(fence.token)
    .bind(now.plus_millis(lease_millis).0)
    .bind(progress.map(|p| p.step))
    .bind(progress.map(|p| p.steps))
    .bind(progress.map(|p| p.loss))
    .bind(now.0)
    .bind(progress.map(|p| p.tokens as i64))
    .execute(db)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Ends a running job well; `false` if the fence is not the latest.
pub(crate) async fn succeed(
    db: &mut Connection,
    fence: &Fence,
    outcome: &JobOutcome,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let outcome = serde_json::to_string(outcome).map_err(|error| StoreError::unreadable("outcome", error))?;
    let done = sqlx::query(
        "UPDATE jobs SET state = 'succeeded', outcome = $3, finished_at = $4, lease_until = NULL
         WHERE id = $1 AND token = $2 AND state = 'running'",
    )
    .bind(fence.job.as_str())
    .bind(fence.token)
    .bind(outcome)
    .bind(now.0)
    .execute(db)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Ends a running job badly; `false` if the fence is not the latest.
pub(crate) async fn fail(
    db: &mut Connection,
    fence: &Fence,
    error: &str,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE jobs SET state = 'failed', error = $3, finished_at = $4, lease_until = NULL
         WHERE id = $1 AND token = $2 AND state = 'running'",
    )
    .bind(fence.job.as_str())
    .bind(fence.token)
    .bind(error)
    .bind(now.0)
    .execute(db)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// How a job goes back into the queue.
pub(crate) struct Back<'a> {
    /// What went wrong, if anything.
    pub(crate) error: Option<&'a str>,
    pub(crate) not_before: Timestamp,
    /// Attempts to be taken off.
    pub(crate) uncounted: u32,
}

/// Puts a running job back into the queue, unless the user has another one there: `false` then, or
/// if the fence is not the latest.
pub(crate) async fn requeue(
    db: &mut Connection,
    fence: &Fence,
    back: &Back<'_>,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE jobs SET state = 'queued', error = $3, not_before = $4, attempts = attempts - $5,
             lease_until = NULL, spent_tokens = spent_tokens + tokens, tokens = 0,
             spent_seconds = spent_seconds + max(0, $6 - COALESCE(started_at, $6)) / 1000.0
         WHERE id = $1 AND token = $2 AND state = 'running'
             AND NOT EXISTS (SELECT 1 FROM jobs q WHERE q.user_id = jobs.user_id AND q.state = 'queued')",
    )
    .bind(fence.job.as_str())
    .bind(fence.token)
    .bind(back.error)
    .bind(back.not_before.0)
    .bind(back.uncounted)
    .bind(now.0)
    .execute(db)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Adds what a running job was to do to what the user's queued job is to do, and what it has cost to what that has, but
/// for what is noted of it already, if there is one and the fence is the latest. What the queued one asks for is newer,
/// and stands. It is the next try: it waits as the running job would have, and has as many attempts behind it.
pub(crate) async fn hand_on(
    db: &mut Connection,
    fence: &Fence,
    back: &Back<'_>,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query(concat!(
        "UPDATE jobs AS q SET new_items = q.new_items + r.new_items, urgent = q.urgent OR r.urgent,
             scratch = q.scratch OR r.scratch, training = COALESCE(q.training, r.training),
             error = COALESCE($4, q.error), not_before = max(q.not_before, $5),
             attempts = max(q.attempts, r.attempts - $6),
             learns_scratch = COALESCE(q.learns_scratch, r.learns_scratch),
             learns_items = COALESCE(q.learns_items, r.learns_items),
             learns_new = COALESCE(q.learns_new, r.learns_new),
             learns_replayed = COALESCE(q.learns_replayed, r.learns_replayed),
             spent_tokens = q.spent_tokens + max(0, r.spent_tokens + r.tokens
                 - ",
        booked!("tokens", "r"),
        "), spent_seconds = q.spent_seconds + max(0.0,
                 r.spent_seconds + max(0, $3 - COALESCE(r.started_at, $3)) / 1000.0
                 - ",
        booked!("seconds", "r"),
        ")
         FROM jobs AS r
         WHERE r.id = $1 AND r.token = $2 AND r.state = 'running' AND q.user_id = r.user_id AND q.state = 'queued'",
    ))
    .bind(fence.job.as_str())
    .bind(fence.token)
    .bind(now.0)
    .bind(back.error)
    .bind(back.not_before.0)
    .bind(back.uncounted)
    .execute(db)
    .await?;
    Ok(())
}

/// Has a running job learn everything from fresh weights, however often it is taken up, which it has yet to begin; `false`
/// if the fence is not the latest.
pub(crate) async fn from_scratch(db: &mut Connection, fence: &Fence) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE jobs SET scratch = TRUE, learns_scratch = NULL, learns_items = NULL, learns_new = NULL,
             learns_replayed = NULL
         WHERE id = $1 AND token = $2 AND state = 'running'",
    )
    .bind(fence.job.as_str())
    .bind(fence.token)
    .execute(db)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Takes all attempts but the one under way off a running job.
pub(crate) async fn forgive(db: &mut Connection, fence: &Fence) -> Result<(), StoreError> {
    sqlx::query("UPDATE jobs SET attempts = 1 WHERE id = $1 AND token = $2 AND state = 'running'")
        .bind(fence.job.as_str())
        .bind(fence.token)
        .execute(db)
        .await?;
    Ok(())
}

/// A job by its place in the queue, its fencing token, and what earlier claims have cost.
pub(super) async fn at(db: &mut Connection, seq: i64) -> Result<(Job, i64, Spent), StoreError> {
    let row = sqlx::query(select!("WHERE j.seq = $1")).bind(seq).fetch_one(db).await?;
    let spent = Spent { tokens: count(&row, "spent_tokens")?, seconds: row.try_get("spent_seconds")? };
    Ok((job(&row)?, row.try_get("token")?, spent))
}

/// A held job as it is now, whoever's it is.
pub(crate) async fn of_fence(db: &mut Connection, fence: &Fence) -> Result<Option<Job>, StoreError> {
    let row = sqlx::query(select!("WHERE j.id = $1 AND j.token = $2"))
        .bind(fence.job.as_str())
        .bind(fence.token)
        .fetch_optional(db)
        .await?;
    row.as_ref().map(job).transpose()
}

/// Calls a job off that has not ended: its worker can do nothing any more.
pub(crate) async fn call_off(
    db: &mut Connection,
    id: &JobId,
    reason: &str,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE jobs SET state = 'cancelled', error = $2, finished_at = $3, lease_until = NULL, token = token + 1
         WHERE id = $1 AND state IN ('queued', 'running')",
    )
    .bind(id.as_str())
    .bind(reason)
    .bind(now.0)
    .execute(db)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Whose a held job is, and the last item that it reads.
pub(crate) async fn last_item(
    db: &mut Connection,
    fence: &Fence,
) -> Result<Option<(UserKey, i64)>, StoreError> {
    let found: Option<(i64, i64)> = sqlx::query_as(
        "SELECT user_id, last_item FROM jobs WHERE id = $1 AND token = $2 AND state = 'running'",
    )
    .bind(fence.job.as_str())
    .bind(fence.token)
    .fetch_optional(db)
    .await?;
    Ok(found.map(|(user, last)| (UserKey(user), last)))
}

/// The user's running job.
pub(crate) async fn running(db: &mut Connection, user: UserKey) -> Result<Option<Job>, StoreError> {
    let row = sqlx::query(select!("WHERE j.user_id = $1 AND j.state = 'running'"))
        .bind(user.0)
        .fetch_optional(db)
        .await?;
    row.as_ref().map(job).transpose()
}

/// Ends the leases of all running jobs, so that they can be claimed at once.
pub(crate) async fn expire_running(db: &mut Connection) -> Result<u64, StoreError> {
    let done = sqlx::query("UPDATE jobs SET lease_until = $1 WHERE state = 'running'")
        .bind(i64::MIN)
        .execute(db)
        .await?;
    Ok(done.rows_affected())
}
