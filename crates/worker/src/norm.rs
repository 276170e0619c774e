//! Whether weights are such as training makes them: finite, and no larger than the layers they act on.

use peft::LoraWeights;

/// What is wrong with the weights, in words; nothing if they are sane.
///
/// The size of an update is the root mean square, over the layer's outputs, of the norms of the rows of scale B A:
/// ||scale B A||_F / sqrt(outputs), by way of tr((B'B)(AA')), which are small.
pub(crate) fn insane(weights: &LoraWeights, most: f64) -> Option<String> {
    if !weights.is_finite() {
        return Some("a weight is not a finite number".into());
    }
    for site in weights.sites.iter().flatten().filter(|site| site.rank > 0) {
        let (rank, out) = (site.rank, site.b.len() / site.rank);
        let a = gram(rank, site.a.chunks_exact(site.a.len() / rank).map(<[f32]>::to_vec).collect());
        let columns = (0..rank).map(|column| site.b.iter().skip(column).step_by(rank).copied().collect());
        let b = gram(rank, columns.collect());
        let trace: f64 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
        let bias = site.bias.iter().flatten().map(|value| f64::from(*value).powi(2)).sum::<f64>();
        let size = site.scale.abs() * ((trace.max(0.0) + bias) / out.max(1) as f64).sqrt();
        // A sum that overflows is no number, and not sane either.
        if size.is_nan() || size > most {
            return Some(format!(
                "the weights have grown beyond measure: {size:.3e} times the size of a base layer, at most {most} is sane"
            ));
        }
    }
    None
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

    fn weights(a: &[f32], b: &[f32], scale: f64) -> LoraWeights {
        let site = LoraTensors { rank: 2, scale, a: a.to_vec(), b: b.to_vec(), ..LoraTensors::default() };
        LoraWeights { config: LoraConfig::oppu(), sites: vec![None, Some(site)] }
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
