//! Decoding of weight rows to float32, block layouts as in llama.cpp's `ggml-common.h`.

use crate::format::Format;
use crate::lanes::multiversion;

multiversion! {
    /// Decodes a whole row; `bytes` holds exactly `out.len()` values.
    pub(crate) fn decode(format: Format, bytes: &[u8], out: &mut [f32]) = decode_body
}

#[inline(always)]
fn decode_body(format: Format, bytes: &[u8], out: &mut [f32]) {
    match format {
        Format::F32 => each(bytes, out, f32::from_le_bytes),
        Format::F16 => each(bytes, out, |b| half_to_f32(u16::from_le_bytes(b))),
        Format::Bf16 => each(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
        Format::Q8_0 => blocks::<34, 32>(bytes, out, q8_0),
        Format::Q4_0 => blocks::<18, 32>(bytes, out, q4_0),
        Format::Q4_1 => blocks::<20, 32>(bytes, out, q4_1),
        Format::Q4K => blocks::<144, 256>(bytes, out, q4k),
        Format::Q6K => blocks::<210, 256>(bytes, out, q6k),
    }
}

#[inline(always)]
fn each<const N: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    for (value, chunk) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = decode(*chunk);
    }
}

#[inline(always)]
fn blocks<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let blocks = bytes.as_chunks::<BYTES>().0.iter();
    for (block, values) in blocks.zip(out.as_chunks_mut::<LEN>().0) {
        decode(block, values);
    }
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

/// `d * q`, q signed bytes after the scale.
#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    for (value, &q) in out.iter_mut().zip(&block[2..]) {
        *value = scale * f32::from(q as i8);
    }
}

/// Low nibbles first half, high nibbles second half.
#[inline(always)]
fn nibbles(packed: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    for i in 0..16 {
        out[i] = packed[i] & 15;
    }
    for i in 0..16 {
        out[i + 16] = packed[i] >> 4;
    }
    out
}

/// `d * (q - 8)`.
#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    let quants = nibbles(&block[2..]);
    for i in 0..32 {
        out[i] = scale * (f32::from(quants[i]) - 8.0);
    }
}

/// `d * q + m`.
#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, min) = (half_at(block, 0), half_at(block, 2));
    let quants = nibbles(&block[4..]);
    for i in 0..32 {
        out[i] = scale * f32::from(quants[i]) + min;
    }
}

/// The six-bit scale and minimum of group `j` (0..8) out of the twelve packed bytes.
#[inline(always)]
fn scale_min_k4(j: usize, packed: &[u8]) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4),
            (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4),
        )
    };
    (f32::from(scale), f32::from(min))
}

/// `d * scale * q - dmin * min`, groups of 32.
#[inline(always)]
fn q4k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (packed, quants) = (&block[4..16], &block[16..]);
    for pair in 0..4 {
        let (scale_low, min_low) = scale_min_k4(2 * pair, packed);
        let (scale_high, min_high) = scale_min_k4(2 * pair + 1, packed);
        let (d1, m1, d2, m2) = (d * scale_low, dmin * min_low, d * scale_high, dmin * min_high);
        for at in 0..32 {
            let q = quants[pair * 32 + at];
            out[pair * 64 + at] = d1 * f32::from(q & 15) - m1;
            out[pair * 64 + 32 + at] = d2 * f32::from(q >> 4) - m2;
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
