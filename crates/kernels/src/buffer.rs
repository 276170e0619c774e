//! Memory that begins at a cache line: a block that holds values of any precision, and parts of buffers that grow.

use std::sync::Arc;

use crate::memory::{LINE, Memory};

/// The place of the first value that begins a cache line.
#[must_use]
pub fn first_at_a_line<T>(values: &[T]) -> usize {
    // An allocation is aligned to its values, so the line begins within the first line's worth of them.
    values.as_ptr().align_offset(LINE).min(LINE / size_of::<T>()).min(values.len())
}

/// `len` values of a buffer that grows as needed, from a cache line on ([`first_at_a_line`]): what one thread writes shares
/// no line with another's, and a vector that is read lies in one.
pub fn at_a_line(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    let most = len + LINE / size_of::<f32>();
    if buffer.len() < most {
        buffer.resize(most, 0.0);
    }
    let start = first_at_a_line(buffer);
    &mut buffer[start..start + len]
}

/// A fixed block of memory that begins as zeros, read and written as float32, as bfloat16 or as bytes. What has not been used
/// takes no memory; a large one may lie in huge pages.
#[derive(Debug)]
pub struct PageBuffer {
    memory: Arc<Memory>,
    /// First byte in the memory, at a cache line.
    start: usize,
    /// Whole cache lines.
    bytes: usize,
}

impl PageBuffer {
    /// At least `bytes` bytes, rounded up to whole cache lines.
    ///
    /// # Panics
    /// When they exceed the address space.
    #[must_use]
    pub fn zeroed(bytes: usize) -> Self {
        Self::new(Memory::zeroed(bytes), bytes)
    }

    /// As [`Self::zeroed`]; none when the system has not as much.
    ///
    /// # Panics
    /// When they exceed the address space.
    #[must_use]
    pub fn try_zeroed(bytes: usize) -> Option<Self> {
        Memory::try_zeroed(bytes).ok().map(|memory| Self::new(memory, bytes))
    }

    fn new(memory: Memory, bytes: usize) -> Self {
        Self { memory: Arc::new(memory), start: 0, bytes: bytes.next_multiple_of(LINE) }
    }

    /// Pieces of so many bytes, which go their own ways. What is left over belongs to nobody.
    ///
    /// # Panics
    /// When a piece is not one or more whole cache lines.
    pub fn split(self, bytes: usize) -> impl Iterator<Item = Self> {
        assert!(bytes > 0 && bytes.is_multiple_of(LINE), "pieces of {bytes} bytes");
        (0..self.bytes / bytes).map(move |at| Self {
            memory: Arc::clone(&self.memory),
            start: self.start + at * bytes,
            bytes,
        })
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// All of it as float32.
    #[must_use]
    pub fn f32(&self) -> &[f32] {
        self.all()
    }

    /// All of it as bfloat16.
    #[must_use]
    pub fn bf16(&self) -> &[u16] {
        self.all()
    }

    /// All of it as signed bytes.
    #[must_use]
    pub fn i8(&self) -> &[i8] {
        self.all()
    }

    /// As [`PageBuffer::f32`], to write.
    pub fn f32_mut(&mut self) -> &mut [f32] {
        self.all_mut()
    }

    /// As [`PageBuffer::bf16`], to write.
    pub fn bf16_mut(&mut self) -> &mut [u16] {
        self.all_mut()
    }

    /// As [`PageBuffer::i8`], to write.
    pub fn i8_mut(&mut self) -> &mut [i8] {
        self.all_mut()
    }

    fn all<T: Plain>(&self) -> &[T] {
        let start = self.memory.start().wrapping_add(self.start);
        // SAFETY: the bytes are this piece's own and lie in the memory, which began as zeros; a line is enough of an
        // alignment, and every bit pattern is a value.
        unsafe { std::slice::from_raw_parts(start.cast(), self.bytes / size_of::<T>()) }
    }

    fn all_mut<T: Plain>(&mut self) -> &mut [T] {
        let start = self.memory.start().wrapping_add(self.start);
        // SAFETY: as for reading; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(start.cast(), self.bytes / size_of::<T>()) }
    }
}

/// A number of which every bit pattern is a value, and whose size divides a cache line.
trait Plain {}
impl Plain for f32 {}
impl Plain for u16 {}
impl Plain for i8 {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_views_are_the_same_memory_at_a_cache_line() {
        for bytes in [1, 64, 1000, 1 << 18] {
            let mut page = PageBuffer::zeroed(bytes);
            assert_eq!(page.bytes(), bytes.div_ceil(64) * 64);
            assert_eq!(page.f32().as_ptr().addr() % 64, 0);
            assert_eq!((page.f32().len(), page.bf16().len()), (page.bytes() / 4, page.bytes() / 2));
            assert!(page.f32().iter().all(|value| value.to_bits() == 0));
            let last = page.f32().len() - 1;
            page.f32_mut()[last] = 1.0;
            // Little-endian: the upper half of a float32 is its bfloat16.
            assert_eq!(page.bf16()[2 * last..], [0, 0x3f80]);
            page.bf16_mut()[2 * last + 1] = 0x4000;
            assert_eq!(page.f32()[last], 2.0);
            page.i8_mut()[4 * last + 3] = 0x3f;
            assert_eq!((page.f32()[last], page.i8().len()), (0.5, page.bytes()));
        }
    }

    #[test]
    fn pieces_share_no_byte_and_keep_their_memory() {
        let pieces: Vec<PageBuffer> = PageBuffer::zeroed(10 * 192 + 64).split(192).collect();
        assert_eq!(pieces.len(), 10);
        let mut pieces: Vec<PageBuffer> = pieces.into_iter().step_by(2).collect();
        for (at, piece) in pieces.iter_mut().enumerate() {
            assert!(piece.bytes() == 192 && piece.i8().iter().all(|&byte| byte == 0));
            piece.i8_mut().fill(at as i8 + 1);
        }
        for (at, piece) in pieces.iter().enumerate() {
            assert!(piece.i8().iter().all(|&byte| byte == at as i8 + 1));
        }
    }
}
