//! Sixteen lanes on whatever vector unit the CPU has, chosen at run time.
//!
//! All implementations that have a fused multiply-add give bit-equal results: the same operations on the same
//! lanes, sums over lanes in one fixed tree, and integer products that are exact.

use crate::isa::Isa;

/// Sixteen float32 values in registers, and the sixteen 32-bit integers and sixty-four bytes beside them.
pub(crate) trait Lanes: Copy {
    /// Sixteen 32-bit integers.
    type Ints: Copy;
    /// Sixty-four bytes: four per lane.
    type Bytes: Copy;
    /// Sixty-four signed bytes as the products of signed bytes want them.
    type Signed: Copy;
    /// Whether there are registers for tall tiles (32 of 512 bits).
    const TALL: bool;
    /// Products of small bytes are added up in 16 bits first.
    const SHORTS: bool = false;
    /// [`Lanes::dot`] of wide bytes takes 128 off each.
    const CENTRED: bool = false;
    /// [`f32::mul_add`] is an instruction.
    const FUSED: bool = true;
    /// The unit.
    const ISA: Isa;

    /// All zero.
    fn zero() -> Self;
    /// Sixteen values from memory.
    ///
    /// # Safety
    /// `from` is valid for reading sixteen values, and the CPU has the implementation's unit.
    unsafe fn load(from: *const f32) -> Self;
    /// Sixteen values to memory.
    ///
    /// # Safety
    /// `to` is valid for writing sixteen values, and the CPU has the implementation's unit.
    unsafe fn store(self, to: *mut f32);
    /// Sixteen IEEE half-precision values from memory.
    ///
    /// # Safety
    /// `from` is valid for reading 32 bytes, and the CPU has the implementation's unit.
    unsafe fn load_half(from: *const u8) -> Self;
    /// Sixteen bfloat16 values from memory.
    ///
    /// # Safety
    /// `from` is valid for reading 32 bytes, and the CPU has the implementation's unit.
    unsafe fn load_brain(from: *const u8) -> Self;
    /// Sixteen pairs of bfloat16 values from memory: the first of each, and the second.
    ///
    /// # Safety
    /// `from` is valid for reading 64 bytes, and the CPU has the implementation's unit.
    unsafe fn load_brain_pairs(from: *const u8) -> [Self; 2];
    /// Sixteen unsigned bytes from memory.
    ///
    /// # Safety
    /// `from` is valid for reading 16 bytes, and the CPU has the implementation's unit.
    unsafe fn load_u8(from: *const u8) -> Self;
    /// Sixteen signed bytes from memory.
    ///
    /// # Safety
    /// `from` is valid for reading 16 bytes, and the CPU has the implementation's unit.
    unsafe fn load_i8(from: *const u8) -> Self;
    /// The same value in every lane.
    fn splat(value: f32) -> Self;
    /// `self * b`, lane by lane.
    fn mul(self, b: Self) -> Self;
    /// `self + b`, lane by lane.
    fn add(self, b: Self) -> Self;
    /// `self + a * b`, lane by lane.
    fn fma(self, a: Self, b: Self) -> Self;
    /// The larger, lane by lane; NaN counts for nothing in `b`.
    fn max(self, b: Self) -> Self;
    /// The larger magnitude, lane by lane; NaN counts for nothing in `self`.
    fn max_abs(self, b: Self) -> Self;
    /// The largest lane, none being NaN.
    fn max_lane(self) -> f32;
    /// The largest lane of each, none being NaN.
    #[inline(always)]
    fn max_lanes<const N: usize>(of: [Self; N]) -> [f32; N] {
        of.map(Self::max_lane)
    }
    /// Stores the lanes, rounded to the nearest integer (ties to even), as signed bytes; lanes lie within ±127 or are NaN,
    /// which may become anything.
    ///
    /// # Safety
    /// `to` is valid for writing sixteen bytes, and the CPU has the implementation's unit.
    unsafe fn store_i8(self, to: *mut i8);
    /// As [`Lanes::store_i8`] of two vectors one behind the other, and the sums of their bytes.
    ///
    /// # Safety
    /// `to` is valid for writing 32 bytes, and the CPU has the implementation's unit.
    unsafe fn store_block(low: Self, high: Self, to: *mut i8) -> [i32; 2];
    /// The sixteen lanes as an array.
    #[inline(always)]
    fn to_array(self) -> [f32; 16] {
        let mut out = [0.0; 16];
        // SAFETY: the array has sixteen values; a value exists only where the CPU has the unit.
        unsafe { self.store(out.as_mut_ptr()) };
        out
    }
    /// The sum of the lanes: halves are added until one value is left.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut v = self.to_array();
        let mut width = 8;
        while width > 0 {
            for i in 0..width {
                v[i] += v[i + width];
            }
            width /= 2;
        }
        v[0]
    }

    /// Asks for a cache line ahead of its use; `from` may be any address.
    #[inline(always)]
    fn prefetch(from: *const u8) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch never faults.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(from.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = from;
    }

    /// Turns a matrix of sixteen rows and columns.
    ///
    /// # Safety
    /// `from` is valid for reading 256 values, `to` for writing them; the CPU has the implementation's unit.
    #[inline(always)]
    unsafe fn transpose(from: *const f32, to: *mut f32) {
        // SAFETY: the caller vouches for the memory.
        unsafe { crate::transpose::plain(from, to) };
    }

    /// The same integer in every lane.
    fn ints(value: i32) -> Self::Ints;
    /// The integers as float32.
    fn from_ints(ints: Self::Ints) -> Self;
    /// Sixty-four bytes from memory.
    ///
    /// # Safety
    /// `from` is valid for reading 64 bytes, and the CPU has the implementation's unit.
    unsafe fn bytes(from: *const u8) -> Self::Bytes;
    /// The low four bits of every byte.
    fn low(bytes: Self::Bytes) -> Self::Bytes;
    /// The high four bits of every byte.
    fn high(bytes: Self::Bytes) -> Self::Bytes;
    /// `low + 16 * pair`, where `pair` is the two bits of `bits` from bit `2 * which` of each byte on.
    fn with_two_bits(low: Self::Bytes, bits: Self::Bytes, which: usize) -> Self::Bytes;
    /// Byte `which` (0..4) of every lane as float32.
    fn byte(bytes: Self::Bytes, which: usize) -> Self;
    /// Adds to every lane the products of its four unsigned bytes with the four signed bytes at `x`, none of those below
    /// -127. Exact; without `wide`, bytes of `weights` are below 64. See [`Lanes::CENTRED`].
    ///
    /// # Safety
    /// `x` is valid for reading four bytes, and the CPU has the implementation's unit.
    unsafe fn dot(sum: Self::Ints, weights: Self::Bytes, x: *const i8, wide: bool) -> Self::Ints;
    /// As [`Lanes::dot`] for bytes below 16, whose products are added up in 16 bits: at most eight times from zero, before
    /// [`Lanes::widen`].
    ///
    /// # Safety
    /// As for [`Lanes::dot`].
    #[inline(always)]
    unsafe fn dot_short(sum: Self::Ints, weights: Self::Bytes, x: *const i8) -> Self::Ints {
        let _ = (sum, weights, x);
        unreachable!("no unit without short sums asks for them")
    }
    /// `start` plus what [`Lanes::dot_short`] added up.
    #[inline(always)]
    fn widen(sum: Self::Ints, start: i32) -> Self::Ints {
        let _ = (sum, start);
        unreachable!("no unit without short sums asks for them")
    }
    /// Thirty-two signed bytes from each of two places, none below -127; without `high`, the second half is zero.
    ///
    /// # Safety
    /// Both are valid for reading 32 bytes, and the CPU has the implementation's unit.
    unsafe fn signed(low: *const i8, high: Option<*const i8>) -> Self::Signed;
    /// The products of sixty-four signed bytes from memory, none below -127, with those of `x`, summed by fours. Exact.
    ///
    /// # Safety
    /// `from` is valid for reading 64 bytes, and the CPU has the implementation's unit.
    unsafe fn signed_dot(from: *const i8, x: Self::Signed) -> Self::Ints;
    /// `low` in the first eight lanes, `high` in the others.
    fn halves(low: f32, high: f32) -> Self;
}

