//! Properties of the queue.

use std::collections::HashSet;

use store::{Demand, Fence, Policy, Spent, StoreError};
use types::{GateReport, JobOutcome, JobProgress, JobState, TrainingOptions};

use crate::trial::{ATTEMPTS, LEASE, Trial, adapter, alice, assert_fenced, bob, item, outcome, text};

pub(crate) async fn uploads_coalesce_into_the_queued_job(t: Trial) {
    let first = t.append(&alice(), vec![text("a")]).await.job.unwrap();
    assert_eq!((first.state, first.attempts, first.created_at), (JobState::Queued, 0, t.now()));
    assert_eq!(first.adapter, alice());
    t.clock.advance_millis(5);
    assert_eq!(t.append(&alice(), vec![text("b")]).await.job.unwrap(), first);
    assert_eq!(t.store.enqueue(&alice(), &Demand::default()).await.unwrap().unwrap(), first);
    let other = t.append(&bob(), vec![text("c")]).await.job.unwrap();
    assert_ne!(other.id, first.id);
    // A running job may have read the history: new items need the next one.
    let running = t.claim().await.unwrap();
    assert_eq!(running.job.id, first.id);
    let next = t.append(&alice(), vec![text("d")]).await.job.unwrap();
    assert_ne!(next.id, first.id);
    assert_eq!(t.append(&alice(), vec![text("e")]).await.job.unwrap(), next);
    assert_eq!(t.store.enqueue(&adapter("acme", "nobody"), &Demand::default()).await.unwrap(), None);
}

pub(crate) async fn duplicates_enqueue_nothing(t: Trial) {
    let queued = t.append(&alice(), vec![item("x", 1)]).await.job.unwrap();
    assert_eq!(t.append(&alice(), vec![item("x", 1)]).await.job.unwrap(), queued);
    let running = t.claim().await.unwrap();
    assert_eq!(t.append(&alice(), vec![item("x", 1)]).await.job.unwrap(), running.job);
    let finished = t.store.finish(&running.fence, &outcome(None)).await.unwrap();
    assert_eq!(t.append(&alice(), vec![item("x", 1)]).await.job.unwrap(), finished);
    assert_eq!(t.claim().await, None);
    // On demand, there is another run without new items.
    assert_eq!(t.store.enqueue(&alice(), &Demand::default()).await.unwrap().unwrap().state, JobState::Queued);
}

pub(crate) async fn the_oldest_claimable_job_is_next(t: Trial) {
    assert_eq!(t.claim().await, None);
    let users: Vec<_> = (0..5).map(|i| adapter("acme", &format!("u{}", 9 - i))).collect();
    for user in &users {
        t.append(user, vec![text("a")]).await;
    }
    t.append(&users[0], vec![text("b")]).await;
    for user in &users {
        let claimed = t.claim().await.unwrap();
        assert_eq!(&claimed.job.adapter, user);
        assert_eq!((claimed.job.state, claimed.job.attempts), (JobState::Running, 1));
        assert_eq!(claimed.job.started_at, Some(t.now()));
        assert_eq!(claimed.fence.job, claimed.job.id);
    }
    assert_eq!(t.claim().await, None);
}

pub(crate) async fn each_job_goes_to_one_worker(t: Trial) {
    for i in 0..40 {
        t.append(&adapter("acme", &format!("u{i}")), vec![text("a")]).await;
    }
    let workers = (0..8).map(|_| {
        let t = t.clone();
        tokio::spawn(async move {
            let mut got = Vec::new();
            while let Some(claimed) = t.claim().await {
                got.push(claimed.job.id);
            }
            got
        })
    });
    let mut all = Vec::new();
    for worker in workers.collect::<Vec<_>>() {
        all.extend(worker.await.unwrap());
    }
    assert_eq!(all.len(), 40);
    assert_eq!(all.into_iter().collect::<HashSet<_>>().len(), 40);
}

pub(crate) async fn a_running_job_holds_back_the_next(t: Trial) {
    let running = t.running_job(&alice()).await;
    let next = t.append(&alice(), vec![text("b")]).await.job.unwrap();
    t.append(&bob(), vec![text("c")]).await;
    assert_eq!(t.claim().await.unwrap().job.adapter, bob());
    assert_eq!(t.claim().await, None);
    t.store.finish(&running.fence, &outcome(None)).await.unwrap();
    assert_eq!(t.claim().await.unwrap().job.id, next.id);
}

