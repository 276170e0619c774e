//! The fast kernels against the plain reference, on every vector unit this CPU has.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

mod support;

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use kernels::{
    Format, Group, Input, Isa, Layer, Left, Listing, LowRank, Means, Numbers, Precision, Products, Rayon,
    Right, RopeTable, RouteTable, Routing, Scratch, Span, SpanAttention, Team, Vectors, Weight, codes_stride,
    fused_linear, isas, linear, linear_many, linear_transposed, multiply, pack_b, quantise_low_rank,
    reference, rms_norm, rms_norm_grad, rope, span_attention, span_attention_grad, swiglu, swiglu_grad,
};
use rand::SeedableRng;
use rand::rngs::StdRng;

use support::{random, worst};

fn ggml(format: Format) -> GgmlDType {
    match format {
        Format::F32 => GgmlDType::F32,
        Format::F16 => GgmlDType::F16,
        Format::Bf16 => GgmlDType::BF16,
        Format::Q8_0 => GgmlDType::Q8_0,
        Format::Q4_0 => GgmlDType::Q4_0,
        Format::Q4_1 => GgmlDType::Q4_1,
        Format::Q4K => GgmlDType::Q4K,
        Format::Q6K => GgmlDType::Q6K,
    }
}

/// A random weight, encoded by candle.
fn weight(rng: &mut StdRng, format: Format, n: usize, k: usize) -> (Weight, Vec<f32>) {
    let dense = Tensor::from_vec(random(rng, n * k), (n, k), &Device::Cpu).unwrap();
    let quantized = QTensor::quantize(&dense, ggml(format)).unwrap();
    let decoded = quantized.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    (Weight::new(format, n, k, quantized.data().unwrap().into_owned()).unwrap(), decoded)
}

#[test]
fn rows_decode_as_in_candle() {
    let mut rng = StdRng::seed_from_u64(1);
    for format in Format::ALL {
        let (weight, expected) = weight(&mut rng, format, 5, 512);
        let mut row = vec![0.0; 512];
        for (i, expected) in expected.chunks(512).enumerate() {
            weight.decode_row(i, &mut row);
            assert!(worst(&row, expected) <= 1e-6, "{format:?} row {i}");
        }
    }
}

/// Rows, rank, A, B in panels, in either precision, and what else it does.
#[derive(Clone)]
struct Update {
    rows: Vec<usize>,
    rank: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    brain: Option<(Vec<u16>, Vec<u16>)>,
    codes: Option<(Vec<i8>, Vec<i8>, Vec<f32>)>,
    input: Option<Vec<f32>>,
    output: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
}

impl Update {
    fn new(rng: &mut StdRng, rank: usize, n: usize, k: usize, is_brain: bool) -> Self {
        let brain = |values: &[f32]| values.iter().map(|&v| half::bf16::from_f32(v).to_bits()).collect();
        let (a, b) = (random(rng, rank * k), pack_b(&random(rng, n * rank), rank));
        let brain = is_brain.then(|| (brain(&a), brain(&b)));
        let codes = None;
        Self { rows: Vec::new(), rank, a, b, brain, codes, input: None, output: None, bias: None }
    }

    fn low_rank(&self) -> LowRank<'_> {
        let rank = self.rank;
        match (&self.codes, &self.brain) {
            (Some((a, b, scales)), _) => LowRank { rank, a: Numbers::I8(a), b: Numbers::I8(b), scales },
            (_, Some((a, b))) => LowRank { rank, a: Numbers::Bf16(a), b: Numbers::Bf16(b), scales: &[] },
            _ => LowRank { rank, a: Numbers::F32(&self.a), b: Numbers::F32(&self.b), scales: &[] },
        }
    }

    fn vectors(&self) -> Vectors<'_> {
        let Self { input, output, bias, .. } = self;
        Vectors { input: input.as_deref(), output: output.as_deref(), bias: bias.as_deref() }
    }
}

struct Updates {
    own: Vec<Update>,
    under: Option<Update>,
}

