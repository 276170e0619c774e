//! Turning matrices of sixteen rows and columns, so that a panel of weights can be read along its rows.

/// `to[j][i] = from[i][j]`.
///
/// # Safety
/// `from` is valid for reading 256 values, `to` for writing them.
#[inline(always)]
pub(crate) unsafe fn plain(from: *const f32, to: *mut f32) {
    for row in 0..16 {
        for column in 0..16 {
            // SAFETY: the caller vouches for the memory.
            unsafe { *to.add(row * 16 + column) = *from.add(column * 16 + row) };
        }
    }
}

/// Turns eight rows and columns of a matrix whose rows have sixteen values.
///
/// # Safety
/// Both are valid for eight times eight values at a distance of sixteen a row; the CPU has AVX.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn eight_with_avx(from: *const f32, to: *mut f32) {
    use std::arch::x86_64::{
        _mm_loadu_ps, _mm256_castps128_ps256, _mm256_insertf128_ps, _mm256_shuffle_ps, _mm256_storeu_ps,
        _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };
    for half in 0..2 {
        // SAFETY: the caller vouches for the memory and the unit.
        unsafe {
            // Four columns of rows i and i + 4.
            let pair = |row: usize| {
                let from = from.add(row * 16 + half * 4);
                _mm256_insertf128_ps::<1>(
                    _mm256_castps128_ps256(_mm_loadu_ps(from)),
                    _mm_loadu_ps(from.add(64)),
                )
            };
            let (a, b, c, d) = (pair(0), pair(1), pair(2), pair(3));
            let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (low2, high2) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            let to = to.add(half * 64);
            _mm256_storeu_ps(to, _mm256_shuffle_ps::<0x44>(low, low2));
            _mm256_storeu_ps(to.add(16), _mm256_shuffle_ps::<0xee>(low, low2));
            _mm256_storeu_ps(to.add(32), _mm256_shuffle_ps::<0x44>(high, high2));
            _mm256_storeu_ps(to.add(48), _mm256_shuffle_ps::<0xee>(high, high2));
        }
    }
}

/// As [`plain`].
///
/// # Safety
/// As for [`plain`]; the CPU has AVX.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn with_avx(from: *const f32, to: *mut f32) {
    for (row, column) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
        // SAFETY: the caller vouches for the memory and the unit.
        unsafe { eight_with_avx(from.add(row * 16 + column), to.add(column * 16 + row)) };
    }
}