pub(crate) async fn an_expired_lease_passes_the_job_on(t: Trial) {
    let first = t.running_job(&alice()).await;
    t.append(&bob(), vec![text("b")]).await;
    t.clock.advance_millis(LEASE - 1);
    assert_eq!(t.claim().await.unwrap().job.adapter, bob());
    assert_eq!(t.claim().await, None);
    t.clock.advance_millis(1);
    let second = t.store.claim("other", LEASE, ATTEMPTS).await.unwrap().unwrap();
    assert_eq!((&second.job.id, second.job.attempts), (&first.job.id, 2));
    assert!(second.fence.token > first.fence.token);
    assert_fenced(t.store.beat(&first.fence, None, LEASE).await);
    t.store.beat(&second.fence, None, LEASE).await.unwrap();
}

pub(crate) async fn a_beat_extends_the_lease(t: Trial) {
    let claimed = t.running_job(&alice()).await;
    let progress = JobProgress { step: 3, steps: 10, loss: 0.1 + 0.2, tokens: 77 };
    for _ in 0..3 {
        t.clock.advance_millis(LEASE - 1);
        t.store.beat(&claimed.fence, Some(progress), LEASE).await.unwrap();
    }
    t.store.beat(&claimed.fence, None, LEASE).await.unwrap();
    assert_eq!(t.claim().await, None);
    let job = t.store.job(&alice().tenant, &claimed.job.id).await.unwrap().unwrap();
    assert_eq!(job.progress, Some(progress));
    // A loss that is no number is a fact too.
    let progress = JobProgress { loss: f64::NAN, ..progress };
    t.store.beat(&claimed.fence, Some(progress), LEASE).await.unwrap();
    assert!(t.store.latest_job(&alice()).await.unwrap().unwrap().progress.unwrap().loss.is_nan());
    // A worker that is late but has not been replaced keeps its job; the next claim starts afresh.
    t.clock.advance_millis(2 * LEASE);
    t.store.beat(&claimed.fence, None, LEASE).await.unwrap();
    t.clock.advance_millis(LEASE);
    assert_eq!(t.claim().await.unwrap().job.progress, None);
}

pub(crate) async fn an_old_fence_can_do_nothing(t: Trial) {
    let old = t.running_job(&alice()).await;
    t.clock.advance_millis(LEASE);
    let new = t.claim().await.unwrap();
    let unknown = Fence { job: "no-such-job".parse().unwrap(), token: 1 };
    let future = Fence { token: new.fence.token + 1, ..new.fence.clone() };
    let all_refused = async |fence: &Fence| {
        assert_fenced(t.store.beat(fence, None, LEASE).await);
        assert_fenced(t.store.finish(fence, &outcome(None)).await);
        assert_fenced(t.store.fail(fence, "error", None).await);
        assert_fenced(t.store.fail(fence, "error", Some(0)).await);
        assert_fenced(t.store.release(fence).await);
    };
    for fence in [&old.fence, &unknown, &future] {
        all_refused(fence).await;
    }
    let job = t.store.latest_job(&alice()).await.unwrap().unwrap();
    assert_eq!(job, new.job);
    // Nor can the latest fence, once the job has ended.
    t.store.finish(&new.fence, &outcome(None)).await.unwrap();
    all_refused(&new.fence).await;
}

pub(crate) async fn a_job_is_given_up_after_its_attempts(t: Trial) {
    let first = t.running_job(&alice()).await;
    let next = t.append(&alice(), vec![text("b")]).await.job.unwrap();
    for attempt in 2..=ATTEMPTS {
        t.clock.advance_millis(LEASE);
        let again = t.claim().await.unwrap();
        assert_eq!((&again.job.id, again.job.attempts), (&first.job.id, attempt));
    }
    t.clock.advance_millis(LEASE);
    // The user's next job has its own attempts.
    assert_eq!(t.claim().await.unwrap().job.id, next.id);
    let job = t.store.job(&alice().tenant, &first.job.id).await.unwrap().unwrap();
    assert_eq!((job.state, job.attempts, job.finished_at), (JobState::Failed, ATTEMPTS, Some(t.now())));
    let error = job.error.unwrap();
    assert!(error.contains("gave up after 3 attempts") && error.contains("worker"), "{error}");
    // Asking for less than one attempt does not fail jobs that were never tried.
    t.append(&bob(), vec![text("c")]).await;
    assert_eq!(t.store.claim("worker", LEASE, 0).await.unwrap().unwrap().job.adapter, bob());
}