impl Updates {
    fn of(&self, row: usize) -> Option<&Update> {
        self.own.iter().find(|update| update.rows.contains(&row))
    }
}

impl Routing for Updates {
    fn at(&self, row: usize) -> Option<LowRank<'_>> {
        self.of(row).map(Update::low_rank)
    }

    fn max_rank(&self) -> usize {
        self.own.iter().map(|update| update.rank).max().unwrap_or(0)
    }

    fn vectors(&self, row: usize) -> Vectors<'_> {
        self.of(row).map_or(Vectors::default(), Update::vectors)
    }

    fn has_vectors(&self) -> bool {
        self.own.iter().any(|own| own.input.is_some() || own.output.is_some() || own.bias.is_some())
    }

    fn under(&self) -> Option<LowRank<'_>> {
        self.under.as_ref().map(Update::low_rank)
    }

    fn coded(&self) -> bool {
        self.own.iter().chain(&self.under).any(|update| update.codes.is_some())
    }
}

/// One row of a larger batch, all that is known of it and nothing of the others.
struct Only<'a>(&'a Updates, usize);

impl Routing for Only<'_> {
    fn at(&self, _: usize) -> Option<LowRank<'_>> {
        self.0.at(self.1)
    }

    fn max_rank(&self) -> usize {
        self.at(0).map_or(0, |update| update.rank)
    }

    fn vectors(&self, _: usize) -> Vectors<'_> {
        self.0.vectors(self.1)
    }

    fn has_vectors(&self) -> bool {
        let Vectors { input, output, bias } = self.vectors(0);
        input.is_some() || output.is_some() || bias.is_some()
    }

    fn under(&self) -> Option<LowRank<'_>> {
        self.0.under()
    }

    fn coded(&self) -> bool {
        self.0.of(self.1).into_iter().chain(&self.0.under).any(|update| update.codes.is_some())
    }
}

/// The same updates, listed from a table that has the update of row `row` at place `row + off`.
struct Tabled<'a> {
    plain: &'a Updates,
    table: RouteTable<Vec<(usize, Update)>>,
    off: usize,
}

impl Routing for Tabled<'_> {
    fn at(&self, _: usize) -> Option<LowRank<'_>> {
        panic!("rows are listed")
    }

    fn max_rank(&self) -> usize {
        self.plain.max_rank()
    }

    fn coded(&self) -> bool {
        self.plain.coded()
    }

    fn list<'a>(&'a self, rows: usize, to: &mut Listing<'_, 'a>) {
        (0..rows).for_each(|row| to.push_at(Some(&self.table), row + self.off));
    }
}

struct Case {
    weight: Weight,
    x: Vec<f32>,
    bias: Vec<f32>,
    adapters: Updates,
    m: usize,
}

impl Case {
    fn new(rng: &mut StdRng, format: Format, m: usize, n: usize, k: usize) -> Self {
        let (weight, _) = weight(rng, format, n, k);
        // Rows 0, 4, 8, .. have no adapter; the others three adapters of ranks 1, 5 and 16 in turn.
        let own = [1usize, 5, 16].into_iter().enumerate().map(|(which, rank)| {
            let rows = (0..m).filter(|row| row % 4 == which + 1).collect();
            Update { rows, ..Update::new(rng, rank, n, k, which == 1) }
        });
        let adapters = Updates { own: own.collect(), under: None };
        Self { weight, x: random(rng, m * k), bias: random(rng, n), adapters, m }
    }

    /// With scales and biases in two of the adapters.
    fn with_vectors(mut self, rng: &mut StdRng) -> Self {
        let (n, k) = (self.weight.rows(), self.weight.cols());
        let [first, second, _] = &mut self.adapters.own[..] else { panic!("three adapters") };
        first.output = Some(random(rng, n));
        first.bias = Some(random(rng, n));
        second.input = Some(random(rng, k));
        second.bias = Some(random(rng, n));
        self
    }

