//! The largest value of each of some rows, on several threads.

use crate::parallel::Shared;
use crate::pointwise::largest;
use crate::team::Workers;

/// [`largest`] of each row of `values`, which are `width` wide. Each thread looks at its own share of the columns: what it
/// has written of a product just before. Buffers grow to what the largest call needs.
#[derive(Debug, Default)]
pub struct RowMaxima {
    /// (columns' shares, rows, 2): place and value, NaN for none.
    parts: Vec<f32>,
    found: Vec<Option<(usize, f32)>>,
}

impl RowMaxima {
    /// Looks for them.
    ///
    /// # Panics
    /// When `values` does not divide into rows of `width`.
    pub fn find(&mut self, workers: &dyn Workers, values: &[f32], width: usize) {
        let rows = values.len() / width.max(1);
        assert_eq!(values.len(), rows * width, "the values do not divide into rows of {width}");
        // Places go through the bits of a float32.
        assert!(u32::try_from(width).is_ok(), "rows of {width} values");
        let shares = workers.threads();
        self.parts.resize(shares * rows * 2, 0.0);
        let parts = Shared::new(&mut self.parts);
        workers.run(shares * rows, &|task| {
            let (share, row) = (task / rows, task % rows);
            let from = width * share / shares;
            let own = &values[row * width..][from..width * (share + 1) / shares];
            let (place, value) = largest(own).map_or((0, f32::NAN), |(at, value)| (from + at, value));
            // SAFETY: every task has a part of its own.
            unsafe { parts.part(task * 2, 2) }.copy_from_slice(&[f32::from_bits(place as u32), value]);
        });
        self.found.clear();
        self.found.extend((0..rows).map(|row| {
            let mut best: Option<(usize, f32)> = None;
            for share in 0..shares {
                let part = &self.parts[(share * rows + row) * 2..][..2];
                if part[1].is_nan() {
                    // What is wrong with a share need not be wrong with the row.
                    return largest(&values[row * width..][..width]);
                }
                if best.is_none_or(|(_, value)| part[1] > value) {
                    best = Some((part[0].to_bits() as usize, part[1]));
                }
            }
            best
        }));
    }

    /// The largest value of a row and its place, as last found.
    ///
    /// # Panics
    /// When there was no such row.
    #[must_use]
    pub fn of(&self, row: usize) -> Option<(usize, f32)> {
        self.found[row]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::team::Team;

    #[test]
    fn they_are_those_of_each_row_alone() {
        for threads in 1..=4 {
            let team = Team::new(threads).unwrap_or_else(|error| panic!("{error}"));
            let mut maxima = RowMaxima::default();
            for width in [1, 3, 16, 50, 1000] {
                let mut values: Vec<f32> = (0..9 * width).map(|i| (i * 37 % 101 / 3) as f32 - 9.0).collect();
                // One of many alike, nothing finite in a share, nothing finite at all, and what is no number.
                values[width..2 * width].fill(4.0);
                values[2 * width..3 * width].fill(f32::NEG_INFINITY);
                values[3 * width..3 * width + width.div_ceil(2)].fill(f32::NEG_INFINITY);
                values[4 * width + width / 2] = f32::NAN;
                values[5 * width + width / 3] = f32::INFINITY;
                maxima.find(&team, &values, width);
                for (row, values) in values.chunks(width).enumerate() {
                    assert_eq!(maxima.of(row), largest(values), "row {row} of {width} on {threads}");
                }
                assert_eq!(maxima.of(4), None);
            }
        }
    }
}
