//! Which sequences run how many tokens in the next step: pure, without clock or tensors, from what it is told of earlier
//! steps' times.
//!
//! Continuous batching (Yu et al., Orca, 2022) with chunked prefill (Agrawal et al., Sarathi-Serve, 2024):
//! sequences that decode come first, one token each; what is left of the step's token budget goes to prompts,
//! oldest first. When blocks run out, the sequence that came last gives its blocks back and starts again. Of sequences
//! with one prompt, the first computes it and the others follow when they can share its blocks.

use std::collections::VecDeque;

use crate::allowance::Allowance;

/// The blocks of the sequences, as far as planning moves them.
pub trait Blocks {
    /// Blocks that a sequence can get.
    fn available(&self) -> usize;

    /// Gives a sequence without blocks those that hold the beginning of its tokens already, the last of them perhaps in
    /// part, and says how many tokens that is: fewer than it has. `None`, and nothing happens, unless the blocks that are still missing for all of
    /// its tokens are available.
    fn reuse(&mut self, id: u64) -> Option<usize>;

    /// Gives a sequence `count` blocks more; so many are available.
    fn grow(&mut self, id: u64, count: usize);

    /// Takes all of a sequence's blocks.
    fn release(&mut self, id: u64);
}

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// The sequence.
    pub id: u64,
    /// Tokens to run.
    pub tokens: usize,
    /// Whether its last known token is among them, so that a new one is sampled.
    pub sample: bool,
}

/// What to do next.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Step {
    /// Sequences that gave their blocks back and wait again.
    pub preempted: Vec<u64>,
    /// Sequences that leave the queue in this step.
    pub admitted: Vec<u64>,
    /// The work.
    pub work: Vec<Work>,
    /// What it costs.
    pub(crate) cost: Cost,
}

/// What a step's time depends on.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Cost {
    /// Sequences that decode.
    decoding: usize,
    /// Tokens of prompts beside them, in those that look back on nothing.
    prompts: f64,
}

impl Step {
    fn clear(&mut self) {
        self.preempted.clear();
        self.admitted.clear();
        self.work.clear();
        self.cost = Cost::default();
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    id: u64,
    /// Tokens of the prompt.
    prompt: usize,
    /// Sequences with one prompt have one mark.
    group: Option<u64>,
    /// Known tokens: prompt and answer so far.
    known: usize,
    /// Tokens whose keys and values are stored.
    computed: usize,
    blocks: usize,
}

/// What the tokens of a step may cost together.
#[derive(Debug, Clone, Copy)]
struct Budget {
    left: usize,
    /// What a token costs, if it looks back on nothing.
    token: usize,
    /// What each position costs that a token of a prompt looks back on.
    position: usize,
    /// What has been spent.
    spent: Cost,
}

impl Budget {
    fn new(left: usize, token: usize, position: usize) -> Self {
        Self { left, token, position, spent: Cost::default() }
    }

    /// What each of a sequence's tokens costs that look back on `seen` positions; none are counted of a sequence that
    /// decodes.
    fn price(&self, seen: Option<usize>) -> usize {
        self.token + self.position * seen.unwrap_or(0)
    }

    /// How many of a sequence's `pending` tokens there is room for: one, as long as there is any.
    fn affords(&self, pending: usize, seen: Option<usize>) -> usize {
        pending.min((self.left / self.price(seen)).max(1)).min(self.left)
    }

    /// What is less than a token is nothing.
    fn spend(&mut self, tokens: usize, seen: Option<usize>) {
        let cost = tokens * self.price(seen);
        match seen {
            Some(_) => self.spent.prompts += cost as f64 / self.token as f64,
            None => self.spent.decoding += tokens,
        }
        let left = self.left.saturating_sub(cost);
        self.left = if left < self.token { 0 } else { left };
    }

    fn refund(&mut self, tokens: usize) {
        self.left += tokens * self.token;
    }
}

/// Queue and batch.
#[derive(Debug)]
pub struct Scheduler {
    block_len: usize,
    max_running: usize,
    step_tokens: usize,
    parity: usize,
    allowance: Allowance,
    waiting: VecDeque<Entry>,
    /// In the order of admission.
    running: Vec<Entry>,
}

impl Scheduler {
    /// A scheduler for at most `max_running` sequences and `step_tokens` tokens in a step, over blocks of
    /// `block_len` tokens. A token that looks back on `parity` positions takes twice as long as the first one.
    #[must_use]
    pub fn new(max_running: usize, step_tokens: usize, block_len: usize, parity: usize) -> Self {
        let (step_tokens, parity) = (step_tokens.max(max_running), parity.max(1));
        let (allowance, waiting, running) = (Allowance::default(), VecDeque::new(), Vec::new());
        Self { block_len, max_running, step_tokens, parity, allowance, waiting, running }
    }

    /// Queues a sequence. While one of its `group` computes the prompt, it waits in order to share the blocks.
    pub fn push(&mut self, id: u64, prompt: usize, group: Option<u64>) {
        self.resume(id, prompt, prompt, group);
    }

    /// Queues a sequence that has `known` tokens by now, none of which are computed.
    pub(crate) fn resume(&mut self, id: u64, prompt: usize, known: usize, group: Option<u64>) {
        self.waiting.push_back(Entry { id, prompt, group, known, computed: 0, blocks: 0 });
    }