pub(crate) async fn a_failed_job_waits_for_its_retry(t: Trial) {
    let claimed = t.running_job(&alice()).await;
    let job = t.store.fail(&claimed.fence, "out of memory", Some(1000)).await.unwrap();
    assert_eq!((job.state, job.attempts, job.error.as_deref()), (JobState::Queued, 1, Some("out of memory")));
    assert_eq!(t.claim().await, None);
    // New items join the job that waits.
    assert_eq!(t.append(&alice(), vec![text("b")]).await.job.unwrap().id, job.id);
    t.clock.advance_millis(1000);
    let again = t.claim().await.unwrap();
    assert_eq!((&again.job.id, again.job.attempts, &again.job.error), (&job.id, 2, &None));
    t.store.fail(&again.fence, "out of memory", Some(0)).await.unwrap();
    let last = t.claim().await.unwrap();
    t.store.fail(&last.fence, "still out of memory", Some(0)).await.unwrap();
    assert_eq!(t.claim().await, None);
    let job = t.store.latest_job(&alice()).await.unwrap().unwrap();
    assert_eq!((job.state, job.attempts), (JobState::Failed, ATTEMPTS));
    assert!(job.error.unwrap().contains("still out of memory"));
    // Without a retry it ends at once.
    let hopeless = t.running_job(&bob()).await;
    let job = t.store.fail(&hopeless.fence, "no items", None).await.unwrap();
    assert_eq!((job.state, job.error.as_deref()), (JobState::Failed, Some("no items")));
    assert_eq!(job.finished_at, Some(t.now()));
    assert_eq!(t.claim().await, None);
}

pub(crate) async fn a_retry_yields_to_a_queued_job(t: Trial) {
    for release in [false, true] {
        let claimed = t.running_job(&alice()).await;
        let next = t.append(&alice(), vec![text("b")]).await.job.unwrap();
        let ended = match release {
            true => t.store.release(&claimed.fence).await.unwrap(),
            false => t.store.fail(&claimed.fence, "out of memory", Some(0)).await.unwrap(),
        };
        assert_eq!(ended.state, JobState::Failed);
        let other = t.claim().await.unwrap();
        assert_eq!(other.job.id, next.id);
        t.store.finish(&other.fence, &outcome(None)).await.unwrap();
    }
}

/// Items that come all the time do not take a user past the wait after a failure, nor past the last attempt.
pub(crate) async fn who_yields_hands_its_wait_on(t: Trial) {
    let mut claimed = t.running_job(&alice()).await;
    for attempt in 1..=ATTEMPTS {
        assert_eq!(claimed.job.attempts, attempt);
        let next = t.append(&alice(), vec![text("b")]).await.job.unwrap();
        t.store.fail(&claimed.fence, "training panicked", Some(1_000)).await.unwrap();
        let waits = t.store.job(&alice().tenant, &next.id).await.unwrap().unwrap();
        assert_eq!((waits.attempts, waits.error.as_deref()), (attempt, Some("training panicked")));
        assert_eq!(waits.retry_at, Some(t.now().plus_millis(1_000)));
        t.clock.advance_millis(999);
        assert_eq!(t.claim().await, None);
        t.clock.advance_millis(1);
        let Some(again) = t.claim().await else {
            assert_eq!(attempt, ATTEMPTS);
            break;
        };
        assert_eq!(again.job.id, next.id);
        claimed = again;
    }
    let given_up = t.store.latest_job(&alice()).await.unwrap().unwrap();
    assert_eq!((given_up.state, given_up.attempts), (JobState::Failed, ATTEMPTS));
    // One that is given back has not been tried, and hands no wait on.
    let released = t.running_job(&alice()).await;
    let next = t.append(&alice(), vec![text("c")]).await.job.unwrap();
    t.store.release(&released.fence).await.unwrap();
    let claimed = t.claim().await.unwrap();
    assert_eq!((&claimed.job.id, claimed.job.attempts), (&next.id, 1));
}

