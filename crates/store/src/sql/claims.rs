//! The tables `jobs`, `turns` and `pauses`, as far as they say whose job is next.

use sqlx::Row as _;
use types::{Job, JobId, TenantId, Timestamp, UserId};

use super::{Connection, id, jobs, time_or_none};
use crate::records::{Policy, Spent, Standing};
use crate::{Fence, Pause, PauseScope, Pauses, StoreError};

/// The jobs that could be claimed now but have been claimed `max_attempts` times.
pub(crate) async fn hopeless(
    db: &mut Connection,
    now: Timestamp,
    max_attempts: u32,
) -> Result<Vec<JobId>, StoreError> {
    let found = sqlx::query(
        "SELECT id FROM jobs WHERE state IN ('queued', 'running') AND attempts >= $2
             AND ((state = 'running' AND lease_until <= $1) OR (state = 'queued' AND not_before <= $1))",
    )
    .bind(now.0)
    .bind(max_attempts)
    .fetch_all(db)
    .await?;
    found.iter().map(|row| id(row, "id")).collect()
}

/// Fails a job that is tried no more.
pub(crate) async fn give_up(db: &mut Connection, job: &JobId, now: Timestamp) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE jobs SET state = 'failed', finished_at = $2, lease_until = NULL,
             error = 'gave up after ' || attempts || ' attempts; the last one: '
                 || COALESCE(error, 'the worker ' || worker || ' stopped without a report')
         WHERE id = $1",
    )
    .bind(job.as_str())
    .bind(now.0)
    .execute(db)
    .await?;
    Ok(())
}

/// That job `j` of user `u` can be claimed at `$2` under the policy in `$4` to `$7`: one that waits no longer, if the user
/// has no running job, or one that runs, if its lease has run out.
macro_rules! ripe {
    () => {
        "j.state IN ('queued', 'running')
            AND ((j.state = 'running' AND j.lease_until <= $2)
                OR (j.state = 'queued' AND j.not_before <= $2
                    AND (j.urgent OR j.attempts > 0 OR j.created_at <= $2 - $6
                        OR (j.new_items >= $4 AND j.touched_at <= $2 - $5
                            AND (u.rejections < 2
                                OR u.rejected_at <= $2 - ($7 << min(u.rejections - 2, 20)))))
                    AND NOT EXISTS (
                        SELECT 1 FROM jobs r WHERE r.user_id = j.user_id AND r.state = 'running')))
            AND NOT EXISTS (
                SELECT 1 FROM pauses p WHERE p.tenant IN ('', u.tenant) AND p.name IN ('', u.name))"
    };
}

