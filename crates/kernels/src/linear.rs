//! The fused linear layer: the frozen products of the sites that share an input, and every row's own adapter, in one
//! call.
//!
//! `y[i] = o_s * (W (i_s * x[i])) + bias + c_s + B_s (A_s x[i])`, where `s` is the adapter of row `i`, if it has one (LoRA,
//! Hu et al. 2021; many adapters in one batch as in Punica, Chen et al. 2023, and S-LoRA, Sheng et al. 2023); most
//! adapters have no scales `o`, `i` and no `c` ([`crate::Vectors`]). Two rounds of work: rows are prepared (norm, scale,
//! quantisation, `A x`), then every task takes some panels of sixteen outputs and computes them for all rows, `B (A x)`
//! being added before they are stored.

use std::ops::Range;

use crate::ahead::{Announced, Soon};
use crate::buffer::at_a_line;
use crate::cut::Cut;
use crate::input::{Input, Prepared, prepare};
use crate::isa::{Isa, isa};
use crate::lanes::{Lanes, multiversion};
use crate::lines::Line;
use crate::low_rank::{PREFETCHED, Route};
use crate::memory::LINE;
use crate::panel::{APART, Sink, Summary, TILE, View, panel_product};
use crate::parallel::Shared;
use crate::routing::{Listing, NoAdapters, Routing, Shape, route_of};
use crate::team::{Rayon, Workers};
use crate::updates::{Updated, Updates};
use crate::vectors::{Adapted, RowVectors};
use crate::weight::{PANEL, Weight};

/// How activations enter the products with quantised weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// In 8 bits, in blocks of 32 with a scale each.
    #[default]
    Fast,
    /// In float32, as in the reference implementation.
    Exact,
}

/// One of the linear layers of a call.
pub struct Layer<'a> {
    /// The frozen matrix.
    pub weight: &'a Weight,
    /// One value per output.
    pub bias: Option<&'a [f32]>,
    /// The rows' adapters.
    pub adapters: &'a dyn Routing,
    /// Shape (rows, outputs).
    pub y: &'a mut [f32],
    /// Whether the result is added to `y`, as at the end of a residual branch, or replaces it.
    pub add: bool,
}

/// Buffers that calls use one after another; they grow to what the largest call needs.
#[derive(Debug, Default)]
pub struct Scratch {
    values: Vec<f32>,
    quants: Vec<Line>,
    summaries: Vec<Line>,
    routes: Vec<Route>,
    /// Those of the call after the next one.
    coming: Vec<Route>,
    shrunk: Vec<f32>,
    vectors: Vec<RowVectors>,
    under: Vec<f32>,
    announced: Announced,
}

impl Scratch {
    /// Says that the call after the next one has layers of `cols` inputs with these adapters for `rows` rows, and `threads`
    /// threads: what it begins with comes out of memory while the next one computes.
    pub fn announce(&mut self, layers: &[&dyn Routing], rows: usize, cols: usize, threads: usize) {
        self.announced.reserve(threads);
        // Once for all, as there.
        self.coming.reserve((LAYERS * PREFETCHED).saturating_sub(self.coming.len()));
        if rows > PREFETCHED || layers.iter().all(|layer| layer.max_rank() == 0) {
            return;
        }
        self.coming.clear();
        for layer in layers {
            layer.list(rows, &mut Listing::new(&mut self.coming, None));
        }
        assert_eq!(self.coming.len(), layers.len() * rows, "a routing lists others than {rows} rows");
        let each = prepared_together(rows, cols);
        let tasks = rows.div_ceil(each);
        for thread in 0..threads {
            // As a team deals them out, row by row: what a thread asks for it will read.
            let [from, to] = [thread, thread + 1].map(|thread| (tasks * thread / threads * each).min(rows));
            for row in from..to {
                for site in 0..layers.len() {
                    let route = &self.coming[site * rows + row];
                    if route.rank > 0 {
                        self.announced.push(site, route.way_down());
                    }
                }
            }
            self.announced.end_thread();
        }
    }
}

// SAFETY: the pointers in `routes`, `coming` and `vectors` are used within the call that writes them only.
unsafe impl Send for Scratch {}

fn grow(buffer: &mut Vec<Line>, bytes: usize) {
    let lines = bytes.div_ceil(LINE);
    if buffer.len() < lines {
        buffer.resize(lines, Line([0; LINE]));
    }
}

