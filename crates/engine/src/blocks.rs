//! The allocation of KV blocks: which are free, who holds which, and which hold the beginning of another sequence.
//!
//! A full block whose keys and values are computed is published under everything they depend on: the scope (whose
//! they are), the block before it and its own tokens, compared in full and not by a hash. A sequence that begins
//! alike takes the published blocks instead of computing them again (as vLLM's automatic prefix caching does;
//! Kwon et al., 2023). Blocks that nobody holds any more stay until their room is needed.

use std::collections::HashMap;
use std::sync::Arc;

use model::BLOCK_LEN;
use types::{AdapterId, GenerationId, TenantId};

use crate::idle::Idle;

/// Whose keys and values these are: nothing is ever shared between two scopes. The base model needs no place in it, as
/// a pool belongs to one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Scope {
    /// Whose request.
    pub tenant: TenantId,
    /// The adapter and its generation; `None` is the base alone.
    pub adapter: Option<(AdapterId, GenerationId)>,
}

/// What a block's keys and values depend on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    before: Before,
    tokens: [u32; BLOCK_LEN],
}

/// What stands before a block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Before {
    /// Nothing: it is a sequence's first.
    Start(Arc<Scope>),
    /// The published block with this number.
    Block(u64),
}

#[derive(Debug, Default)]
struct Block {
    /// Sequences that hold it.
    holders: u32,
    published: Option<Published>,
}

#[derive(Debug)]
struct Published {
    /// Never given twice, so that it cannot name a later content of the same block.
    number: u64,
    key: Key,
}

/// One sequence's blocks, in the order of its positions.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<u32>,
    /// How many of them, from the first on, are published.
    published: usize,
}

impl BlockTable {
    /// The blocks.
    #[must_use]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Makes room in the table for the blocks of `tokens` tokens.
    pub(crate) fn reserve(&mut self, tokens: usize) {
        self.blocks.reserve(tokens.div_ceil(BLOCK_LEN).saturating_sub(self.blocks.len()));
    }
}

/// All blocks. Every one is free, or held by sequences, or idle: published and held by nobody.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<u32>,
    idle: Idle,
    index: HashMap<Key, u32>,
    next_number: u64,
    evictions: u64,
    sharing: bool,
}

impl BlockPool {
    /// A pool of `blocks` free blocks; without `sharing`, nothing is ever published.
    #[must_use]
    pub fn new(blocks: u32, sharing: bool) -> Self {
        Self {
            blocks: (0..blocks).map(|_| Block::default()).collect(),
            free: (0..blocks).rev().collect(),
            idle: Idle::new(blocks),
            index: HashMap::with_capacity(if sharing { blocks as usize } else { 0 }),
            next_number: 0,
            evictions: 0,
            sharing,
        }
    }

    /// Blocks in all.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Whether blocks are published at all.
    #[must_use]
    pub fn is_sharing(&self) -> bool {
        self.sharing
    }

    /// Blocks that a sequence can get: free and idle ones.
    #[must_use]
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks that nobody holds and that are kept for sequences to come.
    #[must_use]
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Published blocks that had to make room, so far.
    #[must_use]
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Gives an empty table the longest published beginning of `tokens`, and says how many tokens that is. At least the
    /// last token is left out, as its logits are wanted. `None`, and nothing happens, unless the blocks that are still
    /// missing for all of `tokens` can be had.
    pub fn reuse(&mut self, table: &mut BlockTable, scope: &Arc<Scope>, tokens: &[u32]) -> Option<usize> {
        debug_assert!(table.blocks.is_empty(), "the table is empty");
        let found = self.beginning(scope, &tokens[..tokens.len().saturating_sub(1)]);
        let missing = tokens.len().div_ceil(BLOCK_LEN) - found.len();
        // Idle blocks that it takes itself are not there for the rest.
        let idle = found.iter().filter(|&&block| self.blocks[block as usize].holders == 0).count();
        if missing > self.available() - idle {
            return None;
        }
        for &block in &found {
            self.hold(block);
        }
        *table = BlockTable { published: found.len(), blocks: found };
        Some(table.blocks.len() * BLOCK_LEN)
    }