    /// With three adapters in eight bits too, whose rows come in runs of one, two and six.
    fn with_codes(mut self, rng: &mut StdRng) -> Self {
        let (n, k) = (self.weight.rows(), self.weight.cols());
        for (run, rank) in [(1usize, 3usize), (2, 8), (6, 21)] {
            let (a, b) = (random(rng, rank * k), random(rng, n * rank));
            let codes = Some(quantise_low_rank(&a, &b, rank));
            let rows = (0..self.m).filter(|row| row / run % 4 == 0 && row % 11 != 5).collect();
            self.adapters.own.insert(0, Update { rows, codes, ..Update::new(rng, rank, n, k, false) });
        }
        self
    }

    /// With an update under all rows.
    fn with_under(mut self, rng: &mut StdRng, is_brain: bool) -> Self {
        self.adapters.under = Some(Update::new(rng, 3, self.weight.rows(), self.weight.cols(), is_brain));
        self
    }

    fn run(&self, isa: Isa, precision: Precision) -> Vec<f32> {
        self.run_with(Means { isa, workers: &Rayon, precision })
    }

    fn run_with(&self, means: Means<'_>) -> Vec<f32> {
        let mut y = vec![f32::NAN; self.m * self.weight.rows()];
        self.layer(means, &self.x, &self.adapters, &mut y);
        y
    }

    fn layer(&self, means: Means<'_>, x: &[f32], adapters: &dyn Routing, y: &mut [f32]) {
        let layer = Layer { weight: &self.weight, bias: Some(&self.bias), adapters, y, add: false };
        fused_linear(&mut Scratch::default(), means, Input::Plain(x), &mut [layer]);
    }

    /// What the plain kernel gives, activations quantised where the precision and the format say so.
    fn expected(&self, precision: Precision) -> Vec<f32> {
        let mut y = vec![0.0; self.m * self.weight.rows()];
        let fast = precision == Precision::Fast && self.weight.format().block_len() > 1;
        let (bias, adapters) = (Some(&self.bias[..]), &self.adapters);
        reference::linear_adapted(&self.weight, bias, &self.x, fast, adapters, &mut y);
        y
    }
}

const PRECISIONS: [Precision; 2] = [Precision::Exact, Precision::Fast];

#[test]
fn fused_linear_equals_the_reference_on_every_unit() {
    println!("units of this CPU: {:?}; others are compiled and skipped", isas());
    let mut rng = StdRng::seed_from_u64(2);
    for format in Format::ALL {
        // Formats with short blocks need no more than whole blocks.
        let short = [(5, 40, 288), (12, 33, 544)].into_iter().filter(|_| format.block_len() <= 32);
        for (m, n, k) in [(1, 7, 256), (3, 33, 512), (9, 64, 256), (33, 130, 512)].into_iter().chain(short) {
            let plain = Case::new(&mut rng, format, m, n, k);
            let vectors = Case::new(&mut rng, format, m, n, k).with_vectors(&mut rng);
            let under = Case::new(&mut rng, format, m, n, k).with_under(&mut rng, m == 9);
            let all = Case::new(&mut rng, format, m, n, k).with_vectors(&mut rng);
            let all = all.with_under(&mut rng, m == 3);
            for (which, case) in [plain, vectors, under, all].into_iter().enumerate() {
                for precision in PRECISIONS {
                    let expected = case.expected(precision);
                    for isa in isas() {
                        let error = worst(&case.run(isa, precision), &expected);
                        let on = format!("{format:?} {m}x{n}x{k} {precision:?} on {isa:?}");
                        assert!(error < 2e-4, "case {which}, {on}: {error}");
                    }
                }
            }
        }
    }
}