/// How a call is carried out.
#[derive(Clone, Copy)]
pub struct Means<'a> {
    /// The vector unit.
    pub isa: Isa,
    /// Who works.
    pub workers: &'a dyn Workers,
    /// How activations enter.
    pub precision: Precision,
}

/// Rounds of preparation smaller than this many values are not worth waking others for.
const ALONE: usize = 4096;

/// Runs layers that share an input of shape (rows, columns).
///
/// # Panics
/// When a buffer's length does not fit the layers' shapes, or the CPU lacks the unit.
pub fn fused_linear(scratch: &mut Scratch, means: Means<'_>, input: Input<'_>, layers: &mut [Layer<'_>]) {
    let Some(first) = layers.first() else { return };
    assert!(layers.len() <= LAYERS, "more than {LAYERS} layers share an input");
    let cols = first.weight.cols();
    let rows = input.len() / cols;
    assert_eq!(input.len(), rows * cols, "the input does not divide into rows of {cols}");
    match input {
        Input::Plain(_) => {}
        Input::Norm { weight, .. } => assert_eq!(weight.len(), cols, "the norm is not {cols} wide"),
        Input::SwiGlu { gate, up } => assert_eq!(gate.len(), up.len(), "gate and up differ"),
    }
    let mut fast = false;
    for layer in &*layers {
        let n = layer.weight.rows();
        assert_eq!(layer.weight.cols(), cols, "the layers' inputs differ");
        assert_eq!(layer.y.len(), rows * n, "y is not {rows} x {n}");
        assert!(layer.bias.is_none_or(|bias| bias.len() == n), "the bias has not {n} values");
        fast |= means.precision == Precision::Fast && layer.weight.format().block_len() > 1;
        if layer.adapters.coded() {
            assert_eq!(means.precision, Precision::Fast, "adapters in eight bits need quantised activations");
            fast = true;
        }
    }
    let scaled = match scales_input(layers, rows) {
        Scales::None => false,
        Scales::Alike => true,
        // Rare: the layers cannot share what is prepared.
        Scales::Differ => {
            for layer in layers {
                fused_linear(scratch, means, input, std::slice::from_mut(layer));
            }
            return;
        }
    };
    let prepared = buffers(scratch, input, layers, rows, cols, Needs { fast, scaled });
    let has_updates = prepared.sites > 0 || prepared.under_rank > 0;
    if fast || has_updates || scaled || !matches!(input, Input::Plain(_)) {
        let each = prepared_together(rows, cols);
        means.workers.run(rows.div_ceil(each), &|task| {
            let (from, to) = (task * each, (task * each + each).min(rows));
            prepare(means.isa, input, from, to, &prepared);
        });
    }
    multiply(means, layers, &prepared, &scratch.announced);
    scratch.announced.clear();
}

/// Rows that one task prepares: as few as share no cache line with others; so few are split all the same.
fn prepared_together(rows: usize, cols: usize) -> usize {
    match rows {
        _ if rows * cols < ALONE => rows.max(1),
        ..=APART => rows.div_ceil(2),
        _ => APART,
    }
}

/// Whether rows' inputs are scaled before the product.
#[derive(Clone, Copy, PartialEq)]
enum Scales {
    None,
    /// By the same vector for all layers.
    Alike,
    Differ,
}

fn scales_input(layers: &[Layer<'_>], rows: usize) -> Scales {
    let mut scales = Scales::None;
    if layers.iter().all(|layer| !layer.adapters.has_vectors()) {
        return scales;
    }
    for row in 0..rows {
        let start = |layer: &Layer<'_>| layer.adapters.vectors(row).input.map(<[f32]>::as_ptr);
        let mut starts = layers.iter().map(start);
        let first = starts.next().flatten();
        if starts.any(|start| start != first) {
            return Scales::Differ;
        }
        if first.is_some() {
            scales = Scales::Alike;
        }
    }
    scales
}

/// What rows need besides their values.
#[derive(Clone, Copy)]
struct Needs {
    /// Quants.
    fast: bool,
    /// A scale of their own.
    scaled: bool,
}

/// Makes room, and lists every row's adapter at every site.
fn buffers(
    scratch: &mut Scratch,
    input: Input<'_>,
    layers: &[Layer<'_>],
    rows: usize,
    cols: usize,
    Needs { fast, scaled }: Needs,
) -> Prepared {
    let rank_stride = layers.iter().map(|layer| layer.adapters.max_rank()).max().unwrap_or(0);
    let sites = if rank_stride == 0 { 0 } else { layers.len() };
    let in_place = matches!(input, Input::Plain(_)) && !scaled;
    let values = match input {
        // Only read.
        Input::Plain(x) if in_place => x.as_ptr(),
        _ => at_a_line(&mut scratch.values, rows * cols).as_mut_ptr(),
    };
    if fast {
        let blocks = View::places(rows) * (cols / 32);
        grow(&mut scratch.quants, blocks * 32);
        grow(&mut scratch.summaries, blocks * size_of::<Summary>());
    }
    scratch.routes.clear();
    let mut adapted = [false; LAYERS];
    let places = (sites * rows).checked_mul(rank_stride).expect("ranks fit the memory");
    let shrunk = at_a_line(&mut scratch.shrunk, places).as_mut_ptr();
    if sites > 0 {
        for (layer, adapted) in layers.iter().zip(&mut adapted) {
            let own = scratch.routes.len();
            let shape = Shape { n: layer.weight.rows(), k: cols, ranks: rank_stride, fast };
            layer.adapters.list(rows, &mut Listing::new(&mut scratch.routes, Some(shape)));
            let own = &scratch.routes[own..];
            assert_eq!(own.len(), rows, "a routing lists {} rows of {rows}", own.len());
            *adapted = own.iter().any(|route| route.rank > 0);
        }
    }
    scratch.vectors.clear();
    let has_vectors = layers.iter().any(|layer| layer.adapters.has_vectors());
    assert!(has_vectors || !scaled, "a routing has vectors and has none");
    for layer in layers.iter().filter(|_| has_vectors) {
        let n = layer.weight.rows();
        let of_row = |row| RowVectors::new(&layer.adapters.vectors(row), n, cols);
        scratch.vectors.extend((0..rows).map(of_row));
    }
    let (mut under, mut under_rank) = ([Route::NONE; LAYERS], 0);
    for (under, layer) in under.iter_mut().zip(layers) {
        let shape = Shape { n: layer.weight.rows(), k: cols, ranks: usize::MAX, fast };
        *under = shape.checked(route_of(layer.adapters.under()));
        under_rank = under.rank.max(under_rank);
    }
    let under_shrunk = at_a_line(&mut scratch.under, layers.len() * rows * under_rank).as_mut_ptr();
    let quants = if fast { scratch.quants.as_mut_ptr().cast::<i8>() } else { std::ptr::null_mut() };
    Prepared {
        view: View { rows, cols, values, quants, summaries: scratch.summaries.as_mut_ptr().cast() },
        routes: scratch.routes.as_ptr(),
        sites,
        adapted,
        shrunk,
        rank_stride,
        vectors: if has_vectors { scratch.vectors.as_ptr() } else { std::ptr::null() },
        scaled,
        under,
        under_rank,
        under_shrunk,
    }
}

/// A layer's output while tasks write disjoint columns of it.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) y: Shared<'a>,
    pub(crate) n: usize,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) add: bool,
}

/// Layers of one call at most: gate and up are two, q, k and v three.
pub(crate) const LAYERS: usize = 4;

fn multiply(means: Means<'_>, layers: &mut [Layer<'_>], prepared: &Prepared, announced: &Announced) {
    let count = layers.len();
    let mut targets: [Option<(&Weight, Target<'_>)>; LAYERS] = [None; LAYERS];
    for (target, layer) in targets.iter_mut().zip(layers) {
        let n = layer.weight.rows();
        *target =
            Some((layer.weight, Target { y: Shared::new(layer.y), n, bias: layer.bias, add: layer.add }));
    }
    let targets = &targets[..count];
    let panels: usize = targets.iter().flatten().map(|(weight, _)| weight.panels()).sum();
    let cut = Cut::new(panels, means.workers.threads());
    means.workers.run(cut.tasks(), &|task| {
        let (thread, all) = cut.thread(task);
        let Range { start: mut at, mut end } = cut.panels(task);
        let mut before = 0;
        for (site, (weight, target)) in targets.iter().flatten().enumerate() {
            let own = weight.panels();
            if at < own {
                let (to, rows) = (end.min(own), prepared.view.rows);
                let place = |panel: usize| (before + panel - all.start) * rows;
                let soon = announced.some(thread, place(at)..place(to), all.len() * rows);
                stripe(means.isa, weight, at, to, *target, site, prepared, soon);
                if end <= own {
                    break;
                }
                at = own;
            }
            at -= own;
            end -= own;
            before += own;
        }
    });
}

multiversion! {
    /// The outputs of the panels `from..to` of a layer.
    fn stripe(
        weight: &Weight, from: usize, to: usize, target: Target<'_>, site: usize, prepared: &Prepared,
        soon: Soon<'_>,
    ) = stripe_body<Lanes>
}

#[inline(always)]
fn stripe_body<L: Lanes>(
    weight: &Weight,
    from: usize,
    to: usize,
    target: Target<'_>,
    site: usize,
    prepared: &Prepared,
    soon: Soon<'_>,
) {
    let adapted = !prepared.vectors.is_null() || prepared.under[site].rank > 0;
    let updates = Updates::new(prepared, site, to);
    if let Some(updates) = &updates {
        updates.ask::<L>(from);
    }
    let between = !L::TALL || prepared.view.rows < 2 * TILE || prepared.view.quants.is_null();
    let mut columns =
        Columns::<L> { target, panel: from, bias: L::zero(), rest: None, updates, soon, between };
    for panel in from..to {
        let width = PANEL.min(target.n - panel * PANEL);
        let plain = width == PANEL && !adapted;
        columns.panel = panel;
        // SAFETY: `Prepared` describes valid buffers, filled for this precision; tasks own disjoint columns.
        unsafe {
            if let Some(bias) = target.bias.filter(|_| plain) {
                columns.bias = L::load(bias[panel * PANEL..][..PANEL].as_ptr());
            }
            columns.rest = (!plain).then(|| Adapted::new(L::ISA, target, panel, width, site, prepared));
            panel_product(weight, panel, &prepared.view, &mut columns);
        }
    }
}

/// The columns of a panel.
struct Columns<'a, L> {
    target: Target<'a>,
    panel: usize,
    bias: L,
    /// For the last columns of a matrix whose rows do not divide by sixteen, and for rows whose adapters do more.
    rest: Option<Adapted<'a>>,
    updates: Option<Updates>,
    soon: Soon<'a>,
    /// Whether what is needed soon is asked for between the tiles, not within.
    between: bool,
}

impl<L: Lanes> Sink<L> for Columns<'_, L> {
    #[inline(always)]
    fn asks(&self) -> bool {
        !self.between && self.soon.any()
    }

    #[inline(always)]
    fn soon(&mut self) -> *const u8 {
        self.soon.four()
    }

    #[inline(always)]
    fn put<const M: usize>(&mut self, row: usize, mut sums: [L; M]) {
        if self.between {
            for _ in 0..M {
                self.soon.ask::<L>();
            }
        }
        if let Some(rest) = &self.rest {
            // One call for each row instead of a copy in every kernel.
            for i in 0..M {
                rest.put(row + i, &sums[i].to_array());
            }
            if let Some(updates) = &self.updates {
                // SAFETY: the tile's rows are there; tasks own disjoint columns.
                unsafe { updates.add::<L>(row, M, self.panel, self.target) };
            }
            return;
        }
        let mut updated = Updated::new();
        if let Some(updates) = &self.updates {
            // SAFETY: the tile's rows are there.
            unsafe { updates.of::<L>(row, M, self.panel, &mut updated) };
        }
        // SAFETY: tasks own disjoint columns; one part is alive at a time; there is an update for each of the tile's rows.
        unsafe {
            for i in 0..M {
                let y =
                    self.target.y.part((row + i) * self.target.n + self.panel * PANEL, PANEL).as_mut_ptr();
                if self.target.bias.is_some() {
                    sums[i] = sums[i].add(self.bias);
                }
                if self.target.add {
                    sums[i] = L::load(y).add(sums[i]);
                }
                if self.updates.is_some() {
                    sums[i] = sums[i].add(L::load(updated.row(i)));
                }
                sums[i].store(y);
            }
        }
    }
}

/// `y = x Wᵀ + bias` in float32 on the caller's rayon pool: `x` is (rows, input features), `y` (rows, output features).
///
/// # Panics
/// When a buffer's length does not fit the weight's shape.
pub fn linear(weight: &Weight, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    let means = Means { isa: isa(), workers: &Rayon, precision: Precision::Exact };
    let layer = Layer { weight, bias, adapters: &NoAdapters, y, add: false };
    fused_linear(&mut Scratch::default(), means, Input::Plain(x), &mut [layer]);
}
