//! AVX2. Values of this type exist only in code reached after detection.

use std::arch::x86_64::*;

use crate::isa::Isa;
use crate::lanes::Lanes;
use crate::lanes_avx512::{sum_of_eight, sums_of_halves};

/// Applies an operation to both halves.
macro_rules! both {
    ($a:expr, |$x:ident| $body:expr) => {{
        let [low, high] = $a;
        [
            {
                let $x = low;
                $body
            },
            {
                let $x = high;
                $body
            },
        ]
    }};
}

#[derive(Clone, Copy)]
pub(crate) struct Avx2([__m256; 2]);

impl Avx2 {
    /// Rounded, ties to even.
    #[inline(always)]
    fn to_bytes(self) -> __m128i {
        // SAFETY: as for `zero`.
        unsafe {
            let ints = both!(self.0, |half| _mm256_cvtps_epi32(half));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(ints[0], ints[1]));
            _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
        }
    }
}

impl Lanes for Avx2 {
    type Ints = [__m256i; 2];
    type Bytes = [__m256i; 2];
    type Signed = [__m256i; 2];
    const TALL: bool = false;
    const SHORTS: bool = true;
    const CENTRED: bool = true;
    const ISA: Isa = Isa::Avx2;

    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: only reached inside functions compiled for, and called after detection of, AVX2.
        Self(unsafe { [_mm256_setzero_ps(); 2] })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        Self(unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe {
            _mm256_storeu_ps(to, self.0[0]);
            _mm256_storeu_ps(to.add(8), self.0[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u8) -> Self {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        Self(unsafe {
            let halves = _mm256_loadu_si256(from.cast());
            [
                _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)),
            ]
        })
    }
    #[inline(always)]
    unsafe fn load_brain(from: *const u8) -> Self {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        Self(unsafe {
            let halves = [_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(16).cast())];
            both!(halves, |half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half))))
        })
    }
    #[inline(always)]
    unsafe fn load_brain_pairs(from: *const u8) -> [Self; 2] {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe {
            let pairs = [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())];
            let first = both!(pairs, |pairs| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)));
            let mask = _mm256_set1_epi32(!0xffff);
            let second = both!(pairs, |pairs| _mm256_castsi256_ps(_mm256_and_si256(pairs, mask)));
            [Self(first), Self(second)]
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        Self(unsafe {
            let halves = [_mm_loadl_epi64(from.cast()), _mm_loadl_epi64(from.add(8).cast())];
            both!(halves, |half| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(half)))
        })
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        Self(unsafe {
            let halves = [_mm_loadl_epi64(from.cast()), _mm_loadl_epi64(from.add(8).cast())];
            both!(halves, |half| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(half)))
        })
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: as for `zero`.
        Self(unsafe { [_mm256_set1_ps(value); 2] })
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        // SAFETY: as for `zero`.
        Self(unsafe { [_mm256_mul_ps(self.0[0], b.0[0]), _mm256_mul_ps(self.0[1], b.0[1])] })
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        // SAFETY: as for `zero`.
        Self(unsafe { [_mm256_add_ps(self.0[0], b.0[0]), _mm256_add_ps(self.0[1], b.0[1])] })
    }
    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: as for `zero`.
        Self(unsafe {
            [_mm256_fmadd_ps(a.0[0], b.0[0], self.0[0]), _mm256_fmadd_ps(a.0[1], b.0[1], self.0[1])]
        })
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        // SAFETY: as for `zero`. Of a NaN and a number the instruction gives its second operand.
        Self(unsafe { [_mm256_max_ps(b.0[0], self.0[0]), _mm256_max_ps(b.0[1], self.0[1])] })
    }
    #[inline(always)]
    fn max_abs(self, b: Self) -> Self {
        // SAFETY: as for `zero`. Of a NaN and a number the instruction gives its second operand.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            let size = both!(b.0, |half| _mm256_andnot_ps(sign, half));
            Self([_mm256_max_ps(size[0], self.0[0]), _mm256_max_ps(size[1], self.0[1])])
        }
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        // SAFETY: as for `zero`.
        unsafe {
            let both = _mm256_max_ps(self.0[0], self.0[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps::<1>(both));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8) {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe { _mm_storeu_si128(to.cast(), self.to_bytes()) }
    }
    #[inline(always)]
    unsafe fn store_block(low: Self, high: Self, to: *mut i8) -> [i32; 2] {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe {
            let bytes = _mm256_set_m128i(high.to_bytes(), low.to_bytes());
            _mm256_storeu_si256(to.cast(), bytes);
            let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
            sums_of_halves(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    fn ints(value: i32) -> [__m256i; 2] {
        // SAFETY: as for `zero`.
        unsafe { [_mm256_set1_epi32(value); 2] }
    }
    #[inline(always)]
    fn from_ints(ints: [__m256i; 2]) -> Self {
        // SAFETY: as for `zero`.
        Self(unsafe { both!(ints, |half| _mm256_cvtepi32_ps(half)) })
    }
    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> [__m256i; 2] {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
    }
    #[inline(always)]
    fn low(bytes: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: as for `zero`.
        unsafe { both!(bytes, |half| _mm256_and_si256(half, _mm256_set1_epi8(15))) }
    }
    #[inline(always)]
    fn high(bytes: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: as for `zero`.
        unsafe { both!(bytes, |half| _mm256_and_si256(_mm256_srli_epi16::<4>(half), _mm256_set1_epi8(15))) }
    }
    #[inline(always)]
    fn with_two_bits(low: [__m256i; 2], bits: [__m256i; 2], which: usize) -> [__m256i; 2] {
        // SAFETY: as for `zero`.
        unsafe {
            let moved = match which {
                0 => both!(bits, |half| _mm256_slli_epi16::<4>(half)),
                1 => both!(bits, |half| _mm256_slli_epi16::<2>(half)),
                2 => bits,
                _ => both!(bits, |half| _mm256_srli_epi16::<2>(half)),
            };
            let pair = both!(moved, |half| _mm256_and_si256(half, _mm256_set1_epi8(0x30)));
            [_mm256_or_si256(low[0], pair[0]), _mm256_or_si256(low[1], pair[1])]
        }
    }
    #[inline(always)]
    fn byte(bytes: [__m256i; 2], which: usize) -> Self {
        // SAFETY: as for `zero`.
        unsafe {
            let moved = match which {
                0 => bytes,
                1 => both!(bytes, |half| _mm256_srli_epi32::<8>(half)),
                2 => both!(bytes, |half| _mm256_srli_epi32::<16>(half)),
                _ => both!(bytes, |half| _mm256_srli_epi32::<24>(half)),
            };
            Self(both!(moved, |half| _mm256_cvtepi32_ps(_mm256_and_si256(half, _mm256_set1_epi32(0xff)))))
        }
    }
    #[inline(always)]
    unsafe fn dot(sum: [__m256i; 2], weights: [__m256i; 2], x: *const i8, wide: bool) -> [__m256i; 2] {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            let dots = if wide {
                // The signs go over to `x`: 2 * 128 * 127 fits 16 bits.
                let signed = both!(weights, |half| _mm256_xor_si256(half, _mm256_set1_epi8(-128)));
                both!(signed, |half| _mm256_madd_epi16(
                    _mm256_maddubs_epi16(_mm256_abs_epi8(half), _mm256_sign_epi8(x, half)),
                    _mm256_set1_epi16(1),
                ))
            } else {
                both!(weights, |half| _mm256_madd_epi16(_mm256_maddubs_epi16(half, x), _mm256_set1_epi16(1)))
            };
            [_mm256_add_epi32(sum[0], dots[0]), _mm256_add_epi32(sum[1], dots[1])]
        }
    }
    #[inline(always)]
    unsafe fn dot_short(sum: [__m256i; 2], weights: [__m256i; 2], x: *const i8) -> [__m256i; 2] {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            let dots = both!(weights, |half| _mm256_maddubs_epi16(half, x));
            [_mm256_add_epi16(sum[0], dots[0]), _mm256_add_epi16(sum[1], dots[1])]
        }
    }
    #[inline(always)]
    fn widen(sum: [__m256i; 2], start: i32) -> [__m256i; 2] {
        // SAFETY: as for `zero`.
        unsafe {
            let sums = both!(sum, |half| _mm256_madd_epi16(half, _mm256_set1_epi16(1)));
            both!(sums, |half| _mm256_add_epi32(half, _mm256_set1_epi32(start)))
        }
    }
    #[inline(always)]
    unsafe fn signed(low: *const i8, high: Option<*const i8>) -> [__m256i; 2] {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe {
            let high = high.map_or(_mm256_setzero_si256(), |high| _mm256_loadu_si256(high.cast()));
            [_mm256_loadu_si256(low.cast()), high]
        }
    }
    #[inline(always)]
    unsafe fn signed_dot(from: *const i8, x: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: as for `zero`; the caller vouches for the memory. Two products are at most 2 * 128 * 127: no overflow
        // in 16 bits.
        unsafe {
            let half = |w: *const i8, x: __m256i| {
                let signed = _mm256_sign_epi8(_mm256_loadu_si256(w.cast()), x);
                _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(x), signed), _mm256_set1_epi16(1))
            };
            [half(from, x[0]), half(from.add(32), x[1])]
        }
    }
    #[inline(always)]
    unsafe fn transpose(from: *const f32, to: *mut f32) {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe { crate::transpose::with_avx(from, to) }
    }
    #[inline(always)]
    fn halves(low: f32, high: f32) -> Self {
        // SAFETY: as for `zero`.
        Self(unsafe { [_mm256_set1_ps(low), _mm256_set1_ps(high)] })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: as for `zero`.
        unsafe { sum_of_eight(_mm256_add_ps(self.0[0], self.0[1])) }
    }
}