#[test]
fn adapters_in_eight_bits_equal_the_reference_on_every_unit() {
    let mut rng = StdRng::seed_from_u64(21);
    for format in [Format::Q4_1, Format::Q8_0, Format::F32] {
        for (m, n, k) in [(1, 7, 256), (9, 64, 544), (33, 130, 512)] {
            let case = Case::new(&mut rng, format, m, n, k).with_codes(&mut rng);
            let expected = case.expected(Precision::Fast);
            let first = case.run(isas()[0], Precision::Fast);
            for isa in isas() {
                let y = case.run(isa, Precision::Fast);
                let error = worst(&y, &expected);
                assert!(error < 1e-3, "{format:?} {m}x{n}x{k} on {isa:?}: {error}");
                let same = y.iter().zip(&first).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same || isa == Isa::Portable, "{format:?} {m}x{n}x{k} on {isa:?}");
            }
        }
    }
}

/// The largest difference from the reference, of the largest value.
fn relative(case: &Case, isa: Isa, expected: &[f32]) -> f32 {
    let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    worst(&case.run(isa, Precision::Fast), expected) / largest
}

#[test]
fn adapters_of_every_rank_equal_the_reference_on_every_unit() {
    let mut rng = StdRng::seed_from_u64(24);
    let (m, n, k) = (9, 70, 544);
    for format in [Format::Q4_1, Format::Q8_0, Format::F32] {
        for rank in [1, 40, 63, 64, 65, 512] {
            // One kept in float32, one in bfloat16, one in eight bits.
            let mut case = Case::new(&mut rng, format, m, n, k);
            for (which, update) in case.adapters.own.iter_mut().enumerate() {
                let rows = std::mem::take(&mut update.rows);
                *update = Update { rows, ..Update::new(&mut rng, rank, n, k, which == 1) };
            }
            let (a, b) = (random(&mut rng, rank * k), random(&mut rng, n * rank));
            case.adapters.own[2].codes = Some(quantise_low_rank(&a, &b, rank));
            let expected = case.expected(Precision::Fast);
            for isa in isas() {
                let error = relative(&case, isa, &expected);
                assert!(error < 2e-5, "{format:?} rank {rank} on {isa:?}: {error}");
            }
            // Negative control: the last rank is missing.
            let last = case.adapters.own[0].a.len() - k;
            case.adapters.own[0].a[last..].fill(0.0);
            let error = relative(&case, isas()[0], &expected);
            assert!(error > 1e-3, "{format:?} rank {rank}: {error}");
        }
    }
}

#[test]
fn updates_listed_from_a_table_are_the_same() {
    let mut rng = StdRng::seed_from_u64(25);
    let case = Case::new(&mut rng, Format::Q4_1, 9, 64, 544).with_codes(&mut rng);
    let means = Means { isa: isas()[0], workers: &Rayon, precision: Precision::Fast };
    let plain = case.run_with(means);
    let run = |off: usize| {
        let own = (0..case.m).filter_map(|row| Some((row, case.adapters.of(row)?.clone())));
        let table = RouteTable::new(Arc::new(own.collect::<Vec<_>>()), case.m, |own, row| {
            own.iter().find(|(of, _)| *of == row).map(|(_, update)| update.low_rank())
        });
        let adapters = Tabled { plain: &case.adapters, table, off };
        let mut y = vec![0.0; plain.len()];
        case.layer(means, &case.x, &adapters, &mut y);
        y.iter().zip(&plain).all(|(a, b)| a.to_bits() == b.to_bits())
    };
    assert!(run(0));
    // Negative control: every row has the next one's.
    assert!(!run(1));
}

#[test]
fn one_wrong_code_is_noticed() {
    // Negative control of the comparison above.
    let mut rng = StdRng::seed_from_u64(23);
    let mut case = Case::new(&mut rng, Format::Q4_1, 9, 64, 544).with_codes(&mut rng);
    let expected = case.expected(Precision::Fast);
    let (codes, ..) = case.adapters.own[0].codes.as_mut().unwrap();
    codes[543] = codes[543].wrapping_add(40);
    assert!(worst(&case.run(isas()[0], Precision::Fast), &expected) > 1e-3);
}

