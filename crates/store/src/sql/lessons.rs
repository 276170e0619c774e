//! The tables `manifests` and `progress`: what was learnt, at what cost, and how well.

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use types::{GenerationId, JobId, JobOutcome, Timestamp};

use super::{Connection, UserKey, booked, count, generation_or_none, id, rows, time};
use crate::records::{Lesson, Manifest, OldLoss, ProgressPoint};
use crate::{Fence, StoreError};

/// The manifest of a generation; `None` if it has none.
pub(crate) async fn manifest(
    db: &mut Connection,
    user: UserKey,
    generation: &GenerationId,
) -> Result<Option<Manifest>, StoreError> {
    let row = find(db, user, generation).await?;
    row.map(|row| hashes(&row, "items")).transpose()
}

/// The items that a generation has learnt from or was judged by; `None` if it has no manifest.
pub(crate) async fn seen(
    db: &mut Connection,
    user: UserKey,
    generation: &GenerationId,
) -> Result<Option<Manifest>, StoreError> {
    let Some(row) = find(db, user, generation).await? else { return Ok(None) };
    Ok(Some(hashes(&row, "items")?.and(hashes(&row, "judged")?)))
}

/// The items that a generation was judged by, and those that it grew from.
pub(crate) async fn judged(
    db: &mut Connection,
    user: UserKey,
    generation: &GenerationId,
) -> Result<Option<Manifest>, StoreError> {
    let row = find(db, user, generation).await?;
    row.map(|row| hashes(&row, "judged")).transpose()
}

/// The baseline of a generation; empty if it has none.
pub(crate) async fn baseline(
    db: &mut Connection,
    user: UserKey,
    generation: &GenerationId,
) -> Result<Vec<OldLoss>, StoreError> {
    let Some(row) = find(db, user, generation).await? else { return Ok(Vec::new()) };
    let bytes: &[u8] = row.try_get::<Option<_>, _>("baseline")?.unwrap_or_default();
    let (losses, rest) = bytes.as_chunks::<44>();
    if !rest.is_empty() {
        return Err(StoreError::unreadable("baseline", format!("{} bytes", bytes.len())));
    }
    let loss = |bytes: &[u8; 44]| {
        let (mut item, mut nats, mut tokens) = ([0; 32], [0; 8], [0; 4]);
        item.copy_from_slice(&bytes[..32]);
        nats.copy_from_slice(&bytes[32..40]);
        tokens.copy_from_slice(&bytes[40..]);
        OldLoss { item, nats: f64::from_le_bytes(nats), tokens: u32::from_le_bytes(tokens) }
    };
    Ok(losses.iter().map(loss).collect())
}

async fn find(
    db: &mut Connection,
    user: UserKey,
    generation: &GenerationId,
) -> Result<Option<SqliteRow>, StoreError> {
    let row =
        sqlx::query("SELECT items, judged, baseline FROM manifests WHERE user_id = $1 AND generation = $2")
            .bind(user.0)
            .bind(generation.as_bytes().as_slice())
            .fetch_optional(db)
            .await?;
    Ok(row)
}

fn hashes(row: &SqliteRow, column: &'static str) -> Result<Manifest, StoreError> {
    let Some(bytes) = row.try_get::<Option<&[u8]>, _>(column)? else { return Ok(Manifest::Unknown) };
    let (hashes, rest) = bytes.as_chunks::<32>();
    if !rest.is_empty() {
        return Err(StoreError::unreadable(column, format!("{} bytes", bytes.len())));
    }
    Ok(Manifest::Items(hashes.to_vec()))
}

/// Notes what has gone into a generation's weights, what it was judged by, and what updates of it are measured by.
pub(crate) async fn insert_manifest(
    db: &mut Connection,
    user: UserKey,
    generation: &GenerationId,
    learnt: &Manifest,
    judged: &Manifest,
    baseline: &[OldLoss],
) -> Result<(), StoreError> {
    let bytes = |manifest: &Manifest| match manifest {
        Manifest::Items(hashes) => Some(hashes.as_flattened().to_vec()),
        Manifest::Unknown => None,
    };
    let losses = baseline.iter().flat_map(|OldLoss { item, nats, tokens }| {
        [item.as_slice(), &nats.to_le_bytes(), &tokens.to_le_bytes()].concat()
    });
    sqlx::query(
        "INSERT INTO manifests (user_id, generation, items, judged, baseline) VALUES ($1, $2, $3, $4, $5)
         ON CONFLICT (user_id, generation) DO UPDATE SET items = excluded.items, judged = excluded.judged,
             baseline = excluded.baseline",
    )
    .bind(user.0)
    .bind(generation.as_bytes().as_slice())
    .bind(bytes(learnt))
    .bind(bytes(judged))
    .bind(losses.collect::<Vec<u8>>())
    .execute(db)
    .await?;
    Ok(())
}

