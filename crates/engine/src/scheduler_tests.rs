//! Plans over a real pool of blocks, without a model: nothing leaks, nothing stalls, nothing is shared that must not be.

use std::collections::HashMap;
use std::sync::Arc;

use model::BLOCK_LEN;
use proptest::prelude::*;

use super::*;
use crate::blocks::{BlockPool, BlockTable, Scope};

const STEP_TOKENS: usize = 32;
const MAX_RUNNING: usize = 4;
const PARITY: usize = 20;

/// A sequence to run.
#[derive(Debug, Clone)]
struct Case {
    prompt: Vec<u32>,
    answer: usize,
    tenant: bool,
    group: Option<u64>,
    /// Cancelled after so many steps.
    leaves: Option<usize>,
}

struct Running {
    case: Case,
    scope: Arc<Scope>,
    tokens: Vec<u32>,
    computed: usize,
    cached: usize,
    table: BlockTable,
}

/// The sequences' tables over one pool, and what a model would have stored: by block, the scope and all tokens up to
/// each position.
struct World {
    pool: BlockPool,
    sequences: HashMap<u64, Running>,
    stored: HashMap<(u32, usize), (Arc<Scope>, Vec<u32>)>,
    preemptions: usize,
    computed: usize,
    /// Steps in which a piece of a prompt ran beside sequences that decode.
    mixed: usize,
    /// Tokens that were there because a block was copied.
    copied: usize,
    fault: Option<Fault>,
}

/// Seeded bugs.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// A block that was to be copied is not.
    NoCopy,
}

impl Blocks for World {
    fn available(&self) -> usize {
        self.pool.available()
    }

    fn reuse(&mut self, id: u64) -> Option<usize> {
        let sequence = self.sequences.get_mut(&id)?;
        let reused = self.pool.reuse(&mut sequence.table, &sequence.scope, &sequence.tokens)?;
        let cached = reused.tokens;
        assert!(cached < sequence.tokens.len());
        if let Some(copy) = reused.copy.filter(|_| self.fault != Some(Fault::NoCopy)) {
            for at in 0..BLOCK_LEN {
                let content = self.stored[&(copy.from, at)].clone();
                self.stored.insert((copy.to, at), content);
            }
        }
        self.copied += cached % BLOCK_LEN;
        (sequence.computed, sequence.cached) = (cached, cached);
        Some(cached)
    }

    fn grow(&mut self, id: u64, count: usize) {
        assert!(count <= self.pool.available(), "more blocks than there are");
        if let Some(sequence) = self.sequences.get_mut(&id) {
            self.pool.grow(&mut sequence.table, count);
        }
    }

    fn release(&mut self, id: u64) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            self.pool.release(&mut sequence.table);
            sequence.computed = 0;
        }
    }
}

impl World {
    fn new(blocks: u32, sharing: bool) -> Self {
        Self {
            pool: BlockPool::new(blocks, sharing),
            sequences: HashMap::new(),
            stored: HashMap::new(),
            preemptions: 0,
            computed: 0,
            mixed: 0,
            copied: 0,
            fault: None,
        }
    }

    fn add(&mut self, scheduler: &mut Scheduler, id: u64, case: &Case) {
        scheduler.push(id, case.prompt.len(), case.group);
        let tenant = if case.tenant { "t" } else { "u" }.parse().expect("an id");
        let sequence = Running {
            scope: Arc::new(Scope { tenant, adapter: None }),
            tokens: case.prompt.clone(),
            case: case.clone(),
            computed: 0,
            cached: 0,
            table: BlockTable::default(),
        };
        self.sequences.insert(id, sequence);
    }

    fn check(&self) {
        self.pool.check(self.sequences.values().map(|sequence| &sequence.table));
    }

