//! A frozen linear layer with what each job trains there: forwards, and backwards to its input and to the jobs' own
//! numbers.

use kernels::{Left, Right, multiply, thin_out};
use model::Linear;
use rayon::prelude::*;
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

/// What the jobs scale that scale an output; their gradients need it.
pub(crate) type Product = Option<Vec<f32>>;

/// What comes down from a segment's output to its input through dropout.
#[derive(Clone)]
struct Down {
    /// Through B.
    low_rank: Vec<f32>,
    /// The gradient of DoRA's share of the frozen product, which reads what dropout leaves; none without dropout.
    frozen: Option<Vec<f32>>,
}

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

    /// Values of a row of the [`Product`] that a way back needs here; 0 if none.
    pub(crate) fn product_width(&self, members: &[Member<'_>]) -> usize {
        if self.any(members, needs_product) { self.dims().0 } else { 0 }
    }

    /// The layer's output of all rows of `x`.
    pub(crate) fn forward(&self, pool: &mut Pool, members: &[Member<'_>], x: &[f32]) -> (Vec<f32>, Product) {
        let n = self.dims().0;
        let mut y = pool.take(self.pack.rows() * n);
        let scaled = self.scaled(pool, members, x);
        self.linear.product(self.pack.products, scaled.as_deref().unwrap_or(x), &mut y);
        scaled.into_iter().for_each(|buffer| pool.give(buffer));
        if !self.is_trained(members) {
            self.add_bias(&mut y);
            return (y, None);
        }
        let dropped = self.dropped(pool, members, x);
        let mut product = self.any(members, needs_product).then(|| pool.take(y.len()));
        if let (Some(product), Some(dropped)) = (&mut product, &dropped)
            && self.pack.segments.iter().any(|segment| self.scales_thinned(&members[segment.job]))
        {
            self.linear.product(self.pack.products, dropped, product);
        }
        let kept: Vec<_> = match &mut product {
            Some(product) => self.parts(product, n).into_iter().map(Some).collect(),
            None => self.pack.segments.iter().map(|_| None).collect(),
        };
        let parts = self.parts(&mut y, n).into_par_iter().zip(kept).zip(&self.pack.segments);
        parts.for_each(|((y, kept), segment)| {
            let input = self.input(&members[segment.job], segment, x, &dropped);
            self.segment_forward(members, segment, input, y, kept);
        });
        dropped.into_iter().for_each(|buffer| pool.give(buffer));
        (y, product)
    }

    /// Makes a segment's frozen product its output; what is scaled goes to `kept`.
    ///
    /// DoRA's output is `g (W x + B A x)` with `g = m / |W + B A|`. In training with dropout it is, as in HF peft,
    /// `W x - W x' + g (W x' + B A x')`, where `x'` is what dropout leaves of `x`; `kept` then begins as `W x'`.
    fn segment_forward(
        &self,
        members: &[Member<'_>],
        segment: &Segment,
        x: &[f32],
        y: &mut [f32],
        kept: Option<&mut [f32]>,
    ) {
        let n = self.dims().0;
        match at(members, segment, self.id) {
            Some((params, SiteParams::Lora(lora))) => {
                let u = down(params, lora, x);
                let update = |y: &mut [f32]| {
                    let b = right(&params.values[lora.b.clone()], n);
                    multiply([segment.rows.len(), lora.rank, n], dense(&u, lora.rank), b, y, true);
                    if let Some(bias) = &lora.bias {
                        let (bias, scale) = (&params.values[bias.clone()], lora.scale as f32);
                        rows(y, n, |_, y| y.iter_mut().zip(bias).for_each(|(y, b)| *y += scale * b));
                    }
                };
                match lora.dora.as_ref().zip(kept) {
                    Some((dora, kept)) if self.scales_thinned(&members[segment.job]) => {
                        y.iter_mut().zip(&*kept).for_each(|(y, kept)| *y -= kept);
                        update(kept);
                        let gains = gains(params, dora);
                        rows(y, n, |at, y| {
                            let scaled = kept[at * n..][..n].iter().zip(&gains);
                            y.iter_mut().zip(scaled).for_each(|(y, (kept, gain))| *y += kept * gain);
                        });
                    }
                    Some((dora, kept)) => {
                        update(y);
                        kept.copy_from_slice(y);
                        let gains = gains(params, dora);
                        rows(y, n, |_, y| y.iter_mut().zip(&gains).for_each(|(y, gain)| *y *= gain));
                    }
                    None => update(y),
                }
                self.add_bias(y);
            }
            Some((params, SiteParams::Output(scale))) => {
                self.add_bias(y);
                kept.into_iter().for_each(|kept| kept.copy_from_slice(y));
                let scale = &params.values[scale.clone()];
                rows(y, n, |_, y| y.iter_mut().zip(scale).for_each(|(y, scale)| *y *= scale));
            }
            Some((_, SiteParams::Input(_))) | None => self.add_bias(y),
        }
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
        let k = self.dims().1;
        let mut downs: Vec<Option<Down>> = vec![None; self.pack.segments.len()];
        if self.is_trained(members) {
            let dropped = self.dropped(pool, members, x);
            self.jobs(members, dy, &mut downs).into_par_iter().for_each(|(member, parts)| {
                for (segment, dy, down) in parts {
                    let input = self.input(member, segment, x, &dropped);
                    *down = self.segment_backward(member, segment, input, product, dy);
                }
            });
            dropped.into_iter().for_each(|buffer| pool.give(buffer));
        }
        let scales_input = self.any(members, |site| matches!(site, SiteParams::Input(_)));
        if !further && !scales_input {
            return Vec::new();
        }
        let mut dx = pool.take(self.pack.rows() * k);
        self.linear.transposed(self.pack.products, dy, &mut dx);
        let mut updates = downs.iter().any(Option::is_some).then(|| self.thinned_down(pool, &downs));
        if let Some(updates) = &mut updates {
            let parts = self.parts(&mut dx, k).into_par_iter().zip(self.parts(updates, k));
            parts.zip(&self.pack.segments).zip(&downs).for_each(|(((dx, update), segment), down)| {
                let (Some((params, SiteParams::Lora(lora))), Some(down)) =
                    (at(members, segment, self.id), down)
                else {
                    return;
                };
                let (du, a) = (&down.low_rank, right(&params.values[lora.a.clone()], k));
                let size = [segment.rows.len(), lora.rank, k];
                match members[segment.job].dropout {
                    Some(dropout) => {
                        multiply(size, dense(du, lora.rank), a, update, down.frozen.is_some());
                        self.drop(dropout, segment, update, dx, true);
                    }
                    None => multiply(size, dense(du, lora.rank), a, dx, true),
                }
            });
        }
        updates.into_iter().for_each(|buffer| pool.give(buffer));
        for segment in self.pack.segments.iter().filter(|_| scales_input) {
            let Some((params, SiteParams::Input(range))) = at(members, segment, self.id) else { continue };
            let rows_k = segment.rows.start * k..segment.rows.end * k;
            let (x, dx) = (&x[rows_k.clone()], &mut dx[rows_k]);
            let grads = &mut members[segment.job].grads[range.clone()];
            add_rows(grads, segment.rows.len(), |row, i| dx[row * k + i] * x[row * k + i]);
            let scale = &params.values[range.clone()];
            rows(dx, k, |_, dx| dx.iter_mut().zip(scale).for_each(|(dx, scale)| *dx *= scale));
        }
        dx
    }

    /// What comes down through the frozen matrix to what dropout leaves of the input: of segments that have it; the others'
    /// rows may be anything.
    fn thinned_down(&self, pool: &mut Pool, downs: &[Option<Down>]) -> Vec<f32> {
        let (n, k) = self.dims();
        let mut updates = pool.take(self.pack.rows() * k);
        let frozen = |down: &'_ Option<Down>| down.as_ref().is_some_and(|down| down.frozen.is_some());
        if downs.iter().any(frozen) {
            let mut dy = pool.zeros(self.pack.rows() * n);
            for (part, down) in self.parts(&mut dy, n).into_iter().zip(downs) {
                let frozen = down.iter().find_map(|down| down.frozen.as_ref());
                frozen.into_iter().for_each(|frozen| part.copy_from_slice(frozen));
            }
            self.linear.transposed(self.pack.products, &dy, &mut updates);
            pool.give(dy);
        }
        updates
    }

    /// Adds the gradients of what the job trains on the way from `x` to `dy`, which becomes that of the frozen product of the
    /// whole input.
    fn segment_backward(
        &self,
        member: &mut Member<'_>,
        segment: &Segment,
        x: &[f32],
        product: &Product,
        dy: &mut [f32],
    ) -> Option<Down> {
        let (n, k) = self.dims();
        let thins = self.scales_thinned(member);
        let (params, count) = (member.params, segment.rows.len());
        let grads = &mut *member.grads;
        let kept = product.as_ref().map(|product| &product[segment.rows.start * n..segment.rows.end * n]);
        match params.sites[self.id.index()].as_ref()? {
            SiteParams::Lora(lora) => {
                let whole = thins.then(|| dy.to_vec());
                if let (Some(dora), Some(kept)) = (&lora.dora, kept) {
                    let grads = &mut grads[dora.magnitude.clone()];
                    add_rows(grads, count, |row, o| dy[row * n + o] * kept[row * n + o] / dora.norms[o]);
                    let gains = gains(params, dora);
                    rows(dy, n, |_, dy| dy.iter_mut().zip(&gains).for_each(|(dy, gain)| *dy *= gain));
                }
                if let Some(bias) = &lora.bias {
                    let grads = &mut grads[bias.clone()];
                    add_rows(grads, count, |row, o| lora.scale as f32 * dy[row * n + o]);
                }
                let (rank, b) = (lora.rank, lora.b.clone());
                let u = down(params, lora, x);
                multiply([rank, count, n], across(&u, rank), right(dy, n), &mut grads[b.clone()], true);
                let du = along(&params.values[b], rank, dy, lora.scale as f32);
                let a = &mut grads[lora.a.clone()];
                multiply([rank, count, k], across(&du, rank), right(x, k), a, true);
                let frozen = whole.map(|mut whole| {
                    // The whole input's gradient goes back to `dy`, and what is left is the thinned one's.
                    whole.swap_with_slice(dy);
                    whole.iter_mut().zip(&*dy).for_each(|(frozen, dy)| *frozen -= dy);
                    whole
                });
                Some(Down { low_rank: du, frozen })
            }
            SiteParams::Output(range) => {
                if let Some(kept) = kept {
                    let grads = &mut grads[range.clone()];
                    add_rows(grads, count, |row, o| dy[row * n + o] * kept[row * n + o]);
                }
                let scale = &params.values[range.clone()];
                rows(dy, n, |_, dy| dy.iter_mut().zip(scale).for_each(|(dy, scale)| *dy *= scale));
                None
            }
            SiteParams::Input(_) => None,
        }
    }

    /// The rows of each segment.
    fn parts<'v>(&self, mut values: &'v mut [f32], width: usize) -> Vec<&'v mut [f32]> {
        let segments = self.pack.segments.iter();
        segments
            .map(|segment| {
                let (part, rest) = std::mem::take(&mut values).split_at_mut(segment.rows.len() * width);
                values = rest;
                part
            })
            .collect()
    }

    /// Every job with its segments, in order, and what belongs to them: jobs are independent of each other.
    fn jobs<'m, 'p, 'v>(
        &'v self,
        members: &'m mut [Member<'p>],
        dy: &'v mut [f32],
        downs: &'v mut [Option<Down>],
    ) -> Vec<(&'m mut Member<'p>, Vec<Part<'v>>)> {
        let mut jobs: Vec<_> = members.iter_mut().map(|member| (member, Vec::new())).collect();
        let parts = self.pack.segments.iter().zip(self.parts(dy, self.dims().0)).zip(downs);
        for ((segment, dy), down) in parts {
            jobs[segment.job].1.push((segment, dy, down));
        }
        jobs.retain(|(_, parts)| !parts.is_empty());
        jobs
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

    /// The input after dropout: rows of jobs that drop some of it here; the others may be anything.
    fn dropped(&self, pool: &mut Pool, members: &[Member<'_>], x: &[f32]) -> Option<Vec<f32>> {
        let segments = &self.pack.segments;
        let drops = |segment: &Segment| self.dropout(&members[segment.job]);
        segments.iter().find_map(drops)?;
        let k = self.dims().1;
        let mut dropped = pool.take(x.len());
        self.parts(&mut dropped, k).into_par_iter().zip(segments).for_each(|(to, segment)| {
            let from = &x[segment.rows.start * k..segment.rows.end * k];
            drops(segment).into_iter().for_each(|dropout| self.drop(dropout, segment, from, to, false));
        });
        Some(dropped)
    }

    /// A job's dropout here.
    fn dropout(&self, member: &Member<'_>) -> Option<Dropout> {
        let is_lora = matches!(member.params.sites[self.id.index()], Some(SiteParams::Lora(_)));
        member.dropout.filter(|_| is_lora)
    }

    /// Whether the job scales, as DoRA, a product of what dropout leaves of the input.
    fn scales_thinned(&self, member: &Member<'_>) -> bool {
        let site = &member.params.sites[self.id.index()];
        self.dropout(member).is_some() && matches!(site, Some(SiteParams::Lora(Lora { dora: Some(_), .. })))
    }

    /// What a segment of the job reads: rows of `x`, after dropout if it has one.
    fn input<'x>(
        &self,
        member: &Member<'_>,
        segment: &Segment,
        x: &'x [f32],
        dropped: &'x Option<Vec<f32>>,
    ) -> &'x [f32] {
        let k = self.dims().1;
        let from = self.dropout(member).and(dropped.as_deref()).unwrap_or(x);
        &from[segment.rows.start * k..segment.rows.end * k]
    }

    fn drop(&self, dropout: Dropout, segment: &Segment, from: &[f32], to: &mut [f32], add: bool) {
        let k = self.dims().1;
        rows(to, k, |at, to| {
            let row = segment.rows.start + at;
            let place = (self.pack.examples[row], self.pack.positions[row]);
            thin_out(dropout.of_row(self.id.index(), place), &from[at * k..][..k], to, add);
        });
    }
}

/// A segment, the gradient of its output, and what comes down from there.
type Part<'v> = (&'v Segment, &'v mut [f32], &'v mut Option<Down>);

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
