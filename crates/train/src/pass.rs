//! One pass of packed rows through the base, forwards and backwards: gradients for what the jobs train, for nothing
//! else, and no further down than the lowest of it.

use kernels::{SpanAttention, span_attention, span_attention_grad};
use model::{BaseModel, Block};
use types::{Site, SiteId};

use crate::buffers::{Pool, add, add_and_norm, add_norm_grad, norm, norm_grad, swiglu, swiglu_grad, turn};
use crate::head::loss_and_grad;
use crate::pack::{Pack, Source};
use crate::site::{Member, Product, SiteAt};

/// What a block leaves for its way back; everything else is computed again.
struct Kept {
    /// Queries and keys before their norms, where the model has such.
    raw: [Option<Vec<f32>>; 2],
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    /// After the attention's residual.
    middle: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// By [`Site::index`].
    products: [Product; 7],
}

impl Kept {
    fn release(self, pool: &mut Pool) {
        let Self { raw, q, k, v, attended, middle, gate, up, products } = self;
        let whole = [q, k, v, attended, middle, gate, up];
        whole
            .into_iter()
            .chain(raw.into_iter().flatten())
            .chain(products.into_iter().flatten())
            .for_each(|buffer| pool.give(buffer));
    }
}

/// A pass.
pub(crate) struct Pass<'a> {
    base: &'a BaseModel,
    pack: &'a Pack,
    attention: SpanAttention,
    /// Bytes of what blocks may leave, their inputs included.
    budget: usize,
}

impl<'a> Pass<'a> {
    pub(crate) fn new(base: &'a BaseModel, pack: &'a Pack, budget: usize) -> Self {
        let mut attention = base.config().span_attention(0, &[]);
        attention.groups.clone_from(&pack.groups);
        Self { base, pack, attention, budget }
    }

