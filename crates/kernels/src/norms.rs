//! The lengths of a matrix's rows under low-rank updates, as DoRA needs them.

use crate::isa::isa;
use crate::lanes::{Lanes, multiversion};
use crate::low_rank::{LowRank, dot};
use crate::panel::decode_panel;
use crate::weight::{PANEL, Weight};

/// The Euclidean norm of each row of `W + B_1 A_1 + B_2 A_2 + ..`, one per output feature. Runs on the caller's thread.
///
/// # Panics
/// When an update does not fit the weight's shape.
#[must_use]
pub fn row_norms(weight: &Weight, updates: &[LowRank<'_>]) -> Vec<f32> {
    let (n, k) = (weight.rows(), weight.cols());
    let updates: Vec<(usize, Vec<f32>, Vec<f32>)> = updates
        .iter()
        .map(|update| {
            assert_eq!(update.a.len(), update.rank * k, "A does not fit");
            assert_eq!(update.b.len(), weight.panels() * PANEL * update.rank, "B does not fit");
            (update.rank, update.a.to_f32(), update.b.to_f32())
        })
        .collect();
    let mut norms = vec![0.0; weight.panels() * PANEL];
    let mut decoded = vec![0.0; PANEL * k];
    for (index, norms) in norms.chunks_exact_mut(PANEL).enumerate() {
        panel_norms(isa(), weight, index, &updates, &mut decoded, norms);
    }
    norms.truncate(n);
    norms
}

multiversion! {
    fn panel_norms(
        weight: &Weight, index: usize, updates: &[(usize, Vec<f32>, Vec<f32>)], decoded: &mut [f32], norms: &mut [f32],
    ) = panel_norms_body<Lanes>
}

#[inline(always)]
fn panel_norms_body<L: Lanes>(
    weight: &Weight,
    index: usize,
    updates: &[(usize, Vec<f32>, Vec<f32>)],
    decoded: &mut [f32],
    norms: &mut [f32],
) {
    let k = weight.cols();
    // SAFETY: this code is compiled for the unit of `L`.
    unsafe { decode_panel::<L>(weight, index, decoded) };
    for (lane, row) in decoded.chunks_exact_mut(k).enumerate() {
        for (rank, a, b) in updates {
            for (r, a) in a.chunks_exact(k).enumerate() {
                let factor = b[(index * rank + r) * PANEL + lane];
                row.iter_mut().zip(a).for_each(|(value, a)| *value += factor * a);
            }
        }
        norms[lane] = dot::<L>(row, row).sqrt();
    }
}