    /// Stores what the model would store and reads what it would read; true when the sequence has ended.
    fn run(&mut self, work: &Work) -> bool {
        let sequence = self.sequences.get_mut(&work.id).expect("it is there");
        let end = sequence.computed + work.tokens;
        let blocks = sequence.table.blocks();
        assert!(end <= blocks.len() * BLOCK_LEN, "its blocks reach so far");
        for at in sequence.computed..end {
            let content = (Arc::clone(&sequence.scope), sequence.tokens[..=at].to_vec());
            self.stored.insert((blocks[at / BLOCK_LEN], at % BLOCK_LEN), content);
        }
        for at in 0..end {
            let stored = self.stored.get(&(blocks[at / BLOCK_LEN], at % BLOCK_LEN));
            let own = |(scope, tokens): &(Arc<Scope>, Vec<u32>)| {
                *scope == sequence.scope && *tokens == sequence.tokens[..=at]
            };
            assert!(stored.is_some_and(own), "another one's keys");
        }
        sequence.computed = end;
        self.computed += work.tokens;
        if work.sample {
            assert_eq!(end, sequence.tokens.len());
            // As greedy decoding does: alike after alike.
            sequence.tokens.push(sequence.tokens.iter().sum::<u32>() % 5);
        }
        self.pool.publish(&mut sequence.table, &sequence.scope, &sequence.tokens[..end]);
        sequence.tokens.len() == sequence.case.prompt.len() + sequence.case.answer
    }

    fn end(&mut self, scheduler: &mut Scheduler, id: u64) {
        scheduler.remove(id);
        if let Some(mut sequence) = self.sequences.remove(&id) {
            self.pool.release(&mut sequence.table);
        }
    }

    /// Runs all sequences to their end, checking each step.
    fn drain(&mut self, cases: &[Case]) {
        let mut scheduler = Scheduler::new(MAX_RUNNING, STEP_TOKENS, BLOCK_LEN, PARITY);
        for (id, case) in (0..).zip(cases) {
            self.add(&mut scheduler, id, case);
        }
        for step_number in 0.. {
            if scheduler.waiting() + scheduler.running() == 0 {
                break;
            }
            assert!(step_number < 10_000, "no progress");
            for (id, case) in (0..).zip(cases) {
                if case.leaves == Some(step_number) {
                    self.end(&mut scheduler, id);
                }
            }
            let decoding = decoding(&scheduler);
            let step = plan(&mut scheduler, self);
            self.check();
            // Who decodes runs in every step, whatever prompts run beside it, and however long they are.
            for &id in &decoding {
                let runs = step.work.contains(&Work { id, tokens: 1, sample: true });
                assert!(runs || step.preempted.contains(&id), "{id} waits for a prompt");
            }
            let piece = |work: &Work| !work.sample || work.tokens > 1;
            self.mixed += usize::from(!decoding.is_empty() && step.work.iter().any(piece));
            self.preemptions += step.preempted.len();
            let left = scheduler.waiting() + scheduler.running();
            assert!(left == 0 || !step.work.is_empty() || !step.preempted.is_empty(), "an empty step");
            assert!(step.work.iter().map(|work| work.tokens).sum::<usize>() <= STEP_TOKENS);
            assert!(scheduler.running() <= MAX_RUNNING);
            for work in &step.work {
                assert!(!step.preempted.contains(&work.id));
                if self.run(work) {
                    self.end(&mut scheduler, work.id);
                } else {
                    scheduler.settle(work, work.sample);
                }
            }
            self.check();
        }
        assert!(self.sequences.is_empty());
        assert_eq!(self.pool.available(), self.pool.blocks(), "every block is free or idle");
    }
}

fn blocks_of(cases: &[Case]) -> usize {
    cases.iter().map(|case| (case.prompt.len() + case.answer).div_ceil(BLOCK_LEN)).max().unwrap_or(1)
}

/// Prompts that often begin alike: cut from one of three texts.
fn case() -> impl Strategy<Value = Case> {
    let parts = (0u32..3, 1usize..100, 1usize..40, any::<bool>());
    let marks = (prop::option::of(0u64..3), prop::option::weighted(0.2, 0usize..30));
    (parts, marks).prop_map(|((text, prompt, answer, tenant), (group, leaves))| Case {
        prompt: (0..prompt as u32).map(|at| if at < 20 { at } else { at * text } % 5).collect(),
        answer,
        tenant,
        group,
        leaves,
    })
}