/// Sixteen lanes as plain code.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 16]);

impl Lanes for Portable {
    type Ints = [i32; 16];
    type Bytes = [u8; 64];
    type Signed = [[i8; 32]; 2];
    const TALL: bool = false;
    const FUSED: bool = cfg!(target_arch = "aarch64");
    const ISA: Isa = Isa::Portable;

    #[inline(always)]
    fn zero() -> Self {
        Self([0.0; 16])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for sixteen readable values.
        Self(unsafe { from.cast::<[f32; 16]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for sixteen writable values.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u8) -> Self {
        // SAFETY: the caller vouches for the memory.
        Self(unsafe { from.cast::<[u16; 16]>().read_unaligned() }.map(half_to_f32))
    }
    #[inline(always)]
    unsafe fn load_brain(from: *const u8) -> Self {
        // SAFETY: the caller vouches for the memory.
        Self(unsafe { from.cast::<[u16; 16]>().read_unaligned() }.map(brain_to_f32))
    }
    #[inline(always)]
    unsafe fn load_brain_pairs(from: *const u8) -> [Self; 2] {
        // SAFETY: the caller vouches for the memory.
        let pairs = unsafe { from.cast::<[[u16; 2]; 16]>().read_unaligned() };
        [0, 1].map(|of| Self(pairs.map(|pair| brain_to_f32(pair[of]))))
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self {
        // SAFETY: the caller vouches for the memory.
        Self(unsafe { from.cast::<[u8; 16]>().read_unaligned() }.map(f32::from))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self {
        // SAFETY: the caller vouches for the memory.
        Self(unsafe { from.cast::<[i8; 16]>().read_unaligned() }.map(f32::from))
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 16])
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * b.0[i]))
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + b.0[i]))
    }
    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        // Without a hardware instruction `mul_add` is a library call; aarch64 always has it.
        Self(std::array::from_fn(|i| {
            if cfg!(target_arch = "aarch64") {
                a.0[i].mul_add(b.0[i], self.0[i])
            } else {
                self.0[i] + a.0[i] * b.0[i]
            }
        }))
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        Self(std::array::from_fn(|i| if b.0[i] > self.0[i] { b.0[i] } else { self.0[i] }))
    }
    #[inline(always)]
    fn max_abs(self, b: Self) -> Self {
        Self(std::array::from_fn(|i| {
            let size = b.0[i].abs();
            if size > self.0[i] { size } else { self.0[i] }
        }))
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        self.0.iter().fold(f32::NEG_INFINITY, |max, &v| if v > max { v } else { max })
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8) {
        let bytes = self.0.map(|v| v.round_ties_even() as i8);
        // SAFETY: the caller vouches for sixteen writable bytes.
        unsafe { to.cast::<[i8; 16]>().write_unaligned(bytes) };
    }
    #[inline(always)]
    unsafe fn store_block(low: Self, high: Self, to: *mut i8) -> [i32; 2] {
        let bytes = [low, high].map(|half| half.0.map(|v| v.round_ties_even() as i8));
        // SAFETY: the caller vouches for 32 writable bytes.
        unsafe { to.cast::<[[i8; 16]; 2]>().write_unaligned(bytes) };
        bytes.map(|half| half.into_iter().map(i32::from).sum())
    }
    #[inline(always)]
    fn to_array(self) -> [f32; 16] {
        self.0
    }
    #[inline(always)]
    fn ints(value: i32) -> [i32; 16] {
        [value; 16]
    }
    #[inline(always)]
    fn from_ints(ints: [i32; 16]) -> Self {
        Self(ints.map(|i| i as f32))
    }
    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> [u8; 64] {
        // SAFETY: the caller vouches for the memory.
        unsafe { from.cast::<[u8; 64]>().read_unaligned() }
    }
    #[inline(always)]
    fn low(bytes: [u8; 64]) -> [u8; 64] {
        bytes.map(|byte| byte & 15)
    }
    #[inline(always)]
    fn high(bytes: [u8; 64]) -> [u8; 64] {
        bytes.map(|byte| byte >> 4)
    }
    #[inline(always)]
    fn with_two_bits(low: [u8; 64], bits: [u8; 64], which: usize) -> [u8; 64] {
        std::array::from_fn(|i| low[i] | ((bits[i] >> (2 * which)) & 3) << 4)
    }
    #[inline(always)]
    fn byte(bytes: [u8; 64], which: usize) -> Self {
        Self(std::array::from_fn(|lane| f32::from(bytes[lane * 4 + which])))
    }
    #[inline(always)]
    unsafe fn dot(sum: [i32; 16], weights: [u8; 64], x: *const i8, _: bool) -> [i32; 16] {
        // SAFETY: the caller vouches for four readable bytes.
        let x = unsafe { x.cast::<[i8; 4]>().read_unaligned() }.map(i32::from);
        let w = |at: usize| i32::from(weights[at]);
        std::array::from_fn(|lane| {
            let at = lane * 4;
            sum[lane] + w(at) * x[0] + w(at + 1) * x[1] + w(at + 2) * x[2] + w(at + 3) * x[3]
        })
    }
    #[inline(always)]
    unsafe fn signed(low: *const i8, high: Option<*const i8>) -> [[i8; 32]; 2] {
        // SAFETY: the caller vouches for the memory.
        [Some(low), high]
            .map(|half| half.map_or([0; 32], |x| unsafe { x.cast::<[i8; 32]>().read_unaligned() }))
    }
    #[inline(always)]
    unsafe fn signed_dot(from: *const i8, x: [[i8; 32]; 2]) -> [i32; 16] {
        // SAFETY: the caller vouches for the memory.
        let w = unsafe { from.cast::<[i8; 64]>().read_unaligned() };
        std::array::from_fn(|lane| {
            (0..4).map(|i| i32::from(w[lane * 4 + i]) * i32::from(x[lane / 8][lane % 8 * 4 + i])).sum()
        })
    }
    #[inline(always)]
    fn halves(low: f32, high: f32) -> Self {
        Self(std::array::from_fn(|lane| if lane < 8 { low } else { high }))
    }
}

