//! Products in bfloat16 against sums in float64 of factors rounded one by one.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::format::Format;
use crate::many_rows_bf16::{backwards, forwards, has_bf16};
use crate::weight::Weight;

type Run = fn(&Weight, &[f32], &mut [f32], bool);

fn random(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn weight(rng: &mut StdRng, format: Format, n: usize, k: usize) -> Weight {
    let bytes = match format {
        Format::F32 => random(rng, n * k).iter().flat_map(|value| value.to_le_bytes()).collect(),
        // Each block a scale in half precision, then 32 codes of eight or four bits.
        _ => {
            let codes = if format == Format::Q8_0 { 32 } else { 16 };
            let block = |rng: &mut StdRng| {
                let scale = half::f16::from_f32(rng.random_range(0.01..0.1)).to_le_bytes();
                scale
                    .into_iter()
                    .chain((0..codes).map(|_| rng.random()).collect::<Vec<u8>>())
                    .collect::<Vec<_>>()
            };
            (0..n * k / 32).flat_map(|_| block(rng)).collect()
        }
    };
    Weight::new(format, n, k, bytes).unwrap()
}

/// The product, both factors rounded or not, and each sum's terms as magnitudes.
fn plain(weight: &Weight, x: &[f32], transposed: bool, rounded: bool) -> Vec<(f64, f64)> {
    let (n, k) = (weight.rows(), weight.cols());
    let enter = |value: f32| f64::from(if rounded { bf16::from_f32(value).to_f32() } else { value });
    let mut w = vec![0.0; n * k];
    w.chunks_exact_mut(k).enumerate().for_each(|(row, w)| weight.decode_row(row, w));
    let (inner, outer) = if transposed { (n, k) } else { (k, n) };
    let at = |i: usize, o: usize| if transposed { w[i * k + o] } else { w[o * k + i] };
    let sum = |x: &[f32], o: usize| {
        let terms = x.iter().enumerate().map(|(i, x)| enter(*x) * enter(at(i, o)));
        terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
    };
    x.chunks_exact(inner).flat_map(|x| (0..outer).map(move |o| sum(x, o))).collect()
}

/// The largest difference, as a share of the terms' magnitude.
fn worst(found: &[f32], expected: &[(f64, f64)]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let share = |(found, (sum, size)): (&f32, &(f64, f64))| (f64::from(*found) - sum).abs() / size;
    found.iter().zip(expected).map(share).fold(0.0, f64::max)
}

fn natives() -> Vec<bool> {
    if has_bf16() {
        return vec![false, true];
    }
    println!("skipped: this CPU has no instructions for bfloat16, their kernel is not run");
    vec![false]
}

#[test]
fn factors_are_rounded_and_sums_are_not() {
    let mut rng = StdRng::seed_from_u64(3);
    let shapes = [
        (1, 7, 33, Format::F32),
        (5, 33, 64, Format::Q8_0),
        (70, 300, 288, Format::Q4_0),
        (27, 131, 102, Format::F32),
        (14, 1100, 512, Format::Q8_0),
    ];
    for (m, n, k, format) in shapes {
        let weight = weight(&mut rng, format, n, k);
        for (run, transposed, [inner, outer]) in
            [(forwards as Run, false, [k, n]), (backwards as Run, true, [n, k])]
        {
            let x = random(&mut rng, m * inner);
            let (rounded, exact) =
                (plain(&weight, &x, transposed, true), plain(&weight, &x, transposed, false));
            for native in natives() {
                let case = format!("{m} {n} {k} {format:?} transposed {transposed} native {native}");
                let mut y = vec![f32::NAN; m * outer];
                run(&weight, &x, &mut y, native);
                // Float32 keeps 24 bits of each sum; the control: bfloat16 keeps 8 of each factor.
                assert!(worst(&y, &rounded) < 3e-6, "{case}: {}", worst(&y, &rounded));
                assert!(worst(&y, &exact) > 3e-5, "{case}: the factors are not rounded");
                for row in 0..m {
                    let mut alone = vec![f32::NAN; outer];
                    run(&weight, &x[row * inner..][..inner], &mut alone, native);
                    assert_eq!(alone, y[row * outer..][..outer], "{case}: row {row} in company");
                }
                for threads in [1, 3] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let mut again = vec![f32::NAN; y.len()];
                    pool.install(|| run(&weight, &x, &mut again, native));
                    assert_eq!(again, y, "{case}: {threads} threads");
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    let mut rng = StdRng::seed_from_u64(4);
    let weight = weight(&mut rng, Format::F32, 20, 40);
    for value in [f32::NAN, f32::INFINITY, f32::MAX] {
        let mut x = random(&mut rng, 80);
        x[7] = value;
        for native in natives() {
            let mut y = vec![0.0; 40];
            forwards(&weight, &x, &mut y, native);
            assert!(y[..20].iter().all(|y| !y.is_finite()), "{value} native {native}: {:?}", &y[..20]);
            assert!(y[20..].iter().all(|y| y.is_finite()), "{value} native {native}: the other row");
        }
    }
}