#[test]
fn codes_of_low_rank_factors_lose_little() {
    let mut rng = StdRng::seed_from_u64(22);
    let (rank, k, n) = (8, 96, 40);
    let (a, b) = (random(&mut rng, rank * k), random(&mut rng, n * rank));
    let (codes_a, codes_b, scales) = quantise_low_rank(&a, &b, rank);
    let decoded = |codes: &[i8], at: usize, scale: f32| f32::from(codes[at]) * scale;
    let x = random(&mut rng, k);
    let (mut size, mut error) = (0.0f32, 0.0f32);
    for out in 0..n {
        let (mut plain, mut coded) = (0.0, 0.0);
        for r in 0..rank {
            let dot = |a: &dyn Fn(usize) -> f32| (0..k).map(|i| a(i) * x[i]).sum::<f32>();
            plain += dot(&|i| a[r * k + i]) * b[out * rank + r];
            let place = (out / 16 * rank + r) * 16 + out % 16;
            coded +=
                dot(&|i| decoded(&codes_a, r * codes_stride(k) + i, scales[r])) * f32::from(codes_b[place]);
        }
        (size, error) = (size.max(plain.abs()), error.max((plain - coded).abs()));
    }
    assert!(error < 0.02 * size && error > 0.0, "{error} of {size}");
}

#[test]
fn dense_rows_may_have_any_length() {
    let mut rng = StdRng::seed_from_u64(12);
    for format in [Format::F32, Format::Bf16, Format::F16] {
        for k in [1, 3, 30, 67] {
            let case = Case::new(&mut rng, format, 5, 20, k);
            for isa in isas() {
                assert!(worst(&case.run(isa, Precision::Fast), &case.expected(Precision::Fast)) < 1e-4);
            }
        }
    }
}

#[test]
fn eight_bits_cost_little_and_something() {
    // Uniform activations lose at most 1/254 of a block's largest value each.
    let mut rng = StdRng::seed_from_u64(13);
    let case = Case::new(&mut rng, Format::Q8_0, 9, 64, 512);
    let (exact, fast) = (case.run(isas()[0], Precision::Exact), case.run(isas()[0], Precision::Fast));
    let error = worst(&exact, &fast);
    assert!(error > 1e-4 && error < 0.15, "{error}");
}

#[test]
fn layers_that_share_an_input_equal_separate_ones() {
    let mut rng = StdRng::seed_from_u64(14);
    let (gate, up) = (random(&mut rng, 5 * 256), random(&mut rng, 5 * 256));
    let norm = random(&mut rng, 256);
    let mut case = |format, n| Case::new(&mut rng, format, 5, n, 256);
    let plain = [case(Format::Q4_1, 100), case(Format::Q8_0, 32), case(Format::Q6K, 17)];
    // Here each layer scales the rows of an adapter differently, so that they cannot share what is prepared.
    let mut case = |format, n| Case::new(&mut rng, format, 5, n, 256).with_vectors(&mut rng);
    let vectors = [case(Format::Q4_1, 100), case(Format::Q8_0, 32), case(Format::Q6K, 17)];
    let mut normed = vec![0.0; gate.len()];
    reference::rms_norm(&gate, &norm, 1e-5, &mut normed);
    let mut gated = vec![0.0; gate.len()];
    reference::swiglu(&gate, &up, &mut gated);
    let inputs = [
        (Input::Plain(&gate), &gate),
        (Input::Norm { x: &gate, weight: &norm, eps: 1e-5 }, &normed),
        (Input::SwiGlu { gate: &gate, up: &up }, &gated),
    ];
    let cases = [&plain, &vectors].into_iter().flat_map(|cases| inputs.map(|i| (cases, i)));
    for ((cases, (input, plain)), isa) in
        cases.flat_map(|case| isas().into_iter().map(move |isa| (case, isa)))
    {
        // Exact: what is prepared differs from the reference in its last bits, which may round to another quant.
        let means = Means { isa, workers: &Rayon, precision: Precision::Exact };
        let mut together: Vec<Vec<f32>> = cases.iter().map(|c| vec![1.0; 5 * c.weight.rows()]).collect();
        let mut layers: Vec<Layer<'_>> = cases
            .iter()
            .zip(&mut together)
            .map(|(c, y)| Layer { weight: &c.weight, bias: None, adapters: &c.adapters, y, add: true })
            .collect();
        fused_linear(&mut Scratch::default(), means, input, &mut layers);
        for (case, together) in cases.iter().zip(&together) {
            let mut alone = vec![0.0; together.len()];
            let (weight, adapters) = (&case.weight, &case.adapters);
            let layer = Layer { weight, bias: None, adapters, y: &mut alone, add: false };
            fused_linear(&mut Scratch::default(), means, Input::Plain(plain), &mut [layer]);
            alone.iter_mut().for_each(|y| *y += 1.0);
            assert!(worst(&alone, together) < 1e-4, "{:?} on {isa:?}", case.weight);
        }
    }
}

