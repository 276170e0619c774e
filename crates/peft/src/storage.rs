//! In which numbers an adapter is kept while it serves.

use kernels::Precision;

/// The numbers of low-rank factors in memory. Scales and biases are float32 in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Storage {
    /// As in the file.
    F32,
    /// The upper half of float32.
    Bf16,
    /// Eight bits, with a scale for each row of A and each column of B; wants quantised activations, so it serves beside
    /// [`Precision::Fast`] only. Factors whose rows are no whole blocks of 32 values are kept in bfloat16.
    Int8,
}

impl Storage {
    /// Most bytes of one value.
    #[must_use]
    pub const fn value_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::Int8 => 2,
        }
    }
}

impl From<Precision> for Storage {
    /// Eight bits where activations have eight, float32 where they are exact.
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::Fast => Self::Int8,
            Precision::Exact => Self::F32,
        }
    }
}
