//! How each format's packed panel is read in vectors of sixteen rows.

use crate::lanes::Lanes;
use crate::weight::{Panel, SUPER_LINES};

/// A panel whose columns can be had as float32.
pub(crate) trait Columns {
    /// Columns `4 * group..4 * group + 4`.
    ///
    /// # Safety
    /// The panel is of this format and has these columns; the CPU has the unit of `L`.
    unsafe fn four<L: Lanes>(panel: Panel, group: usize) -> [L; 4];

    /// One column; for formats without blocks, whose rows may have any length.
    ///
    /// # Safety
    /// As for [`Columns::four`].
    unsafe fn one<L: Lanes>(panel: Panel, column: usize) -> L;
}

/// A panel of small integer codes with scales per block of 32 columns: `value = scale * (code - OFFSET) + min`.
pub(crate) trait Codes {
    /// Codes reach beyond six bits.
    const WIDE: bool;
    /// Codes have four bits.
    const NARROW: bool;
    /// What is taken off every code.
    const OFFSET: i32;
    /// Blocks have minima.
    const MINS: bool;
    /// Scales are for 16 columns instead of 32.
    const HALVES: bool;
    /// Bytes of the codes of 32 columns, and about those of their header.
    const BLOCK_BYTES: usize;
    /// See [`Codes::BLOCK_BYTES`].
    const HEADER_BYTES: usize;

    /// The codes of columns `4 * group..4 * group + 4`.
    ///
    /// # Safety
    /// The panel is of this format and has these columns; the CPU has the unit of `L`.
    unsafe fn group<L: Lanes>(panel: Panel, group: usize) -> L::Bytes;

    /// The scales of columns `16 * half..16 * half + 16`.
    ///
    /// # Safety
    /// As for [`Codes::group`].
    unsafe fn scale<L: Lanes>(panel: Panel, half: usize) -> L;