#[test]
fn what_is_not_a_number_is_not_hidden_by_quantisation() {
    let mut rng = StdRng::seed_from_u64(15);
    let mut case = Case::new(&mut rng, Format::Q4_1, 3, 16, 64);
    for poison in [f32::NAN, f32::INFINITY] {
        case.x[64 + 40] = poison;
        let y = case.run(isas()[0], Precision::Fast);
        assert!(y[16..32].iter().all(|y| y.is_nan()), "{poison}");
        assert!(y[..16].iter().chain(&y[32..]).all(|y| y.is_finite()));
    }
}

#[test]
fn a_single_wrong_value_of_an_adapter_is_noticed() {
    // Negative control: the comparison above must see it, wherever it is.
    let damages: [fn(&mut Updates); 5] = [
        |adapters| adapters.own[0].b[17] += 0.05,
        |adapters| adapters.own[0].output.as_mut().unwrap()[17] += 0.05,
        |adapters| adapters.own[0].bias.as_mut().unwrap()[63] += 0.05,
        |adapters| adapters.own[1].input.as_mut().unwrap()[255] += 0.05,
        |adapters| adapters.under.as_mut().unwrap().a[300] += 0.05,
    ];
    for damage in damages {
        let mut rng = StdRng::seed_from_u64(3);
        let case = Case::new(&mut rng, Format::Q4_1, 9, 64, 256).with_vectors(&mut rng);
        let mut case = case.with_under(&mut rng, false);
        let expected = case.expected(Precision::Exact);
        damage(&mut case.adapters);
        assert!(worst(&case.run(isas()[0], Precision::Exact), &expected) > 2e-4);
    }
}

