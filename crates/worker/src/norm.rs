//! Whether weights are such as training makes them: finite, and no larger than the layers they act on.

use model::BaseModel;
use peft::{AdapterWeights, Ia3Scale, LoraWeights};
use train::row_squares;

/// What is wrong with the weights, in words; nothing if they are sane.
///
/// The size of LoRA's update is the root mean square, over the layer's outputs, of the norms of the rows of scale B A:
/// ||scale B A||_F / sqrt(outputs), by way of tr((B'B)(AA')), which are small. DoRA's magnitudes are the norms of the rows
/// that come out of it: their size is that of all magnitudes of a layer beside that of its base's rows, ||m|| / ||W||_F. The
/// size of IA3 is the root mean square of its scales, that of a prompt the one of its embeddings' values.
pub(crate) fn insane(weights: &AdapterWeights, base: &BaseModel, most: f64) -> Option<String> {
    if !weights.is_finite() {
        return Some("a weight is not a finite number".into());
    }
    let size = match weights {
        AdapterWeights::Lora(lora) => larger(largest_update(lora), largest_magnitude(lora, base)),
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

/// The largest size of any site's magnitudes; 0 without any.
fn largest_magnitude(weights: &LoraWeights, base: &BaseModel) -> f64 {
    let shape = base.shape();
    let sites = shape.site_ids().zip(&weights.sites);
    let sites = sites.filter_map(|(id, site)| Some((id, site.as_ref()?.magnitude.as_ref()?)));
    let size = |(id, magnitude): (_, &Vec<f32>)| {
        let own: f64 = magnitude.iter().map(|value| f64::from(*value).powi(2)).sum();
        (own / row_squares(base, id).iter().sum::<f64>()).sqrt()
    };
    sites.map(size).fold(0.0, larger)
}

/// The products of all pairs of vectors, row by row.
fn gram(rank: usize, vectors: Vec<Vec<f32>>) -> Vec<f64> {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    (0..rank * rank).map(|at| dot(&vectors[at / rank], &vectors[at % rank])).collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::ops::ControlFlow;
    use std::path::Path;

    use peft::{AdapterConfig, LoraConfig, LoraTensors};
    use train::{Recipe, train};
    use types::Example;

    use super::*;

    fn base() -> BaseModel {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama");
        model::load(&folder, model::LoadOptions::default()).unwrap().model
    }

    fn weights(a: &[f32], b: &[f32], scale: f64) -> AdapterWeights {
        let site = LoraTensors { rank: 2, scale, a: a.to_vec(), b: b.to_vec(), ..LoraTensors::default() };
        AdapterWeights::Lora(LoraWeights { config: LoraConfig::oppu(), sites: vec![None, Some(site)] })
    }

    #[test]
    fn the_size_is_that_of_the_product() {
        // A is 2 x 3, B is 2 x 2: B A = [[1, 2, 0], [3, 6, 4]], of square norm 66, over two outputs.
        let (a, b) = ([1.0, 2.0, 0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 3.0, 4.0]);
        let (base, size) = (base(), 2.0 * (66.0f64 / 2.0).sqrt());
        assert_eq!(insane(&weights(&a, &b, 2.0), &base, size * 1.001), None);
        let words = insane(&weights(&a, &b, 2.0), &base, size * 0.999);
        assert!(words.is_some_and(|words| words.contains("grown")));
    }

    #[test]
    fn no_numbers_are_insane() {
        let (base, good) = (base(), [1.0; 4]);
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(insane(&weights(&[1.0, 1.0, bad, 1.0], &good, 1.0), &base, 1e9).is_some());
            assert!(insane(&weights(&good, &[bad, 1.0, 1.0, 1.0], 1.0), &base, 1e9).is_some());
        }
        assert!(insane(&weights(&[f32::MAX; 4], &[f32::MAX; 4], 1e300), &base, 1e9).is_some());
    }

    #[test]
    fn magnitudes_are_measured_by_the_rows_of_the_base() {
        let base = base();
        let config = LoraConfig { use_dora: true, ..LoraConfig::oppu() };
        let recipe = Recipe { adapter: AdapterConfig::Lora(config), epochs: 1, ..Recipe::oppu() };
        let examples = [Example { tokens: vec![1, 2, 3, 4], answer_start: 2 }];
        let trained = train(&base, None, &examples, &recipe, |_| ControlFlow::Continue(())).unwrap().weights;
        let with = |change: &dyn Fn(usize, &mut Vec<f32>)| {
            let AdapterWeights::Lora(mut lora) = trained.clone() else { panic!("it is one of LoRA") };
            let magnitudes = lora.sites.iter_mut().flatten().filter_map(|site| site.magnitude.as_mut());
            magnitudes.enumerate().for_each(|(at, magnitude)| change(at, magnitude));
            insane(&AdapterWeights::Lora(lora), &base, 10.0)
        };
        assert_eq!(with(&|_, _| ()), None);
        // As large as it may be, and beyond; in the last of the sites alone, in one output alone, with either sign.
        let scaled = |factor: f32| with(&|_, values| values.iter_mut().for_each(|value| *value *= factor));
        assert_eq!(scaled(9.9), None);
        assert!(scaled(10.1).is_some_and(|words| words.contains("grown")));
        for bad in [1e6, -1e6] {
            assert!(with(&|at, values| values[3] = if at == 5 { bad } else { values[3] }).is_some());
        }
        assert_eq!(with(&|_, values| values.fill(0.0)), None);
    }
}
