//! The fast kernels against the plain reference, on every vector unit this CPU has.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use kernels::{
    AdapterRows, Format, Isa, KvLayout, KvView, PagedSequence, RopeTable, Span, SpanAttention, Weight, isas,
    linear_adapted_with, linear_transposed, paged_attention, reference, rms_norm, rms_norm_grad, rope,
    span_attention, span_attention_grad, swiglu, swiglu_grad,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn random(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

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

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
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

struct Case {
    weight: Weight,
    x: Vec<f32>,
    bias: Vec<f32>,
    /// Rows, rank, A, B.
    adapters: Vec<(Vec<u32>, usize, Vec<f32>, Vec<f32>)>,
    m: usize,
}

impl Case {
    fn new(rng: &mut StdRng, format: Format, m: usize, n: usize, k: usize) -> Self {
        let (weight, _) = weight(rng, format, n, k);
        // Rows 0, 4, 8, .. have no adapter; the others three adapters of ranks 1, 5 and 16 in turn.
        let adapters = [1usize, 5, 16]
            .into_iter()
            .enumerate()
            .map(|(which, rank)| {
                let rows = (0..m as u32).filter(|row| row % 4 == which as u32 + 1).collect();
                (rows, rank, random(rng, rank * k), random(rng, n * rank))
            })
            .collect();
        Self { weight, x: random(rng, m * k), bias: random(rng, n), adapters, m }
    }

    fn adapters(&self) -> Vec<AdapterRows<'_>> {
        self.adapters.iter().map(|(rows, rank, a, b)| AdapterRows { rows, rank: *rank, a, b }).collect()
    }

    fn run(&self, isa: Isa) -> Vec<f32> {
        let mut y = vec![f32::NAN; self.m * self.weight.rows()];
        linear_adapted_with(isa, &self.weight, Some(&self.bias), &self.x, &self.adapters(), &mut y);
        y
    }
}

#[test]
fn fused_linear_equals_the_reference_on_every_unit() {
    println!("units of this CPU: {:?}; others are compiled and skipped", isas());
    let mut rng = StdRng::seed_from_u64(2);
    for format in Format::ALL {
        for (m, n, k) in [(1, 7, 256), (3, 33, 512), (9, 64, 256), (33, 130, 512)] {
            let case = Case::new(&mut rng, format, m, n, k);
            let mut expected = vec![0.0; m * n];
            let adapters = case.adapters();
            reference::linear_adapted(&case.weight, Some(&case.bias), &case.x, &adapters, &mut expected);
            for isa in isas() {
                let error = worst(&case.run(isa), &expected);
                assert!(error < 2e-4, "{format:?} {m}x{n}x{k} on {isa:?}: {error}");
            }
        }
    }
}

#[test]
fn a_rank_one_column_too_many_is_noticed() {
    // Negative control: the comparison above must see a single wrong adapter value.
    let mut rng = StdRng::seed_from_u64(3);
    let mut case = Case::new(&mut rng, Format::Q4_1, 9, 64, 256);
    let mut expected = vec![0.0; 9 * 64];
    let adapters = case.adapters();
    reference::linear_adapted(&case.weight, Some(&case.bias), &case.x, &adapters, &mut expected);
    case.adapters[0].3[17] += 0.05;
    assert!(worst(&case.run(isas()[0]), &expected) > 2e-4);
}