#[test]
fn rows_without_vectors_are_the_same_to_the_bit_beside_rows_with_them() {
    let mut rng = StdRng::seed_from_u64(16);
    for (n, k) in [(96, 288), (50, 64)] {
        let mut case = Case::new(&mut rng, Format::Q8_0, 21, n, k);
        for (isa, precision) in
            isas().into_iter().flat_map(|isa| PRECISIONS.map(|precision| (isa, precision)))
        {
            let plain = case.run(isa, precision);
            case = case.with_vectors(&mut rng);
            let beside = case.run(isa, precision);
            for (row, (plain, beside)) in plain.chunks(n).zip(beside.chunks(n)).enumerate() {
                // Rows 1, 5, .. and 2, 6, .. have the adapters that got vectors.
                assert_eq!(plain == beside, matches!(row % 4, 0 | 3), "row {row} on {isa:?}");
            }
            case.adapters.own.iter_mut().for_each(|own| {
                (own.input, own.output, own.bias) = (None, None, None);
            });
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_company() {
    let mut rng = StdRng::seed_from_u64(4);
    let team = Team::new(2).unwrap();
    let shapes = [(96, 288, true), (50, 64, false), (70, 1120, true), (96, 288, false)];
    let eight_bits = shapes.map(|(n, k, plain)| (Format::Q8_0, n, k, plain));
    let others = Format::ALL.map(|format| (format, 50, 256, format.block_len() == 256));
    for (format, n, k, plain) in eight_bits.into_iter().chain(others) {
        let mut case = Case::new(&mut rng, format, 67, n, k);
        if !plain {
            case = case.with_vectors(&mut rng).with_under(&mut rng, true);
        }
        for isa in isas() {
            for precision in PRECISIONS {
                let together = case.run(isa, precision);
                let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
                let single = one_thread.install(|| case.run(isa, precision));
                assert_eq!(together, single, "thread count, {format:?} on {isa:?}");
                assert_eq!(
                    together,
                    case.run_with(Means { isa, workers: &team, precision }),
                    "team, {format:?} on {isa:?}"
                );
                for row in 0..case.m {
                    let mut alone = vec![f32::NAN; n];
                    let means = Means { isa, workers: &Rayon, precision };
                    let adapters = Only(&case.adapters, row);
                    case.layer(means, &case.x[row * k..][..k], &adapters, &mut alone);
                    assert_eq!(alone, &together[row * n..][..n], "row {row}, {format:?} on {isa:?}");
                }
            }
        }
    }
}

#[test]
fn units_with_fused_multiply_add_agree_to_the_bit() {
    let units: Vec<Isa> = isas().into_iter().filter(|isa| *isa != Isa::Portable).collect();
    if units.len() < 2 {
        println!("skipped: this CPU has not both AVX2 and AVX-512");
        return;
    }
    for format in Format::ALL {
        let case = Case::new(&mut StdRng::seed_from_u64(5), format, 13, 40, 256);
        for precision in PRECISIONS {
            assert_eq!(case.run(units[0], precision), case.run(units[1], precision), "{format:?}");
        }
    }
}

#[test]
fn products_of_many_rows_equal_the_reference() {
    let mut rng = StdRng::seed_from_u64(6);
    let shapes = [
        (1, 7, 32, Format::Q4_1),
        (5, 33, 64, Format::Q8_0),
        (70, 300, 288, Format::Q4_0),
        (130, 144, 102, Format::F32),
        (3, 18, 256, Format::Q6K),
        (14, 40, 512, Format::Q4K),
    ];
    for (m, n, k, format) in shapes {
        let (weight, _) = weight(&mut rng, format, n, k);
        let x = random(&mut rng, m * k);
        let (mut fast, mut plain) = (vec![0.0; m * n], vec![0.0; m * n]);
        linear_many(&weight, Products::F32, &x, &mut fast);
        linear(&weight, None, &x, &mut plain);
        assert!(worst(&fast, &plain) < 2e-4, "{format:?}");
        for row in 0..m {
            let mut alone = vec![0.0; n];
            linear_many(&weight, Products::F32, &x[row * k..][..k], &mut alone);
            assert_eq!(alone, fast[row * n..][..n], "row {row} in company");
        }
        let dy = random(&mut rng, m * n);
        let (mut fast, mut plain) = (vec![0.0; m * k], vec![0.0; m * k]);
        linear_transposed(&weight, Products::F32, &dy, &mut fast);
        reference::linear_transposed(&weight, &dy, &mut plain);
        assert!(worst(&fast, &plain) < 2e-4, "{format:?}");
        for row in 0..m {
            let mut alone = vec![0.0; k];
            linear_transposed(&weight, Products::F32, &dy[row * n..][..n], &mut alone);
            assert_eq!(alone, fast[row * k..][..k], "row {row} in company");
        }
    }
}

#[test]
fn plain_products_equal_a_loop() {
    let mut rng = StdRng::seed_from_u64(11);
    for (m, k, n) in [(1, 3, 5), (8, 100, 70), (53, 8, 205), (200, 16, 16)] {
        for transposed in [false, true] {
            let (left, right) = (random(&mut rng, m * k), random(&mut rng, k * n));
            let (row, step) = if transposed { (1, m) } else { (k, 1) };
            let start = random(&mut rng, m * n);
            let mut out = start.clone();
            let factors = (Left { values: &left, row, step }, Right { values: &right, stride: n });
            multiply([m, k, n], factors.0, factors.1, &mut out, true);
            let plain: Vec<f32> = (0..m * n)
                .map(|at| {
                    let product = |j: usize| left[at / n * row + j * step] * right[j * n + at % n];
                    start[at] + (0..k).map(product).sum::<f32>()
                })
                .collect();
            assert!(worst(&out, &plain) < 1e-4, "{m} {k} {n} {transposed}");
            multiply([m, k, n], factors.0, factors.1, &mut out, false);
            assert!(worst(&out, &plain) > 1e-2, "not added");
        }
    }
}

/// The derivative of `sum(f(x) * dy)` by central differences, at every place of `x`.
fn numeric(x: &[f32], dy: &[f32], f: impl Fn(&[f32]) -> Vec<f32>) -> Vec<f32> {
    let at = |i: usize, step: f32| {
        let mut x = x.to_vec();
        x[i] += step;
        f(&x).iter().zip(dy).map(|(y, d)| f64::from(*y) * f64::from(*d)).sum::<f64>()
    };
    (0..x.len()).map(|i| ((at(i, 1e-2) - at(i, -1e-2)) / 2e-2) as f32).collect()
}

#[test]
fn gradients_equal_central_differences() {
    let mut rng = StdRng::seed_from_u64(9);
    let (x, weight, dy) = (random(&mut rng, 24), random(&mut rng, 8), random(&mut rng, 24));
    let mut dx = dy.clone();
    rms_norm_grad(&x, &weight, 1e-5, &mut dx);
    let norm = |x: &[f32]| {
        let mut y = vec![0.0; 24];
        rms_norm(x, &weight, 1e-5, &mut y);
        y
    };
    assert!(worst(&dx, &numeric(&x, &dy, norm)) < 2e-3);

    let (gate, up) = (random(&mut rng, 24), random(&mut rng, 24));
    let (mut dgate, mut dup) = (gate.clone(), up.clone());
    swiglu_grad(&mut dgate, &mut dup, &dy);
    let run = |gate: &[f32], up: &[f32]| {
        let mut y = vec![0.0; 24];
        swiglu(gate, up, &mut y);
        y
    };
    assert!(worst(&dgate, &numeric(&gate, &dy, |gate| run(gate, &up))) < 1e-3);
    assert!(worst(&dup, &numeric(&up, &dy, |up| run(&gate, up))) < 1e-3);

    let table = RopeTable::new(&[1.0, 0.3], 6);
    let turn = |inverse: bool, x: &[f32]| {
        let mut x = x.to_vec();
        rope(&table, &[0, 3, 5], inverse, &mut x);
        x
    };
    assert!(worst(&turn(true, &dy), &numeric(&x, &dy, |x| turn(false, x))) < 1e-3);

    for window in [None, Some(3)] {
        // One sequence, and two that share their first row.
        let shared = Group {
            head: Span { first: 3, len: 1 },
            tails: vec![Span { first: 4, len: 2 }, Span { first: 6, len: 1 }],
        };
        let groups = vec![Span { first: 0, len: 3 }.into(), shared];
        let shape = SpanAttention { heads: 2, kv_heads: 1, head_dim: 4, window, groups };
        let (q, k, v) = (random(&mut rng, 56), random(&mut rng, 28), random(&mut rng, 28));
        let dout = random(&mut rng, 56);
        let run = |q: &[f32], k: &[f32], v: &[f32]| {
            let mut out = vec![0.0; 56];
            span_attention(&shape, q, k, v, &mut out);
            out
        };
        let (mut dq, mut dk, mut dv) = (vec![0.0; 56], vec![0.0; 28], vec![0.0; 28]);
        span_attention_grad(&shape, &q, &k, &v, &dout, &mut dq, &mut dk, &mut dv);
        assert!(worst(&dq, &numeric(&q, &dout, |q| run(q, &k, &v))) < 1e-3);
        assert!(worst(&dk, &numeric(&k, &dout, |k| run(&q, k, &v))) < 1e-3);
        assert!(worst(&dv, &numeric(&v, &dout, |v| run(&q, &k, v))) < 1e-3);
    }
}
