//! Sixteen float32 lanes on whatever vector unit the CPU has, chosen at run time.
//!
//! All implementations that have a fused multiply-add give bit-equal results: sixteen partial sums,
//! reduced in one fixed tree.

use std::sync::OnceLock;

/// A vector unit the kernels have code for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 F, BW, DQ, VL with FMA and F16C.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Whatever the compiler's baseline is (on aarch64: NEON).
    Portable,
}

/// The unit that is used: the best one the CPU has.
#[must_use]
pub fn isa() -> Isa {
    static FOUND: OnceLock<Isa> = OnceLock::new();
    *FOUND.get_or_init(|| isas()[0])
}

/// All units this CPU can run, best first.
#[must_use]
pub fn isas() -> Vec<Isa> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if avx512 {
            found.push(Isa::Avx512);
        }
        if avx2 {
            found.push(Isa::Avx2);
        }
    }
    found.push(Isa::Portable);
    found
}

/// Sixteen float32 values in registers.
pub(crate) trait Lanes: Copy {
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
    /// The same value in every lane.
    fn splat(value: f32) -> Self;
    /// Sixteen unsigned bytes.
    fn from_u8(bytes: [u8; 16]) -> Self;
    /// Sixteen signed bytes.
    fn from_i8(bytes: [u8; 16]) -> Self;
    /// `self + a * b`, lane by lane.
    fn fma(self, a: Self, b: Self) -> Self;
    /// The sixteen lanes as an array.
    fn to_array(self) -> [f32; 16];
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
}

/// Sixteen lanes as plain code.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 16]);

impl Lanes for Portable {
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
    fn splat(value: f32) -> Self {
        Self([value; 16])
    }
    #[inline(always)]
    fn from_u8(bytes: [u8; 16]) -> Self {
        Self(bytes.map(f32::from))
    }
    #[inline(always)]
    fn from_i8(bytes: [u8; 16]) -> Self {
        Self(bytes.map(|byte| f32::from(byte as i8)))
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
    fn to_array(self) -> [f32; 16] {
        self.0
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    //! The x86 units. Values of these types exist only in code reached after detection.
    use std::arch::x86_64::{
        __m256, __m512, _mm_loadl_epi64, _mm_loadu_si128, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps,
        _mm256_cvtepu8_epi32, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_storeu_ps, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::Lanes;

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    impl Lanes for Avx512 {
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
        fn splat(value: f32) -> Self {
            // SAFETY: as for `zero`.
            Self(unsafe { _mm512_set1_ps(value) })
        }
        #[inline(always)]
        fn from_u8(bytes: [u8; 16]) -> Self {
            // SAFETY: as for `zero`; the load reads the array's sixteen bytes.
            Self(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()))) })
        }
        #[inline(always)]
        fn from_i8(bytes: [u8; 16]) -> Self {
            // SAFETY: as for `from_u8`.
            Self(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()))) })
        }
        #[inline(always)]
        fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: as for `zero`.
            Self(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
        }
        #[inline(always)]
        fn to_array(self) -> [f32; 16] {
            let mut out = [0.0; 16];
            // SAFETY: as for `zero`; the array has sixteen values.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), self.0) };
            out
        }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2([__m256; 2]);

    impl Lanes for Avx2 {
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
        fn splat(value: f32) -> Self {
            // SAFETY: as for `zero`.
            Self(unsafe { [_mm256_set1_ps(value); 2] })
        }
        #[inline(always)]
        fn from_u8(bytes: [u8; 16]) -> Self {
            // SAFETY: as for `zero`; the loads read the array's sixteen bytes.
            Self(unsafe {
                [
                    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes.as_ptr().cast()))),
                    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes[8..].as_ptr().cast()))),
                ]
            })
        }
        #[inline(always)]
        fn from_i8(bytes: [u8; 16]) -> Self {
            // SAFETY: as for `from_u8`.
            Self(unsafe {
                [
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes.as_ptr().cast()))),
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes[8..].as_ptr().cast()))),
                ]
            })
        }
        #[inline(always)]
        fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: as for `zero`.
            Self(unsafe {
                [_mm256_fmadd_ps(a.0[0], b.0[0], self.0[0]), _mm256_fmadd_ps(a.0[1], b.0[1], self.0[1])]
            })
        }
        #[inline(always)]
        fn to_array(self) -> [f32; 16] {
            let mut out = [0.0; 16];
            // SAFETY: as for `zero`; the array has sixteen values.
            unsafe { self.store(out.as_mut_ptr()) };
            out
        }
    }
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
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512($($arg: $ty),*) { $body($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) { $body($($arg),*) }
                match crate::lanes::isa() {
                    // SAFETY: the unit was detected.
                    crate::lanes::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: the unit was detected.
                    crate::lanes::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    crate::lanes::Isa::Portable => {}
                }
            }
            $body($($arg),*)
        }
    };
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident<Lanes>) => {
        $(#[$doc])*
        $vis fn $name(isa: crate::lanes::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512($($arg: $ty),*) { $body::<crate::lanes::x86::Avx512>($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) { $body::<crate::lanes::x86::Avx2>($($arg),*) }
                assert!(isa == crate::lanes::isa() || crate::lanes::isas().contains(&isa), "this CPU has no {isa:?}");
                match isa {
                    // SAFETY: the assertion above: the unit was detected.
                    crate::lanes::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: the assertion above: the unit was detected.
                    crate::lanes::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    crate::lanes::Isa::Portable => {}
                }
            }
            let _ = isa;
            $body::<crate::lanes::Portable>($($arg),*)
        }
    };
}
pub(crate) use multiversion;