    /// Adds `count` blocks to a table; the caller has seen that they are available.
    pub fn grow(&mut self, table: &mut BlockTable, count: usize) {
        for _ in 0..count {
            let block = self.free.pop().or_else(|| self.evict());
            let Some(block) = block else {
                debug_assert!(false, "more blocks than are available");
                return;
            };
            self.blocks[block as usize].holders = 1;
            table.blocks.push(block);
        }
    }

    /// Publishes the full blocks of `tokens`, which are the tokens whose keys and values are stored. Where another
    /// sequence has published the same, the table takes that block and frees its own: the content is equal to the bit.
    pub fn publish(&mut self, table: &mut BlockTable, scope: &Arc<Scope>, tokens: &[u32]) {
        if !self.sharing {
            return;
        }
        let (full, _) = tokens.as_chunks::<BLOCK_LEN>();
        for tokens in full.iter().skip(table.published) {
            let own = table.blocks[table.published];
            let before = match table.published.checked_sub(1).map(|at| table.blocks[at] as usize) {
                None => Before::Start(Arc::clone(scope)),
                Some(block) => match &self.blocks[block].published {
                    Some(published) => Before::Block(published.number),
                    None => return debug_assert!(false, "the block before is published"),
                },
            };
            let key = Key { before, tokens: *tokens };
            if let Some(&known) = self.index.get(&key) {
                self.hold(known);
                table.blocks[table.published] = known;
                self.let_go(own);
            } else {
                let number = self.next_number;
                self.next_number += 1;
                self.index.insert(key.clone(), own);
                self.blocks[own as usize].published = Some(Published { number, key });
            }
            table.published += 1;
        }
    }

    /// Takes all blocks from a table. The last ones go first, so that a block is always reused for something else
    /// before the one it follows.
    pub fn release(&mut self, table: &mut BlockTable) {
        table.published = 0;
        while let Some(block) = table.blocks.pop() {
            self.let_go(block);
        }
    }

    /// The published blocks that hold the longest beginning of `tokens`.
    fn beginning(&self, scope: &Arc<Scope>, tokens: &[u32]) -> Vec<u32> {
        let mut found = Vec::new();
        let (full, _) = tokens.as_chunks::<BLOCK_LEN>();
        let mut before = Before::Start(Arc::clone(scope));
        for tokens in full.iter().take_while(|_| self.sharing) {
            let key = Key { before, tokens: *tokens };
            let Some(&block) = self.index.get(&key) else { break };
            let Some(published) = &self.blocks[block as usize].published else { break };
            before = Before::Block(published.number);
            found.push(block);
        }
        found
    }

    fn hold(&mut self, block: u32) {
        let holders = &mut self.blocks[block as usize].holders;
        if *holders == 0 {
            self.idle.remove(block);
        }
        *holders += 1;
    }

    fn let_go(&mut self, block: u32) {
        let Block { holders, published } = &mut self.blocks[block as usize];
        debug_assert!(*holders > 0, "a block was released twice");
        *holders = holders.saturating_sub(1);
        match (*holders, published) {
            (0, Some(_)) => self.idle.push(block),
            (0, None) => self.free.push(block),
            _ => {}
        }
    }

    /// The idle block that was let go first, no longer published.
    fn evict(&mut self) -> Option<u32> {
        let block = self.idle.pop()?;
        if let Some(published) = self.blocks[block as usize].published.take() {
            self.index.remove(&published.key);
        }
        self.evictions += 1;
        Some(block)
    }
}

