//! NEON of aarch64: sixteen lanes as four registers; with `dotprod` for 8-bit products where the CPU has it.
//!
//! NEON itself belongs to every aarch64 CPU.

use std::arch::aarch64::*;

use crate::isa::Isa;
use crate::lanes::{Lanes, half_to_f32};

type Four<T> = [T; 4];

/// Applies an operation to all four registers.
macro_rules! all {
    (|$i:ident| $body:expr) => {
        all!(@ $i $body; 0 1 2 3)
    };
    (@ $i:ident $body:expr; $($at:literal)*) => {
        [$({
            const $i: usize = $at;
            $body
        }),*]
    };
}

/// What both units share: everything but the products of bytes, which `$dot` adds to one register of sums.
macro_rules! neon_lanes {
    ($(#[$doc:meta])* $name:ident, $dot:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name(Four<float32x4_t>);

        impl $name {
            /// Rounded, ties to even.
            #[inline(always)]
            fn to_bytes(self) -> int8x16_t {
                // SAFETY: as for `splat`.
                unsafe {
                    let ints = all!(|I| vcvtnq_s32_f32(self.0[I]));
                    let words = [
                        vqmovn_high_s32(vqmovn_s32(ints[0]), ints[1]),
                        vqmovn_high_s32(vqmovn_s32(ints[2]), ints[3]),
                    ];
                    vqmovn_high_s16(vqmovn_s16(words[0]), words[1])
                }
            }
        }

        impl Lanes for $name {
            type Ints = Four<int32x4_t>;
            type Bytes = Four<uint8x16_t>;
            type Signed = Four<int8x16_t>;
            const TALL: bool = false;
            const ISA: Isa = Isa::$name;

            #[inline(always)]
            fn zero() -> Self {
                Self::splat(0.0)
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                // SAFETY: the caller vouches for the memory.
                Self(all!(|I| unsafe { vld1q_f32(from.add(4 * I)) }))
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                for (i, four) in self.0.into_iter().enumerate() {
                    // SAFETY: the caller vouches for the memory.
                    unsafe { vst1q_f32(to.add(4 * i), four) };
                }
            }
            #[inline(always)]
            unsafe fn load_half(from: *const u8) -> Self {
                // SAFETY: the caller vouches for the memory; an array has sixteen values.
                unsafe { Self::load(from.cast::<[u16; 16]>().read_unaligned().map(half_to_f32).as_ptr()) }
            }
            #[inline(always)]
            unsafe fn load_brain(from: *const u8) -> Self {
                let from = from.cast::<u16>();
                // SAFETY: the caller vouches for the memory.
                Self(all!(|I| unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.add(4 * I)))) }))
            }
            #[inline(always)]
            unsafe fn load_brain_pairs(from: *const u8) -> [Self; 2] {
                let from = from.cast::<u32>();
                // SAFETY: the caller vouches for the memory.
                unsafe {
                    let pairs = all!(|I| vld1q_u32(from.add(4 * I)));
                    let second = vdupq_n_u32(!0xffff);
                    [
                        Self(all!(|I| vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs[I])))),
                        Self(all!(|I| vreinterpretq_f32_u32(vandq_u32(pairs[I], second)))),
                    ]
                }
            }
            #[inline(always)]
            unsafe fn load_u8(from: *const u8) -> Self {
                // SAFETY: the caller vouches for the memory.
                unsafe {
                    let bytes = vld1q_u8(from);
                    let words = [vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes)];
                    Self([
                        vcvtq_f32_u32(vmovl_u16(vget_low_u16(words[0]))),
                        vcvtq_f32_u32(vmovl_high_u16(words[0])),
                        vcvtq_f32_u32(vmovl_u16(vget_low_u16(words[1]))),
                        vcvtq_f32_u32(vmovl_high_u16(words[1])),
                    ])
                }
            }
            #[inline(always)]
            unsafe fn load_i8(from: *const u8) -> Self {
                // SAFETY: the caller vouches for the memory.
                unsafe {
                    let bytes = vld1q_s8(from.cast());
                    let words = [vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)];
                    Self([
                        vcvtq_f32_s32(vmovl_s16(vget_low_s16(words[0]))),
                        vcvtq_f32_s32(vmovl_high_s16(words[0])),
                        vcvtq_f32_s32(vmovl_s16(vget_low_s16(words[1]))),
                        vcvtq_f32_s32(vmovl_high_s16(words[1])),
                    ])
                }
            }
            #[inline(always)]
            fn splat(value: f32) -> Self {
                // SAFETY: every aarch64 CPU has NEON.
                Self([unsafe { vdupq_n_f32(value) }; 4])
            }
            #[inline(always)]
            fn mul(self, b: Self) -> Self {
                // SAFETY: as for `splat`.
                Self(all!(|I| unsafe { vmulq_f32(self.0[I], b.0[I]) }))
            }
            #[inline(always)]
            fn add(self, b: Self) -> Self {
                // SAFETY: as for `splat`.
                Self(all!(|I| unsafe { vaddq_f32(self.0[I], b.0[I]) }))
            }
            #[inline(always)]
            fn fma(self, a: Self, b: Self) -> Self {
                // SAFETY: as for `splat`.
                Self(all!(|I| unsafe { vfmaq_f32(self.0[I], a.0[I], b.0[I]) }))
            }
            #[inline(always)]
            fn max(self, b: Self) -> Self {
                // SAFETY: as for `splat`. Of a NaN and a number `maxnm` gives the number.
                Self(all!(|I| unsafe { vmaxnmq_f32(self.0[I], b.0[I]) }))
            }
            #[inline(always)]
            fn max_abs(self, b: Self) -> Self {
                // SAFETY: as for `splat`. Of a NaN and a number `maxnm` gives the number.
                Self(all!(|I| unsafe { vmaxnmq_f32(self.0[I], vabsq_f32(b.0[I])) }))
            }
            #[inline(always)]
            fn max_lane(self) -> f32 {
                let [a, b, c, d] = self.0;
                // SAFETY: as for `splat`.
                unsafe { vmaxvq_f32(vmaxq_f32(vmaxq_f32(a, b), vmaxq_f32(c, d))) }
            }
            #[inline(always)]
            unsafe fn store_i8(self, to: *mut i8) {
                // SAFETY: as for `splat`; the caller vouches for the memory.
                unsafe { vst1q_s8(to, self.to_bytes()) }
            }
            #[inline(always)]
            unsafe fn store_block(low: Self, high: Self, to: *mut i8) -> [i32; 2] {
                // SAFETY: as for `splat`; the caller vouches for the memory.
                unsafe {
                    let bytes = [low.to_bytes(), high.to_bytes()];
                    vst1q_s8(to, bytes[0]);
                    vst1q_s8(to.add(16), bytes[1]);
                    bytes.map(|half| i32::from(vaddlvq_s8(half)))
                }
            }
            #[inline(always)]
            fn ints(value: i32) -> Four<int32x4_t> {
                // SAFETY: as for `splat`.
                [unsafe { vdupq_n_s32(value) }; 4]
            }
            #[inline(always)]
            fn from_ints(ints: Four<int32x4_t>) -> Self {
                // SAFETY: as for `splat`.
                Self(all!(|I| unsafe { vcvtq_f32_s32(ints[I]) }))
            }
            #[inline(always)]
            unsafe fn bytes(from: *const u8) -> Four<uint8x16_t> {
                // SAFETY: the caller vouches for the memory.
                all!(|I| unsafe { vld1q_u8(from.add(16 * I)) })
            }
            #[inline(always)]
            fn low(bytes: Four<uint8x16_t>) -> Four<uint8x16_t> {
                // SAFETY: as for `splat`.
                all!(|I| unsafe { vandq_u8(bytes[I], vdupq_n_u8(15)) })
            }
            #[inline(always)]
            fn high(bytes: Four<uint8x16_t>) -> Four<uint8x16_t> {
                // SAFETY: as for `splat`.
                all!(|I| unsafe { vshrq_n_u8::<4>(bytes[I]) })
            }
            #[inline(always)]
            fn with_two_bits(low: Four<uint8x16_t>, bits: Four<uint8x16_t>, which: usize) -> Four<uint8x16_t> {
                // SAFETY: as for `splat`.
                all!(|I| unsafe {
                    let moved = match which {
                        0 => vshlq_n_u8::<4>(bits[I]),
                        1 => vshlq_n_u8::<2>(bits[I]),
                        2 => bits[I],
                        _ => vshrq_n_u8::<2>(bits[I]),
                    };
                    vorrq_u8(low[I], vandq_u8(moved, vdupq_n_u8(0x30)))
                })
            }
            #[inline(always)]
            fn byte(bytes: Four<uint8x16_t>, which: usize) -> Self {
                // SAFETY: as for `splat`.
                Self(all!(|I| unsafe {
                    let lanes = vreinterpretq_u32_u8(bytes[I]);
                    let moved = match which {
                        0 => lanes,
                        1 => vshrq_n_u32::<8>(lanes),
                        2 => vshrq_n_u32::<16>(lanes),
                        _ => vshrq_n_u32::<24>(lanes),
                    };
                    vcvtq_f32_u32(vandq_u32(moved, vdupq_n_u32(0xff)))
                }))
            }
            #[inline(always)]
            unsafe fn dot(
                sum: Four<int32x4_t>, weights: Four<uint8x16_t>, x: *const i8, wide: bool,
            ) -> Four<int32x4_t> {
                // SAFETY: as for `splat`; the caller vouches for four readable bytes.
                unsafe {
                    let four = x.cast::<[i8; 4]>().read_unaligned();
                    let x = vreinterpretq_s8_s32(vdupq_n_s32(i32::from_ne_bytes(four.map(|x| x as u8))));
                    if wide {
                        // The products are of signed bytes: 128 is taken off every weight and its share added again.
                        let share = vdupq_n_s32(128 * four.iter().map(|&x| i32::from(x)).sum::<i32>());
                        all!(|I| {
                            let signed = vreinterpretq_s8_u8(veorq_u8(weights[I], vdupq_n_u8(0x80)));
                            $dot(vaddq_s32(sum[I], share), signed, x)
                        })
                    } else {
                        all!(|I| $dot(sum[I], vreinterpretq_s8_u8(weights[I]), x))
                    }
                }
            }
            #[inline(always)]
            unsafe fn signed(low: *const i8, high: Option<*const i8>) -> Four<int8x16_t> {
                // SAFETY: the caller vouches for the memory.
                unsafe {
                    let zero = vdupq_n_s8(0);
                    let high = high.map_or([zero; 2], |high| [vld1q_s8(high), vld1q_s8(high.add(16))]);
                    [vld1q_s8(low), vld1q_s8(low.add(16)), high[0], high[1]]
                }
            }
            #[inline(always)]
            unsafe fn signed_dot(from: *const i8, x: Four<int8x16_t>) -> Four<int32x4_t> {
                // SAFETY: the caller vouches for the memory.
                all!(|I| unsafe { $dot(vdupq_n_s32(0), vld1q_s8(from.add(16 * I)), x[I]) })
            }
            #[inline(always)]
            fn halves(low: f32, high: f32) -> Self {
                let (Self([low, ..]), Self([high, ..])) = (Self::splat(low), Self::splat(high));
                Self([low, low, high, high])
            }
        }
    };
}

neon_lanes!(
    /// Baseline NEON.
    Neon, dot_of_products
);
neon_lanes!(
    /// NEON with the dot products of Armv8.2.
    NeonDot, dot_instruction
);

/// Adds to each 32-bit lane the sum of its four products of bytes.
#[inline(always)]
unsafe fn dot_of_products(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: every aarch64 CPU has NEON. Two products are at most 2 * 128 * 127: no overflow in 16 bits.
    unsafe {
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(w, x)))
    }
}

/// As [`dot_of_products`], in one instruction.
#[inline(always)]
unsafe fn dot_instruction(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: reached only after detection of `dotprod`; the instruction touches registers only.
    unsafe {
        std::arch::asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
