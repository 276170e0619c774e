//! Memory that begins at a cache line: a block that holds values of any precision, and parts of buffers that grow.

/// Bytes of a cache line: where a buffer begins, and what its length is a multiple of.
pub(crate) const LINE: usize = 64;

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

/// A fixed block of zeroed memory, read and written as float32, as bfloat16 or as bytes. What the operating system has not been
/// asked to fill takes no memory.
#[derive(Debug)]
pub struct PageBuffer {
    words: Box<[u32]>,
    /// Words before the first cache line.
    start: usize,
    /// Words from there on.
    len: usize,
}

impl PageBuffer {
    /// At least `bytes` bytes, rounded up to whole cache lines.
    #[must_use]
    pub fn zeroed(bytes: usize) -> Self {
        let len = bytes.div_ceil(LINE) * LINE / 4;
        let words = vec![0u32; len + LINE / 4].into_boxed_slice();
        let start = first_at_a_line(&words);
        Self { words, start, len }
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.len * 4
    }

    /// All of it as float32.
    #[must_use]
    pub fn f32(&self) -> &[f32] {
        let words = &self.words[self.start..self.start + self.len];
        // SAFETY: size and alignment of u32 and f32 are equal, and every bit pattern is a value of both.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
    }

    /// All of it as bfloat16.
    #[must_use]
    pub fn bf16(&self) -> &[u16] {
        let words = &self.words[self.start..self.start + self.len];
        // SAFETY: a u32 is two u16 of weaker alignment, and every bit pattern is a value.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len() * 2) }
    }

    /// All of it as signed bytes.
    #[must_use]
    pub fn i8(&self) -> &[i8] {
        let words = &self.words[self.start..self.start + self.len];
        // SAFETY: a u32 is four i8 of weaker alignment, and every bit pattern is a value.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len() * 4) }
    }

    /// As [`PageBuffer::i8`], to write.
    pub fn i8_mut(&mut self) -> &mut [i8] {
        let words = &mut self.words[self.start..self.start + self.len];
        // SAFETY: as for reading; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len() * 4) }
    }

    /// As [`PageBuffer::f32`], to write.
    pub fn f32_mut(&mut self) -> &mut [f32] {
        let words = &mut self.words[self.start..self.start + self.len];
        // SAFETY: as for reading; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) }
    }

    /// As [`PageBuffer::bf16`], to write.
    pub fn bf16_mut(&mut self) -> &mut [u16] {
        let words = &mut self.words[self.start..self.start + self.len];
        // SAFETY: as for reading; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len() * 2) }
    }
}

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
}
