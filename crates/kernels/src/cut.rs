//! How a product's panels are dealt out.

use std::ops::Range;

/// Panels dealt out to threads: a third of a thread's own for its first task, a third of what is left for the next, so that
/// it reads memory in long runs and nobody waits long for the last task.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    panels: usize,
    threads: usize,
    /// Of each thread.
    tasks: usize,
}

impl Cut {
    pub(crate) fn new(panels: usize, threads: usize) -> Self {
        let (mut own, mut tasks) = (panels.div_ceil(threads), 1);
        while threads > 1 && own > 1 {
            own -= own.div_ceil(3);
            tasks += 1;
        }
        Self { panels, threads, tasks }
    }

    pub(crate) fn tasks(&self) -> usize {
        self.threads * self.tasks
    }

    /// The thread whose task it is, and all panels of it.
    pub(crate) fn thread(&self, task: usize) -> (usize, Range<usize>) {
        let thread = task / self.tasks;
        (thread, self.panels * thread / self.threads..self.panels * (thread + 1) / self.threads)
    }

    pub(crate) fn panels(&self, task: usize) -> Range<usize> {
        let (_, Range { mut start, end }) = self.thread(task);
        let nth = task % self.tasks;
        for _ in 0..nth {
            start += (end - start).div_ceil(3);
        }
        start..if nth + 1 == self.tasks { end } else { start + (end - start).div_ceil(3) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_panel_is_in_one_task_and_the_last_tasks_are_small() {
        for panels in [1, 2, 3, 7, 36, 60, 192, 1537] {
            for threads in [1, 2, 3, 16, 100] {
                let cut = Cut::new(panels, threads);
                let mut next = 0;
                for task in 0..cut.tasks() {
                    let Range { start, end } = cut.panels(task);
                    assert!(
                        start == next && end >= start,
                        "task {task} of {panels} panels, {threads} threads"
                    );
                    next = end;
                    let is_last = (task + 1) % cut.tasks == 0;
                    assert!(threads == 1 || !is_last || end - start <= 1, "{start}..{end}");
                }
                assert_eq!(next, panels, "{threads} threads");
            }
        }
    }
}