/// What a job was asked to do is not lost with it.
pub(crate) async fn a_job_that_yields_hands_its_demands_on(t: Trial) {
    let options = |rank| TrainingOptions { rank: Some(rank), ..TrainingOptions::default() };
    for (release, urgent) in [(false, false), (false, true), (true, false), (true, true)] {
        for own in [None, Some(options(2))] {
            t.append(&alice(), vec![text("a"), text("b")]).await;
            let all = Demand { urgent, from_scratch: true, training: Some(options(4)), new_items: 0 };
            t.store.enqueue(&alice(), &all).await.unwrap();
            let claimed = t.claim().await.unwrap();
            let next = t.append(&alice(), vec![text("c")]).await.job.unwrap();
            let training = Demand { training: own.clone(), ..Demand::default() };
            t.store.enqueue(&alice(), &training).await.unwrap();
            assert!(!next.from_scratch);
            match release {
                true => t.store.release(&claimed.fence).await.unwrap(),
                false => t.store.fail(&claimed.fence, "out of memory", Some(0)).await.unwrap(),
            };
            // The one item of its own would have to wait for others.
            let min_new_items = if urgent { 99 } else { 3 };
            let policy = Policy {
                min_new_items,
                debounce_millis: 0,
                max_staleness_millis: 1 << 40,
                ..Policy::AT_ONCE
            };
            let other = t.store.claim_ripe("worker", LEASE, ATTEMPTS, &policy).await.unwrap().unwrap();
            assert_eq!((&other.job.id, other.job.from_scratch), (&next.id, true));
            assert_eq!(other.job.training, Some(own.unwrap_or(options(4))), "the newer wish counts");
            t.store.finish(&other.fence, &outcome(None)).await.unwrap();
        }
    }
    // What has failed for good hands nothing on, and nobody hands anything to another user.
    let demand = Demand { from_scratch: true, ..Demand::default() };
    t.append(&alice(), vec![text("d")]).await;
    t.store.enqueue(&alice(), &demand).await.unwrap();
    let claimed = t.claim().await.unwrap();
    let bobs = t.append(&bob(), vec![text("b")]).await.job.unwrap();
    let next = t.append(&alice(), vec![text("e")]).await.job.unwrap();
    t.store.fail(&claimed.fence, "no items", None).await.unwrap();
    for job in [bobs, next] {
        assert!(!t.store.job(&alice().tenant, &job.id).await.unwrap().unwrap().from_scratch);
    }
    // Nor does one that is somebody else's by now.
    let old = t.claim().await.unwrap();
    t.store.enqueue(&old.job.adapter, &Demand { training: Some(options(8)), ..demand }).await.unwrap();
    let demanding = t.store.latest_job(&old.job.adapter).await.unwrap().unwrap();
    assert!(demanding.from_scratch && demanding.id != old.job.id);
    t.clock.advance_millis(LEASE);
    let new = loop {
        let claimed = t.claim().await.unwrap();
        if claimed.job.id == old.job.id {
            break claimed;
        }
    };
    assert_fenced(t.store.release(&old.fence).await);
    assert_eq!(t.store.job(&alice().tenant, &new.job.id).await.unwrap().unwrap(), new.job);
}

pub(crate) async fn a_released_job_keeps_its_attempts(t: Trial) {
    let mut claimed = t.running_job(&alice()).await;
    for _ in 0..2 * ATTEMPTS {
        let job = t.store.release(&claimed.fence).await.unwrap();
        assert_eq!((job.state, job.attempts), (JobState::Queued, 0));
        let again = t.claim().await.unwrap();
        assert_eq!((&again.job.id, again.job.attempts), (&job.id, 1));
        assert!(again.fence.token > claimed.fence.token);
        assert_fenced(t.store.beat(&claimed.fence, None, LEASE).await);
        claimed = again;
    }
}

