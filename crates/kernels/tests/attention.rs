//! Attention over paged keys and values against the plain reference, and its ways against each other.

mod support;

use kernels::{
    Isa, KvElement, KvLayout, KvStore, KvStoreMut, Means, PagedSequence, Pages, Precision, Rayon, RopeTable,
    Rotary, Span, SpanAttention, Team, from_bf16, isa, isas, paged_attention, reference, rotate_and_attend,
    rotate_and_store, span_attention, to_bf16,
};
use rand::SeedableRng;
use rand::rngs::StdRng;

use support::{random, worst};

fn means(isa: Isa) -> Means<'static> {
    Means { isa, workers: &Rayon, precision: Precision::Fast }
}

fn attention_equals_the_reference<E: KvElement>() {
    let mut rng = StdRng::seed_from_u64(7);
    for (head_dim, heads) in [(20, 9), (64, 9), (128, 3), (96, 15)] {
        let layout = KvLayout { layers: 3, kv_heads: 3, head_dim };
        let blocks = 12;
        let numbers = random(&mut rng, blocks * layout.block_values());
        let numbers: Vec<E> = numbers.into_iter().map(E::from_f32).collect();
        let sequences = [
            PagedSequence { first_block: 0, blocks: 6, rows: 1, start: 90 },
            PagedSequence { first_block: 6, blocks: 1, rows: 9, start: 0 },
            PagedSequence { first_block: 7, blocks: 4, rows: 20, start: 31 },
        ];
        let pages = Pages::new(&[7, 2, 5, 9, 10, 6, 1, 3, 11, 0, 4], &sequences);
        for window in [None, Some(8), Some(30)] {
            let kv = KvStore { layout, numbers: &numbers, layer: 1, window };
            let width = heads * head_dim;
            let q = random(&mut rng, 30 * width);
            let mut plain = vec![0.0; q.len()];
            reference::paged_attention(&kv, pages, heads, &q, &mut plain);
            for isa in isas() {
                let mut fast = vec![0.0; q.len()];
                paged_attention(means(isa), &kv, pages, heads, &q, &mut fast);
                assert!(worst(&fast, &plain) < 1e-5, "window {window:?} on {isa:?}");
                let mut at = 0;
                for sequence in &sequences {
                    for row in 0..sequence.rows {
                        let alone = [PagedSequence { rows: 1, start: sequence.start + row, ..*sequence }];
                        let alone = Pages::new(&[7, 2, 5, 9, 10, 6, 1, 3, 11, 0, 4], &alone);
                        let mut out = vec![0.0; width];
                        paged_attention(means(isa), &kv, alone, heads, &q[at..at + width], &mut out);
                        assert_eq!(out, &fast[at..at + width], "row {row} in company on {isa:?}");
                        at += width;
                    }
                }
            }
        }
    }
}

#[test]
fn paged_attention_equals_the_reference() {
    attention_equals_the_reference::<f32>();
    attention_equals_the_reference::<u16>();
}

/// Packed sequences attend as paged ones that hold the same numbers.
fn paged_equals_packed<E: KvElement>(round: fn(f32) -> f32) {
    let mut rng = StdRng::seed_from_u64(8);
    for head_dim in [16, 32, 48, 64, 76] {
        let layout = KvLayout { layers: 2, kv_heads: 2, head_dim };
        let shape = SpanAttention {
            heads: 4,
            kv_heads: 2,
            head_dim,
            window: Some(6),
            groups: vec![Span { first: 0, len: 11 }.into(), Span { first: 11, len: 25 }.into()],
        };
        let (rows, key_width) = (36, 2 * head_dim);
        let q = random(&mut rng, rows * 4 * head_dim);
        let [mut k, v] = [(); 2].map(|()| random(&mut rng, rows * key_width));
        let kept = |values: &[f32]| values.iter().map(|value| round(*value)).collect::<Vec<_>>();
        let mut packed = vec![0.0; q.len()];
        span_attention(&shape, &q, &kept(&k), &kept(&v), &mut packed);
        let sequences = [
            PagedSequence { first_block: 0, blocks: 1, rows: 11, start: 0 },
            PagedSequence { first_block: 1, blocks: 2, rows: 25, start: 0 },
        ];
        let pages = Pages::new(&[0, 2, 1], &sequences);
        let mut numbers = vec![E::from_f32(0.0); 3 * layout.block_values()];
        // Angles of zero: nothing turns.
        let table = RopeTable::new(&vec![0.0; head_dim / 2], 32);
        let rotary = Rotary { table: &table, query_norm: None, key_norm: None, eps: 1e-5 };
        let mut store = KvStoreMut { layout, numbers: &mut numbers, layer: 1 };
        let mut turned = q.clone();
        rotate_and_store(means(isa()), rotary, &mut store, pages, &mut turned, &mut k, &v);
        assert_eq!(turned, q);
        let kv = KvStore { layout, numbers: &numbers, layer: 1, window: Some(6) };
        let mut paged = vec![0.0; q.len()];
        paged_attention(means(isa()), &kv, pages, 4, &q, &mut paged);
        assert!(worst(&packed, &paged) < 1e-5, "heads of {head_dim}");
    }
}

