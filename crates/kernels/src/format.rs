//! Weight matrices in the number formats of GGUF and safetensors files.

/// A storage format of weights. Block formats are those of llama.cpp's `ggml-common.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 32 signed bytes and an F16 scale.
    Q8_0,
    /// 32 four-bit values around 8 and an F16 scale.
    Q4_0,
    /// 32 four-bit values, an F16 scale and an F16 minimum.
    Q4_1,
    /// 256 four-bit values in eight groups with six-bit scales and minima.
    Q4K,
    /// 256 six-bit values in sixteen groups with eight-bit scales.
    Q6K,
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 8] =
        [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_0, Self::Q4_1, Self::Q4K, Self::Q6K];

    /// Values per block.
    #[must_use]
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
            Self::Q4K | Self::Q6K => 256,
        }
    }

    /// Bytes per block.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q4K => 144,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of `cols` values.
    ///
    /// # Errors
    /// [`WeightError::Columns`] if `cols` is not a multiple of the block length.
    pub fn row_bytes(self, cols: usize) -> Result<usize, WeightError> {
        if cols == 0 || !cols.is_multiple_of(self.block_len()) {
            return Err(WeightError::Columns { format: self, cols, block: self.block_len() });
        }
        (cols / self.block_len()).checked_mul(self.block_bytes()).ok_or(WeightError::TooLarge)
    }
}

/// Why a buffer is not a weight matrix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WeightError {
    /// The row length does not fit the format's blocks.
    #[error("a row of {cols} values does not divide into {format:?} blocks of {block}")]
    Columns {
        /// The format.
        format: Format,
        /// Values per row.
        cols: usize,
        /// Values per block.
        block: usize,
    },
    /// The buffer has another length than the shape needs.
    #[error("a {rows} x {cols} matrix in {format:?} takes {expected} bytes, not {got}")]
    Length {
        /// The format.
        format: Format,
        /// Rows (output features).
        rows: usize,
        /// Columns (input features).
        cols: usize,
        /// Bytes needed.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// The shape overflows the address space.
    #[error("the shape is too large")]
    TooLarge,
}

/// A frozen matrix of shape (rows = output features, cols = input features) in its file's format.
pub struct Weight {
    format: Format,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    data: Box<[u8]>,
}

impl std::fmt::Debug for Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weight({:?}, {} x {})", self.format, self.rows, self.cols)
    }
}

impl Weight {
    /// Takes over a row-major buffer of encoded rows.
    ///
    /// # Errors
    /// When the buffer's length is not what format and shape need.
    pub fn new(format: Format, rows: usize, cols: usize, data: Vec<u8>) -> Result<Self, WeightError> {
        let row_bytes = format.row_bytes(cols)?;
        let expected = row_bytes.checked_mul(rows).ok_or(WeightError::TooLarge)?;
        if expected != data.len() {
            return Err(WeightError::Length { format, rows, cols, expected, got: data.len() });
        }
        Ok(Self { format, rows, cols, row_bytes, data: data.into_boxed_slice() })
    }

    /// A float32 matrix.
    ///
    /// # Errors
    /// When `values` is not `rows * cols` long.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Result<Self, WeightError> {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::new(Format::F32, rows, cols, bytes)
    }

    /// The number format.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes held in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// The encoded bytes of a row.
    pub(crate) fn row(&self, row: usize) -> &[u8] {
        &self.data[row * self.row_bytes..][..self.row_bytes]
    }

    /// Decodes a row into `out`, which has `cols` values.
    ///
    /// # Panics
    /// When `row` or the length of `out` does not fit the matrix.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {self:?} into {}", out.len());
        crate::dequant::decode(crate::lanes::isa(), self.format, self.row(row), out);
    }

    /// Reorders the rows: row `i` of the result is row `order(i)` of `self`.
    ///
    /// # Panics
    /// When `order` names a row that does not exist.
    #[must_use]
    pub fn reorder_rows(&self, order: impl Fn(usize) -> usize) -> Self {
        let mut data = Vec::with_capacity(self.data.len());
        for row in 0..self.rows {
            data.extend_from_slice(self.row(order(row)));
        }
        Self { data: data.into_boxed_slice(), ..*self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_checked() {
        assert!(Weight::new(Format::Q4_1, 2, 64, vec![0; 80]).is_ok());
        assert!(matches!(
            Weight::new(Format::Q4_1, 2, 48, vec![0; 60]),
            Err(WeightError::Columns { cols: 48, block: 32, .. })
        ));
        assert!(matches!(
            Weight::new(Format::Q4_1, 2, 64, vec![0; 79]),
            Err(WeightError::Length { expected: 80, got: 79, .. })
        ));
        assert_eq!(Weight::new(Format::F32, usize::MAX, 64, vec![]).map(|_| ()), Err(WeightError::TooLarge));
    }
}
