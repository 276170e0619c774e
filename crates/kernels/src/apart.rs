//! Where the threads of a team run: its helpers keep off the leader's processor.
//!
//! Linux may wake a helper there although another processor has nothing but idle-priority threads to run: one that has
//! just run something else does not count as free for a few milliseconds. Leader and helper wait for each other by
//! spinning, so each then keeps the other from running for whole timer ticks, and a step takes twice its time or more.

pub(crate) use system::Apart;

#[cfg(target_os = "linux")]
mod system {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_getcpu, sched_setaffinity};

    /// Keeps a team's helpers off the leader's processor.
    #[derive(Debug, Default)]
    pub(crate) struct Apart {
        /// Where the team may run; nothing if that is too few processors for it.
        allowed: Option<CpuSet>,
        helpers: Vec<OnceLock<Pid>>,
        /// The processor that the helpers keep off.
        leader: AtomicUsize,
    }

    impl Apart {
        pub(crate) fn new(threads: usize) -> Self {
            let allowed = sched_getaffinity(None).ok().filter(|set| set.count() as usize >= threads);
            let helpers = (1..threads).map(|_| OnceLock::new()).collect();
            Self { allowed, helpers, leader: AtomicUsize::new(usize::MAX) }
        }

        /// The calling thread is the helper of this index.
        pub(crate) fn register(&self, index: usize) {
            if self.helpers[index].set(gettid()).is_ok() {
                self.leader.store(usize::MAX, Ordering::Release);
            }
        }

        /// The calling thread is the leader; hardly a cost unless it has moved.
        pub(crate) fn keep(&self) {
            let Some(mut set) = self.allowed else { return };
            let here = sched_getcpu();
            if self.leader.swap(here, Ordering::AcqRel) == here {
                return;
            }
            set.unset(here);
            for helper in self.helpers.iter().filter_map(OnceLock::get) {
                // Where the system does not allow it, the helper runs as it would.
                let _refused = sched_setaffinity(Some(*helper), &set);
            }
        }
    }

    #[cfg(test)]
    #[expect(clippy::print_stdout, reason = "tests")]
    mod tests {
        use super::*;

        #[test]
        fn helpers_keep_off_the_processor_that_the_leader_runs_on() {
            let Ok(all) = sched_getaffinity(None) else { panic!("no affinity") };
            let processors: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)).collect();
            if processors.len() < 2 {
                println!("skipped: one processor");
                return;
            }
            let team = crate::Team::new(2).unwrap_or_else(|error| panic!("{error}"));
            let helper = *team.apart().helpers[0].wait();
            for here in processors.iter().chain(&processors) {
                let mut one = CpuSet::new();
                one.set(*here);
                sched_setaffinity(None, &one).unwrap_or_else(|error| panic!("{error}"));
                crate::Workers::run(&team, 2, &|_| ());
                let allowed = sched_getaffinity(Some(helper)).unwrap_or_else(|error| panic!("{error}"));
                let expected = processors.iter().filter(|cpu| *cpu != here);
                assert!(expected.into_iter().all(|cpu| allowed.is_set(*cpu)), "{here}");
                assert!(!allowed.is_set(*here), "{here}");
            }
            sched_setaffinity(None, &all).unwrap_or_else(|error| panic!("{error}"));
        }

        #[test]
        fn a_team_larger_than_the_machine_runs_where_it_will() {
            let Ok(all) = sched_getaffinity(None) else { panic!("no affinity") };
            assert!(Apart::new(all.count() as usize + 1).allowed.is_none());
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    /// Elsewhere the system alone says where threads run.
    #[derive(Debug, Default)]
    pub(crate) struct Apart;

    impl Apart {
        pub(crate) fn new(_threads: usize) -> Self {
            Self
        }

        pub(crate) fn register(&self, _index: usize) {}

        pub(crate) fn keep(&self) {}
    }
}
