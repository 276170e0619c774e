//! Frozen matrices, packed for the kernels when they are loaded: sixteen output rows side by side, so that a vector
//! holds one column of sixteen rows and no sum ever crosses lanes.
//!
//! A panel of sixteen rows is a header with the scales, then the codes. Codes of columns `4g..4g + 4` of row `r` are
//! the bytes `4r..4r + 4` of a line of 64 bytes, the shape of an 8-bit dot product; two groups share a line of
//! four-bit codes. The packed form holds the file's numbers and nothing else; the loaded form is dropped.

use crate::format::{Format, WeightError};
use crate::lanes::{brain_to_f32, half_to_f32};
use crate::lines::{Line, Lines};

/// Rows of a panel.
pub(crate) const PANEL: usize = 16;

/// A frozen matrix of shape (rows = output features, cols = input features).
pub struct Weight {
    format: Format,
    rows: usize,
    cols: usize,
    header_lines: usize,
    panel_lines: usize,
    lines: Lines,
}

impl std::fmt::Debug for Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weight({:?}, {} x {})", self.format, self.rows, self.cols)
    }
}

/// The scales and codes of sixteen rows.
#[derive(Clone, Copy)]
pub(crate) struct Panel {
    pub(crate) header: *const u8,
    pub(crate) codes: *const u8,
    /// How far away the next panel is.
    pub(crate) next: usize,
}

/// Lines of a panel's header and of its codes.
const fn panel_lines(format: Format, cols: usize) -> (usize, usize) {
    match format {
        Format::F32 => (0, cols),
        Format::F16 | Format::Bf16 => (0, cols.div_ceil(2)),
        Format::Q8_0 => ((cols / 32).div_ceil(2), cols / 4),
        Format::Q4_0 => ((cols / 32).div_ceil(2), cols / 8),
        Format::Q4_1 => (cols / 32, cols / 8),
        Format::Q4K => (cols / 256 * SUPER_LINES, cols / 8),
        Format::Q6K => (cols / 256 * SUPER_LINES, cols / 32 * 6),
    }
}

/// Lines of the header of a block of 256 columns.
pub(crate) const SUPER_LINES: usize = 5;

impl Weight {
    /// Packs a row-major buffer of rows in the file's format.
    ///
    /// # Errors
    /// When the buffer's length is not what format and shape need.
    pub fn new(format: Format, rows: usize, cols: usize, data: Vec<u8>) -> Result<Self, WeightError> {
        Self::reordered(format, rows, cols, data, |row| row)
    }

    /// As [`Weight::new`]; row `i` of the matrix is row `order(i)` of `data`.
    ///
    /// # Errors
    /// When the buffer's length is not what format and shape need.
    ///
    /// # Panics
    /// When `order` names a row that is not there.
    pub fn reordered(
        format: Format,
        rows: usize,
        cols: usize,
        data: Vec<u8>,
        order: impl Fn(usize) -> usize,
    ) -> Result<Self, WeightError> {
        let row_bytes = format.row_bytes(cols)?;
        let expected = row_bytes.checked_mul(rows).ok_or(WeightError::TooLarge)?;
        if expected != data.len() {
            return Err(WeightError::Length { format, rows, cols, expected, got: data.len() });
        }
        let (header_lines, code_lines) = panel_lines(format, cols);
        let panel_lines = header_lines + code_lines;
        let mut lines = Lines::zeroed(rows.div_ceil(PANEL) * panel_lines);
        for (index, panel) in lines.chunks_exact_mut(panel_lines).enumerate() {
            let panel = panel.as_flattened_bytes();
            for lane in 0..PANEL.min(rows - index * PANEL) {
                let row = &data[order(index * PANEL + lane) * row_bytes..][..row_bytes];
                let (header, codes) = panel.split_at_mut(header_lines * 64);
                pack_row(format, row, lane, header, codes);
            }
        }
        Ok(Self { format, rows, cols, header_lines, panel_lines, lines })
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
        self.lines.len() * 64
    }

    /// Panels of sixteen rows; the last one's missing rows are zero.
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    pub(crate) fn panel(&self, index: usize) -> Panel {
        let lines = &self.lines[index * self.panel_lines..][..self.panel_lines];
        let header = lines.as_ptr().cast::<u8>();
        let codes = header.wrapping_add(self.header_lines * 64);
        Panel { header, codes, next: self.panel_lines * 64 }
    }

