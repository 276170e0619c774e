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
