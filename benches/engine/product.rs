//! The frozen product against candle's `QMatMul`, on the linear layers of a synthetic Llama: 2048 hidden, 8 layers, Q4_K.

use std::time::{Duration, Instant};

use atelier::service::cores;
use candle_core::quantized::{GgmlDType, QMatMul, QTensor, ggml_file};
use candle_core::{Device, Module, Tensor};
use kernels::{Format, Input, Layer, Means, NoAdapters, Precision, Scratch, Team, Weight};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::Bench;
use crate::progress::progress;
use crate::row::{Goal, Row};

const LAYERS: usize = 8;
/// (output, input) features of a block's layers: q, k, v, o, gate, up, down.
const SHAPES: [(usize, usize); 7] =
    [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632)];
const BATCHES: [usize; 5] = [1, 8, 16, 32, 512];
/// Shortest time a measurement takes.
const LEAST: Duration = Duration::from_millis(300);

/// The same matrix on both sides.
struct Pair {
    ours: Weight,
    candle: QMatMul,
}

/// One call of our kernel, as serving makes it.
fn product(scratch: &mut Scratch, workers: &Team, weight: &Weight, x: &[f32], y: &mut [f32]) {
    let means = Means { isa: kernels::isa(), workers, precision: Precision::Fast };
    let layer = Layer { weight, bias: None, adapters: &NoAdapters, y, add: false };
    kernels::fused_linear(scratch, means, Input::Plain(x), &mut [layer]);
}

/// The rows.
pub(crate) fn rows(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let progress = progress("products", BATCHES.len() * bench.runs);
    let matrices = matrices()?;
    let team = Team::new(cores())?;
    let mut scratch = Scratch::default();
    let mut rng = StdRng::seed_from_u64(1);
    let mut rows = Vec::new();
    for m in BATCHES {
        let input: Vec<f32> = (0..m * 5632).map(|_| rng.random_range(-1.0..1.0)).collect();
        let mut output = vec![0.0; m * 5632];
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..bench.runs {
            ours.push(rate(m, || {
                for Pair { ours, .. } in &matrices {
                    let (x, y) = (&input[..m * ours.cols()], &mut output[..m * ours.rows()]);
                    product(&mut scratch, &team, ours, x, y);
                }
                Ok(())
            })?);
            theirs.push(rate(m, || {
                for Pair { ours, candle } in &matrices {
                    let x = Tensor::from_slice(&input[..m * ours.cols()], (m, ours.cols()), &Device::Cpu)?;
                    candle.forward(&x)?;
                }
                Ok(())
            })?);
            progress.inc(1);
        }
        let name = format!("product, synthetic Llama 2048, Q4_K, m = {m}, GOP/s (peer: candle's QMatMul)");
        rows.push(Row::paired(name, &ours, &theirs).goal(Goal::AtLeast(1.2)));
    }
    progress.finish_and_clear();
    Ok(rows)
}

/// Billions of operations per second of passes through all layers.
fn rate(m: usize, mut pass: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let weights: usize = SHAPES.iter().map(|(out, input)| out * input).sum();
    let (start, mut passes) = (Instant::now(), 0.0);
    while start.elapsed() < LEAST {
        pass()?;
        passes += 1.0;
    }
    Ok(passes * 2.0 * (m * weights * LAYERS) as f64 / start.elapsed().as_secs_f64() / 1e9)
}

/// Every layer has its own copy, so that the weights come from memory as they would in a model.
fn matrices() -> anyhow::Result<Vec<Pair>> {
    let mut rng = StdRng::seed_from_u64(0);
    let mut layer = Vec::new();
    for (out, input) in SHAPES {
        let values: Vec<f32> = (0..out * input).map(|_| rng.random_range(-0.1..0.1)).collect();
        let values = Tensor::from_vec(values, (out, input), &Device::Cpu)?;
        layer.push(((out, input), QTensor::quantize(&values, GgmlDType::Q4K)?.data()?.into_owned()));
    }
    let mut matrices = Vec::new();
    for _ in 0..LAYERS {
        for ((out, input), bytes) in &layer {
            let dims = vec![*out, *input];
            let theirs = ggml_file::qtensor_from_ggml(GgmlDType::Q4K, bytes, dims, &Device::Cpu)?;
            matrices.push(Pair {
                ours: Weight::new(Format::Q4K, *out, *input, bytes.clone())?,
                candle: QMatMul::from_qtensor(theirs)?,
            });
        }
    }
    Ok(matrices)
}