proptest! {
    #[test]
    fn every_sequence_ends_within_the_pool(
        cases in prop::collection::vec(case(), 1..12),
        spare in 0usize..20,
        sharing in any::<bool>(),
    ) {
        // The pool fits the longest sequence alone, and some more.
        World::new((blocks_of(&cases) + spare) as u32, sharing).drain(&cases);
    }
}

/// The running sequences of which one token is left to compute.
fn decoding(scheduler: &Scheduler) -> Vec<u64> {
    let decode = scheduler.running.iter().filter(|entry| entry.known - entry.computed == 1);
    decode.map(|entry| entry.id).collect()
}

fn plan(scheduler: &mut Scheduler, world: &mut World) -> Step {
    let mut step = Step::default();
    scheduler.plan(world, &mut step);
    step
}

/// Positions that count for nothing.
const FAR: usize = 1 << 30;

fn plain(prompt: u32, answer: usize) -> Case {
    Case { prompt: (0..prompt).collect(), answer, tenant: true, group: None, leaves: None }
}

#[test]
fn a_sequence_joins_a_running_batch() {
    let mut scheduler = Scheduler::new(4, 32, 16, FAR);
    let mut world = World::new(100, true);
    world.add(&mut scheduler, 1, &plain(3, 9));
    let step = plan(&mut scheduler, &mut world);
    assert_eq!(step.work, [Work { id: 1, tokens: 3, sample: true }]);
    world.run(&step.work[0]);
    scheduler.settle(&step.work[0], true);
    world.add(&mut scheduler, 2, &plain(40, 9));
    let step = plan(&mut scheduler, &mut world);
    assert_eq!(step.work[0], Work { id: 1, tokens: 1, sample: true });
    // Half of those who run are prompts: a quarter of the step.
    assert_eq!(step.work[1], Work { id: 2, tokens: 8, sample: false });
    assert_eq!(world.sequences[&2].table.blocks().len(), 1);
}

#[test]
fn prompts_get_the_square_of_their_share() {
    let tokens = |decoding: u64, prompts: u64| {
        let mut scheduler = Scheduler::new(16, 256, 16, FAR);
        let mut world = World::new(1000, true);
        for id in 0..decoding {
            world.add(&mut scheduler, id, &Case { tenant: false, ..plain(3 + id as u32, 9) });
        }
        let step = plan(&mut scheduler, &mut world);
        step.work.iter().for_each(|work| scheduler.settle(work, true));
        for id in 0..prompts {
            world.add(&mut scheduler, 100 + id, &plain(300 + id as u32, 9));
        }
        let step = plan(&mut scheduler, &mut world);
        step.work.iter().filter(|work| work.id >= 100).map(|work| work.tokens).sum::<usize>()
    };
    assert_eq!(tokens(0, 1), 256, "nobody waits");
    assert_eq!(tokens(1, 1), 64);
    assert_eq!(tokens(8, 1), 4, "half of those who decode");
    assert_eq!(tokens(4, 12), 144);
    assert_eq!(tokens(15, 9), 7, "half of them; only one can run");
}

#[test]
fn a_prompts_pieces_shrink_as_they_look_back_on_more() {
    // What the prompt had computed before each of its pieces, and their tokens, beside so many who decode.
    let pieces = |decoding: u64, parity: usize| {
        let mut scheduler = Scheduler::new(16, 128, 16, parity);
        let mut world = World::new(200, true);
        for id in 0..decoding {
            world.add(&mut scheduler, id, &Case { tenant: false, ..plain(3 + id as u32, 99) });
        }
        let mut pieces = Vec::new();
        for turn in 0..9 {
            if turn == 1 {
                world.add(&mut scheduler, 99, &plain(300, 9));
            }
            let step = plan(&mut scheduler, &mut world);
            for work in &step.work {
                let looks_back_on = world.sequences[&work.id].computed;
                pieces.extend((work.id == 99).then_some((looks_back_on, work.tokens)));
                world.run(work);
                scheduler.settle(work, work.sample);
            }
        }
        // Where nobody waits, it gets all there is.
        (0..decoding).for_each(|id| world.end(&mut scheduler, id));
        assert!(plan(&mut scheduler, &mut world).work[0].tokens > 100);
        pieces
    };
    // A quarter of the step, where 100 positions cost as much as a token.
    let beside_one = pieces(1, 100);
    assert_eq!(beside_one[..4], [(0, 32), (32, 24), (56, 20), (76, 18)]);
    assert!(beside_one.iter().all(|&(back, tokens)| tokens * (100 + back) <= 32 * 100));
    // Half as many as decode.
    assert_eq!(pieces(12, 100)[..4], [(0, 6), (6, 5), (11, 5), (16, 5)]);
    // One, where that is more than there is time for.
    assert_eq!(pieces(12, 1)[..4], [(0, 6), (6, 1), (7, 1), (8, 1)]);
}

