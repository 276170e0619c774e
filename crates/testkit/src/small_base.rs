//! A frozen base of any shape, without a model around it.

use kernels::Weight;
use peft::{BaseShape, FrozenBase};
use types::SiteId;

/// Matrices of small fixed numbers, the same for one shape always.
pub struct SmallBase {
    shape: BaseShape,
    hash: [u8; 32],
    weights: Vec<Weight>,
}

impl SmallBase {
    /// A base with these shapes that claims this hash.
    ///
    /// # Panics
    /// When a dimension is zero.
    #[must_use]
    pub fn new(shape: BaseShape, hash: [u8; 32]) -> Self {
        let weight = |id: SiteId| {
            let (rows, cols) = shape.dims(id.site);
            let value = |at: usize| ((at * 37 + id.index() * 11) % 23) as f32 / 23.0 - 0.5;
            let values: Vec<f32> = (0..rows * cols).map(value).collect();
            Weight::from_f32(rows, cols, &values).expect("the shape is valid")
        };
        let weights = shape.site_ids().map(weight).collect();
        Self { shape, hash, weights }
    }
}

impl FrozenBase for SmallBase {
    fn shape(&self) -> BaseShape {
        self.shape.clone()
    }

    fn hash(&self) -> [u8; 32] {
        self.hash
    }

    fn linear(&self, id: SiteId) -> (&Weight, Option<&[f32]>) {
        (&self.weights[id.index()], None)
    }
}