    /// The minima of a block of 32 columns.
    ///
    /// # Safety
    /// As for [`Codes::group`].
    #[inline(always)]
    unsafe fn min<L: Lanes>(_: Panel, _: usize) -> L {
        L::zero()
    }
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct Bf16;
pub(crate) struct Q8_0;
pub(crate) struct Q4_0;
pub(crate) struct Q4_1;
pub(crate) struct Q4K;
pub(crate) struct Q6K;

macro_rules! dense {
    ($name:ident, $bytes:literal, |$at:ident| $load:expr) => {
        impl Columns for $name {
            #[inline(always)]
            unsafe fn four<L: Lanes>(panel: Panel, group: usize) -> [L; 4] {
                // SAFETY: the caller vouches for the columns.
                unsafe {
                    [
                        Self::one(panel, group * 4),
                        Self::one(panel, group * 4 + 1),
                        Self::one(panel, group * 4 + 2),
                        Self::one(panel, group * 4 + 3),
                    ]
                }
            }
            #[inline(always)]
            unsafe fn one<L: Lanes>(panel: Panel, column: usize) -> L {
                // SAFETY: the caller vouches for the column.
                unsafe {
                    let $at = panel.codes.add(column * $bytes);
                    $load
                }
            }
        }
    };
}

dense!(F32, 64, |at| L::load(at.cast()));
dense!(F16, 32, |at| L::load_half(at));
dense!(Bf16, 32, |at| L::load_brain(at));

/// Decodes codes to float32, for every format of codes.
macro_rules! columns_of_codes {
    ($($name:ident)*) => {$(
        impl Columns for $name {
            #[inline(always)]
            unsafe fn four<L: Lanes>(panel: Panel, group: usize) -> [L; 4] {
                // SAFETY: the caller vouches for the columns.
                unsafe {
                    let codes = Self::group::<L>(panel, group);
                    let scale: L = Self::scale(panel, group / 4);
                    let min = if Self::MINS {
                        Self::min(panel, group / 8)
                    } else {
                        scale.mul(L::splat(-Self::OFFSET as f32))
                    };
                    [
                        min.fma(L::byte(codes, 0), scale),
                        min.fma(L::byte(codes, 1), scale),
                        min.fma(L::byte(codes, 2), scale),
                        min.fma(L::byte(codes, 3), scale),
                    ]
                }
            }
            #[inline(always)]
            unsafe fn one<L: Lanes>(_: Panel, _: usize) -> L {
                unreachable!("rows of codes are whole blocks")
            }
        }
    )*};
}

columns_of_codes!(Q8_0 Q4_0 Q4_1 Q4K Q6K);

#[inline(always)]
unsafe fn nibbles<L: Lanes>(lines: *const u8, group: usize) -> L::Bytes {
    // SAFETY: the caller vouches for the line.
    let pair = unsafe { L::bytes(lines.add(group / 2 * 64)) };
    if group.is_multiple_of(2) { L::low(pair) } else { L::high(pair) }
}

impl Codes for Q8_0 {
    const WIDE: bool = true;
    const NARROW: bool = false;
    const OFFSET: i32 = 128;
    const MINS: bool = false;
    const HALVES: bool = false;
    const BLOCK_BYTES: usize = 512;
    const HEADER_BYTES: usize = 32;
    #[inline(always)]
    unsafe fn group<L: Lanes>(panel: Panel, group: usize) -> L::Bytes {
        // SAFETY: the caller vouches for the columns.
        unsafe { L::bytes(panel.codes.add(group * 64)) }
    }
    #[inline(always)]
    unsafe fn scale<L: Lanes>(panel: Panel, half: usize) -> L {
        // SAFETY: the caller vouches for the columns.
        unsafe { L::load_half(panel.header.add(half / 2 * 32)) }
    }
}

impl Codes for Q4_0 {
    const WIDE: bool = false;
    const NARROW: bool = true;
    const OFFSET: i32 = 8;
    const MINS: bool = false;
    const HALVES: bool = false;
    const BLOCK_BYTES: usize = 256;
    const HEADER_BYTES: usize = 32;
    #[inline(always)]
    unsafe fn group<L: Lanes>(panel: Panel, group: usize) -> L::Bytes {
        // SAFETY: the caller vouches for the columns.
        unsafe { nibbles::<L>(panel.codes, group) }
    }
    #[inline(always)]
    unsafe fn scale<L: Lanes>(panel: Panel, half: usize) -> L {
        // SAFETY: the caller vouches for the columns.
        unsafe { L::load_half(panel.header.add(half / 2 * 32)) }
    }
}

impl Codes for Q4_1 {
    const WIDE: bool = false;
    const NARROW: bool = true;
    const OFFSET: i32 = 0;
    const MINS: bool = true;
    const HALVES: bool = false;
    const BLOCK_BYTES: usize = 256;
    const HEADER_BYTES: usize = 64;
    #[inline(always)]
    unsafe fn group<L: Lanes>(panel: Panel, group: usize) -> L::Bytes {
        // SAFETY: the caller vouches for the columns.
        unsafe { nibbles::<L>(panel.codes, group) }
    }
    #[inline(always)]
    unsafe fn scale<L: Lanes>(panel: Panel, half: usize) -> L {
        // SAFETY: the caller vouches for the columns.
        unsafe { L::load_half(panel.header.add(half / 2 * 64)) }
    }
    #[inline(always)]
    unsafe fn min<L: Lanes>(panel: Panel, block: usize) -> L {
        // SAFETY: the caller vouches for the columns.
        unsafe { L::load_half(panel.header.add(block * 64 + 32)) }
    }
}

impl Codes for Q4K {
    const WIDE: bool = false;
    const NARROW: bool = true;
    const OFFSET: i32 = 0;
    const MINS: bool = true;
    const HALVES: bool = false;
    const BLOCK_BYTES: usize = 256;
    const HEADER_BYTES: usize = 40;
    #[inline(always)]
    unsafe fn group<L: Lanes>(panel: Panel, group: usize) -> L::Bytes {
        // SAFETY: the caller vouches for the columns.
        unsafe { nibbles::<L>(panel.codes, group) }
    }
    #[inline(always)]
    unsafe fn scale<L: Lanes>(panel: Panel, half: usize) -> L {
        // SAFETY: the caller vouches for the columns.
        unsafe {
            let header = panel.header.add(half / 16 * SUPER_LINES * 64);
            L::load_half(header).mul(L::load_u8(header.add(64 + half % 16 / 2 * 16)))
        }
    }
    #[inline(always)]
    unsafe fn min<L: Lanes>(panel: Panel, block: usize) -> L {
        // SAFETY: the caller vouches for the columns.
        unsafe {
            let header = panel.header.add(block / 8 * SUPER_LINES * 64);
            let min = L::load_half(header.add(32)).mul(L::load_u8(header.add(192 + block % 8 * 16)));
            min.mul(L::splat(-1.0))
        }
    }
}

impl Codes for Q6K {
    const WIDE: bool = false;
    const NARROW: bool = false;
    const OFFSET: i32 = 32;
    const MINS: bool = false;
    const HALVES: bool = true;
    const BLOCK_BYTES: usize = 384;
    const HEADER_BYTES: usize = 40;
    #[inline(always)]
    unsafe fn group<L: Lanes>(panel: Panel, group: usize) -> L::Bytes {
        // SAFETY: the caller vouches for the columns; a block has four lines of nibbles, then two of pairs.
        unsafe {
            let lines = panel.codes.add(group / 8 * 6 * 64);
            let pairs = L::bytes(lines.add((4 + group % 8 / 4) * 64));
            L::with_two_bits(nibbles::<L>(lines, group % 8), pairs, group % 4)
        }
    }
    #[inline(always)]
    unsafe fn scale<L: Lanes>(panel: Panel, half: usize) -> L {
        // SAFETY: the caller vouches for the columns.
        unsafe {
            let header = panel.header.add(half / 16 * SUPER_LINES * 64);
            L::load_half(header).mul(L::load_i8(header.add(64 + half % 16 * 16)))
        }
    }
}

/// Calls `$body` with `$layout` standing for the type of a format.
macro_rules! with_layout {
    ($format:expr, codes: |$codes:ident| $quantised:expr, dense: |$dense:ident| $plain:expr $(,)?) => {
        match $format {
            crate::format::Format::F32 => {
                type $dense = crate::layout::F32;
                $plain
            }
            crate::format::Format::F16 => {
                type $dense = crate::layout::F16;
                $plain
            }
            crate::format::Format::Bf16 => {
                type $dense = crate::layout::Bf16;
                $plain
            }
            crate::format::Format::Q8_0 => {
                type $codes = crate::layout::Q8_0;
                $quantised
            }
            crate::format::Format::Q4_0 => {
                type $codes = crate::layout::Q4_0;
                $quantised
            }
            crate::format::Format::Q4_1 => {
                type $codes = crate::layout::Q4_1;
                $quantised
            }
            crate::format::Format::Q4K => {
                type $codes = crate::layout::Q4K;
                $quantised
            }
            crate::format::Format::Q6K => {
                type $codes = crate::layout::Q6K;
                $quantised
            }
        }
    };
}
pub(crate) use with_layout;