/// Eight who decode beside a prompt of 2,000 tokens, on a machine where a step takes 4 ms and so many seconds more for each
/// row beyond the first, and for 1,000 positions that a prompt's token looks back on as long as for so many rows: how much
/// longer than without the prompt the longest step takes, and how many steps the prompt. The scheduler takes a thousand
/// positions for a row, and is told of the times, or not.
fn beside_a_long_prompt(row: f64, rows: f64, told: bool) -> (f64, usize) {
    let mut scheduler = Scheduler::new(16, 256, 16, 1000);
    let mut world = World::new(1000, false);
    for id in 0..8 {
        world.add(&mut scheduler, id, &Case { tenant: false, ..plain(3 + id as u32, 3000) });
    }
    let (mut longest, mut steps) = (0.0f64, 0);
    for turn in 0..2500 {
        if turn == 50 {
            world.add(&mut scheduler, 99, &plain(2000, 9));
        }
        let step = plan(&mut scheduler, &mut world);
        let mut seconds = 4e-3 - row;
        for work in &step.work {
            let back = world.sequences[&work.id].computed;
            let back = if work.id == 99 { back as f64 / 1000.0 } else { 0.0 };
            seconds += row * work.tokens as f64 * (1.0 + rows * back);
            scheduler.settle(work, work.sample);
            let sequence = world.sequences.get_mut(&work.id).expect("it is there");
            sequence.computed += work.tokens;
            sequence.tokens.extend(work.sample.then_some(0));
        }
        if told {
            scheduler.measured(&step, seconds);
        }
        if turn > 70 {
            longest = longest.max(seconds / (4e-3 + 7.0 * row));
        }
        steps += usize::from(turn >= 50);
        if step.work.iter().any(|work| work.id == 99 && work.sample) {
            break;
        }
    }
    (longest, steps)
}

#[test]
fn a_long_prompt_takes_the_time_there_is() {
    // Rows as dear as where arithmetic is the bound: half as many as decode are about what there is time for.
    let (longest, steps) = beside_a_long_prompt(0.55e-3, 1.0, true);
    assert!((1.2..1.5).contains(&longest) && (600..1000).contains(&steps), "{longest}, {steps}");
    // Where attention takes longer than the scheduler thinks. Negative control: it is not told of the times.
    let (longest, _) = beside_a_long_prompt(0.55e-3, 3.0, true);
    assert!(longest < 1.5, "{longest}");
    let (longest, slow) = beside_a_long_prompt(0.55e-3, 3.0, false);
    assert!(longest > 1.5, "{longest}");
    // Where rows cost little, the prompt is sooner done.
    let (longest, steps) = beside_a_long_prompt(0.05e-3, 1.0, true);
    assert!(longest < 1.5 && 2 * steps < slow, "{longest}, {steps} of {slow}");
}

#[test]
fn who_decodes_runs_in_every_step_beside_a_long_prompt() {
    let mut world = World::new(64, true);
    world.drain(&[plain(3, 40), plain(4, 40), Case { tenant: false, ..plain(5, 40) }, plain(99, 5)]);
    // Ninety and more tokens in pieces of at most half as many as decode, or a quarter of the step.
    assert!(world.mixed >= 10, "{} steps", world.mixed);
}

