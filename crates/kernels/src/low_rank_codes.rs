//! Low-rank factors in eight bits.

use crate::isa::isa;
use crate::lanes::{Lanes, multiversion};
use crate::low_rank::{codes_stride, pack_b};
use crate::vectors::part;
use crate::weight::PANEL;

/// A of shape (rank, columns) and B of shape (output features, rank) in eight bits: codes of A in rows of
/// [`codes_stride`], codes of B in panels as [`pack_b`] has them, and [`crate::LowRank::scales`]. Each row of A and each
/// column of B has the scale `max |value| / 127`; a code is `value / scale`, rounded, ties to even.
///
/// # Panics
/// When a factor does not divide by `rank`.
#[must_use]
pub fn quantise_low_rank(a: &[f32], b: &[f32], rank: usize) -> (Vec<i8>, Vec<i8>, Vec<f32>) {
    let (cols, n) = (a.len() / rank, b.len() / rank);
    assert!(a.len() == rank * cols && b.len() == rank * n, "A or B does not divide into ranks of {rank}");
    let b = pack_b(b, rank);
    let (mut a_codes, mut b_codes) = (vec![0; rank * codes_stride(cols)], vec![0; b.len()]);
    let mut scales = vec![0.0; rank];
    quantise(isa(), a, &b, &mut a_codes, &mut b_codes, &mut scales);
    (a_codes, b_codes, scales)
}

multiversion! {
    fn quantise(a: &[f32], b: &[f32], a_codes: &mut [i8], b_codes: &mut [i8], scales: &mut [f32])
        = quantise_body<Lanes>
}

#[inline(always)]
fn quantise_body<L: Lanes>(a: &[f32], b: &[f32], a_codes: &mut [i8], b_codes: &mut [i8], scales: &mut [f32]) {
    let rank = scales.len();
    let (cols, stride) = (a.len() / rank, a_codes.len() / rank);
    for (at, scale) in scales.iter_mut().enumerate() {
        let row = || a[at * cols..][..cols].chunks(PANEL);
        let column = || b.chunks(PANEL).skip(at).step_by(rank);
        let of_row = a_codes[at * stride..][..stride].chunks_mut(PANEL);
        let of_column = b_codes.chunks_mut(PANEL).skip(at).step_by(rank);
        *scale = to_codes::<L>(row(), row().zip(of_row)) * to_codes::<L>(column(), column().zip(of_column));
    }
}

/// Writes the codes of some values beside their places, and returns their scale.
#[inline(always)]
fn to_codes<'a, L: Lanes>(
    values: impl Iterator<Item = &'a [f32]>,
    places: impl Iterator<Item = (&'a [f32], &'a mut [i8])>,
) -> f32 {
    let max = values.fold(L::zero(), |max, values| max.max_abs(sixteen::<L>(values))).max_lane();
    let inverse = L::splat(if max > 0.0 { 127.0 / max } else { 0.0 });
    for (values, codes) in places {
        let codes: &mut [i8; PANEL] = codes.try_into().expect("rows and panels are whole sixteens");
        // SAFETY: there is room for sixteen codes.
        unsafe { sixteen::<L>(values).mul(inverse).store_i8(codes.as_mut_ptr()) };
    }
    max / 127.0
}

/// Up to sixteen values, the rest zeros.
#[inline(always)]
fn sixteen<L: Lanes>(values: &[f32]) -> L {
    // SAFETY: the values are there.
    unsafe { part(values.as_ptr(), 0, values.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every code is its value over the scale, rounded, and lies where the kernels read it.
    #[test]
    fn codes_are_the_rounded_values_in_their_places() {
        let random = |seed: u32, len: usize| -> Vec<f32> {
            (0..len as u32)
                .map(|at| ((at + seed).wrapping_mul(2_654_435_761) >> 8) as f32 / 8e6 - 1.0)
                .collect()
        };
        for (rank, cols, n) in [(1, 32, 16), (3, 70, 40), (8, 576, 192), (5, 15, 1)] {
            let (a, b) = (random(1, rank * cols), random(2, n * rank));
            let (a_codes, b_codes, scales) = quantise_low_rank(&a, &b, rank);
            let scale = |max: f32| if max > 0.0 { 127.0 / max } else { 0.0 };
            let mut padding = a_codes.iter().chain(&b_codes).map(|&code| i64::from(code).abs()).sum::<i64>();
            for at in 0..rank {
                let row = &a[at * cols..][..cols];
                let column: Vec<f32> = (0..n).map(|row| b[row * rank + at]).collect();
                let largest = |values: &[f32]| values.iter().fold(0.0f32, |max, value| max.max(value.abs()));
                let (of_row, of_column) = (largest(row), largest(&column));
                assert_eq!(scales[at], of_row / 127.0 * (of_column / 127.0));
                for (place, value) in row.iter().enumerate() {
                    let code = a_codes[at * codes_stride(cols) + place];
                    assert_eq!(f32::from(code), (value * scale(of_row)).round_ties_even(), "A {at} {place}");
                    padding -= i64::from(code).abs();
                }
                for (place, value) in column.iter().enumerate() {
                    let code = b_codes[(place / PANEL * rank + at) * PANEL + place % PANEL];
                    assert_eq!(
                        f32::from(code),
                        (value * scale(of_column)).round_ties_even(),
                        "B {place} {at}"
                    );
                    padding -= i64::from(code).abs();
                }
            }
            assert_eq!(padding, 0, "what is filled up is not zero");
        }
        let (a, b, scales) = quantise_low_rank(&[0.0; 64], &[0.0; 16], 1);
        assert!(a.iter().chain(&b).all(|&code| code == 0) && scales == [0.0]);
    }
}
