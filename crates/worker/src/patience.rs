//! Serving comes first: training waits while requests run, but never starves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use thread_priority::{
    NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy,
    thread_native_id,
};

/// Whether requests run at this moment.
pub type Load = Arc<dyn Fn() -> bool + Send + Sync>;

/// Begins a visit of training to the processor, which ends when the value is dropped.
pub(crate) type Visits = Arc<dyn Fn() -> Box<dyn Send> + Send + Sync>;

/// How long one look at the load holds.
const GLANCE: Duration = Duration::from_millis(1);

/// Lets the calling thread run when nothing else wants the processor (`SCHED_IDLE` on Linux). False where that is not
/// possible: it runs as others do.
pub(crate) fn run_when_idle() -> bool {
    if !cfg!(target_os = "linux") {
        return false;
    }
    let policy = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
    let set = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, policy);
    if let Err(error) = &set {
        tracing::warn!(?error, "training runs at normal priority");
    }
    set.is_ok()
}

/// Waits its turn between two pieces of work.
pub(crate) struct Patience {
    load: Option<Load>,
    floor: f64,
    since: Instant,
}

impl Patience {
    /// `floor` is the share of the time, above 0 to 1, that work takes at least.
    pub(crate) fn new(load: Option<Load>, floor: f64) -> Self {
        Self { load, floor, since: Instant::now() }
    }

    /// Waits while requests run, as long as the work since the last wait allows.
    #[expect(
        clippy::disallowed_methods,
        reason = "the end of a request tells nobody; the thread does nothing else"
    )]
    pub(crate) fn wait(&mut self) {
        let Some(load) = &self.load else { return };
        let begun = Instant::now();
        let most = longest_wait(begun - self.since, self.floor);
        while load() && begun.elapsed() < most {
            std::thread::sleep(GLANCE);
        }
        self.since = Instant::now();
    }
}

/// The longest wait after `work` for which work is still `floor` of the whole.
fn longest_wait(work: Duration, floor: f64) -> Duration {
    let floor = floor.clamp(0.01, 1.0);
    work.mul_f64((1.0 - floor) / floor)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn work_keeps_its_share() {
        let second = Duration::from_secs(1);
        assert_eq!(longest_wait(second, 0.25), 3 * second);
        assert_eq!(longest_wait(second, 0.5), second);
        assert_eq!(longest_wait(second, 1.0), Duration::ZERO);
        assert_eq!(longest_wait(second, 0.0), 99 * second, "never for ever");
    }

    #[test]
    fn it_waits_until_the_requests_are_done() {
        let looks = Arc::new(AtomicU32::new(0));
        let seen = Arc::clone(&looks);
        let load: Load = Arc::new(move || seen.fetch_add(1, Ordering::Relaxed) < 3);
        let mut patience = Patience::new(Some(load), 0.01);
        patience.since -= Duration::from_secs(3600);
        patience.wait();
        assert_eq!(looks.load(Ordering::Relaxed), 4, "three looks in vain and one that lets it go");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_training_thread_is_idle() {
        let policy = std::thread::spawn(|| {
            let before = thread_priority::thread_schedule_policy();
            run_when_idle();
            (before, thread_priority::thread_schedule_policy())
        });
        let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
        let (before, after) = policy.join().expect("it ends");
        assert_eq!(after, Ok(idle));
        assert_ne!(before, Ok(idle));
    }
}