#[test]
fn who_waits_for_room_is_not_overtaken() {
    let mut scheduler = Scheduler::new(4, 64, 16, FAR);
    let mut world = World::new(4, true);
    world.add(&mut scheduler, 1, &plain(20, 9));
    world.add(&mut scheduler, 2, &Case { tenant: false, ..plain(33, 9) });
    world.add(&mut scheduler, 3, &plain(5, 9));
    let step = plan(&mut scheduler, &mut world);
    assert_eq!(step.admitted, [1], "the second needs three blocks and two are left");
    world.run(&step.work[0]);
    scheduler.settle(&step.work[0], true);
    assert!(plan(&mut scheduler, &mut world).admitted.is_empty());
    world.end(&mut scheduler, 2);
    // One like the first shares a block with it and needs but two.
    scheduler.remove(3);
    world.add(&mut scheduler, 4, &plain(33, 9));
    assert_eq!(plan(&mut scheduler, &mut world).admitted, [4]);
    world.check();
}

#[test]
fn a_group_computes_its_prompt_once() {
    let computed = |prompt, group| {
        let cases: Vec<Case> = (0..4).map(|_| Case { group, ..plain(prompt, 5) }).collect();
        let mut world = World::new(64, true);
        world.drain(&cases);
        world.computed
    };
    let answers = 4 * 4;
    assert_eq!(computed(100, Some(7)), 100 + 3 * 4 + answers);
    assert_eq!(computed(24, Some(7)), 24 + 3 * 8 + answers);
    // Negative control: the second of those that do not wait computes it beside the first.
    assert_eq!(computed(24, None), 24 + 24 + 2 * 8 + answers);
}

#[test]
fn others_pass_a_group_that_waits() {
    let mut scheduler = Scheduler::new(4, 128, 16, FAR);
    let mut world = World::new(100, true);
    for id in 0..3 {
        world.add(&mut scheduler, id, &Case { group: Some(1), ..plain(24, 9) });
    }
    world.add(&mut scheduler, 3, &Case { tenant: false, ..plain(20, 9) });
    let step = plan(&mut scheduler, &mut world);
    assert_eq!(step.admitted, [0, 3]);
    for work in &step.work {
        world.run(work);
        scheduler.settle(work, work.sample);
    }
    let step = plan(&mut scheduler, &mut world);
    assert_eq!(step.admitted, [1, 2]);
    assert_eq!((world.sequences[&1].cached, world.sequences[&2].cached), (16, 16));
}

#[test]
fn preemption_takes_no_shared_block() {
    // Four sequences share six blocks and grow by three each, over a pool of twelve: some must leave, and come back.
    let cases: Vec<Case> = (0..4u32)
        .map(|id| {
            let mut case = Case { group: Some(1), ..plain(100, 40) };
            case.prompt[99] = id;
            case
        })
        .collect();
    let mut world = World::new(12, true);
    world.drain(&cases);
    assert!(world.preemptions > 0);
    assert!(world.pool.evictions() > 0);
    // Recomputing all of every prompt would be 400 and more.
    assert!(world.computed < 400, "{}", world.computed);
}

/// Four texts that part within a block, one after the other.
fn parting() -> Vec<Case> {
    let texts = [60, 24, 20, 24].map(|agrees| {
        let mut case = plain(60, 5);
        case.prompt[agrees..].iter_mut().for_each(|token| *token += 100 + agrees as u32);
        case
    });
    texts.into()
}

#[test]
fn what_agrees_within_a_block_is_copied() {
    let mut world = World::new(64, true);
    for case in parting() {
        world.drain(&[case]);
    }
    // Eight and four tokens after the block in common; the fourth is the second again, all but the last token of it.
    assert_eq!((world.copied, world.computed), (8 + 4 + 11, 60 + (60 - 24) + (60 - 20) + 1 + 4 * 4));
}

#[test]
#[should_panic(expected = "another one's keys")]
fn a_copy_that_is_forgotten_is_seen() {
    let mut world = World { fault: Some(Fault::NoCopy), ..World::new(64, true) };
    for case in parting() {
        world.drain(&[case]);
    }
}
