//! The allocation of KV blocks: which are free, who holds which, and which hold the beginning of another sequence.
//!
//! A full block whose keys and values are computed is published under everything they depend on: the scope (whose
//! they are), the block before it and its own tokens, compared in full and not by a hash. A sequence that begins
//! alike takes the published blocks instead of computing them again (as vLLM's automatic prefix caching does;
//! Kwon et al., 2023), and a copy of the one after them that begins as it goes on. Blocks that nobody holds any more
//! stay until their room is needed.

use std::collections::HashMap;
use std::sync::Arc;

use model::BLOCK_LEN;
use types::{AdapterId, GenerationId, TenantId};

use crate::links::{Idle, Siblings};

/// Of the blocks that may begin as a sequence goes on, so many are compared, the newest first.
const COMPARED: usize = 16;

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

/// What a sequence need not compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reused {
    /// Tokens whose keys and values are there, those of the copied block among them.
    pub tokens: usize,
    /// What has to be copied before anything is stored again.
    pub copy: Option<BlockCopy>,
}

/// The beginning of one block that becomes that of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    /// A published block.
    pub from: u32,
    /// The last block of the sequence's table.
    pub to: u32,
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
    /// Published blocks by what stands before them.
    siblings: Siblings<Before>,
    next_number: u64,
    evictions: u64,
    sharing: bool,
    /// All blocks from this one on were never held.
    untouched: u32,
}

impl BlockPool {
    /// A pool of `blocks` free blocks; without `sharing`, nothing is ever published.
    #[must_use]
    pub fn new(blocks: u32, sharing: bool) -> Self {
        let published = if sharing { blocks as usize } else { 0 };
        Self {
            blocks: (0..blocks).map(|_| Block::default()).collect(),
            free: (0..blocks).rev().collect(),
            idle: Idle::new(blocks),
            index: HashMap::with_capacity(published),
            siblings: Siblings::new(blocks, published),
            next_number: 0,
            evictions: 0,
            sharing,
            untouched: 0,
        }
    }

    /// The pool as it is when nobody holds or has published anything; tables of before must not meet it.
    pub(crate) fn emptied(&self) -> Self {
        let Self { next_number, evictions, untouched, .. } = *self;
        Self { next_number, evictions, untouched, ..Self::new(self.blocks.len() as u32, self.sharing) }
    }

    /// Blocks in all.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The first of the blocks that nobody has ever held; they are handed out in their order.
    #[must_use]
    pub fn untouched(&self) -> usize {
        self.untouched as usize
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

    /// Gives an empty table the longest published beginning of `tokens`: full blocks, and if the block after them begins
    /// as another does, a block of its own that the caller has to make a copy of that one. At least the last token is
    /// left out, as its logits are wanted. `None`, and nothing happens, unless the blocks that are still missing for all
    /// of `tokens` can be had.
    pub fn reuse(&mut self, table: &mut BlockTable, scope: &Arc<Scope>, tokens: &[u32]) -> Option<Reused> {
        debug_assert!(table.blocks.is_empty(), "the table is empty");
        let known = &tokens[..tokens.len().saturating_sub(1)];
        let (found, last) = self.beginning(scope, known);
        let missing = tokens.len().div_ceil(BLOCK_LEN) - found.len();
        // Idle blocks that it takes itself are not there for the rest.
        let idle = found.iter().filter(|&&block| self.is_idle(block)).count();
        if missing > self.available() - idle {
            return None;
        }
        for &block in &found {
            self.hold(block);
        }
        let full = found.len() * BLOCK_LEN;
        *table = BlockTable { published: found.len(), blocks: found };
        let Some((from, alike)) = self.alike(&last, &known[full..]) else {
            return Some(Reused { tokens: full, copy: None });
        };
        // The block to be copied must not make room for the copy.
        if self.available() == usize::from(self.is_idle(from)) {
            return Some(Reused { tokens: full, copy: None });
        }
        self.hold(from);
        self.grow(table, 1);
        self.let_go(from);
        let copy = table.blocks.last().map(|&to| BlockCopy { from, to });
        Some(Reused { tokens: full + alike, copy })
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
            self.untouched = self.untouched.max(block + 1);
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
                self.siblings.push(key.before.clone(), own);
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

    /// The published blocks that hold the longest beginning of `tokens`, and what stands before the next one.
    fn beginning(&self, scope: &Arc<Scope>, tokens: &[u32]) -> (Vec<u32>, Before) {
        let mut found = Vec::new();
        let (full, _) = tokens.as_chunks::<BLOCK_LEN>();
        let mut before = Before::Start(Arc::clone(scope));
        for tokens in full.iter().take_while(|_| self.sharing) {
            let key = Key { before, tokens: *tokens };
            let known = self.index.get(&key).copied();
            before = key.before;
            let Some(block) = known else { break };
            let Some(published) = &self.blocks[block as usize].published else { break };
            before = Before::Block(published.number);
            found.push(block);
        }
        (found, before)
    }

    /// Of the latest published blocks after `before`, the one that agrees with the most of `tokens` from the first on, and
    /// with how many.
    fn alike(&self, before: &Before, tokens: &[u32]) -> Option<(u32, usize)> {
        let alike = |block: u32| {
            let published = self.blocks[block as usize].published.as_ref()?;
            let same =
                published.key.tokens.iter().zip(tokens).take_while(|(theirs, own)| theirs == own).count();
            (same > 0).then_some((block, same))
        };
        // Of equals the newest, which comes first.
        self.siblings
            .of(before)
            .take(COMPARED)
            .filter_map(alike)
            .reduce(|best, next| if next.1 > best.1 { next } else { best })
    }

    fn is_idle(&self, block: u32) -> bool {
        self.blocks[block as usize].holders == 0
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
            self.siblings.remove(&published.key.before, block);
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
        let firsts: std::collections::HashSet<&Before> = self.index.keys().map(|key| &key.before).collect();
        assert_eq!(firsts.len(), self.siblings.keys());
        assert_eq!(firsts.iter().map(|before| self.siblings.of(before).count()).sum::<usize>(), published);
        for (key, block) in &self.index {
            assert!(
                self.siblings.of(&key.before).any(|other| other == *block),
                "a block without its siblings"
            );
        }
        let at = |block: &u32| &self.blocks[*block as usize];
        assert!(self.free.iter().map(at).all(|block| block.holders == 0 && block.published.is_none()));
        let mut idle: Vec<u32> = self.idle.iter().collect();
        idle.reverse();
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
#[path = "blocks_tests.rs"]
mod tests;