    /// Decodes a row into `out`, which has `cols` values.
    ///
    /// # Panics
    /// When `row` or the length of `out` does not fit the matrix.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {self:?} into {}", out.len());
        let panel = &self.lines[row / PANEL * self.panel_lines..][..self.panel_lines];
        let (header, codes) = panel.split_at(self.header_lines);
        let row = PackedRow { header: bytes(header), codes: bytes(codes), lane: row % PANEL };
        for (column, out) in out.iter_mut().enumerate() {
            *out = row.value(self.format, column);
        }
    }
}

fn bytes(lines: &[Line]) -> &[u8] {
    // SAFETY: a line is exactly its 64 bytes.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * 64) }
}

trait AsBytes {
    fn as_flattened_bytes(&mut self) -> &mut [u8];
}

impl AsBytes for [Line] {
    fn as_flattened_bytes(&mut self) -> &mut [u8] {
        // SAFETY: a line is exactly its 64 bytes, and any bytes are a line.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.len() * 64) }
    }
}

/// The byte of a column's code among lines of 64, four columns a line.
fn place(group: usize, lane: usize, column: usize) -> usize {
    group * 64 + lane * 4 + column % 4
}

/// Stores a four-bit code.
fn put_nibble(codes: &mut [u8], lane: usize, column: usize, code: u8) {
    let group = column / 4;
    codes[place(group / 2, lane, column)] |= code << (4 * (group % 2));
}

fn copy_half(header: &mut [u8], at: usize, lane: usize, half: &[u8]) {
    header[at + lane * 2..][..2].copy_from_slice(half);
}

/// Stores a row, block layouts as in llama.cpp's `ggml-common.h`.
fn pack_row(format: Format, row: &[u8], lane: usize, header: &mut [u8], codes: &mut [u8]) {
    for (index, block) in row.chunks_exact(format.block_bytes()).enumerate() {
        let first = index * format.block_len();
        match format {
            Format::F32 => codes[index * 64 + lane * 4..][..4].copy_from_slice(block),
            Format::F16 | Format::Bf16 => codes[index * 32 + lane * 2..][..2].copy_from_slice(block),
            Format::Q8_0 => {
                copy_half(header, index * 32, lane, &block[..2]);
                for (at, &code) in block[2..].iter().enumerate() {
                    let column = first + at;
                    codes[place(column / 4, lane, column)] = code.wrapping_add(128);
                }
            }
            Format::Q4_0 | Format::Q4_1 => {
                let quants = if format == Format::Q4_1 {
                    copy_half(header, index * 64, lane, &block[..2]);
                    copy_half(header, index * 64 + 32, lane, &block[2..4]);
                    &block[4..]
                } else {
                    copy_half(header, index * 32, lane, &block[..2]);
                    &block[2..]
                };
                for (at, pair) in quants.iter().enumerate() {
                    put_nibble(codes, lane, first + at, pair & 15);
                    put_nibble(codes, lane, first + 16 + at, pair >> 4);
                }
            }
            Format::Q4K => {
                let header = &mut header[index * SUPER_LINES * 64..];
                copy_half(header, 0, lane, &block[..2]);
                copy_half(header, 32, lane, &block[2..4]);
                for group in 0..8 {
                    let (scale, min) = scale_min_k4(group, &block[4..16]);
                    header[64 + group * 16 + lane] = scale;
                    header[192 + group * 16 + lane] = min;
                    for at in 0..32 {
                        let pair = block[16 + group / 2 * 32 + at];
                        let code = if group % 2 == 0 { pair & 15 } else { pair >> 4 };
                        put_nibble(codes, lane, first + group * 32 + at, code);
                    }
                }
            }
            Format::Q6K => {
                let header = &mut header[index * SUPER_LINES * 64..];
                copy_half(header, 0, lane, &block[208..]);
                for (group, &scale) in block[192..208].iter().enumerate() {
                    header[64 + group * 16 + lane] = scale;
                }
                for at in 0..256 {
                    put_six_bits(codes, lane, first + at, code_q6k(block, at));
                }
            }
        }
    }
}

