//! The maths between the linear layers against float64, on the unit in use: `ATELIER_ISA` names a lesser one.
#![expect(clippy::print_stdout, reason = "tests")]

use kernels::{RopeTable, isa, reference, rms_norm, rope, softmax_weights, swiglu};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn random(rng: &mut StdRng, len: usize, size: f32) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-size..size)).collect()
}

/// The largest difference, of the larger of 1 and the value.
fn worst(ours: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(ours.len(), expected.len());
    let differences = ours.iter().zip(expected).map(|(a, b)| (a - b).abs() / b.abs().max(1.0));
    differences.fold(0.0, |worst, difference| if difference > worst { difference } else { worst })
}

/// Widths that fill vectors and that do not.
const WIDTHS: [usize; 7] = [1, 7, 16, 31, 576, 1120, 1536];

#[test]
fn norms_equal_float64() {
    println!("on {:?}", isa());
    let mut rng = StdRng::seed_from_u64(1);
    for width in WIDTHS {
        let (x, weight) = (random(&mut rng, 3 * width, 4.0), random(&mut rng, width, 2.0));
        let (mut ours, mut expected) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        rms_norm(&x, &weight, 1e-5, &mut ours);
        reference::rms_norm(&x, &weight, 1e-5, &mut expected);
        assert!(worst(&ours, &expected) < 1e-6, "{width}: {}", worst(&ours, &expected));
        // Negative control: another epsilon is seen.
        reference::rms_norm(&x, &weight, 1e-2, &mut expected);
        assert!(worst(&ours, &expected) > 1e-4, "{width}");
    }
}

#[test]
fn gates_equal_float64() {
    let mut rng = StdRng::seed_from_u64(2);
    for width in WIDTHS {
        let (mut gate, up) = (random(&mut rng, width, 12.0), random(&mut rng, width, 3.0));
        // Where e^-v leaves float32's range.
        gate.extend([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4]);
        let up = [up, vec![1.0; 6]].concat();
        let (mut ours, mut expected) = (vec![0.0; gate.len()], vec![0.0; gate.len()]);
        swiglu(&gate, &up, &mut ours);
        reference::swiglu(&gate, &up, &mut expected);
        assert!(worst(&ours, &expected) < 2e-6, "{width}: {}", worst(&ours, &expected));
    }
}

#[test]
fn rotations_equal_float64() {
    let mut rng = StdRng::seed_from_u64(3);
    for head_dim in [2, 16, 20, 64, 128] {
        let frequencies: Vec<f32> =
            (0..head_dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
        let table = RopeTable::new(&frequencies, 2048);
        let positions = [0, 1, 77, 2047];
        for inverse in [false, true] {
            let x = random(&mut rng, positions.len() * 3 * head_dim, 2.0);
            let (mut ours, mut expected) = (x.clone(), x);
            rope(&table, &positions, inverse, &mut ours);
            reference::rope(&frequencies, &positions, inverse, &mut expected);
            assert!(worst(&ours, &expected) < 1e-6, "{head_dim}: {}", worst(&ours, &expected));
            reference::rope(&frequencies, &positions, inverse, &mut expected);
            assert!(worst(&ours, &expected) > 1e-2, "turned twice");
        }
    }
}

#[test]
fn the_weights_of_a_softmax_equal_float64() {
    let mut rng = StdRng::seed_from_u64(4);
    for width in WIDTHS {
        let logits = random(&mut rng, width, 20.0);
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for temperature in [0.3, 1.0, 2.5] {
            let mut ours = vec![0.0; width];
            softmax_weights(&logits, max, temperature, &mut ours);
            let weight = |logit: &f32| (f64::from((logit - max) / temperature).exp()) as f32;
            let expected: Vec<f32> = logits.iter().map(weight).collect();
            assert!(worst(&ours, &expected) < 1e-6, "{width}: {}", worst(&ours, &expected));
        }
    }
}
