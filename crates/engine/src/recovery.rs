//! What becomes of the thread and its sequences when something in it panics.

use std::panic::{AssertUnwindSafe, catch_unwind};

#[cfg(test)]
use crate::faults::{Fault, strike};
use crate::request::Event;
use crate::runner::Runner;

/// Runs `work`, or says what it said when it panicked. What it may have left half done, the caller must not use again.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
    })
}

impl Runner {
    /// Goes on after a panic in what all sequences share, such as the plan. Whose fault it was is not known, so those who
    /// run end, or the first in the queue if nobody does: the same fault cannot come back for ever. False when nobody was
    /// there to end.
    pub(crate) fn recover(&mut self, reason: &str) -> bool {
        #[cfg(test)]
        strike(&self.faults, Fault::Recovering);
        let suspects = self.scheduler.suspects();
        self.start_over();
        for &id in &suspects {
            self.fail(id, format!("a step of the engine panicked: {reason}"));
        }
        self.outbox.send();
        self.publish_stats();
        !suspects.is_empty()
    }

    /// Gives up all blocks and the queue, in which a panic may have left half of a change, and queues all sequences anew by
    /// age. They compute their keys and values again, to the same bits.
    pub(crate) fn start_over(&mut self) {
        self.blocks = self.blocks.emptied();
        self.scheduler.clear();
        let mut ids: Vec<u64> = self.sequences.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            sequence.forget_blocks();
            self.scheduler.resume(id, sequence.prompt(), sequence.tokens.len(), sequence.group);
        }
    }

    /// Tells everybody that the engine has stopped, and why, before the thread ends.
    pub(crate) fn give_up(mut self, reason: String) {
        tracing::error!(%reason, "the engine has stopped");
        let told = Event::Failed { deadline: false, reason: format!("the engine has stopped: {reason}") };
        self.shared.stop(reason);
        let handed_in: Vec<_> = self.inbox.try_iter().map(|(_, sink)| sink).collect();
        self.shared.moved(self.taken_in + handed_in.len(), 0);
        for sink in self.sequences.into_values().map(|sequence| sequence.sink).chain(handed_in) {
            self.outbox.push(sink.letter(told.clone()));
        }
    }
}