#[test]
fn a_row_does_not_depend_on_its_company() {
    let mut rng = StdRng::seed_from_u64(4);
    for (n, k) in [(96, 288), (50, 64), (70, 1120)] {
        let case = Case::new(&mut rng, Format::Q8_0, 67, n, k);
        for isa in isas() {
            let together = case.run(isa);
            let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
            assert_eq!(together, one_thread.install(|| case.run(isa)), "thread count, {isa:?}");
            for row in 0..case.m {
                let mut alone = vec![f32::NAN; n];
                let adapters: Vec<AdapterRows<'_>> = case
                    .adapters
                    .iter()
                    .filter(|(rows, ..)| rows.contains(&(row as u32)))
                    .map(|(_, rank, a, b)| AdapterRows { rows: &[0], rank: *rank, a, b })
                    .collect();
                let x = &case.x[row * k..][..k];
                linear_adapted_with(isa, &case.weight, Some(&case.bias), x, &adapters, &mut alone);
                assert_eq!(alone, &together[row * n..][..n], "row {row} on {isa:?}");
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
    let case = Case::new(&mut StdRng::seed_from_u64(5), Format::Q4_1, 13, 40, 96);
    assert_eq!(case.run(units[0]), case.run(units[1]));
}

#[test]
fn the_transposed_product_equals_the_reference() {
    let mut rng = StdRng::seed_from_u64(6);
    for (m, n, k) in [(1, 7, 32), (5, 33, 64), (70, 96, 288)] {
        let (weight, _) = weight(&mut rng, Format::Q4_1, n, k);
        let dy = random(&mut rng, m * n);
        let (mut fast, mut plain) = (vec![0.0; m * k], vec![0.0; m * k]);
        linear_transposed(&weight, &dy, &mut fast);
        reference::linear_transposed(&weight, &dy, &mut plain);
        assert!(worst(&fast, &plain) < 2e-4);
    }
}

#[test]
fn paged_attention_equals_the_reference() {
    let mut rng = StdRng::seed_from_u64(7);
    let layout = KvLayout { kv_heads: 3, head_dim: 20, block_len: 16 };
    let blocks = 12;
    let keys = random(&mut rng, blocks * layout.block_values());
    let values = random(&mut rng, blocks * layout.block_values());
    let sequences = [
        PagedSequence { blocks: &[7, 2, 5], first_row: 0, rows: 1, start: 40 },
        PagedSequence { blocks: &[1], first_row: 1, rows: 9, start: 0 },
        PagedSequence { blocks: &[3, 11, 0, 4], first_row: 10, rows: 20, start: 31 },
    ];
    for window in [None, Some(8)] {
        let kv = KvView { layout, keys: &keys, values: &values, window };
        let q = random(&mut rng, 30 * 9 * 20);
        let (mut fast, mut plain) = (vec![0.0; q.len()], vec![0.0; q.len()]);
        paged_attention(&kv, &sequences, 9, &q, &mut fast);
        reference::paged_attention(&kv, &sequences, 9, &q, &mut plain);
        assert!(worst(&fast, &plain) < 1e-5, "window {window:?}");
    }
}

#[test]
fn packed_sequences_attend_as_paged_ones() {
    let mut rng = StdRng::seed_from_u64(8);
    let layout = KvLayout { kv_heads: 2, head_dim: 16, block_len: 16 };
    let shape = SpanAttention {
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        window: Some(6),
        spans: vec![Span { first: 0, len: 11 }, Span { first: 11, len: 5 }],
    };
    let (q, k, v) = (random(&mut rng, 16 * 64), random(&mut rng, 16 * 32), random(&mut rng, 16 * 32));
    let mut packed = vec![0.0; q.len()];
    span_attention(&shape, &q, &k, &v, &mut packed);
    let mut keys = vec![0.0; 2 * layout.block_values()];
    let mut values = keys.clone();
    for (block, span) in shape.spans.iter().enumerate() {
        for row in 0..span.len {
            let at = (span.first + row) * 32;
            layout.store(&mut keys, &[block as u32], row, &k[at..at + 32]);
            layout.store(&mut values, &[block as u32], row, &v[at..at + 32]);
        }
    }
    let kv = KvView { layout, keys: &keys, values: &values, window: Some(6) };
    let sequences = [
        PagedSequence { blocks: &[0], first_row: 0, rows: 11, start: 0 },
        PagedSequence { blocks: &[1], first_row: 11, rows: 5, start: 0 },
    ];
    let mut paged = vec![0.0; q.len()];
    paged_attention(&kv, &sequences, 4, &q, &mut paged);
    assert!(worst(&packed, &paged) < 1e-5);
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
    let mut dx = vec![0.0; 24];
    rms_norm_grad(&x, &weight, 1e-5, &dy, &mut dx);
    let norm = |x: &[f32]| {
        let mut y = vec![0.0; 24];
        rms_norm(x, &weight, 1e-5, &mut y);
        y
    };
    assert!(worst(&dx, &numeric(&x, &dy, norm)) < 2e-3);

    let (gate, up) = (random(&mut rng, 24), random(&mut rng, 24));
    let (mut dgate, mut dup) = (vec![0.0; 24], vec![0.0; 24]);
    swiglu_grad(&gate, &up, &dy, &mut dgate, &mut dup);
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
        let spans = vec![Span { first: 0, len: 5 }, Span { first: 5, len: 2 }];
        let shape = SpanAttention { heads: 2, kv_heads: 1, head_dim: 4, window, spans };
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