/// The six-bit scale and minimum of group `j` (0..8) out of the twelve packed bytes.
fn scale_min_k4(j: usize, packed: &[u8]) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        ((packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4))
    }
}

/// The six-bit code of column `at` of a block: low four bits, high two bits.
fn code_q6k(block: &[u8], at: usize) -> u8 {
    let (half, quarter, within) = (at / 128, at % 128 / 32, at % 32);
    let low = block[half * 64 + quarter % 2 * 32 + within];
    let low = if quarter < 2 { low & 15 } else { low >> 4 };
    let high = block[128 + half * 32 + within];
    low | ((high >> (2 * quarter)) & 3) << 4
}

/// A block of 32 columns takes four lines of low nibbles and two lines of high pairs, four groups a line.
fn put_six_bits(codes: &mut [u8], lane: usize, column: usize, code: u8) {
    let (block, within) = (column / 32 * 6 * 64, column % 32);
    put_nibble(&mut codes[block..], lane, within, code & 15);
    let group = within / 4;
    codes[block + place(4 + group / 4, lane, column)] |= (code >> 4) << (2 * (group % 4));
}

/// One row of a panel.
struct PackedRow<'a> {
    header: &'a [u8],
    codes: &'a [u8],
    lane: usize,
}

impl PackedRow<'_> {
    fn half(&self, at: usize) -> f32 {
        let at = at + self.lane * 2;
        half_to_f32(u16::from_le_bytes([self.header[at], self.header[at + 1]]))
    }

    fn nibble(&self, codes: &[u8], column: usize) -> f32 {
        let group = column / 4;
        f32::from((codes[place(group / 2, self.lane, column)] >> (4 * (group % 2))) & 15)
    }

    fn value(&self, format: Format, column: usize) -> f32 {
        let block = column / 32;
        let short = |at: usize| u16::from_le_bytes([self.codes[at], self.codes[at + 1]]);
        match format {
            Format::F32 => {
                let at = column * 64 + self.lane * 4;
                f32::from_bits(u32::from(short(at)) | u32::from(short(at + 2)) << 16)
            }
            Format::F16 => half_to_f32(short(column * 32 + self.lane * 2)),
            Format::Bf16 => brain_to_f32(short(column * 32 + self.lane * 2)),
            Format::Q8_0 => {
                let code = self.codes[place(column / 4, self.lane, column)];
                self.half(block * 32) * (f32::from(code) - 128.0)
            }
            Format::Q4_0 => self.half(block * 32) * (self.nibble(self.codes, column) - 8.0),
            Format::Q4_1 => {
                // The product is exact, so that a fused and a separate addition round alike.
                self.half(block * 64) * self.nibble(self.codes, column) + self.half(block * 64 + 32)
            }
            Format::Q4K => {
                let at = column / 256 * SUPER_LINES * 64;
                let group = column % 256 / 32;
                let scale = f32::from(self.header[at + 64 + group * 16 + self.lane]);
                let min = f32::from(self.header[at + 192 + group * 16 + self.lane]);
                let (scale, min) = (self.half(at) * scale, self.half(at + 32) * min);
                scale * self.nibble(self.codes, column) - min
            }
            Format::Q6K => {
                let at = column / 256 * SUPER_LINES * 64;
                let scale = self.header[at + 64 + column % 256 / 16 * 16 + self.lane] as i8;
                let codes = &self.codes[block * 6 * 64..];
                let group = column % 32 / 4;
                let high = codes[place(4 + group / 4, self.lane, column)] >> (2 * (group % 4));
                let code = self.nibble(codes, column % 32) + 16.0 * f32::from(high & 3);
                self.half(at) * f32::from(scale) * (code - 32.0)
            }
        }
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

    #[test]
    fn packing_adds_no_more_than_headers() {
        for (format, rows, cols, most) in
            [(Format::Q4_1, 576, 1536, 1.0), (Format::Q8_0, 64, 576, 1.001), (Format::Q4K, 32, 2048, 1.06)]
        {
            let bytes = format.row_bytes(cols).unwrap_or(0) * rows;
            let weight = Weight::new(format, rows, cols, vec![0; bytes]).map_or(usize::MAX, |w| w.bytes());
            assert!(weight as f64 <= bytes as f64 * most, "{format:?}: {weight} for {bytes}");
        }
    }
}
