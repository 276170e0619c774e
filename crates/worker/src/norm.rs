//! Whether weights are such as training makes them: finite, and no larger than the layers they act on.

use peft::{AdapterWeights, Ia3Scale, LoraWeights};

/// What is wrong with the weights, in words; nothing if they are sane.
///
/// The size of LoRA's update is the root mean square, over the layer's outputs, of the norms of the rows of scale B A:
/// ||scale B A||_F / sqrt(outputs), by way of tr((B'B)(AA')), which are small. That of IA3 is the root mean square of
/// its scales, that of a prompt the one of its embeddings' values. DoRA's magnitudes are as large as the base's rows.
pub(crate) fn insane(weights: &AdapterWeights, most: f64) -> Option<String> {
    if !weights.is_finite() {
        return Some("a weight is not a finite number".into());
    }
    let size = match weights {
        AdapterWeights::Lora(lora) => largest_update(lora),
        AdapterWeights::Ia3(ia3) => ia3.sites.iter().flatten().fold(0.0, |largest: f64, site| match site {
            Ia3Scale::Output(values) | Ia3Scale::Input(values) => larger(largest, mean_square(values).sqrt()),
        }),
        AdapterWeights::Prompt(prompt) => mean_square(&prompt.embeddings).sqrt(),
    };
    let too_large = size.is_nan() || size > most;
    too_large.then(|| {
        format!("the weights have grown beyond measure: {size:.3e} times the size of a base layer, at most {most} is sane")
    })
}

fn mean_square(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / values.len().max(1) as f64
}

/// The larger of two sizes; no number if one is none.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// The largest update of any site.
fn largest_update(weights: &LoraWeights) -> f64 {
    let mut largest = 0.0;
    for site in weights.sites.iter().flatten().filter(|site| site.rank > 0) {
        let (rank, out) = (site.rank, site.b.len() / site.rank);
        let a = gram(rank, site.a.chunks_exact(site.a.len() / rank).map(<[f32]>::to_vec).collect());
        let columns = (0..rank).map(|column| site.b.iter().skip(column).step_by(rank).copied().collect());
        let b = gram(rank, columns.collect());
        let trace: f64 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
        let bias = site.bias.iter().flatten().map(|value| f64::from(*value).powi(2)).sum::<f64>();
        let size = site.scale.abs() * ((trace.max(0.0) + bias) / out.max(1) as f64).sqrt();
        largest = larger(largest, size);
    }
    largest
}

/// The products of all pairs of vectors, row by row.
fn gram(rank: usize, vectors: Vec<Vec<f32>>) -> Vec<f64> {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    (0..rank * rank).map(|at| dot(&vectors[at / rank], &vectors[at % rank])).collect()
}

#[cfg(test)]
mod tests {
    use peft::{LoraConfig, LoraTensors};

    use super::*;

    fn weights(a: &[f32], b: &[f32], scale: f64) -> AdapterWeights {
        let site = LoraTensors { rank: 2, scale, a: a.to_vec(), b: b.to_vec(), ..LoraTensors::default() };
        AdapterWeights::Lora(LoraWeights { config: LoraConfig::oppu(), sites: vec![None, Some(site)] })
    }

    #[test]
    fn the_size_is_that_of_the_product() {
        // A is 2 x 3, B is 2 x 2: B A = [[1, 2, 0], [3, 6, 4]], of square norm 66, over two outputs.
        let (a, b) = ([1.0, 2.0, 0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 3.0, 4.0]);
        let size = 2.0 * (66.0f64 / 2.0).sqrt();
        assert_eq!(insane(&weights(&a, &b, 2.0), size * 1.001), None);
        assert!(insane(&weights(&a, &b, 2.0), size * 0.999).is_some_and(|words| words.contains("grown")));
    }

    #[test]
    fn no_numbers_are_insane() {
        let good = [1.0; 4];
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(insane(&weights(&[1.0, 1.0, bad, 1.0], &good, 1.0), 1e9).is_some());
            assert!(insane(&weights(&good, &[bad, 1.0, 1.0, 1.0], 1.0), 1e9).is_some());
        }
        assert!(insane(&weights(&[f32::MAX; 4], &[f32::MAX; 4], 1e300), 1e9).is_some());
    }
}
