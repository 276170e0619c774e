//! Lists of blocks from the middle of which one can be taken: all of them within one array, without allocation.

use std::collections::HashMap;
use std::hash::Hash;

const NONE: u32 = u32::MAX;

/// The two ends of a list.
#[derive(Debug, Clone, Copy)]
struct Ends {
    oldest: u32,
    newest: u32,
}

const EMPTY: Ends = Ends { oldest: NONE, newest: NONE };

/// By block: the one put into its list before it, and the one put in after it. A block is in one list at most.
#[derive(Debug)]
struct Links(Box<[(u32, u32)]>);

impl Links {
    fn new(blocks: u32) -> Self {
        Self((0..blocks).map(|_| (NONE, NONE)).collect())
    }

    fn push(&mut self, ends: &mut Ends, block: u32) {
        self.0[block as usize] = (ends.newest, NONE);
        match self.0.get_mut(ends.newest as usize) {
            Some((_, after)) => *after = block,
            None => ends.oldest = block,
        }
        ends.newest = block;
    }

    fn remove(&mut self, ends: &mut Ends, block: u32) {
        let (before, after) = self.0[block as usize];
        match self.0.get_mut(before as usize) {
            Some(link) => link.1 = after,
            None => ends.oldest = after,
        }
        match self.0.get_mut(after as usize) {
            Some(link) => link.0 = before,
            None => ends.newest = before,
        }
    }

    /// From the newest to the oldest.
    fn back_from(&self, newest: u32) -> impl Iterator<Item = u32> {
        let some = |block: u32| (block != NONE).then_some(block);
        std::iter::successors(some(newest), move |&block| some(self.0[block as usize].0))
    }
}

/// Blocks by the time at which they were put in.
#[derive(Debug)]
pub(crate) struct Idle {
    links: Links,
    ends: Ends,
    len: usize,
}

impl Idle {
    /// An empty queue for blocks below `blocks`.
    pub(crate) fn new(blocks: u32) -> Self {
        Self { links: Links::new(blocks), ends: EMPTY, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Puts in a block that is not in it.
    pub(crate) fn push(&mut self, block: u32) {
        self.links.push(&mut self.ends, block);
        self.len += 1;
    }

    /// Takes out a block that is in it.
    pub(crate) fn remove(&mut self, block: u32) {
        self.links.remove(&mut self.ends, block);
        self.len -= 1;
    }

    /// Takes out the oldest.
    pub(crate) fn pop(&mut self) -> Option<u32> {
        let oldest = (self.ends.oldest != NONE).then_some(self.ends.oldest)?;
        self.remove(oldest);
        Some(oldest)
    }

    /// From the newest to the oldest.
    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        self.links.back_from(self.ends.newest)
    }
}

/// Blocks by the key they have in common; a block has one key at most.
#[derive(Debug)]
pub(crate) struct Siblings<K> {
    links: Links,
    lists: HashMap<K, Ends>,
}

impl<K: Hash + Eq> Siblings<K> {
    /// No lists yet, with room for `lists` of blocks below `blocks`.
    pub(crate) fn new(blocks: u32, lists: usize) -> Self {
        Self { links: Links::new(blocks), lists: HashMap::with_capacity(lists) }
    }

    /// Puts in a block that is in no list.
    pub(crate) fn push(&mut self, key: K, block: u32) {
        self.links.push(self.lists.entry(key).or_insert(EMPTY), block);
    }

    /// Takes out a block that is in the list of this key.
    pub(crate) fn remove(&mut self, key: &K, block: u32) {
        let Some(ends) = self.lists.get_mut(key) else { return debug_assert!(false, "no such list") };
        self.links.remove(ends, block);
        if ends.newest == NONE {
            self.lists.remove(key);
        }
    }

    /// A key's blocks, from the newest to the oldest.
    pub(crate) fn of(&self, key: &K) -> impl Iterator<Item = u32> {
        self.links.back_from(self.lists.get(key).map_or(NONE, |ends| ends.newest))
    }

    /// Keys that have a block.
    #[cfg(test)]
    pub(crate) fn keys(&self) -> usize {
        self.lists.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn idle_is_a_queue(actions in prop::collection::vec((0u32..8, any::<bool>()), 0..60)) {
            let (mut idle, mut plain) = (Idle::new(8), VecDeque::new());
            for (block, pop) in actions {
                if pop {
                    prop_assert_eq!(idle.pop(), plain.pop_front());
                } else if plain.contains(&block) {
                    idle.remove(block);
                    plain.retain(|other| *other != block);
                } else {
                    idle.push(block);
                    plain.push_back(block);
                }
                prop_assert_eq!(idle.len(), plain.len());
                prop_assert!(idle.iter().eq(plain.iter().rev().copied()));
            }
        }

        #[test]
        fn siblings_are_lists_by_key(actions in prop::collection::vec((0u32..8, 0u32..3), 0..60)) {
            let mut siblings = Siblings::new(8, 3);
            let mut plain: Vec<(u32, u32)> = Vec::new();
            for (block, key) in actions {
                if let Some(at) = plain.iter().position(|(other, _)| *other == block) {
                    siblings.remove(&plain.remove(at).1, block);
                } else {
                    siblings.push(key, block);
                    plain.push((block, key));
                }
                for key in 0..3 {
                    let expected = plain.iter().rev().filter(|(_, other)| *other == key).map(|(block, _)| *block);
                    prop_assert!(siblings.of(&key).eq(expected));
                }
                prop_assert_eq!(siblings.keys(), plain.iter().map(|(_, key)| key).collect::<std::collections::HashSet<_>>().len());
            }
        }
    }
}
