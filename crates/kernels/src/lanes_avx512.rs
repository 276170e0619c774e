//! AVX-512. Values of this type exist only in code reached after detection.

use std::arch::x86_64::*;

use crate::isa::Isa;
use crate::lanes::Lanes;

#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub(crate) __m512);

impl Lanes for Avx512 {
    type Ints = __m512i;
    type Bytes = __m512i;
    /// The bytes, and -128 times their sums by fours: signed bytes enter the product as unsigned ones, 128 too large.
    type Signed = [__m512i; 2];
    const TALL: bool = true;
    const ISA: Isa = Isa::Avx512;

    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: only reached inside functions compiled for, and called after detection of, AVX-512.
        Self(unsafe { _mm512_setzero_ps() })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        Self(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u8) -> Self {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }
    #[inline(always)]
    unsafe fn load_brain(from: *const u8) -> Self {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        Self(unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        })
    }
    #[inline(always)]
    unsafe fn load_brain_pairs(from: *const u8) -> [Self; 2] {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe {
            let pairs = _mm512_loadu_si512(from.cast());
            let second = _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff));
            [_mm512_slli_epi32::<16>(pairs), second].map(|half| Self(_mm512_castsi512_ps(half)))
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        Self(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) })
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        Self(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) })
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: as for `zero`.
        Self(unsafe { _mm512_set1_ps(value) })
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        // SAFETY: as for `zero`.
        Self(unsafe { _mm512_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        // SAFETY: as for `zero`.
        Self(unsafe { _mm512_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: as for `zero`.
        Self(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        // SAFETY: as for `zero`. Of a NaN and a number the instruction gives its second operand.
        Self(unsafe { _mm512_max_ps(b.0, self.0) })
    }
    #[inline(always)]
    fn max_abs(self, b: Self) -> Self {
        // SAFETY: as for `zero`. Of a NaN and a number the instruction gives its second operand.
        Self(unsafe { _mm512_max_ps(_mm512_abs_ps(b.0), self.0) })
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        // SAFETY: as for `zero`.
        unsafe { _mm512_reduce_max_ps(self.0) }
    }
    #[inline(always)]
    fn max_lanes<const N: usize>(of: [Self; N]) -> [f32; N] {
        let mut largest = [0.0; N];
        let (fours, rest) = of.as_chunks::<4>();
        for (at, four) in fours.iter().enumerate() {
            // SAFETY: as for `zero`; there are four places.
            unsafe { _mm_storeu_ps(largest.as_mut_ptr().add(4 * at), max_of_four(four.map(|of| of.0))) };
        }
        for (largest, of) in largest[N - rest.len()..].iter_mut().zip(rest) {
            *largest = of.max_lane();
        }
        largest
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8) {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(self.0))) }
    }
    #[inline(always)]
    unsafe fn store_block(low: Self, high: Self, to: *mut i8) -> [i32; 2] {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe {
            let [low, high] = [low, high].map(|half| _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(half.0)));
            let bytes = _mm256_set_m128i(high, low);
            _mm256_storeu_si256(to.cast(), bytes);
            sums_of_halves(_mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), bytes))
        }
    }
    #[inline(always)]
    fn ints(value: i32) -> __m512i {
        // SAFETY: as for `zero`.
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    fn from_ints(ints: __m512i) -> Self {
        // SAFETY: as for `zero`.
        Self(unsafe { _mm512_cvtepi32_ps(ints) })
    }
    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> __m512i {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    fn low(bytes: __m512i) -> __m512i {
        // SAFETY: as for `zero`.
        unsafe { _mm512_and_si512(bytes, _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    fn high(bytes: __m512i) -> __m512i {
        // SAFETY: as for `zero`.
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    fn with_two_bits(low: __m512i, bits: __m512i, which: usize) -> __m512i {
        // SAFETY: as for `zero`.
        unsafe {
            let moved = match which {
                0 => _mm512_slli_epi16::<4>(bits),
                1 => _mm512_slli_epi16::<2>(bits),
                2 => bits,
                _ => _mm512_srli_epi16::<2>(bits),
            };
            _mm512_or_si512(low, _mm512_and_si512(moved, _mm512_set1_epi8(0x30)))
        }
    }
    #[inline(always)]
    fn byte(bytes: __m512i, which: usize) -> Self {
        // SAFETY: as for `zero`.
        unsafe {
            let moved = match which {
                0 => _mm512_and_si512(bytes, _mm512_set1_epi32(0xff)),
                1 => _mm512_and_si512(_mm512_srli_epi32::<8>(bytes), _mm512_set1_epi32(0xff)),
                2 => _mm512_and_si512(_mm512_srli_epi32::<16>(bytes), _mm512_set1_epi32(0xff)),
                _ => _mm512_srli_epi32::<24>(bytes),
            };
            Self(_mm512_cvtepi32_ps(moved))
        }
    }
    #[inline(always)]
    unsafe fn dot(sum: __m512i, weights: __m512i, x: *const i8, _: bool) -> __m512i {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe { _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(x.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn signed(low: *const i8, high: Option<*const i8>) -> [__m512i; 2] {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe {
            let low = _mm512_zextsi256_si512(_mm256_loadu_si256(low.cast()));
            let x = match high {
                Some(high) => _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(high.cast())),
                None => low,
            };
            let sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), x);
            [x, _mm512_sub_epi32(_mm512_setzero_si512(), sums)]
        }
    }
    #[inline(always)]
    unsafe fn signed_dot(from: *const i8, [x, less]: [__m512i; 2]) -> __m512i {
        // SAFETY: as for `zero`; the caller vouches for the memory.
        unsafe {
            let unsigned = _mm512_xor_si512(_mm512_loadu_si512(from.cast()), _mm512_set1_epi8(-128));
            _mm512_dpbusd_epi32(less, unsigned, x)
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
        Self(unsafe { _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(low), _mm512_set1_ps(high)) })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: as for `zero`.
        unsafe {
            let low = _mm512_castps512_ps256(self.0);
            sum_of_eight(_mm256_add_ps(low, _mm512_extractf32x8_ps::<1>(self.0)))
        }
    }
}

/// The sums of the lower and of the higher four.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
pub(crate) unsafe fn sums_of_halves(eight: __m256i) -> [i32; 2] {
    // SAFETY: the caller vouches for the unit.
    unsafe {
        let pairs = _mm256_add_epi32(eight, _mm256_shuffle_epi32::<0b01_00_11_10>(eight));
        let sums = _mm256_add_epi32(pairs, _mm256_shuffle_epi32::<0b10_11_00_01>(pairs));
        [_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums)]
            .map(|half| _mm_cvtsi128_si32(half))
    }
}

/// The largest lane of each of four.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn max_of_four([a, b, c, d]: [__m512; 4]) -> __m128 {
    // SAFETY: the caller vouches for the unit.
    unsafe {
        let ab = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_max_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        // In every quarter, one of each.
        let all = _mm512_max_ps(
            _mm512_shuffle_ps::<0b01_00_01_00>(ab, cd),
            _mm512_shuffle_ps::<0b11_10_11_10>(ab, cd),
        );
        let half = _mm256_max_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps::<1>(all));
        _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
    }
}

/// The sum of eight lanes: halves are added until one value is left.
///
/// # Safety
/// The CPU has AVX.
#[inline(always)]
pub(crate) unsafe fn sum_of_eight(eight: __m256) -> f32 {
    // SAFETY: the caller vouches for the unit.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}
