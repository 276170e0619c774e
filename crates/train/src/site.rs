//! A frozen linear layer with what each job trains there: forwards, and backwards to its input and to the jobs' own
//! numbers.

use kernels::{Left, Right, multiply};
use model::Linear;
use types::SiteId;

use crate::buffers::{Pool, add_rows, rows};
use crate::pack::{Pack, Segment};
use crate::params::{Dora, Lora, Params, SiteParams};
use crate::random::Dropout;

/// A job as a pass sees it.
pub(crate) struct Member<'a> {
    pub(crate) params: &'a Params,
    /// The gradients of `params.values`; passes add to them.
    pub(crate) grads: &'a mut [f32],
    pub(crate) dropout: Option<Dropout>,
    /// What the loss of an answer token counts: one over their number in the job's batch.
    pub(crate) share: f32,
    /// The sum of the losses of the batch's answer tokens so far, in nats.
    pub(crate) loss: &'a mut f64,
}

/// A linear layer in a pass.
#[derive(Clone, Copy)]
pub(crate) struct SiteAt<'a> {
    pub(crate) id: SiteId,
    pub(crate) linear: &'a Linear,
    pub(crate) pack: &'a Pack,
}

/// `W x` of the jobs that scale it; their gradients need it.
pub(crate) type Product = Option<Vec<f32>>;

fn at<'p>(members: &[Member<'p>], segment: &Segment, id: SiteId) -> Option<(&'p Params, &'p SiteParams)> {
    let params: &'p Params = members[segment.job].params;
    params.sites[id.index()].as_ref().map(|site| (params, site))
}

