//! Buffers that are used again, and row-wise maths spread over the caller's rayon pool.

use kernels::RopeTable;
use rayon::prelude::*;

/// Rows of a task.
const ROWS: usize = 16;

/// Buffers that nobody uses at present. Pages that were touched once stay: a pass allocates only what the passes before
/// it did not need.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: Vec<Vec<f32>>,
}

impl Pool {
    /// A buffer of `len` values that may be anything.
    pub(crate) fn take(&mut self, len: usize) -> Vec<f32> {
        let fits = |buffer: &&(usize, usize)| buffer.1 >= len;
        let sizes: Vec<(usize, usize)> = self.free.iter().map(Vec::capacity).enumerate().collect();
        let best = sizes.iter().filter(fits).min_by_key(|(_, capacity)| *capacity);
        let mut buffer = best.map_or_else(Vec::new, |(at, _)| self.free.swap_remove(*at));
        buffer.resize(len, 0.0);
        buffer
    }

    pub(crate) fn zeros(&mut self, len: usize) -> Vec<f32> {
        let mut buffer = self.take(len);
        buffer.fill(0.0);
        buffer
    }

    pub(crate) fn give(&mut self, buffer: Vec<f32>) {
        if buffer.capacity() > 0 {
            self.free.push(buffer);
        }
    }
}

/// RMS norm of rows of `weight.len()` values.
pub(crate) fn norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let part = ROWS * weight.len();
    let parts = x.par_chunks(part).zip(y.par_chunks_mut(part));
    parts.for_each(|(x, y)| kernels::rms_norm(x, weight, eps, y));
}

/// `to += from`, and [`norm`] of that.
pub(crate) fn add_and_norm(from: &[f32], to: &mut [f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let part = ROWS * weight.len();
    let parts = from.par_chunks(part).zip(to.par_chunks_mut(part)).zip(y.par_chunks_mut(part));
    parts.for_each(|((from, to), y)| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        kernels::rms_norm(to, weight, eps, y);
    });
}

/// The gradient of [`norm`] with respect to `x`, in place of `dy`.
pub(crate) fn norm_grad(x: &[f32], weight: &[f32], eps: f32, dy: &mut [f32]) {
    let part = ROWS * weight.len();
    let parts = x.par_chunks(part).zip(dy.par_chunks_mut(part));
    parts.for_each(|(x, dy)| kernels::rms_norm_grad(x, weight, eps, dy));
}

/// Adds to `dx` the gradient of [`norm`] with respect to `x`, given that of its output as the sum of `dys`.
pub(crate) fn add_norm_grad(x: &[f32], weight: &[f32], eps: f32, dys: &[Vec<f32>], dx: &mut [f32]) {
    let width = weight.len();
    x.par_chunks(ROWS * width).zip(dx.par_chunks_mut(ROWS * width)).enumerate().for_each(|(at, (x, dx))| {
        let mut sum = vec![0.0; width];
        for (row, (x, dx)) in x.chunks_exact(width).zip(dx.chunks_exact_mut(width)).enumerate() {
            let from = (at * ROWS + row) * width;
            sum.fill(0.0);
            for dy in dys {
                sum.iter_mut().zip(&dy[from..][..width]).for_each(|(sum, dy)| *sum += dy);
            }
            kernels::rms_norm_grad(x, weight, eps, &mut sum);
            dx.iter_mut().zip(&sum).for_each(|(dx, sum)| *dx += sum);
        }
    });
}

pub(crate) fn swiglu(gate: &[f32], up: &[f32], y: &mut [f32], width: usize) {
    let part = ROWS * width;
    let parts = gate.par_chunks(part).zip(up.par_chunks(part)).zip(y.par_chunks_mut(part));
    parts.for_each(|((gate, up), y)| kernels::swiglu(gate, up, y));
}

/// The gradients of [`swiglu`], in place of `gate` and `up`.
pub(crate) fn swiglu_grad(gate: &mut [f32], up: &mut [f32], dy: &[f32], width: usize) {
    let part = ROWS * width;
    let parts = gate.par_chunks_mut(part).zip(up.par_chunks_mut(part)).zip(dy.par_chunks(part));
    parts.for_each(|((gate, up), dy)| kernels::swiglu_grad(gate, up, dy));
}

/// `to += from`.
pub(crate) fn add(from: &[f32], to: &mut [f32]) {
    let part = 1 << 13;
    to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
    });
}

/// Rotates rows of queries and keys to their positions, or back.
pub(crate) fn turn(table: &RopeTable, positions: &[u32], back: bool, q: &mut [f32], k: &mut [f32]) {
    let [q_part, k_part] = [q.len(), k.len()].map(|len| ROWS * len / positions.len());
    let parts = q.par_chunks_mut(q_part).zip(k.par_chunks_mut(k_part)).zip(positions.par_chunks(ROWS));
    parts.for_each(|((q, k), positions)| {
        kernels::rope(table, positions, back, q);
        kernels::rope(table, positions, back, k);
    });
}

/// Calls `each(row, values)` for every row.
pub(crate) fn rows(values: &mut [f32], width: usize, each: impl Fn(usize, &mut [f32]) + Sync) {
    values.par_chunks_mut(ROWS * width).enumerate().for_each(|(part, values)| {
        for (row, values) in values.chunks_exact_mut(width).enumerate() {
            each(part * ROWS + row, values);
        }
    });
}

/// Adds to `sums` every row of `f(row, column)`, in the order of the rows.
pub(crate) fn add_rows(sums: &mut [f32], rows: usize, f: impl Fn(usize, usize) -> f32) {
    for row in 0..rows {
        for (column, sum) in sums.iter_mut().enumerate() {
            *sum += f(row, column);
        }
    }
}
