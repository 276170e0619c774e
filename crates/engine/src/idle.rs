//! A queue of blocks from the middle of which one can be taken: a list within two arrays, without allocation.

const NONE: u32 = u32::MAX;

/// Blocks by the time at which they were put in.
#[derive(Debug)]
pub(crate) struct Idle {
    /// By block: the one put in before it, and the one put in after it.
    links: Box<[(u32, u32)]>,
    oldest: u32,
    newest: u32,
    len: usize,
}

impl Idle {
    /// An empty queue for blocks below `blocks`.
    pub(crate) fn new(blocks: u32) -> Self {
        let links = (0..blocks).map(|_| (NONE, NONE)).collect();
        Self { links, oldest: NONE, newest: NONE, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Puts in a block that is not in it.
    pub(crate) fn push(&mut self, block: u32) {
        self.links[block as usize] = (self.newest, NONE);
        match self.links.get_mut(self.newest as usize) {
            Some((_, after)) => *after = block,
            None => self.oldest = block,
        }
        self.newest = block;
        self.len += 1;
    }

    /// Takes out a block that is in it.
    pub(crate) fn remove(&mut self, block: u32) {
        let (before, after) = self.links[block as usize];
        match self.links.get_mut(before as usize) {
            Some(link) => link.1 = after,
            None => self.oldest = after,
        }
        match self.links.get_mut(after as usize) {
            Some(link) => link.0 = before,
            None => self.newest = before,
        }
        self.len -= 1;
    }

    /// Takes out the oldest.
    pub(crate) fn pop(&mut self) -> Option<u32> {
        let oldest = (self.oldest != NONE).then_some(self.oldest)?;
        self.remove(oldest);
        Some(oldest)
    }

    /// From the oldest to the newest.
    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        let some = |block: u32| (block != NONE).then_some(block);
        std::iter::successors(some(self.oldest), move |&block| some(self.links[block as usize].1))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_queue(actions in prop::collection::vec((0u32..8, any::<bool>()), 0..60)) {
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
                prop_assert!(idle.iter().eq(plain.iter().copied()));
            }
        }
    }
}