#[cfg(test)]
impl BlockPool {
    /// Everything that must hold at all times, given all tables there are.
    pub(crate) fn check<'a>(&self, tables: impl IntoIterator<Item = &'a BlockTable>) {
        let mut held = vec![0; self.blocks.len()];
        for table in tables {
            let numbers = table.blocks.iter().map(|&block| {
                held[block as usize] += 1;
                self.blocks[block as usize].published.as_ref().map(|published| published.number)
            });
            let numbers: Vec<Option<u64>> = numbers.collect();
            assert!(numbers[..table.published].iter().all(Option::is_some), "a shared block is published");
            assert!(numbers[table.published..].iter().all(Option::is_none), "what is written to is not");
        }
        let mut numbers = std::collections::HashSet::new();
        let mut published = 0;
        for (block, &held) in self.blocks.iter().zip(&held) {
            assert_eq!(block.holders, held, "the count of holders");
            assert!(held <= 1 || block.published.is_some(), "an unpublished block in two sequences");
            published += usize::from(block.published.is_some());
            numbers.extend(block.published.as_ref().map(|published| published.number));
        }
        assert_eq!((self.index.len(), numbers.len()), (published, published), "the index");
        let chained = |key: &Key| match key.before {
            Before::Start(_) => true,
            Before::Block(number) => numbers.contains(&number),
        };
        assert!(self.index.keys().all(chained), "a chain has lost its middle");
        let at = |block: &u32| &self.blocks[*block as usize];
        assert!(self.free.iter().map(at).all(|block| block.holders == 0 && block.published.is_none()));
        let idle: Vec<u32> = self.idle.iter().collect();
        assert_eq!(idle.len(), self.idle.len());
        assert!(idle.iter().map(at).all(|block| block.holders == 0 && block.published.is_some()));
        let holds = held.iter().filter(|held| **held > 0).count();
        assert_eq!(self.free.len() + idle.len() + holds, self.blocks.len(), "a block is lost");
        // What is evicted first is never what another one builds on.
        let mut gone = std::collections::HashSet::new();
        for published in idle.iter().filter_map(|block| at(block).published.as_ref()) {
            assert!(!matches!(published.key.before, Before::Block(number) if gone.contains(&number)));
            gone.insert(published.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(tenant: &str, adapter: Option<(&str, u8)>) -> Arc<Scope> {
        let tenant: TenantId = tenant.parse().expect("an id");
        let adapter = adapter.map(|(user, generation)| {
            let id = AdapterId::new(tenant.clone(), user.parse().expect("an id"));
            (id, GenerationId::from_bytes([generation; 32]))
        });
        Arc::new(Scope { tenant, adapter })
    }

    fn tokens(count: u32) -> Vec<u32> {
        (0..count).map(|at| at * 7 % 64).collect()
    }

    /// A table that holds `tokens`, computed and published.
    fn computed(pool: &mut BlockPool, scope: &Arc<Scope>, tokens: &[u32]) -> (BlockTable, usize) {
        let mut table = BlockTable::default();
        let cached = pool.reuse(&mut table, scope, tokens).expect("there is room");
        pool.grow(&mut table, tokens.len().div_ceil(BLOCK_LEN) - cached / BLOCK_LEN);
        pool.publish(&mut table, scope, tokens);
        (table, cached)
    }

    #[test]
    fn a_beginning_is_found_again_but_never_all_of_it() {
        let mut pool = BlockPool::new(20, true);
        let base = scope("t", None);
        let (mut first, cached) = computed(&mut pool, &base, &tokens(50));
        assert_eq!(cached, 0);
        for (len, expected) in [(50, 48), (49, 48), (48, 32), (33, 32), (17, 16), (16, 0), (1, 0), (80, 48)] {
            let (mut table, cached) = computed(&mut pool, &base, &tokens(len));
            assert_eq!(cached, expected, "{len} tokens");
            assert_eq!(table.blocks[..expected / 16], first.blocks[..expected / 16]);
            pool.check([&first, &table]);
            pool.release(&mut table);
        }
        let mut other = tokens(50);
        other[20] = 63;
        let (mut table, cached) = computed(&mut pool, &base, &other);
        assert_eq!(cached, 16, "up to the block that differs, though the third has the same tokens");
        pool.release(&mut table);
        pool.release(&mut first);
        pool.check([]);
        assert_eq!(pool.available(), 20);
        assert!(pool.idle() >= 5);
    }

    #[test]
    fn nothing_passes_from_scope_to_scope() {
        let scopes = [
            scope("t", None),
            scope("u", None),
            scope("t", Some(("ann", 1))),
            scope("t", Some(("ann", 2))),
            scope("t", Some(("bob", 1))),
            scope("u", Some(("ann", 1))),
        ];
        let mut pool = BlockPool::new(60, true);
        for scope in &scopes {
            assert_eq!(computed(&mut pool, scope, &tokens(100)).1, 0, "{scope:?}");
        }
        // Negative control: within each scope everything is found.
        for scope in &scopes {
            assert_eq!(computed(&mut pool, scope, &tokens(100)).1, 96, "{scope:?}");
        }
    }

    #[test]
    fn nothing_is_kept_without_sharing() {
        let mut pool = BlockPool::new(20, false);
        let base = scope("t", None);
        let (mut table, _) = computed(&mut pool, &base, &tokens(50));
        assert_eq!(computed(&mut pool, &base, &tokens(50)).1, 0);
        pool.release(&mut table);
        assert_eq!(pool.idle(), 0);
    }

    #[test]
    fn equal_blocks_of_two_sequences_become_one() {
        let mut pool = BlockPool::new(8, true);
        let base = scope("t", None);
        let (mut a, mut b) = (BlockTable::default(), BlockTable::default());
        for table in [&mut a, &mut b] {
            assert_eq!(pool.reuse(table, &base, &tokens(40)), Some(0));
            pool.grow(table, 3);
        }
        assert_eq!(pool.available(), 2);
        pool.publish(&mut a, &base, &tokens(40));
        pool.publish(&mut b, &base, &tokens(40));
        assert_eq!(a.blocks[..2], b.blocks[..2]);
        assert_ne!(a.blocks[2], b.blocks[2], "the last one is not full");
        assert_eq!(pool.available(), 4);
        pool.check([&a, &b]);
        pool.release(&mut a);
        pool.check([&b]);
        assert_eq!(pool.idle(), 0, "held by the other");
        pool.release(&mut b);
        assert_eq!((pool.idle(), pool.available()), (2, 8));
    }

    #[test]
    fn room_is_made_by_the_oldest_and_the_last_blocks_first() {
        let mut pool = BlockPool::new(6, true);
        let (old, new) = (scope("t", None), scope("u", None));
        for scope in [&old, &new] {
            let (mut table, _) = computed(&mut pool, scope, &tokens(48));
            pool.release(&mut table);
        }
        assert_eq!((pool.idle(), pool.evictions()), (6, 0));
        let mut table = BlockTable::default();
        pool.grow(&mut table, 2);
        pool.check([&table]);
        assert_eq!(pool.evictions(), 2);
        assert_eq!(pool.beginning(&old, &tokens(48)).len(), 1, "the first of the old chain is left");
        assert_eq!(pool.beginning(&new, &tokens(48)).len(), 3);
        // Use makes young again.
        pool.release(&mut table);
        let (mut used, cached) = computed(&mut pool, &old, &tokens(17));
        assert_eq!(cached, 16);
        pool.release(&mut used);
        pool.grow(&mut table, 5);
        pool.check([&table]);
        assert_eq!(
            (pool.beginning(&old, &tokens(17)).len(), pool.beginning(&new, &tokens(17)).len()),
            (1, 0)
        );
    }

    #[test]
    fn idle_blocks_count_as_room_but_not_twice() {
        let mut pool = BlockPool::new(4, true);
        let base = scope("t", None);
        let (mut table, _) = computed(&mut pool, &base, &tokens(33));
        pool.release(&mut table);
        assert_eq!((pool.available(), pool.idle()), (4, 2));
        // 64 tokens: two blocks are cached, two more are there. 65 tokens would need a third.
        assert_eq!(pool.reuse(&mut table, &base, &tokens(65)), None);
        assert_eq!(pool.idle(), 2, "a refusal changes nothing");
        assert_eq!(pool.reuse(&mut table, &base, &tokens(64)), Some(32));
        pool.grow(&mut table, 2);
        pool.check([&table]);
        assert_eq!(pool.available(), 0);
    }
}
