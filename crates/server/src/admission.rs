//! Who may start now: a few sequences of each user at a time, a bounded number of requests that wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use types::AdapterId;

use crate::error::{ApiError, Code};
use crate::fault::{overloaded, unavailable};
use crate::limits::Limits;

/// When to come back if a user's own queue is full.
const USER_RETRY: Duration = Duration::from_secs(1);

/// Admits requests that name a user. What names none is bounded by the engine's queue alone. Clones share the state.
#[derive(Clone)]
pub(crate) struct Admission(Arc<Inner>);

struct Inner {
    /// Users with requests under way, and only those.
    users: DashMap<AdapterId, Arc<Gate>>,
    waiting: AtomicUsize,
    in_flight_per_user: usize,
    queued_per_user: usize,
    queued: usize,
    patience: Duration,
}

struct Gate {
    turns: Arc<Semaphore>,
    waiting: AtomicUsize,
}

/// The right to run; given back when dropped.
pub(crate) struct Permit {
    // Dropped in this order: the turn is free before the user may be forgotten.
    _turn: Option<OwnedSemaphorePermit>,
    _place: Option<Place>,
}

/// Keeps a user's gate in the map.
struct Place {
    inner: Arc<Inner>,
    user: AdapterId,
    gate: Option<Arc<Gate>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.gate = None;
        self.inner.users.remove_if(&self.user, |_, gate| Arc::strong_count(gate) == 1);
    }
}

/// One more that waits, as long as this lives.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn enter(count: &'a AtomicUsize, limit: usize) -> Option<Self> {
        let more = |waiting| (waiting < limit).then_some(waiting + 1);
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self(count))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Admission {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self(Arc::new(Inner {
            users: DashMap::new(),
            waiting: AtomicUsize::new(0),
            in_flight_per_user: limits.in_flight_per_user,
            queued_per_user: limits.queued_per_user,
            queued: limits.queued,
            patience: limits.queue_timeout,
        }))
    }

    /// Requests that wait for their turn.
    pub(crate) fn waiting(&self) -> usize {
        self.0.waiting.load(Ordering::Relaxed)
    }

    /// Waits until `user` may run `sequences` more.
    pub(crate) async fn enter(&self, user: Option<AdapterId>, sequences: usize) -> Result<Permit, ApiError> {
        let Some(user) = user else { return Ok(Permit { _turn: None, _place: None }) };
        let inner = &self.0;
        let new_gate = || {
            let turns = Arc::new(Semaphore::new(inner.in_flight_per_user));
            Arc::new(Gate { turns, waiting: AtomicUsize::new(0) })
        };
        let gate = Arc::clone(&inner.users.entry(user.clone()).or_insert_with(new_gate));
        let place = Place { inner: Arc::clone(inner), user, gate: Some(Arc::clone(&gate)) };
        // A request for more than a user may have at once takes all of it.
        let turns = sequences.clamp(1, inner.in_flight_per_user) as u32;
        let turn = match Arc::clone(&gate.turns).try_acquire_many_owned(turns) {
            Ok(turn) => turn,
            Err(_) => inner.wait(&gate, turns).await?,
        };
        Ok(Permit { _turn: Some(turn), _place: Some(place) })
    }
}

impl Inner {
    async fn wait(&self, gate: &Gate, turns: u32) -> Result<OwnedSemaphorePermit, ApiError> {
        let busy = |message: &str| ApiError::new(Code::RateLimited, message).retry_after(USER_RETRY);
        let _of_user = Waiting::enter(&gate.waiting, self.queued_per_user)
            .ok_or_else(|| busy("too many requests of this user wait: try again"))?;
        let _of_all = Waiting::enter(&self.waiting, self.queued)
            .ok_or_else(|| overloaded("too many requests wait: try again"))?;
        let turn = Arc::clone(&gate.turns).acquire_many_owned(turns);
        match tokio::time::timeout(self.patience, turn).await {
            Ok(turn) => turn.map_err(unavailable),
            Err(_) => Err(busy("earlier requests of this user took too long: try again")),
        }
    }
}

#[cfg(test)]
mod tests {
    use types::{TenantId, UserId};

    use super::*;

    fn admission(queued: usize) -> Admission {
        let limits = Limits {
            in_flight_per_user: 2,
            queued_per_user: 1,
            queued,
            queue_timeout: Duration::from_millis(20),
            ..Limits::default()
        };
        Admission::new(&limits)
    }

    fn user(name: &str) -> Option<AdapterId> {
        let tenant: TenantId = "t".parse().expect("tenant");
        Some(AdapterId::new(tenant, name.parse::<UserId>().expect("user")))
    }

    async fn code(admission: &Admission, name: &str) -> Option<Code> {
        admission.enter(user(name), 1).await.err().map(|error| error.code())
    }

    #[tokio::test]
    async fn each_user_has_turns_and_a_queue() {
        let admission = admission(8);
        let first = admission.enter(user("ann"), 1).await.expect("free");
        let second = admission.enter(user("ann"), 1).await.expect("free");
        assert_eq!(code(&admission, "bob").await, None);
        let third = tokio::spawn({
            let admission = admission.clone();
            async move { admission.enter(user("ann"), 1).await }
        });
        while admission.waiting() == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(code(&admission, "ann").await, Some(Code::RateLimited), "the queue is full");
        drop(first);
        let third = third.await.expect("joins").expect("its turn");
        assert_eq!(code(&admission, "ann").await, Some(Code::RateLimited), "it took too long");
        drop((second, third));
        assert_eq!(code(&admission, "ann").await, None);
        assert!(admission.0.users.is_empty(), "idle users are forgotten");
        assert_eq!(admission.waiting(), 0);
    }

    #[tokio::test]
    async fn the_queue_of_all_is_bounded() {
        let admission = admission(0);
        let _held = admission.enter(user("ann"), 7).await.expect("more than all is all");
        assert_eq!(code(&admission, "ann").await, Some(Code::Overloaded));
        assert!(admission.enter(None, 100).await.is_ok(), "nobody's requests are not counted");
    }
}