/// Gives the next job that can be claimed to `worker`. The tenant who was served longest ago comes first, then the user
/// of whom that is true, then the oldest job; but what a dead worker has begun comes before what has not begun.
pub(crate) async fn claim(
    db: &mut Connection,
    worker: &str,
    now: Timestamp,
    lease_until: Timestamp,
    policy: &Policy,
) -> Result<Option<(Job, i64, Spent)>, StoreError> {
    let claimed: Option<i64> = sqlx::query_scalar(concat!(
        "UPDATE jobs SET state = 'running', attempts = attempts + 1, token = token + 1, worker = $1,
             lease_until = $3, started_at = $2, beat_at = $2, step = NULL, steps = NULL, loss = NULL, error = NULL,
             spent_tokens = spent_tokens + tokens, tokens = 0, spent_seconds = spent_seconds + CASE
                 WHEN state = 'running' THEN max(0, COALESCE(beat_at - started_at, 0)) / 1000.0 ELSE 0 END,
             last_item = COALESCE(last_item, (SELECT max(i.seq) FROM items i WHERE i.user_id = jobs.user_id), 0)
         WHERE seq = (
             SELECT j.seq FROM jobs j JOIN users u ON u.id = j.user_id LEFT JOIN turns t ON t.tenant = u.tenant
             WHERE ",
        ripe!(),
        " ORDER BY COALESCE(t.served, 0), j.state = 'queued', u.served, j.seq LIMIT 1)
         RETURNING seq",
    ))
    .bind(worker)
    .bind(now.0)
    .bind(lease_until.0)
    .bind(policy.min_new_items as i64)
    .bind(policy.debounce_millis)
    .bind(policy.max_staleness_millis)
    .bind(policy.rest_millis)
    .fetch_optional(&mut *db)
    .await?;
    let Some(seq) = claimed else { return Ok(None) };
    let (job, token, spent) = jobs::at(db, seq).await?;
    sqlx::query(
        "INSERT INTO turns (tenant, served) VALUES ($1, (SELECT COALESCE(max(served), 0) + 1 FROM turns))
         ON CONFLICT (tenant) DO UPDATE SET served = excluded.served",
    )
    .bind(job.adapter.tenant.as_str())
    .execute(&mut *db)
    .await?;
    sqlx::query(
        "UPDATE users SET served = (SELECT max(served) + 1 FROM users)
         WHERE id = (SELECT user_id FROM jobs WHERE seq = $1)",
    )
    .bind(seq)
    .execute(db)
    .await?;
    Ok(Some((job, token, spent)))
}

/// How the holder of a claim stands.
pub(crate) async fn standing(
    db: &mut Connection,
    fence: &Fence,
    now: Timestamp,
    policy: &Policy,
) -> Result<Standing, StoreError> {
    let found = sqlx::query(concat!(
        "SELECT
             EXISTS (SELECT 1 FROM pauses p WHERE p.tenant IN ('', o.tenant) AND p.name IN ('', o.name)) AS paused,
             own.started_at <= $2 - $8
                 AND NOT EXISTS (SELECT 1 FROM jobs q WHERE q.user_id = own.user_id AND q.state = 'queued')
                 AND EXISTS (
                     SELECT 1 FROM jobs j JOIN users u ON u.id = j.user_id
                     WHERE j.user_id <> own.user_id AND ",
        ripe!(),
        ") AS awaited
         FROM jobs own JOIN users o ON o.id = own.user_id
         WHERE own.id = $1 AND own.token = $3 AND own.state = 'running'",
    ))
    .bind(fence.job.as_str())
    .bind(now.0)
    .bind(fence.token)
    .bind(policy.min_new_items as i64)
    .bind(policy.debounce_millis)
    .bind(policy.max_staleness_millis)
    .bind(policy.rest_millis)
    .bind(policy.turn_millis)
    .fetch_optional(db)
    .await?;
    let Some(row) = found else { return Ok(Standing::Lost) };
    Ok(match (row.try_get("paused")?, row.try_get("awaited")?) {
        (true, _) => Standing::Paused,
        (false, true) => Standing::Awaited,
        (false, false) => Standing::Held,
    })
}

/// Sets a pause, unless it is set.
pub(crate) async fn pause(
    db: &mut Connection,
    scope: &PauseScope,
    by: &TenantId,
    reason: Option<&str>,
    now: Timestamp,
) -> Result<(), StoreError> {
    let (tenant, name) = scope.names();
    sqlx::query(
        "INSERT INTO pauses (tenant, name, since, paused_by, reason) VALUES ($1, $2, $3, $4, $5)
         ON CONFLICT DO NOTHING",
    )
    .bind(tenant)
    .bind(name)
    .bind(now.0)
    .bind(by.as_str())
    .bind(reason)
    .execute(db)
    .await?;
    Ok(())
}

/// Lifts a pause.
pub(crate) async fn resume(db: &mut Connection, scope: &PauseScope) -> Result<(), StoreError> {
    let (tenant, name) = scope.names();
    sqlx::query("DELETE FROM pauses WHERE tenant = $1 AND name = $2")
        .bind(tenant)
        .bind(name)
        .execute(db)
        .await?;
    Ok(())
}

/// The pauses that a tenant, or one of its users, is under.
pub(crate) async fn pauses(
    db: &mut Connection,
    tenant: &TenantId,
    user: Option<&UserId>,
) -> Result<Pauses, StoreError> {
    let found = sqlx::query("SELECT * FROM pauses WHERE tenant IN ('', $1) AND name IN ('', $2)")
        .bind(tenant.as_str())
        .bind(user.map_or("", UserId::as_str))
        .fetch_all(db)
        .await?;
    let mut pauses = Pauses::default();
    for row in &found {
        let by: Option<&str> = row.try_get("paused_by")?;
        let by = by.map(|by| by.parse().map_err(|error| StoreError::unreadable("paused_by", error)));
        let since = time_or_none(row, "since")?;
        let pause = Some(Pause { since, by: by.transpose()?, reason: row.try_get("reason")? });
        match (row.try_get("tenant")?, row.try_get("name")?) {
            ("", _) => pauses.server = pause,
            (_, "") => pauses.tenant = pause,
            _ => pauses.user = pause,
        }
    }
    Ok(pauses)
}