/// What a claim has cost is there at the next, however it ended.
pub(crate) async fn costs_outlive_claims(t: Trial) {
    let at = |tokens| Some(JobProgress { step: 1, steps: 10, loss: 1.0, tokens });
    let claim = async |tokens, seconds| {
        let claimed = t.claim().await.unwrap();
        assert_eq!(claimed.spent, Spent { tokens, seconds });
        claimed
    };
    t.append(&alice(), vec![text("a")]).await;
    // Killed: up to its last heartbeat, whatever comes after.
    let killed = claim(0, 0.0).await;
    t.clock.advance_millis(4_000);
    t.store.beat(&killed.fence, at(100), LEASE).await.unwrap();
    t.clock.advance_millis(1_000);
    t.store.beat(&killed.fence, None, LEASE).await.unwrap();
    t.clock.advance_millis(LEASE);
    // Stopped, and failed: up to the end.
    let stopped = claim(100, 5.0).await;
    t.clock.advance_millis(1_000);
    t.store.beat(&stopped.fence, at(10), LEASE).await.unwrap();
    t.clock.advance_millis(1_000);
    t.store.release(&stopped.fence).await.unwrap();
    t.clock.advance_millis(60_000);
    let failed = claim(110, 7.0).await;
    t.store.beat(&failed.fence, at(5), LEASE).await.unwrap();
    t.clock.advance_millis(500);
    t.store.fail(&failed.fence, "out of memory", Some(0)).await.unwrap();
    // Yielding: to the one that takes its place.
    let yielding = claim(115, 7.5).await;
    t.store.beat(&yielding.fence, at(1), LEASE).await.unwrap();
    t.clock.advance_millis(500);
    let next = t.append(&alice(), vec![text("b")]).await.job.unwrap();
    t.store.release(&yielding.fence).await.unwrap();
    let last = claim(116, 8.0).await;
    assert_eq!(last.job.id, next.id);
    t.store.finish(&last.fence, &outcome(None)).await.unwrap();
    t.append(&alice(), vec![text("c")]).await;
    claim(0, 0.0).await;
}

pub(crate) async fn an_outcome_comes_back(t: Trial) {
    let claimed = t.running_job(&alice()).await;
    let gate = GateReport {
        train_items: 90,
        heldout_items: 10,
        heldout_tokens: 1000,
        base_bits: 3.1,
        head_bits: None,
        new_bits: 2.9,
        p_base: Some(0.01),
        p_head: None,
        head_items: None,
        verdict: "better".to_owned(),
    };
    let full = JobOutcome { gate: Some(gate.clone()), ..outcome(None) };
    for bad in [f64::NAN, f64::INFINITY] {
        let gate = GateReport { new_bits: bad, ..gate.clone() };
        let refused = t.store.finish(&claimed.fence, &JobOutcome { gate: Some(gate), ..full.clone() }).await;
        assert!(matches!(refused, Err(StoreError::Invalid { field: "outcome", .. })));
    }
    t.clock.advance_millis(100);
    let job = t.store.finish(&claimed.fence, &full).await.unwrap();
    assert_eq!((job.state, job.finished_at), (JobState::Succeeded, Some(t.now())));
    assert_eq!(job.outcome, Some(full));
    assert_eq!(t.store.job(&alice().tenant, &job.id).await.unwrap(), Some(job));
}

pub(crate) async fn jobs_are_listed(t: Trial) {
    let mut ids = Vec::new();
    for user in [alice(), bob(), alice(), alice(), bob()] {
        let claimed = t.running_job(&user).await;
        t.store.finish(&claimed.fence, &outcome(None)).await.unwrap();
        ids.insert(0, claimed.job.id);
    }
    let foreign = t.running_job(&adapter("globex", "carol")).await.job.id;
    let (tenant, user) = (alice().tenant, alice().user().unwrap().clone());
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let page = t.store.jobs(&tenant, None, after.as_ref(), 2).await.unwrap();
        all.extend(page.entries.into_iter().map(|job| job.id));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(all, ids);
    let own = t.store.jobs(&tenant, Some(&user), None, 10).await.unwrap();
    assert!(own.entries.iter().all(|job| job.adapter == alice()) && own.entries.len() == 3);
    assert_eq!(own.next, None);
    assert_eq!(t.store.jobs(&tenant, None, Some(&foreign), 10).await.unwrap().entries, []);
}

pub(crate) async fn the_queue_is_counted(t: Trial) {
    let stats = t.store.queue_stats().await.unwrap();
    assert_eq!(stats, store::QueueStats::default());
    let started = t.now();
    let running = t.running_job(&alice()).await;
    t.append(&alice(), vec![text("b")]).await;
    t.clock.advance_millis(10);
    t.append(&bob(), vec![text("c")]).await;
    let stats = t.store.queue_stats().await.unwrap();
    assert_eq!((stats.queued, stats.running, stats.oldest_queued), (2, 1, Some(started)));
    t.store.finish(&running.fence, &outcome(None)).await.unwrap();
    assert_eq!(t.store.queue_stats().await.unwrap().running, 0);
}