#[test]
fn packed_sequences_attend_as_paged_ones() {
    paged_equals_packed::<f32>(|value| value);
    paged_equals_packed::<u16>(|value| from_bf16(to_bf16(value)));
}

/// One round of work for rows that decode gives the bits that two give.
fn one_round_equals_two<E: KvElement + PartialEq + std::fmt::Debug>() {
    let mut rng = StdRng::seed_from_u64(12);
    let team = Team::new(2).unwrap_or_else(|error| panic!("{error}"));
    for (head_dim, heads, kv_heads) in [(20, 9, 3), (64, 9, 3), (128, 2, 2), (96, 15, 3)] {
        let layout = KvLayout { layers: 3, kv_heads, head_dim };
        let (width, key_width) = (heads * head_dim, kv_heads * head_dim);
        // The first two begin alike.
        let blocks = [7, 2, 5, 7, 2, 1, 3, 11, 0, 4, 6, 9, 8];
        let sequences = [(0, 3, 40), (3, 3, 47), (6, 1, 0), (7, 6, 95)]
            .map(|(first_block, blocks, start)| PagedSequence { first_block, blocks, rows: 1, start });
        let numbers: Vec<E> =
            random(&mut rng, 12 * layout.block_values()).into_iter().map(E::from_f32).collect();
        let frequencies: Vec<f32> = (0..head_dim / 2).map(|i| 0.9f32.powi(i as i32)).collect();
        let table = RopeTable::new(&frequencies, 128);
        let (query_norm, key_norm) = (random(&mut rng, head_dim), random(&mut rng, head_dim));
        for (window, norms) in [(None, false), (Some(30), true)] {
            let rotary = Rotary {
                table: &table,
                query_norm: norms.then_some(&query_norm),
                key_norm: norms.then_some(&key_norm),
                eps: 1e-5,
            };
            for count in 1..=sequences.len() {
                let pages = Pages::new(&blocks, &sequences[..count]);
                let q = random(&mut rng, count * width);
                let [k, mut v] = [(); 2].map(|()| random(&mut rng, count * key_width));
                let means = Means { isa: isa(), workers: &team, precision: Precision::Fast };
                let (mut two_q, mut two_k, mut two, mut kept) =
                    (q.clone(), k.clone(), vec![0.0; q.len()], numbers.clone());
                let mut store = KvStoreMut { layout, numbers: &mut kept, layer: 1 };
                rotate_and_store(means, rotary, &mut store, pages, &mut two_q, &mut two_k, &v);
                let kv = KvStore { layout, numbers: &kept, layer: 1, window };
                paged_attention(means, &kv, pages, heads, &two_q, &mut two);
                let (mut one_q, mut one_k, mut one, mut numbers) =
                    (q, k, vec![0.0; two.len()], numbers.clone());
                let store = KvStoreMut { layout, numbers: &mut numbers, layer: 1 };
                let rows = [&mut one_q[..], &mut one_k, &mut v, &mut one];
                rotate_and_attend(means, rotary, store, window, pages, heads, rows);
                assert_eq!(
                    (&one, &one_q, &one_k),
                    (&two, &two_q, &two_k),
                    "{count} rows, heads of {head_dim}"
                );
                assert_eq!(numbers, kept);
                // Negative control: who does not see the new row answers otherwise.
                if window.is_none() {
                    let unseen = KvStore { numbers: &numbers, layer: 2, ..kv };
                    paged_attention(means, &unseen, pages, heads, &one_q, &mut two);
                    assert_ne!(one, two);
                }
            }
        }
    }
}

#[test]
fn rows_that_decode_are_rotated_and_attend_in_one_round() {
    one_round_equals_two::<f32>();
    one_round_equals_two::<u16>();
}