/// bfloat16 to single.
#[inline(always)]
pub fn brain_to_f32(brain: u16) -> f32 {
    f32::from_bits(u32::from(brain) << 16)
}

/// Single to bfloat16, to the nearest, ties to even; NaN stays NaN.
#[inline(always)]
pub fn f32_to_brain(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    if value.is_nan() { (bits >> 16) as u16 | 0x40 } else { (rounded >> 16) as u16 }
}

/// IEEE half precision to single, without a branch: the exponent is corrected by a multiplication, which
/// also makes subnormal numbers normal.
#[inline(always)]
pub(crate) fn half_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let rest = u32::from(half & 0x7fff) << 13;
    let finite = (f32::from_bits(rest) * f32::from_bits(0x7780_0000)).to_bits();
    let special = if half & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(sign | finite | special)
}

/// Compiles a body once per vector unit and calls the version for the CPU at hand.
///
/// `multiversion! { fn name(args) = body }` for plain bodies the compiler vectorises, and
/// `multiversion! { fn name(args) = body<Lanes> }` for bodies generic over [`Lanes`]; the latter also
/// gets `name_with(isa, args)`.
macro_rules! multiversion {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
                fn avx512($($arg: $ty),*) { $body($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) { $body($($arg),*) }
                match crate::isa::isa() {
                    // SAFETY: the unit was detected.
                    crate::isa::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: the unit was detected.
                    crate::isa::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            $body($($arg),*)
        }
    };
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident<Lanes>) => {
        $(#[$doc])*
        $vis fn $name(isa: crate::isa::Isa, $($arg: $ty),*) {
            assert!(isa == crate::isa::isa() || crate::isa::isas().contains(&isa), "this CPU has no {isa:?}");
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
                fn avx512($($arg: $ty),*) { $body::<crate::lanes_avx512::Avx512>($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) { $body::<crate::lanes_avx2::Avx2>($($arg),*) }
                match isa {
                    // SAFETY: the assertion above: the unit was detected.
                    crate::isa::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: the assertion above: the unit was detected.
                    crate::isa::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            #[cfg(target_arch = "aarch64")]
            match isa {
                crate::isa::Isa::NeonDot => return $body::<crate::lanes_neon::NeonDot>($($arg),*),
                crate::isa::Isa::Neon => return $body::<crate::lanes_neon::Neon>($($arg),*),
                _ => {}
            }
            $body::<crate::lanes::Portable>($($arg),*)
        }
    };
}
pub(crate) use multiversion;

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

    #[test]
    fn singles_round_to_the_nearest_brain() {
        for value in [0.0f32, -0.0, 1.0, 1.003_906_2, 1.011_718_8, -3.3e38, f32::INFINITY, 1e-40, 0.1] {
            assert_eq!(f32_to_brain(value), half::bf16::from_f32(value).to_bits(), "{value}");
        }
        assert!(brain_to_f32(f32_to_brain(f32::NAN)).is_nan());
    }
}
