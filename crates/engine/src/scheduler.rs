//! Which sequences run how many tokens in the next step: pure, without clock or tensors.
//!
//! Continuous batching (Yu et al., Orca, 2022) with chunked prefill (Agrawal et al., Sarathi-Serve, 2024):
//! sequences that decode come first, one token each; what is left of the step's token budget goes to prompts,
//! oldest first. When blocks run out, the sequence that came last gives its blocks back and starts again.

use std::collections::VecDeque;

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// The sequence.
    pub id: u64,
    /// Tokens to run.
    pub tokens: usize,
    /// Blocks to give it before.
    pub new_blocks: usize,
    /// Whether its last known token is among them, so that a new one is sampled.
    pub sample: bool,
}

/// What to do next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// Sequences that give their blocks back and wait again, before the rest happens.
    pub preempted: Vec<u64>,
    /// Sequences that leave the queue in this step.
    pub admitted: Vec<u64>,
    /// The work.
    pub work: Vec<Work>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    id: u64,
    /// Known tokens: prompt and answer so far.
    known: usize,
    /// Tokens whose keys and values are stored.
    computed: usize,
    blocks: usize,
}

/// Queue and batch.
#[derive(Debug)]
pub struct Scheduler {
    block_len: usize,
    max_running: usize,
    step_tokens: usize,
    waiting: VecDeque<Entry>,
    /// In the order of admission.
    running: Vec<Entry>,
}

impl Scheduler {
    /// A scheduler for at most `max_running` sequences and `step_tokens` tokens in a step, over blocks of
    /// `block_len` tokens.
    #[must_use]
    pub fn new(max_running: usize, step_tokens: usize, block_len: usize) -> Self {
        let step_tokens = step_tokens.max(max_running);
        Self { block_len, max_running, step_tokens, waiting: VecDeque::new(), running: Vec::new() }
    }

    /// Queues a sequence of `known` tokens.
    pub fn push(&mut self, id: u64, known: usize) {
        self.waiting.push_back(Entry { id, known, computed: 0, blocks: 0 });
    }

    /// Takes a sequence out, wherever it is.
    pub fn remove(&mut self, id: u64) {
        self.waiting.retain(|entry| entry.id != id);
        self.running.retain(|entry| entry.id != id);
    }

    /// Sequences that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences in the batch.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Decides the next step, given the number of free blocks. A sequence alone always fits the pool (the
    /// caller checks that before `push`), so every step makes progress.
    pub fn plan(&mut self, mut free: usize) -> Step {
        let mut step = Step::default();
        let mut budget = self.step_tokens;
        // Decoding sequences first, then prompts under way, each in the order of admission.
        for decoding in [true, false] {
            let mut at = 0;
            while at < self.running.len() {
                let entry = self.running[at];
                let pending = entry.known - entry.computed;
                if (pending == 1) != decoding || step.work.iter().any(|work| work.id == entry.id) {
                    at += 1;
                    continue;
                }
                let tokens = pending.min(budget);
                let need = self.blocks_for(entry.computed + tokens) - entry.blocks;
                if need > free {
                    // The newest sequence makes room; it may be this one.
                    let last = self.preempt(&mut step);
                    free += last.blocks;
                    step.work.retain(|work| {
                        if work.id == last.id {
                            free += work.new_blocks;
                            budget += work.tokens;
                        }
                        work.id != last.id
                    });
                    continue;
                }
                if tokens > 0 {
                    free -= need;
                    budget -= tokens;
                    step.work.push(Work {
                        id: entry.id,
                        tokens,
                        new_blocks: need,
                        sample: tokens == pending,
                    });
                }
                at += 1;
            }
        }
        // New ones only when nobody had to leave and the whole prompt has room.
        while step.preempted.is_empty() && budget > 0 && self.running.len() < self.max_running {
            let Some(entry) = self.waiting.front().copied() else { break };
            if self.blocks_for(entry.known) > free {
                break;
            }
            let tokens = entry.known.min(budget);
            let need = self.blocks_for(tokens);
            // The rest of the prompt is spoken for, so that the next one does not take its blocks.
            free -= self.blocks_for(entry.known);
            budget -= tokens;
            step.work.push(Work { id: entry.id, tokens, new_blocks: need, sample: tokens == entry.known });
            step.admitted.push(entry.id);
            self.running.push(entry);
            self.waiting.pop_front();
        }
        for work in &step.work {
            if let Some(entry) = self.running.iter_mut().find(|entry| entry.id == work.id) {
                entry.blocks += work.new_blocks;
            }
        }
        step
    }

