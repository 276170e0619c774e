//! Products of pairs of bfloat16 numbers by AVX-512 BF16. Values of these types exist only in code reached after
//! detection.

use std::arch::x86_64::*;

use crate::isa::{Isa, isa};
use crate::lanes_avx512::Avx512;
use crate::many_rows_bf16::{Pairs, Part, backwards_body, forwards_body, round_body};

/// Whether the CPU has it.
pub(crate) fn detected() -> bool {
    isa() == Isa::Avx512 && is_x86_feature_detected!("avx512bf16")
}

struct Native;

impl Pairs<Avx512> for Native {
    type Two = __m512bh;
    #[inline(always)]
    unsafe fn put(even: Avx512, odd: Avx512, to: *mut u16) {
        // SAFETY: only reached inside functions compiled for, and called after detection of, the unit; the caller
        // vouches for the memory.
        unsafe {
            // Lane by lane: the even number, then the odd one, sixteen places further.
            let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
            let numbers: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd.0, even.0));
            _mm512_storeu_si512(to.cast(), _mm512_permutexvar_epi16(order, numbers));
        }
    }
    #[inline(always)]
    unsafe fn two(from: *const u16) -> __m512bh {
        // SAFETY: as for `put`.
        unsafe { std::mem::transmute(_mm512_loadu_si512(from.cast())) }
    }
    #[inline(always)]
    unsafe fn add(sum: Avx512, weights: __m512bh, x: *const u16) -> Avx512 {
        // SAFETY: as for `put`.
        unsafe {
            let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(x.cast::<i32>().read_unaligned()));
            Avx512(_mm512_dpbf16_ps(sum.0, weights, x))
        }
    }
    #[inline(always)]
    unsafe fn round(numbers: Avx512, to: *mut u16) {
        // SAFETY: as for `put`.
        unsafe {
            let numbers: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(numbers.0));
            _mm256_storeu_si256(to.cast(), numbers);
        }
    }
}

const ORDER: [u16; 32] = {
    let mut order = [0; 32];
    let mut lane = 0;
    while lane < 16 {
        order[2 * lane] = lane as u16;
        order[2 * lane + 1] = lane as u16 + 16;
        lane += 1;
    }
    order
};

macro_rules! native {
    ($name:ident($($arg:ident: $ty:ty),*) = $body:ident) => {
        /// Called after [`detected`].
        pub(crate) fn $name($($arg: $ty),*) {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
            fn native($($arg: $ty),*) {
                $body::<Avx512, Native>($($arg),*);
            }
            assert!(detected(), "this CPU has no AVX-512 BF16");
            // SAFETY: asserted.
            unsafe { native($($arg),*) }
        }
    };
}

native! { round(from: &[f32], to: &mut [u16], cols: usize) = round_body }
native! { forwards(part: Part<'_>) = forwards_body }
native! { backwards(part: Part<'_>) = backwards_body }