    /// Forgets all sequences.
    pub(crate) fn clear(&mut self) {
        self.waiting.clear();
        self.running.clear();
    }

    /// Those whom a failed plan may be due to: who runs, or else who is first in the queue.
    pub(crate) fn suspects(&self) -> Vec<u64> {
        let first = self.waiting.front().filter(|_| self.running.is_empty());
        self.running.iter().chain(first).map(|entry| entry.id).collect()
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

    /// Decides the next step, in place of what `step` held, and moves the blocks accordingly. A sequence alone always
    /// fits the pool (the caller checks that before `push`), so every step makes progress.
    pub fn plan(&mut self, blocks: &mut impl Blocks, step: &mut Step) {
        step.clear();
        let mut budget = self.budget();
        // Decoding sequences first, then prompts under way, each in the order of admission.
        for decoding in [true, false] {
            let mut at = 0;
            while at < self.running.len() {
                let entry = self.running[at];
                let pending = entry.known - entry.computed;
                if (pending == 1) != decoding {
                    at += 1;
                    continue;
                }
                let seen = (!decoding).then_some(entry.computed);
                let tokens = budget.affords(pending, seen);
                let need = self.blocks_for(entry.computed + tokens).saturating_sub(entry.blocks);
                if need > blocks.available() {
                    // The newest sequence makes room; it may be this one. What others share with it stays theirs.
                    let last = self.preempt(blocks, step);
                    step.work.retain(|work| {
                        if work.id == last {
                            budget.refund(work.tokens);
                        }
                        work.id != last
                    });
                    continue;
                }
                if tokens > 0 {
                    budget.spend(tokens, seen);
                    self.running[at].blocks += need;
                    blocks.grow(entry.id, need);
                    step.work.push(Work { id: entry.id, tokens, sample: tokens == pending });
                }
                at += 1;
            }
        }
        // New ones only when nobody had to leave.
        if step.preempted.is_empty() {
            self.admit(blocks, &mut budget, step);
        }
        step.cost = budget.spent;
    }

    /// Room in the next step for one token of each sequence that decodes, and for the prompts as much as there is time
    /// for ([`Allowance`]), or the square of their share among all sequences if that is more. A long prompt beside many who decode
    /// goes in small pieces; many prompts beside few who decode, as in a burst, go in large ones. All of them shrink as they
    /// look back on more.
    fn budget(&self) -> Budget {
        let decoding = self.running.iter().filter(|entry| entry.known - entry.computed == 1).count();
        let room = self.max_running - self.running.len();
        let prompts = self.running.len() - decoding + self.waiting.len().min(room);
        if decoding == 0 || prompts == 0 {
            return Budget::new(self.step_tokens, 1, 0);
        }
        let share = (self.step_tokens * prompts * prompts / (prompts + decoding).pow(2)) as f64;
        let rests = share < Allowance::most(decoding) && self.allowance.rests(decoding);
        let prompts = if rests { 0.0 } else { share.max(self.allowance.tokens(decoding)) };
        let prompts = prompts.min((self.step_tokens - decoding) as f64);
        let left = decoding * self.parity + (prompts * self.parity as f64) as usize;
        Budget::new(left, self.parity, 1)
    }

    /// A planned step took so many seconds.
    pub(crate) fn measured(&mut self, step: &Step, seconds: f64) {
        if !step.preempted.is_empty() {
            // Part of what was counted did not run.
            return;
        }
        self.allowance.measured(step.cost.decoding, step.cost.prompts, seconds);
    }

    /// Lets in those who wait, in their order, as long as the whole of the next one has room.
    fn admit(&mut self, blocks: &mut impl Blocks, budget: &mut Budget, step: &mut Step) {
        let mut at = 0;
        while budget.left > 0 && self.running.len() < self.max_running {
            let Some(mut entry) = self.waiting.get(at).copied() else { break };
            if self.prompt_is_under_way(&entry) {
                at += 1;
                continue;
            }
            // As long as there is budget, all that run have got the blocks of their prompts.
            let Some(cached) = blocks.reuse(entry.id) else { break };
            let tokens = budget.affords(entry.known - cached, Some(cached));
            let held = self.blocks_for(cached);
            let need = self.blocks_for(cached + tokens).saturating_sub(held);
            blocks.grow(entry.id, need);
            (entry.computed, entry.blocks) = (cached, held + need);
            budget.spend(tokens, Some(cached));
            step.work.push(Work { id: entry.id, tokens, sample: cached + tokens == entry.known });
            step.admitted.push(entry.id);
            self.running.push(entry);
            self.waiting.remove(at);
        }
    }

    /// Whether a running sequence of the same group has not stored all blocks yet that the others can share.
    fn prompt_is_under_way(&self, entry: &Entry) -> bool {
        let shared = |mate: &Entry| mate.prompt.saturating_sub(1) / self.block_len * self.block_len;
        let mut mates = self.running.iter().filter(|mate| mate.group == entry.group);
        entry.group.is_some() && mates.any(|mate| mate.computed < shared(mate))
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
    fn preempt(&mut self, blocks: &mut impl Blocks, step: &mut Step) -> u64 {
        let Some(last) = self.running.pop() else { return u64::MAX };
        blocks.release(last.id);
        self.waiting.push_front(Entry { computed: 0, blocks: 0, ..last });
        step.preempted.push(last.id);
        last.id
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
