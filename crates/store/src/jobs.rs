//! The queue of training jobs: at most one queued and one running job per adapter.

use types::{AdapterId, Job, JobId, JobOutcome, JobProgress, TenantId, UserId};

use crate::history::ordered_uuid;
use crate::sql::jobs::Back;
use crate::sql::{self, Connection, UserKey};
use crate::{Claimed, Demand, Fence, Lesson, Page, Policy, QueueStats, Standing, Store, StoreError};

impl Store {
    /// Makes sure that a job will train on the user's history as it is now, and as `demand` says:
    /// enqueues one, or adds to the queued one. `None` if there is no such user.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn enqueue(&self, adapter: &AdapterId, demand: &Demand) -> Result<Option<Job>, StoreError> {
        let mut tx = self.write().await?;
        let Some(user) = sql::users::find(&mut tx, adapter).await? else { return Ok(None) };
        let job = self.queued_job(&mut tx, user.key, demand).await?;
        tx.commit().await?;
        Ok(Some(job))
    }

    /// The user's queued job, made if there is none. A running job does not count: it may have read
    /// the history already.
    pub(crate) async fn queued_job(
        &self,
        db: &mut Connection,
        user: UserKey,
        demand: &Demand,
    ) -> Result<Job, StoreError> {
        let now = self.now();
        let id = match sql::jobs::queued(db, user).await? {
            Some(job) => job.id,
            None => {
                let id: JobId = ordered_uuid(now).parse().expect("a uuid is a valid job id");
                sql::jobs::insert(db, user, &id, now).await?;
                id
            }
        };
        sql::jobs::demand(db, user, demand, now).await?;
        sql::jobs::queued(db, user).await?.ok_or_else(|| StoreError::not_found("job", id))
    }

    /// Calls a job off: one that waits will not run, the worker of one that runs can do nothing more with it and learns
    /// so at once. A job that has ended stays as it is. Returns the job as it is now; `None` if the tenant has no such
    /// job.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn cancel(&self, tenant: &TenantId, id: &JobId) -> Result<Option<Job>, StoreError> {
        let mut tx = self.write().await?;
        let Some(job) = sql::jobs::find(&mut tx, tenant, id).await? else { return Ok(None) };
        let called_off = self.call_off(&mut tx, id, "cancelled on request").await?;
        let job = sql::jobs::find(&mut tx, tenant, id).await?.unwrap_or(job);
        tx.commit().await?;
        if called_off {
            self.interrupt();
            self.sweep(&job.adapter).await;
        }
        Ok(Some(job))
    }

    /// Calls a job off, if it is open, and notes what it has cost.
    pub(crate) async fn call_off(
        &self,
        db: &mut Connection,
        id: &JobId,
        reason: &str,
    ) -> Result<bool, StoreError> {
        let now = self.now();
        sql::lessons::insert_unfinished(db, id, now).await?;
        sql::jobs::call_off(db, id, reason, now).await
    }

    /// [`Store::claim_ripe`] without waiting.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn claim(
        &self,
        worker: &str,
        lease_millis: i64,
        max_attempts: u32,
    ) -> Result<Option<Claimed>, StoreError> {
        self.claim_ripe(worker, lease_millis, max_attempts, &Policy::AT_ONCE).await
    }

    /// Gives `worker` the next job that can be claimed, if there is one: a queued job that `policy` lets go
    /// and whose user has no running one, or a running job whose lease has run out (its worker has crashed).
    /// Tenants take turns, whoever was served longest ago first; within a tenant the oldest job is next. Jobs
    /// of whom a pause holds are left alone.
    ///
    /// The worker must `beat` at least every `lease_millis`, or the job goes to the next one. A job
    /// that was claimed `max_attempts` times and is up for another claim is failed instead.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn claim_ripe(
        &self,
        worker: &str,
        lease_millis: i64,
        max_attempts: u32,
        policy: &Policy,
    ) -> Result<Option<Claimed>, StoreError> {
        let mut tx = self.write().await?;
        // Waiting for this turn may have taken long, and a heartbeat may wait behind it.
        let now = self.now();
        for (fence, lease_millis) in self.beats().waiting() {
            sql::jobs::beat(&mut tx, &fence, None, now, lease_millis).await?;
        }
        let given_up = sql::claims::hopeless(&mut tx, now, max_attempts.max(1)).await?;
        for job in &given_up {
            sql::lessons::insert_unfinished(&mut tx, job, now).await?;
            sql::claims::give_up(&mut tx, job, now).await?;
            sql::users::turn_down(&mut tx, job, now).await?;
        }
        let lease_until = now.plus_millis(lease_millis);
        let claimed = sql::claims::claim(&mut tx, worker, now, lease_until, policy).await?;
        tx.commit().await?;
        if !given_up.is_empty() {
            tracing::warn!(jobs = given_up.len(), max_attempts, "gave up jobs that had too many attempts");
        }
        let claimed = claimed.map(|(job, token, spent)| {
            let fence = Fence { job: job.id.clone(), token };
            Claimed { job, fence, spent }
        });
        Ok(claimed)
    }

    /// How a worker stands with a job that it has claimed; changes nothing.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn standing(&self, fence: &Fence, policy: &Policy) -> Result<Standing, StoreError> {
        let now = self.now();
        sql::claims::standing(&mut *self.read().await?, fence, now, policy).await
    }

    /// Reports that a job is being worked on (and how far it is), which extends its lease from now on. While this waits
    /// for others that write, nobody gets the job either.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if the worker has lost the job and must stop.
    pub async fn beat(
        &self,
        fence: &Fence,
        progress: Option<JobProgress>,
        lease_millis: i64,
    ) -> Result<(), StoreError> {
        let _announced = self.beats().announce(fence, lease_millis);
        let mut tx = self.write().await?;
        if !sql::jobs::beat(&mut tx, fence, progress.as_ref(), self.now(), lease_millis).await? {
            return Err(fenced(fence));
        }
        tx.commit().await?;
        Ok(())
    }

    /// Ends a job that published nothing. (One that publishes is ended by [`Store::publish`].)
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if the worker has lost the job, [`StoreError::Invalid`] if a number of
    /// the outcome is not finite.
    pub async fn finish(&self, fence: &Fence, outcome: &JobOutcome) -> Result<Job, StoreError> {
        self.finish_with(fence, outcome, None).await
    }

    /// [`Store::finish`] for a job that has trained: notes what that cost.
    ///
    /// # Errors
    /// Those of [`Store::finish`].
    pub async fn finish_lesson(
        &self,
        fence: &Fence,
        outcome: &JobOutcome,
        lesson: &Lesson,
    ) -> Result<Job, StoreError> {
        self.finish_with(fence, outcome, Some(lesson)).await
    }

    /// Notes what a job is about to learn: what that costs is booked however the job ends.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if the worker has lost the job.
    pub async fn begin_lesson(&self, fence: &Fence, lesson: &Lesson) -> Result<(), StoreError> {
        let mut tx = self.write().await?;
        if !sql::lessons::begin(&mut tx, fence, lesson).await? {
            return Err(fenced(fence));
        }
        tx.commit().await?;
        Ok(())
    }

    /// Notes what an update has cost that is of no use, and that its job learns the whole history from fresh weights
    /// from now on, also if another worker has to take it up. `outcome` holds what the job has cost by now.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if the worker has lost the job, [`StoreError::Invalid`] if a number of
    /// the outcome is not finite.
    pub async fn give_update_up(
        &self,
        fence: &Fence,
        outcome: &JobOutcome,
        lesson: &Lesson,
    ) -> Result<(), StoreError> {
        check_outcome(outcome)?;
        let mut tx = self.write().await?;
        let (user, _) = sql::jobs::last_item(&mut tx, fence).await?.ok_or_else(|| fenced(fence))?;
        sql::lessons::insert_progress(&mut tx, user, &fence.job, lesson, outcome, self.now()).await?;
        if !sql::jobs::from_scratch(&mut tx, fence).await? {
            return Err(fenced(fence));
        }
        tx.commit().await?;
        Ok(())
    }

    async fn finish_with(
        &self,
        fence: &Fence,
        outcome: &JobOutcome,
        lesson: Option<&Lesson>,
    ) -> Result<Job, StoreError> {
        check_outcome(outcome)?;
        let now = self.now();
        let mut tx = self.write().await?;
        if let Some(lesson) = lesson {
            let found = sql::jobs::last_item(&mut tx, fence).await?;
            let (user, _) = found.ok_or_else(|| fenced(fence))?;
            sql::lessons::insert_progress(&mut tx, user, &fence.job, lesson, outcome, now).await?;
            sql::users::turn_down(&mut tx, &fence.job, now).await?;
        }
        if !sql::jobs::succeed(&mut tx, fence, outcome, now).await? {
            return Err(fenced(fence));
        }
        let job = sql::jobs::of_fence(&mut tx, fence).await?.ok_or_else(|| fenced(fence))?;
        tx.commit().await?;
        self.sweep(&job.adapter).await;
        Ok(job)
    }

    /// Ends a job with an error, or gives it back to be tried again `retry_after_millis` from now
    /// (as often as `claim` allows). If the user has another queued job, that one is the next try, and waits as long: this
    /// one fails, and what it was to do beside reading the history is added to the other's demands, what it has cost to
    /// its costs, and its attempts count there.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if the worker has lost the job.
    pub async fn fail(
        &self,
        fence: &Fence,
        error: &str,
        retry_after_millis: Option<i64>,
    ) -> Result<Job, StoreError> {
        let back = retry_after_millis.map(|millis| Back {
            error: Some(error),
            not_before: self.now().plus_millis(millis),
            uncounted: 0,
        });
        self.end_badly(fence, back, error).await
    }

    /// Gives a job back untried, for a worker that is told to stop or that others wait for: the claim does not count as an
    /// attempt. If the user has another queued job, that one does the work, with the demands of both, and this one fails.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if the worker has lost the job.
    pub async fn release(&self, fence: &Fence) -> Result<Job, StoreError> {
        let back = Back { error: None, not_before: self.now(), uncounted: 1 };
        self.end_badly(fence, Some(back), "stopped in favour of a newer job").await
    }

    /// Puts a job back if it may go, or lets it fail with `error`.
    async fn end_badly(&self, fence: &Fence, back: Option<Back<'_>>, error: &str) -> Result<Job, StoreError> {
        let now = self.now();
        let mut tx = self.write().await?;
        let mut queued = false;
        match back {
            Some(back) => {
                queued = sql::jobs::requeue(&mut tx, fence, &back, now).await?;
                if !queued {
                    sql::jobs::hand_on(&mut tx, fence, &back, now).await?;
                }
            }
            None => {
                sql::lessons::insert_unfinished(&mut tx, &fence.job, now).await?;
                sql::users::turn_down(&mut tx, &fence.job, now).await?;
            }
        }
        if !queued && !sql::jobs::fail(&mut tx, fence, error, now).await? {
            return Err(fenced(fence));
        }
        let job = sql::jobs::of_fence(&mut tx, fence).await?.ok_or_else(|| fenced(fence))?;
        tx.commit().await?;
        self.sweep(&job.adapter).await;
        Ok(job)
    }

    /// A job of the tenant.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn job(&self, tenant: &TenantId, id: &JobId) -> Result<Option<Job>, StoreError> {
        sql::jobs::find(&mut *self.read().await?, tenant, id).await
    }

    /// The user's newest job; if one is open, the newest is.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn latest_job(&self, adapter: &AdapterId) -> Result<Option<Job>, StoreError> {
        let mut tx = self.read().await?;
        let Some(user) = sql::users::find(&mut tx, adapter).await? else { return Ok(None) };
        sql::jobs::latest(&mut tx, user.key).await
    }

    /// Jobs of the tenant, or of one of its users, newest first. `limit` is at least 1 (0 counts
    /// as 1). `after` must be a job of the tenant, or the page is empty.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn jobs(
        &self,
        tenant: &TenantId,
        user: Option<&UserId>,
        after: Option<&JobId>,
        limit: u32,
    ) -> Result<Page<Job, JobId>, StoreError> {
        let limit = limit.max(1);
        let mut tx = self.read().await?;
        let found = sql::jobs::list(&mut tx, tenant, user, after, limit.saturating_add(1)).await?;
        Ok(Page::cut(found, limit, |job| job.id.clone()))
    }

    /// The queue in figures, over all tenants.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn queue_stats(&self) -> Result<QueueStats, StoreError> {
        sql::jobs::stats(&mut *self.read().await?).await
    }
}

pub(crate) fn fenced(fence: &Fence) -> StoreError {
    StoreError::Fenced { job: fence.job.clone() }
}

/// JSON has no infinities and no NaN: what cannot come back is refused.
pub(crate) fn check_outcome(outcome: &JobOutcome) -> Result<(), StoreError> {
    let gate = outcome.gate.as_ref();
    let numbers =
        gate.map_or([0.0; 3], |gate| [gate.base_bits, gate.head_bits.unwrap_or(0.0), gate.new_bits]);
    if !outcome.seconds.is_finite() || numbers.iter().any(|number| !number.is_finite()) {
        return Err(StoreError::Invalid { field: "outcome", reason: "must hold finite numbers only" });
    }
    Ok(())
}