impl SiteAt<'_> {
    fn dims(&self) -> (usize, usize) {
        (self.linear.weight.rows(), self.linear.weight.cols())
    }

    /// Whether any job of the pass trains something here.
    pub(crate) fn is_trained(&self, members: &[Member<'_>]) -> bool {
        self.pack.segments.iter().any(|segment| at(members, segment, self.id).is_some())
    }

    fn any(&self, members: &[Member<'_>], is: impl Fn(&SiteParams) -> bool) -> bool {
        self.pack.segments.iter().filter_map(|s| at(members, s, self.id)).any(|(_, site)| is(site))
    }

    /// The layer's output of all rows of `x`.
    pub(crate) fn forward(&self, pool: &mut Pool, members: &[Member<'_>], x: &[f32]) -> (Vec<f32>, Product) {
        let (n, k) = self.dims();
        let mut y = pool.take(self.pack.rows() * n);
        let scaled = self.scaled(pool, members, x);
        self.linear.product(scaled.as_deref().unwrap_or(x), &mut y);
        scaled.into_iter().for_each(|buffer| pool.give(buffer));
        let mut product = self.any(members, needs_product).then(|| pool.take(y.len()));
        for segment in &self.pack.segments {
            let y = &mut y[segment.rows.start * n..segment.rows.end * n];
            let mut keep = |y: &[f32]| {
                if let Some(product) = &mut product {
                    product[segment.rows.start * n..segment.rows.end * n].copy_from_slice(y);
                }
            };
            match at(members, segment, self.id) {
                Some((params, SiteParams::Lora(lora))) => {
                    let dropped = self.dropped(pool, members, segment, x);
                    let x = dropped.as_deref().unwrap_or(&x[segment.rows.start * k..segment.rows.end * k]);
                    let u = down(params, lora, x);
                    let b = &params.values[lora.b.clone()];
                    multiply([segment.rows.len(), lora.rank, n], dense(&u, lora.rank), right(b, n), y, true);
                    dropped.into_iter().for_each(|buffer| pool.give(buffer));
                    if let Some(bias) = &lora.bias {
                        let bias = &params.values[bias.clone()];
                        rows(y, n, |_, y| {
                            y.iter_mut().zip(bias).for_each(|(y, b)| *y += lora.scale as f32 * b)
                        });
                    }
                    if let Some(dora) = &lora.dora {
                        keep(y);
                        let gains = gains(params, dora);
                        rows(y, n, |_, y| y.iter_mut().zip(&gains).for_each(|(y, gain)| *y *= gain));
                    }
                    self.add_bias(y);
                }
                Some((params, SiteParams::Output(scale))) => {
                    self.add_bias(y);
                    keep(y);
                    let scale = &params.values[scale.clone()];
                    rows(y, n, |_, y| y.iter_mut().zip(scale).for_each(|(y, scale)| *y *= scale));
                }
                Some((_, SiteParams::Input(_))) | None => self.add_bias(y),
            }
        }
        (y, product)
    }

    /// Adds the jobs' gradients here, given the output's; gives that of `x` if `further`. `dy` may be changed.
    pub(crate) fn backward(
        &self,
        pool: &mut Pool,
        members: &mut [Member<'_>],
        x: &[f32],
        product: &Product,
        dy: &mut [f32],
        further: bool,
    ) -> Vec<f32> {
        let (n, k) = self.dims();
        // What comes down through A, of the rows that have one.
        let mut low_rank: Vec<Option<Vec<f32>>> = Vec::new();
        for segment in &self.pack.segments {
            let count = segment.rows.len();
            let rows_n = segment.rows.start * n..segment.rows.end * n;
            let dy = &mut dy[rows_n.clone()];
            let Some((params, site)) = at(members, segment, self.id) else {
                low_rank.push(None);
                continue;
            };
            let kept = product.as_ref().map(|product| &product[rows_n]);
            match site {
                SiteParams::Lora(lora) => {
                    let dropped = self.dropped(pool, members, segment, x);
                    let x = dropped.as_deref().unwrap_or(&x[segment.rows.start * k..segment.rows.end * k]);
                    if let (Some(dora), Some(kept)) = (&lora.dora, kept) {
                        let grads = &mut members[segment.job].grads[dora.magnitude.clone()];
                        add_rows(grads, count, |row, o| dy[row * n + o] * kept[row * n + o] / dora.norms[o]);
                        let gains = gains(params, dora);
                        rows(dy, n, |_, dy| dy.iter_mut().zip(&gains).for_each(|(dy, gain)| *dy *= gain));
                    }
                    if let Some(bias) = &lora.bias {
                        let grads = &mut members[segment.job].grads[bias.clone()];
                        add_rows(grads, count, |row, o| lora.scale as f32 * dy[row * n + o]);
                    }
                    let rank = lora.rank;
                    let u = down(params, lora, x);
                    let grads = &mut members[segment.job].grads;
                    multiply(
                        [rank, count, n],
                        across(&u, rank),
                        right(dy, n),
                        &mut grads[lora.b.clone()],
                        true,
                    );
                    let du = along(&params.values[lora.b.clone()], rank, dy, lora.scale as f32);
                    multiply(
                        [rank, count, k],
                        across(&du, rank),
                        right(x, k),
                        &mut grads[lora.a.clone()],
                        true,
                    );
                    dropped.into_iter().for_each(|buffer| pool.give(buffer));
                    low_rank.push(further.then_some(du));
                }
                SiteParams::Output(range) => {
                    if let Some(kept) = kept {
                        let grads = &mut members[segment.job].grads[range.clone()];
                        add_rows(grads, count, |row, o| dy[row * n + o] * kept[row * n + o]);
                    }
                    let scale = &params.values[range.clone()];
                    rows(dy, n, |_, dy| dy.iter_mut().zip(scale).for_each(|(dy, scale)| *dy *= scale));
                    low_rank.push(None);
                }
                SiteParams::Input(_) => low_rank.push(None),
            }
        }
        let scales_input = self.any(members, |site| matches!(site, SiteParams::Input(_)));
        if !further && !scales_input {
            return Vec::new();
        }
        let mut dx = pool.take(self.pack.rows() * k);
        self.linear.transposed(dy, &mut dx);
        for (segment, du) in self.pack.segments.iter().zip(&low_rank) {
            let (rows_k, count) = (segment.rows.start * k..segment.rows.end * k, segment.rows.len());
            let dx = &mut dx[rows_k.clone()];
            match at(members, segment, self.id) {
                Some((params, SiteParams::Lora(lora))) => {
                    let Some(du) = du else { continue };
                    let a = right(&params.values[lora.a.clone()], k);
                    let size = [count, lora.rank, k];
                    if let Some(dropout) = members[segment.job].dropout {
                        let mut update = pool.take(count * k);
                        multiply(size, dense(du, lora.rank), a, &mut update, false);
                        self.drop(dropout, segment, &mut update);
                        crate::buffers::add(&update, dx);
                        pool.give(update);
                    } else {
                        multiply(size, dense(du, lora.rank), a, dx, true);
                    }
                }
                Some((params, SiteParams::Input(range))) => {
                    let x = &x[rows_k];
                    let grads = &mut members[segment.job].grads[range.clone()];
                    add_rows(grads, count, |row, i| dx[row * k + i] * x[row * k + i]);
                    let scale = &params.values[range.clone()];
                    rows(dx, k, |_, dx| dx.iter_mut().zip(scale).for_each(|(dx, scale)| *dx *= scale));
                }
                Some((_, SiteParams::Output(_))) | None => {}
            }
        }
        dx
    }

    fn add_bias(&self, y: &mut [f32]) {
        if let Some(bias) = &self.linear.bias {
            rows(y, bias.len(), |_, y| y.iter_mut().zip(&**bias).for_each(|(y, bias)| *y += bias));
        }
    }

    /// The input, scaled for the jobs that scale it.
    fn scaled(&self, pool: &mut Pool, members: &[Member<'_>], x: &[f32]) -> Option<Vec<f32>> {
        if !self.any(members, |site| matches!(site, SiteParams::Input(_))) {
            return None;
        }
        let k = self.dims().1;
        let mut scaled = pool.take(x.len());
        scaled.copy_from_slice(x);
        for segment in &self.pack.segments {
            if let Some((params, SiteParams::Input(range))) = at(members, segment, self.id) {
                let scale = &params.values[range.clone()];
                let x = &mut scaled[segment.rows.start * k..segment.rows.end * k];
                rows(x, k, |_, x| x.iter_mut().zip(scale).for_each(|(x, scale)| *x *= scale));
            }
        }
        Some(scaled)
    }

    /// A segment's rows of the input after dropout.
    fn dropped(
        &self,
        pool: &mut Pool,
        members: &[Member<'_>],
        segment: &Segment,
        x: &[f32],
    ) -> Option<Vec<f32>> {
        let dropout = members[segment.job].dropout?;
        let k = self.dims().1;
        let mut dropped = pool.take(segment.rows.len() * k);
        dropped.copy_from_slice(&x[segment.rows.start * k..segment.rows.end * k]);
        self.drop(dropout, segment, &mut dropped);
        Some(dropped)
    }

    fn drop(&self, dropout: Dropout, segment: &Segment, x: &mut [f32]) {
        rows(x, self.dims().1, |row, values| {
            let row = segment.rows.start + row;
            dropout.apply(self.id.index(), (self.pack.examples[row], self.pack.positions[row]), values);
        });
    }
}

fn needs_product(site: &SiteParams) -> bool {
    matches!(site, SiteParams::Output(_) | SiteParams::Lora(Lora { dora: Some(_), .. }))
}

/// What DoRA multiplies each output with.
fn gains(params: &Params, dora: &Dora) -> Vec<f32> {
    params.values[dora.magnitude.clone()].iter().zip(&dora.norms).map(|(m, norm)| m / norm).collect()
}

/// Values of a row of [`along`]: whole vectors.
fn padded(rank: usize) -> usize {
    rank.next_multiple_of(16)
}

/// The rows of [`along`] as a left factor, and the same transposed.
fn dense(u: &[f32], rank: usize) -> Left<'_> {
    Left { values: u, row: padded(rank), step: 1 }
}

fn across(u: &[f32], rank: usize) -> Left<'_> {
    Left { values: u, row: 1, step: padded(rank) }
}

fn right(values: &[f32], stride: usize) -> Right<'_> {
    Right { values, stride }
}

/// `scale A x` of every row.
fn down(params: &Params, lora: &Lora, x: &[f32]) -> Vec<f32> {
    along(&params.values[lora.a.clone()], lora.rank, x, lora.scale as f32)
}

/// `scale matrix[r] . x` of every row of `x`, filled up with zeros; the matrix is (rank, width).
fn along(matrix: &[f32], rank: usize, x: &[f32], scale: f32) -> Vec<f32> {
    let (width, stride) = (matrix.len() / rank, padded(rank));
    let mut columns = vec![0.0; width * stride];
    for (r, row) in matrix.chunks_exact(width).enumerate() {
        row.iter().enumerate().for_each(|(at, value)| columns[at * stride + r] = scale * value);
    }
    let mut u = vec![0.0; x.len() / width * stride];
    let left = Left { values: x, row: width, step: 1 };
    multiply([x.len() / width, width, stride], left, right(&columns, stride), &mut u, false);
    u
}