    /// Records that a sequence's work of the last step is done, and whether a token was sampled and kept.
    pub fn settle(&mut self, work: &Work, sampled: bool) {
        if let Some(entry) = self.running.iter_mut().find(|entry| entry.id == work.id) {
            entry.computed += work.tokens;
            entry.known += usize::from(sampled);
        }
    }

    fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_len)
    }

    /// Sends the newest running sequence back to the head of the queue, as it was.
    fn preempt(&mut self, step: &mut Step) -> Entry {
        let last = self.running.pop().unwrap_or(Entry { id: 0, known: 0, computed: 0, blocks: 0 });
        self.waiting.push_front(Entry { computed: 0, blocks: 0, ..last });
        step.preempted.push(last.id);
        last
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs all sequences to their end over a pool of `blocks`, checking each step; returns the steps.
    fn drain(blocks: usize, sequences: &[(usize, usize)]) -> usize {
        let mut scheduler = Scheduler::new(4, 32, 16);
        let mut left: Vec<usize> = sequences.iter().map(|(_, answer)| *answer).collect();
        let mut held = vec![0; sequences.len()];
        for (id, (prompt, _)) in sequences.iter().enumerate() {
            scheduler.push(id as u64, *prompt);
        }
        let mut steps = 0;
        while scheduler.waiting() + scheduler.running() > 0 {
            steps += 1;
            assert!(steps < 10_000, "no progress");
            let free = blocks - held.iter().sum::<usize>();
            let step = scheduler.plan(free);
            for id in &step.preempted {
                held[*id as usize] = 0;
            }
            assert!(!step.work.is_empty() || !step.preempted.is_empty(), "an empty step");
            assert!(step.work.iter().map(|work| work.tokens).sum::<usize>() <= 32);
            assert!(scheduler.running() <= 4);
            for work in &step.work {
                let id = work.id as usize;
                assert!(!step.preempted.contains(&work.id));
                held[id] += work.new_blocks;
                assert!(held.iter().sum::<usize>() <= blocks, "more blocks than there are");
                if work.sample {
                    left[id] -= 1;
                }
                if work.sample && left[id] == 0 {
                    held[id] = 0;
                    scheduler.remove(work.id);
                } else {
                    scheduler.settle(work, work.sample);
                }
            }
        }
        assert!(left.iter().all(|left| *left == 0));
        steps
    }

    proptest! {
        #[test]
        fn every_sequence_ends_within_the_pool(
            sequences in prop::collection::vec((1usize..100, 1usize..40), 1..12),
            spare in 0usize..20,
        ) {
            // The pool fits the longest sequence alone, and some more.
            let longest = sequences.iter().map(|(prompt, answer)| (prompt + answer).div_ceil(16)).max();
            drain(longest.unwrap_or(1) + spare, &sequences);
        }
    }

    #[test]
    fn a_sequence_joins_a_running_batch() {
        let mut scheduler = Scheduler::new(4, 32, 16);
        scheduler.push(1, 3);
        let step = scheduler.plan(100);
        assert_eq!(step.work, [Work { id: 1, tokens: 3, new_blocks: 1, sample: true }]);
        scheduler.settle(&step.work[0], true);
        scheduler.push(2, 40);
        let step = scheduler.plan(99);
        assert_eq!(step.work[0], Work { id: 1, tokens: 1, new_blocks: 0, sample: true });
        assert_eq!(step.work[1], Work { id: 2, tokens: 31, new_blocks: 2, sample: false });
    }
}
