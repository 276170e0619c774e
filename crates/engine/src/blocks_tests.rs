//! The pool alone: what is found again, by whom, and for how long.

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

/// So many tokens in full blocks.
fn full(tokens: usize) -> Reused {
    Reused { tokens, copy: None }
}

/// A table that holds `tokens`, computed and published.
fn computed(pool: &mut BlockPool, scope: &Arc<Scope>, tokens: &[u32]) -> (BlockTable, usize) {
    let mut table = BlockTable::default();
    let reused = pool.reuse(&mut table, scope, tokens).expect("there is room");
    let missing = tokens.len().div_ceil(BLOCK_LEN) - table.blocks.len();
    pool.grow(&mut table, missing);
    pool.publish(&mut table, scope, tokens);
    (table, reused.tokens)
}

#[test]
fn a_beginning_is_found_again_but_never_all_of_it() {
    let mut pool = BlockPool::new(20, true);
    let base = scope("t", None);
    let (mut first, cached) = computed(&mut pool, &base, &tokens(50));
    assert_eq!(cached, 0);
    for (len, expected) in [(50, 48), (49, 48), (48, 47), (33, 32), (17, 16), (16, 15), (1, 0), (80, 48)] {
        let (mut table, cached) = computed(&mut pool, &base, &tokens(len));
        assert_eq!(cached, expected, "{len} tokens");
        assert_eq!(table.blocks[..expected / 16], first.blocks[..expected / 16]);
        pool.check([&first, &table]);
        pool.release(&mut table);
    }
    let mut other = tokens(50);
    other[20] = 63;
    let (mut table, cached) = computed(&mut pool, &base, &other);
    assert_eq!(cached, 20, "up to the token that differs, though the third block has the same tokens");
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
        assert_eq!(pool.reuse(table, &base, &tokens(40)), Some(full(0)));
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
    assert_eq!(pool.beginning(&old, &tokens(48)).0.len(), 1, "the first of the old chain is left");
    assert_eq!(pool.beginning(&new, &tokens(48)).0.len(), 3);
    // Use makes young again.
    pool.release(&mut table);
    let (mut used, cached) = computed(&mut pool, &old, &tokens(17));
    assert_eq!(cached, 16);
    pool.release(&mut used);
    pool.grow(&mut table, 5);
    pool.check([&table]);
    assert_eq!(
        (pool.beginning(&old, &tokens(17)).0.len(), pool.beginning(&new, &tokens(17)).0.len()),
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
    assert_eq!(pool.reuse(&mut table, &base, &tokens(64)), Some(full(32)));
    pool.grow(&mut table, 2);
    pool.check([&table]);
    assert_eq!(pool.available(), 0);
}

#[test]
fn the_block_that_agrees_longest_is_copied() {
    let mut pool = BlockPool::new(12, true);
    let base = scope("t", None);
    let text = |agrees: usize| {
        let mut tokens = tokens(48);
        tokens[agrees..].iter_mut().for_each(|token| *token += 100);
        tokens
    };
    let mut tables: Vec<BlockTable> =
        [20, 25, 22].map(|agrees| computed(&mut pool, &base, &text(agrees)).0).into();
    let mut table = BlockTable::default();
    let reused = pool.reuse(&mut table, &base, &tokens(40)).expect("there is room");
    let copy = reused.copy.expect("a copy");
    assert_eq!((reused.tokens, copy.from), (25, tables[1].blocks[1]));
    assert_eq!(table.blocks, [tables[0].blocks[0], copy.to]);
    assert_eq!(table.published, 1, "the copy is its own, to be written to");
    pool.grow(&mut table, 1);
    tables.push(table);
    pool.check(&tables);
    tables.iter_mut().for_each(|table| pool.release(table));
    pool.check([]);
    // Another scope and another beginning find nothing.
    let (_, cached) = computed(&mut pool, &scope("u", None), &tokens(40));
    assert_eq!(cached, 0);
    assert_eq!(pool.beginning(&base, &text(0)).0.len(), 0);
}

#[test]
fn a_block_that_is_copied_makes_no_room_for_the_copy() {
    let base = scope("t", None);
    for (blocks, expected) in [(1, 0), (2, 15)] {
        let mut pool = BlockPool::new(blocks, true);
        let (mut table, _) = computed(&mut pool, &base, &tokens(16));
        pool.release(&mut table);
        let reused = pool.reuse(&mut table, &base, &tokens(16)).expect("there is room");
        assert_eq!(reused.tokens, expected, "{blocks} blocks");
        assert!(reused.copy.is_none_or(|copy| copy.from != copy.to));
        let missing = 1 - table.blocks.len();
        pool.grow(&mut table, missing);
        pool.check([&table]);
    }
}

#[test]
fn few_of_many_are_compared() {
    let mut pool = BlockPool::new(2 * COMPARED as u32, true);
    let base = scope("t", None);
    for first in 1..=COMPARED as u32 + 1 {
        let mut table = computed(&mut pool, &base, &[first; BLOCK_LEN]).0;
        pool.release(&mut table);
    }
    let found = |pool: &mut BlockPool, first| {
        let (mut table, cached) = computed(pool, &base, &[first; BLOCK_LEN - 1]);
        pool.release(&mut table);
        cached
    };
    assert_eq!((found(&mut pool, 1), found(&mut pool, 2)), (0, BLOCK_LEN - 2));
}
