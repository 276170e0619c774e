//! Decoding of weight rows to float32, block layouts as in llama.cpp's `ggml-common.h`.

use crate::format::Format;
use crate::lanes::{Lanes, multiversion};

multiversion! {
    /// Decodes a whole row; `bytes` holds exactly `out.len()` values.
    pub(crate) fn decode(format: Format, bytes: &[u8], out: &mut [f32]) = decode_body<Lanes>
}

/// Decodes a row chunk by chunk. A macro, since a function passed as a value is not compiled for the vector unit of
/// the function it is passed to.
macro_rules! chunks {
    ($bytes:ident, $out:ident, $size:literal => $len:literal, $decode:expr) => {
        for (chunk, values) in $bytes.as_chunks::<$size>().0.iter().zip($out.as_chunks_mut::<$len>().0) {
            $decode(chunk, values);
        }
    };
}

#[inline(always)]
fn decode_body<L: Lanes>(format: Format, bytes: &[u8], out: &mut [f32]) {
    match format {
        Format::F32 => chunks!(bytes, out, 4 => 1, single),
        Format::F16 => chunks!(bytes, out, 2 => 1, half),
        Format::Bf16 => chunks!(bytes, out, 2 => 1, brain),
        Format::Q8_0 => chunks!(bytes, out, 34 => 32, q8_0::<L>),
        Format::Q4_0 => chunks!(bytes, out, 18 => 32, q4_0::<L>),
        Format::Q4_1 => chunks!(bytes, out, 20 => 32, q4_1::<L>),
        Format::Q4K => chunks!(bytes, out, 144 => 256, q4k::<L>),
        Format::Q6K => chunks!(bytes, out, 210 => 256, q6k),
    }
}

#[inline(always)]
fn single(bytes: &[u8; 4], out: &mut [f32; 1]) {
    out[0] = f32::from_le_bytes(*bytes);
}

#[inline(always)]
fn half(bytes: &[u8; 2], out: &mut [f32; 1]) {
    out[0] = half_to_f32(u16::from_le_bytes(*bytes));
}

#[inline(always)]
fn brain(bytes: &[u8; 2], out: &mut [f32; 1]) {
    out[0] = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
}

#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    half_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// IEEE half precision to single, without a branch: the exponent is corrected by a multiplication, which
/// also makes subnormal numbers normal.
#[inline(always)]
fn half_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let rest = u32::from(half & 0x7fff) << 13;
    let finite = (f32::from_bits(rest) * f32::from_bits(0x7780_0000)).to_bits();
    let special = if half & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(sign | finite | special)
}

/// Stores `scale * q + min` for sixteen small integers. The product is exact, so that a fused and a separate addition
/// round alike.
#[inline(always)]
fn put<L: Lanes>(q: L, scale: f32, min: f32, out: &mut [f32]) {
    assert!(out.len() >= 16);
    let values = L::splat(min).fma(q, L::splat(scale));
    // SAFETY: sixteen values fit (asserted).
    unsafe { values.store(out.as_mut_ptr()) };
}

/// Sixteen bytes from `at` on.
#[inline(always)]
fn sixteen(block: &[u8], at: usize) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&block[at..at + 16]);
    bytes
}

/// `d * q`, q signed bytes after the scale.
#[inline(always)]
fn q8_0<L: Lanes>(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    put(L::from_i8(sixteen(block, 2)), scale, 0.0, &mut out[..16]);
    put(L::from_i8(sixteen(block, 18)), scale, 0.0, &mut out[16..]);
}

/// `scale * q + min`, low nibbles first half, high nibbles second half.
#[inline(always)]
fn nibbles<L: Lanes>(packed: [u8; 16], scale: f32, min: f32, out: &mut [f32; 32]) {
    put(L::from_u8(packed.map(|pair| pair & 15)), scale, min, &mut out[..16]);
    put(L::from_u8(packed.map(|pair| pair >> 4)), scale, min, &mut out[16..]);
}

/// `d * (q - 8)`.
#[inline(always)]
fn q4_0<L: Lanes>(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    nibbles::<L>(sixteen(block, 2), scale, -8.0 * scale, out);
}

/// `d * q + m`.
#[inline(always)]
fn q4_1<L: Lanes>(block: &[u8; 20], out: &mut [f32; 32]) {
    nibbles::<L>(sixteen(block, 4), half_at(block, 0), half_at(block, 2), out);
}

/// The six-bit scale and minimum of group `j` (0..8) out of the twelve packed bytes.
#[inline(always)]
fn scale_min_k4(j: usize, packed: &[u8]) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        ((packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4))
    };
    (f32::from(scale), f32::from(min))
}

/// `d * scale * q - dmin * min`, groups of 32: low nibbles one group, high nibbles the next.
#[inline(always)]
fn q4k<L: Lanes>(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (packed, quants) = (&block[4..16], &block[16..]);
    for group in 0..8 {
        let (scale, min) = scale_min_k4(group, packed);
        let (scale, min) = (d * scale, -dmin * min);
        for half in 0..2 {
            let bytes = sixteen(quants, group / 2 * 32 + half * 16);
            let q = bytes.map(|pair| if group % 2 == 0 { pair & 15 } else { pair >> 4 });
            put(L::from_u8(q), scale, min, &mut out[group * 32 + half * 16..][..16]);
        }
    }
}

/// `d * scale * (q - 32)`, low four bits, high two bits, groups of 16.
#[inline(always)]
fn q6k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for half in 0..2 {
        let low = &block[half * 64..];
        let high = &block[128 + half * 32..];
        let scales = &block[192 + half * 8..];
        for at in 0..32 {
            let h = high[at];
            let quants = [
                (low[at] & 15) | ((h & 3) << 4),
                (low[at + 32] & 15) | (((h >> 2) & 3) << 4),
                (low[at] >> 4) | (((h >> 4) & 3) << 4),
                (low[at + 32] >> 4) | ((h >> 6) << 4),
            ];
            for (quarter, q) in quants.into_iter().enumerate() {
                let scale = f32::from(scales[quarter * 2 + at / 16] as i8);
                out[half * 128 + quarter * 32 + at] = d * scale * (f32::from(q) - 32.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_converts_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (half_to_f32(bits), half::f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#x}");
        }
    }
}
