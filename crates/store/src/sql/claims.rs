//! The tables `jobs`, `turns` and `pauses`, as far as they say whose job is next.

use types::{AdapterId, Job, TenantId, Timestamp, UserId};

use super::{Connection, jobs};
use crate::records::{Policy, Standing};
use crate::{Fence, StoreError};

/// Fails the jobs that could be claimed now but have been claimed `max_attempts` times.
pub(crate) async fn give_up(
    db: &mut Connection,
    now: Timestamp,
    max_attempts: u32,
) -> Result<u64, StoreError> {
    let done = sqlx::query(
        "UPDATE jobs SET state = 'failed', finished_at = $1, lease_until = NULL,
             error = 'gave up after ' || attempts || ' attempts; the last one: '
                 || COALESCE(error, 'the worker ' || worker || ' stopped without a report')
         WHERE state IN ('queued', 'running') AND attempts >= $2
             AND ((state = 'running' AND lease_until <= $1) OR (state = 'queued' AND not_before <= $1))",
    )
    .bind(now.0)
    .bind(max_attempts)
    .execute(db)
    .await?;
    Ok(done.rows_affected())
}

/// Gives the next job that can be claimed to `worker`: one that waits no longer, if the user has no running job, or
/// one that runs, if its lease has run out. The tenant who was served longest ago comes first, then the oldest job.
pub(crate) async fn claim(
    db: &mut Connection,
    worker: &str,
    now: Timestamp,
    lease_until: Timestamp,
    policy: &Policy,
) -> Result<Option<(Job, i64)>, StoreError> {
    let claimed: Option<i64> = sqlx::query_scalar(
        "UPDATE jobs SET state = 'running', attempts = attempts + 1, token = token + 1, worker = $1,
             lease_until = $3, started_at = $2, step = NULL, steps = NULL, loss = NULL, error = NULL,
             last_item = COALESCE(last_item, (SELECT max(i.seq) FROM items i WHERE i.user_id = jobs.user_id), 0)
         WHERE seq = (
             SELECT j.seq FROM jobs j JOIN users u ON u.id = j.user_id LEFT JOIN turns t ON t.tenant = u.tenant
             WHERE j.state IN ('queued', 'running')
                 AND ((j.state = 'running' AND j.lease_until <= $2)
                     OR (j.state = 'queued' AND j.not_before <= $2
                         AND (j.urgent OR j.attempts > 0 OR j.created_at <= $2 - $6
                             OR (j.new_items >= $4 AND j.touched_at <= $2 - $5))
                         AND NOT EXISTS (
                             SELECT 1 FROM jobs r WHERE r.user_id = j.user_id AND r.state = 'running')))
                 AND NOT EXISTS (
                     SELECT 1 FROM pauses p WHERE p.tenant = u.tenant AND p.name IN ('', u.name))
             ORDER BY COALESCE(t.served, 0), j.seq LIMIT 1)
         RETURNING seq",
    )
    .bind(worker)
    .bind(now.0)
    .bind(lease_until.0)
    .bind(policy.min_new_items as i64)
    .bind(policy.debounce_millis)
    .bind(policy.max_staleness_millis)
    .fetch_optional(&mut *db)
    .await?;
    let Some(seq) = claimed else { return Ok(None) };
    let (job, token) = jobs::at(db, seq).await?;
    sqlx::query(
        "INSERT INTO turns (tenant, served) VALUES ($1, (SELECT COALESCE(max(served), 0) + 1 FROM turns))
         ON CONFLICT (tenant) DO UPDATE SET served = excluded.served",
    )
    .bind(job.adapter.tenant.as_str())
    .execute(db)
    .await?;
    Ok(Some((job, token)))
}

/// How the holder of a claim stands.
pub(crate) async fn standing(db: &mut Connection, fence: &Fence) -> Result<Standing, StoreError> {
    let paused: Option<bool> = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM pauses p WHERE p.tenant = u.tenant AND p.name IN ('', u.name))
         FROM jobs j JOIN users u ON u.id = j.user_id
         WHERE j.id = $1 AND j.token = $2 AND j.state = 'running'",
    )
    .bind(fence.job.as_str())
    .bind(fence.token)
    .fetch_optional(db)
    .await?;
    Ok(match paused {
        None => Standing::Lost,
        Some(true) => Standing::Paused,
        Some(false) => Standing::Held,
    })
}

/// Sets or lifts the pause of a tenant or one of its users.
pub(crate) async fn set_pause(
    db: &mut Connection,
    tenant: &TenantId,
    user: Option<&UserId>,
    paused: bool,
) -> Result<(), StoreError> {
    let statement = match paused {
        true => "INSERT INTO pauses (tenant, name) VALUES ($1, $2) ON CONFLICT DO NOTHING",
        false => "DELETE FROM pauses WHERE tenant = $1 AND name = $2",
    };
    sqlx::query(statement).bind(tenant.as_str()).bind(user.map_or("", UserId::as_str)).execute(db).await?;
    Ok(())
}

/// Lifts what an erased user has left.
pub(crate) async fn forget_pause(db: &mut Connection, adapter: &AdapterId) -> Result<(), StoreError> {
    set_pause(db, &adapter.tenant, adapter.user(), false).await
}

/// Whether the tenant's training is paused, and whether the user's own is.
pub(crate) async fn pauses(
    db: &mut Connection,
    tenant: &TenantId,
    user: Option<&UserId>,
) -> Result<(bool, bool), StoreError> {
    let names: Vec<String> =
        sqlx::query_scalar("SELECT name FROM pauses WHERE tenant = $1 AND name IN ('', $2)")
            .bind(tenant.as_str())
            .bind(user.map_or("", UserId::as_str))
            .fetch_all(db)
            .await?;
    Ok((names.iter().any(String::is_empty), names.iter().any(|name| !name.is_empty())))
}