    /// Adds losses and gradients of all rows to the members. `breathe` is called between blocks.
    pub(crate) fn run(self, pool: &mut Pool, members: &mut [Member<'_>], breathe: &mut dyn FnMut()) {
        let layers = self.base.config().layers;
        let lowest = self.lowest(members);
        let first_kept = self.first_kept(members, lowest.layer);
        let mut inputs: Vec<Vec<f32>> = Vec::with_capacity(layers);
        let mut kept: Vec<Option<Kept>> = Vec::with_capacity(layers);
        let mut x = self.embed(pool, members);
        for layer in 0..layers {
            breathe();
            let (left, next) = self.forward(pool, members, layer, &x);
            if layer >= first_kept {
                kept.push(Some(left));
            } else {
                left.release(pool);
                kept.push(None);
            }
            if layer >= lowest.layer {
                inputs.push(std::mem::replace(&mut x, next));
            } else {
                inputs.push(Vec::new());
                pool.give(std::mem::replace(&mut x, next));
            }
        }
        let mut dx = loss_and_grad(self.base, pool, members, self.pack, &x);
        pool.give(x);
        for layer in (lowest.layer..layers).rev() {
            breathe();
            let (Some(x), Some(left)) = (inputs.pop(), kept.pop()) else { break };
            let left = left.unwrap_or_else(|| {
                breathe();
                let (left, next) = self.forward(pool, members, layer, &x);
                pool.give(next);
                left
            });
            let floor = (layer == lowest.layer).then_some(lowest.site).flatten();
            dx = self.backward(pool, members, layer, &x, left, dx, floor);
            pool.give(x);
        }
        if lowest.site.is_none() {
            self.add_to_embeddings(members, &dx);
        }
        pool.give(dx);
    }

    /// The last block's output; nothing is kept. `breathe` is called between blocks.
    pub(crate) fn hidden(
        &self,
        pool: &mut Pool,
        members: &[Member<'_>],
        breathe: &mut dyn FnMut(),
    ) -> Vec<f32> {
        let mut x = self.embed(pool, members);
        for layer in 0..self.base.config().layers {
            breathe();
            let (left, next) = self.forward(pool, members, layer, &x);
            left.release(pool);
            pool.give(std::mem::replace(&mut x, next));
        }
        x
    }

    /// The lowest block and site that anything trains at; no site when it is the input embeddings.
    fn lowest(&self, members: &[Member<'_>]) -> Lowest {
        let jobs = self.pack.segments.iter().map(|segment| members[segment.job].params.lowest());
        match jobs.min().flatten() {
            Some(index) => Lowest { layer: index / 7, site: Some(Site::ALL[index % 7]) },
            None => Lowest { layer: 0, site: None },
        }
    }

    /// The first of the blocks that leave all they need for their way back: the upper ones, as many as the budget has room
    /// for beside the inputs of all blocks that have one, without which nothing could be computed again.
    fn first_kept(&self, members: &[Member<'_>], lowest: usize) -> usize {
        let layers = self.base.config().layers;
        let inputs = (layers - lowest) * self.row_bytes(self.base.config().hidden);
        let mut left = self.budget.saturating_sub(inputs);
        let fits = |layer: &usize| {
            let bytes = self.kept_bytes(members, *layer);
            let fits = bytes <= left;
            left = left.saturating_sub(bytes);
            fits
        };
        layers - (lowest..layers).rev().take_while(fits).count()
    }

    /// Bytes of what a block leaves: see [`Kept`].
    fn kept_bytes(&self, members: &[Member<'_>], layer: usize) -> usize {
        let (config, block) = (self.base.config(), &self.base.blocks()[layer]);
        let (query, key) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let raw = [(&block.query_norm, query), (&block.key_norm, key)];
        let raw: usize = raw.iter().filter(|(norm, _)| norm.is_some()).map(|(_, width)| width).sum();
        let sites = Site::ALL.map(|site| self.site(layer, site));
        let products: usize = sites.iter().map(|site| site.product_width(members)).sum();
        self.row_bytes(raw + 2 * query + 2 * key + config.hidden + 2 * config.feed_forward + products)
    }

    /// Bytes of so many values of every row.
    fn row_bytes(&self, width: usize) -> usize {
        self.pack.rows() * width * size_of::<f32>()
    }

    fn embed(&self, pool: &mut Pool, members: &[Member<'_>]) -> Vec<f32> {
        let width = self.base.config().hidden;
        let mut x = pool.take(self.pack.rows() * width);
        for segment in &self.pack.segments {
            let values = &members[segment.job].params.values;
            for row in segment.rows.clone() {
                let x = &mut x[row * width..][..width];
                match self.pack.sources[row] {
                    Source::Token(token) => self.base.embedding().decode_row(token as usize, x),
                    Source::Virtual(at) => x.copy_from_slice(&values[at * width..][..width]),
                }
            }
        }
        x
    }

    /// Adds the gradients of the inputs to the virtual tokens' embeddings.
    fn add_to_embeddings(&self, members: &mut [Member<'_>], dx: &[f32]) {
        let width = self.base.config().hidden;
        for segment in &self.pack.segments {
            let grads = &mut members[segment.job].grads;
            for row in segment.rows.clone() {
                if let Source::Virtual(at) = self.pack.sources[row] {
                    let sums = &mut grads[at * width..][..width];
                    sums.iter_mut().zip(&dx[row * width..]).for_each(|(sum, dx)| *sum += dx);
                }
            }
        }
    }

    fn site(&self, layer: usize, site: Site) -> SiteAt<'a> {
        let linear = &self.base.blocks()[layer].linears[site.index()];
        SiteAt { id: SiteId::new(layer, site), linear, pack: self.pack }
    }

    /// Norms queries or keys in place if there is a norm; gives back what they were then.
    fn head_norm(&self, pool: &mut Pool, weight: Option<&[f32]>, x: &mut Vec<f32>) -> Option<Vec<f32>> {
        let weight = weight?;
        let mut normed = pool.take(x.len());
        norm(x, weight, self.base.config().norm_eps, &mut normed);
        Some(std::mem::replace(x, normed))
    }

    fn forward(&self, pool: &mut Pool, members: &[Member<'_>], layer: usize, x: &[f32]) -> (Kept, Vec<f32>) {
        let (base, config) = (self.base, self.base.config());
        let block: &Block = &base.blocks()[layer];
        let mut products: [Product; 7] = Default::default();
        let mut linear = |pool: &mut Pool, site: Site, x: &[f32]| {
            let (y, product) = self.site(layer, site).forward(pool, members, x);
            products[site.index()] = product;
            y
        };
        let mut normed = pool.take(x.len());
        norm(x, &block.attention_norm, config.norm_eps, &mut normed);
        let mut q = linear(pool, Site::Q, &normed);
        let mut k = linear(pool, Site::K, &normed);
        let v = linear(pool, Site::V, &normed);
        let raw = [
            self.head_norm(pool, block.query_norm.as_deref(), &mut q),
            self.head_norm(pool, block.key_norm.as_deref(), &mut k),
        ];
        turn(base.rope(), &self.pack.positions, false, &mut q, &mut k);
        let mut attended = pool.take(q.len());
        let attention = SpanAttention { window: config.windows[layer], ..self.attention.clone() };
        span_attention(&attention, &q, &k, &v, &mut attended);
        let mut middle = linear(pool, Site::O, &attended);
        add_and_norm(x, &mut middle, &block.feed_forward_norm, config.norm_eps, &mut normed);
        let gate = linear(pool, Site::Gate, &normed);
        let up = linear(pool, Site::Up, &normed);
        let mut gated = pool.take(gate.len());
        swiglu(&gate, &up, &mut gated, config.feed_forward);
        let mut next = linear(pool, Site::Down, &gated);
        add(&middle, &mut next);
        pool.give(normed);
        pool.give(gated);
        (Kept { raw, q, k, v, attended, middle, gate, up, products }, next)
    }

    /// The gradient of the block's input `x` from that of its output, which it takes; below `floor` nothing is computed.
    fn backward(
        &self,
        pool: &mut Pool,
        members: &mut [Member<'_>],
        layer: usize,
        x: &[f32],
        kept: Kept,
        mut dx: Vec<f32>,
        floor: Option<Site>,
    ) -> Vec<f32> {
        let (base, config) = (self.base, self.base.config());
        let block: &Block = &base.blocks()[layer];
        let Kept { raw, q, k, v, attended, middle, mut gate, mut up, products } = kept;
        let below = |site: Site| floor.is_none_or(|floor| floor < site);
        // `dy` is a residual branch's gradient, which must not change.
        let branch = |pool: &mut Pool,
                      members: &mut [Member<'_>],
                      site: Site,
                      x: &[f32],
                      dy: &[f32],
                      further| {
            let mut own = pool.take(dy.len());
            own.copy_from_slice(dy);
            let dx =
                self.site(layer, site).backward(pool, members, x, &products[site.index()], &mut own, further);
            pool.give(own);
            dx
        };
        let mut normed = pool.take(middle.len());
        let mut given = Vec::new();
        'way: {
            let mut gated = pool.take(gate.len());
            swiglu(&gate, &up, &mut gated, config.feed_forward);
            let dgated = branch(pool, members, Site::Down, &gated, &dx, below(Site::Down));
            pool.give(gated);
            if !below(Site::Down) {
                break 'way;
            }
            swiglu_grad(&mut gate, &mut up, &dgated, config.feed_forward);
            pool.give(dgated);
            norm(&middle, &block.feed_forward_norm, config.norm_eps, &mut normed);
            let further = below(Site::Gate);
            let mut backward = |pool: &mut Pool, site: Site, x: &[f32], dy: &mut [f32], further| {
                self.site(layer, site).backward(pool, members, x, &products[site.index()], dy, further)
            };
            let dnormed = [
                backward(pool, Site::Gate, &normed, &mut gate, further),
                backward(pool, Site::Up, &normed, &mut up, further),
            ];
            if !further {
                break 'way;
            }
            add_norm_grad(&middle, &block.feed_forward_norm, config.norm_eps, &dnormed, &mut dx);
            given.extend(dnormed);
            let dattended = branch(pool, members, Site::O, &attended, &dx, below(Site::O));
            if !below(Site::O) {
                break 'way;
            }
            let attention = SpanAttention { window: config.windows[layer], ..self.attention.clone() };
            let (mut dq, mut dk, mut dv) = (pool.take(q.len()), pool.take(k.len()), pool.take(v.len()));
            span_attention_grad(&attention, &q, &k, &v, &dattended, &mut dq, &mut dk, &mut dv);
            given.push(dattended);
            turn(base.rope(), &self.pack.positions, true, &mut dq, &mut dk);
            for (raw, weight, dy) in
                [(&raw[0], &block.query_norm, &mut dq), (&raw[1], &block.key_norm, &mut dk)]
            {
                if let (Some(raw), Some(weight)) = (raw, weight) {
                    norm_grad(raw, weight, config.norm_eps, dy);
                }
            }
            norm(x, &block.attention_norm, config.norm_eps, &mut normed);
            let further = floor.is_none();
            let mut dnormed = Vec::new();
            for (site, dy) in [(Site::Q, &mut dq), (Site::K, &mut dk), (Site::V, &mut dv)] {
                let at = self.site(layer, site);
                if further || at.is_trained(members) {
                    dnormed.push(at.backward(pool, members, &normed, &products[site.index()], dy, further));
                }
            }
            if further {
                add_norm_grad(x, &block.attention_norm, config.norm_eps, &dnormed, &mut dx);
            }
            given.extend(dnormed);
            given.extend([dq, dk, dv]);
        }
        given.push(normed);
        given.into_iter().for_each(|buffer| pool.give(buffer));
        Kept { raw, q, k, v, attended, middle, gate, up, products }.release(pool);
        dx
    }
}

/// Where the way back ends.
struct Lowest {
    layer: usize,
    site: Option<Site>,
}

#[cfg(test)]
impl Kept {
    /// Bytes that are really there.
    fn bytes(&self) -> usize {
        let Self { raw, q, k, v, attended, middle, gate, up, products } = self;
        let whole = [q, k, v, attended, middle, gate, up].into_iter();
        whole.chain(raw.iter().flatten()).chain(products.iter().flatten()).map(|b| size_of_val(&b[..])).sum()
    }
}

#[cfg(test)]
impl Pass<'_> {
    /// The budgets at which one block more is kept, from none to all that have a way back, each checked against what
    /// the blocks really leave; and the lowest of these blocks.
    pub(crate) fn budgets(&self, pool: &mut Pool, members: &[Member<'_>]) -> (Vec<usize>, usize) {
        let layers = self.base.config().layers;
        let lowest = self.lowest(members).layer;
        let mut left = Vec::new();
        let mut x = self.embed(pool, members);
        let input = size_of_val(&x[..]);
        for layer in 0..layers {
            let (kept, next) = self.forward(pool, members, layer, &x);
            assert_eq!(kept.bytes(), self.kept_bytes(members, layer), "block {layer}");
            left.push(kept.bytes());
            x = next;
        }
        let mut budgets = vec![(layers - lowest) * input];
        for bytes in left[lowest..].iter().rev() {
            budgets.push(budgets[budgets.len() - 1] + bytes);
        }
        (budgets, lowest)
    }
}