/// Notes what a training cost and came to. The outcome holds what the job has cost in all: what has been noted of it
/// before is taken off.
pub(crate) async fn insert_progress(
    db: &mut Connection,
    user: UserKey,
    job: &JobId,
    lesson: &Lesson,
    outcome: &JobOutcome,
    now: Timestamp,
) -> Result<(), StoreError> {
    let gate = outcome.gate.as_ref();
    sqlx::query(
        "INSERT INTO progress (user_id, job, at, scratch, items, new_items, replayed_items, tokens, seconds,
             base_bits, head_bits, new_bits, generation)
         SELECT $1, $2, $3, $4, $5, $6, $7, max(0, $8 - COALESCE(sum(tokens), 0)),
             max(0.0, $9 - COALESCE(sum(seconds), 0.0)), $10, $11, $12, $13
         FROM progress WHERE user_id = $1 AND job = $2",
    )
    .bind(user.0)
    .bind(job.as_str())
    .bind(now.0)
    .bind(lesson.from_scratch)
    .bind(lesson.items as i64)
    .bind(lesson.new_items as i64)
    .bind(lesson.replayed_items as i64)
    .bind(outcome.trained_tokens as i64)
    .bind(outcome.seconds)
    .bind(gate.map(|gate| gate.base_bits))
    .bind(gate.and_then(|gate| gate.head_bits))
    .bind(gate.map(|gate| gate.new_bits))
    .bind(outcome.generation.as_ref().map(|id| id.as_bytes().as_slice()))
    .execute(db)
    .await?;
    Ok(())
}

/// Notes what a job is about to learn; `false` if the fence is not the latest.
pub(crate) async fn begin(db: &mut Connection, fence: &Fence, lesson: &Lesson) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE jobs SET learns_scratch = $3, learns_items = $4, learns_new = $5, learns_replayed = $6
         WHERE id = $1 AND token = $2 AND state = 'running'",
    )
    .bind(fence.job.as_str())
    .bind(fence.token)
    .bind(lesson.from_scratch)
    .bind(lesson.items as i64)
    .bind(lesson.new_items as i64)
    .bind(lesson.replayed_items as i64)
    .execute(db)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Notes what a job has cost that comes to no numbers, up to its last sign of life, if it is open and has begun to train.
/// What has been noted of it before is taken off.
pub(crate) async fn insert_unfinished(
    db: &mut Connection,
    job: &JobId,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query(concat!(
        "INSERT INTO progress (user_id, job, at, scratch, items, new_items, replayed_items, tokens, seconds)
         SELECT j.user_id, j.id, $2, j.learns_scratch, j.learns_items, j.learns_new, j.learns_replayed,
             max(0, j.spent_tokens + j.tokens
                 - ",
        booked!("tokens", "j"),
        "),
             max(0.0, j.spent_seconds
                 + CASE WHEN j.state = 'running' THEN max(0, COALESCE(j.beat_at - j.started_at, 0)) / 1000.0 ELSE 0 END
                 - ",
        booked!("seconds", "j"),
        ")
         FROM jobs j WHERE j.id = $1 AND j.state IN ('queued', 'running') AND j.learns_scratch IS NOT NULL",
    ))
    .bind(job.as_str())
    .bind(now.0)
    .execute(db)
    .await?;
    Ok(())
}

fn point(row: &SqliteRow) -> Result<(i64, ProgressPoint), StoreError> {
    let point = ProgressPoint {
        job: id(row, "job")?,
        at: time(row, "at")?,
        from_scratch: row.try_get("scratch")?,
        items: count(row, "items")?,
        new_items: count(row, "new_items")?,
        replayed_items: count(row, "replayed_items")?,
        tokens: count(row, "tokens")?,
        seconds: row.try_get("seconds")?,
        base_bits: row.try_get("base_bits")?,
        head_bits: row.try_get("head_bits")?,
        new_bits: row.try_get("new_bits")?,
        generation: generation_or_none(row, "generation")?,
    };
    Ok((row.try_get("seq")?, point))
}

/// The user's trainings after `after`, in the order in which they ended, each with its place.
pub(crate) async fn progress(
    db: &mut Connection,
    user: UserKey,
    after: i64,
    limit: u32,
) -> Result<Vec<(i64, ProgressPoint)>, StoreError> {
    let found = sqlx::query("SELECT * FROM progress WHERE user_id = $1 AND seq > $2 ORDER BY seq LIMIT $3")
        .bind(user.0)
        .bind(after)
        .bind(rows(limit))
        .fetch_all(db)
        .await?;
    found.iter().map(point).collect()
}

/// The user's updates since the last training from fresh weights, whatever came of either. What was called off does not
/// count: it came to nothing that could be judged.
pub(crate) async fn updates_since_full(db: &mut Connection, user: UserKey) -> Result<i64, StoreError> {
    let updates = sqlx::query_scalar(
        "WITH ended AS (
             SELECT p.seq, p.scratch FROM progress p JOIN jobs j ON j.id = p.job
             WHERE p.user_id = $1 AND j.state <> 'cancelled')
         SELECT count(*) FROM ended WHERE seq > COALESCE((SELECT max(seq) FROM ended WHERE scratch), 0)",
    )
    .bind(user.0)
    .fetch_one(db)
    .await?;
    Ok(updates)
}

/// Number, tokens and seconds of the user's trainings: on from the head, and from fresh weights.
pub(crate) async fn costs(db: &mut Connection, user: UserKey) -> Result<[(u64, u64, f64); 2], StoreError> {
    let found = sqlx::query(
        "SELECT scratch, count(*) AS runs, sum(tokens) AS tokens, sum(seconds) AS seconds
         FROM progress WHERE user_id = $1 GROUP BY scratch",
    )
    .bind(user.0)
    .fetch_all(db)
    .await?;
    let mut costs = [(0, 0, 0.0); 2];
    for row in &found {
        let scratch: bool = row.try_get("scratch")?;
        costs[usize::from(scratch)] = (count(row, "runs")?, count(row, "tokens")?, row.try_get("seconds")?);
    }
    Ok(costs)
}
