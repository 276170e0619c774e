//! The pool of fixed pages that adapters in use lie in.
//!
//! All memory is there from the start. An adapter takes as many pages as its true ranks need, its tensors placed first
//! fit, none across two pages; any free pages do, so a pool never fragments. A page belongs to one adapter until the
//! last handle on its tensors is gone, and comes back by being dropped: to hand it out earlier cannot be written down.
//! (The idea is S-LoRA's unified paging, Sheng et al. 2023.)

use std::sync::{Arc, Mutex, PoisonError};

use kernels::{Numbers, PageBuffer};

use crate::shape::BaseShape;
use crate::storage::Storage;

/// Smallest page that [`PagePool::page_bytes_for`] proposes.
const LEAST_PAGE: usize = 256 << 10;
/// No more of a page is used, so that places in it are short.
const MOST_OF_A_PAGE: usize = u32::MAX as usize;
/// Tensors begin at a cache line.
const LINE: usize = 64;

/// A pool of pages. Clones share it.
#[derive(Debug, Clone)]
pub struct PagePool(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    page_bytes: usize,
    pages: usize,
    free: Mutex<Vec<PageBuffer>>,
}

impl PagePool {
    /// As many pages of `page_bytes` as fit `budget` bytes, all of them free.
    #[must_use]
    pub fn new(page_bytes: usize, budget: usize) -> Self {
        let page_bytes = page_bytes.max(LINE).next_multiple_of(LINE);
        let pages = budget / page_bytes;
        let free = PageBuffer::zeroed(pages * page_bytes).split(page_bytes).collect();
        Self(Arc::new(Pool { page_bytes, pages, free: Mutex::new(free) }))
    }

    /// The page size for a base: a power of two, at least 256 KiB, that holds the largest tensor an adapter of
    /// this rank can have there.
    #[must_use]
    pub fn page_bytes_for(shape: &BaseShape, storage: Storage, max_rank: usize) -> usize {
        // B comes in panels of sixteen rows.
        let largest = shape.dims.iter().map(|&(out, input)| out.next_multiple_of(16).max(input)).max();
        let tensor = largest.unwrap_or(0) * max_rank * storage.value_bytes();
        tensor.next_power_of_two().max(LEAST_PAGE)
    }

    /// Bytes of a page.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.0.page_bytes
    }

    /// Pages in all.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.0.pages
    }

    /// Pages that nobody has.
    #[must_use]
    pub fn free(&self) -> usize {
        self.0.free.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Copies tensors into pages of their own; `None` if there are too few free ones, or if a tensor is larger than a
    /// page. Calls `between` after every page that is wiped and every tensor that is copied.
    ///
    /// Nothing of a page's last owner is left: what is not written is wiped.
    pub(crate) fn store(&self, tensors: &[Numbers<'_>], between: &mut dyn FnMut()) -> Option<Vec<Span>> {
        let plan = Plan::new(self.0.page_bytes, tensors.iter().map(bytes))?;
        let mut pages = self.take(plan.pages())?;
        for (page, filled) in pages.iter_mut().zip(&plan.filled) {
            page.buffer.i8_mut()[*filled..].fill(0);
            between();
        }
        for (tensor, &(page, start)) in tensors.iter().zip(&plan.places) {
            between();
            let page = &mut pages[page].buffer;
            let end = start + bytes(tensor);
            page.i8_mut()[end..end.next_multiple_of(LINE)].fill(0);
            match tensor {
                Numbers::F32(values) => {
                    page.f32_mut()[start / 4..start / 4 + values.len()].copy_from_slice(values);
                }
                Numbers::Bf16(values) => {
                    page.bf16_mut()[start / 2..start / 2 + values.len()].copy_from_slice(values);
                }
                Numbers::I8(codes) => page.i8_mut()[start..start + codes.len()].copy_from_slice(codes),
            }
        }
        let pages: Vec<Arc<Page>> = pages.into_iter().map(Arc::new).collect();
        let span = |(tensor, &(page, start)): (&Numbers<'_>, &(usize, usize))| Span {
            page: Arc::clone(&pages[page]),
            start: (start / LINE) as u32,
            len: tensor.len() as u32,
            view: match tensor {
                Numbers::F32(_) => View::F32,
                Numbers::Bf16(_) => View::Bf16,
                Numbers::I8(_) => View::I8,
            },
        };
        Some(tensors.iter().zip(&plan.places).map(span).collect())
    }

    fn take(&self, count: usize) -> Option<Vec<Page>> {
        let taken = {
            let mut free = self.0.free.lock().unwrap_or_else(PoisonError::into_inner);
            let rest = free.len().checked_sub(count)?;
            free.split_off(rest)
        };
        Some(taken.into_iter().map(|buffer| Page { buffer, pool: Arc::clone(&self.0) }).collect())
    }
}

/// Bytes of a tensor.
pub(crate) fn bytes(tensor: &Numbers<'_>) -> usize {
    match *tensor {
        Numbers::F32(values) => size_of_val(values),
        Numbers::Bf16(values) => size_of_val(values),
        Numbers::I8(codes) => size_of_val(codes),
    }
}

/// Where tensors go: first fit over the adapter's own pages.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Bytes in use of each page, from its start.
    filled: Vec<usize>,
    /// Page and first byte of each tensor.
    places: Vec<(usize, usize)>,
}

impl Plan {
    /// A plan for tensors of these lengths in bytes; `None` if one is larger than a page.
    pub(crate) fn new(page_bytes: usize, tensors: impl Iterator<Item = usize>) -> Option<Self> {
        // An adapter without a tensor takes a page all the same, so that the pool bounds the number of adapters.
        let mut plan = Self { filled: vec![0], places: Vec::new() };
        let page_bytes = page_bytes.min(MOST_OF_A_PAGE);
        for bytes in tensors {
            let bytes = bytes.next_multiple_of(LINE);
            if bytes > page_bytes {
                return None;
            }
            let fits = plan.filled.iter().position(|filled| filled + bytes <= page_bytes);
            let page = fits.unwrap_or(plan.filled.len());
            if page == plan.filled.len() {
                plan.filled.push(0);
            }
            plan.places.push((page, plan.filled[page]));
            plan.filled[page] += bytes;
        }
        Some(plan)
    }

    /// Pages it takes.
    pub(crate) fn pages(&self) -> usize {
        self.filled.len()
    }
}

/// A page in use. Dropped, it is free.
#[derive(Debug)]
struct Page {
    buffer: PageBuffer,
    pool: Arc<Pool>,
}

impl Drop for Page {
    fn drop(&mut self) {
        let buffer = std::mem::replace(&mut self.buffer, PageBuffer::zeroed(0));
        self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}

/// A tensor in a page, which it keeps.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    page: Arc<Page>,
    /// In cache lines.
    start: u32,
    /// In values.
    len: u32,
    view: View,
}

/// As what a page is read.
#[derive(Debug, Clone, Copy)]
enum View {
    F32,
    Bf16,
    I8,
}

impl Span {
    /// The values.
    pub(crate) fn numbers(&self) -> Numbers<'_> {
        let (buffer, start, len) = (&self.page.buffer, self.start as usize * LINE, self.len as usize);
        match self.view {
            View::F32 => Numbers::F32(&buffer.f32()[start / 4..start / 4 + len]),
            View::Bf16 => Numbers::Bf16(&buffer.bf16()[start / 2..start / 2 + len]),
            View::I8 => Numbers::I8(&buffer.i8()[start..start + len]),
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn values(span: &Span) -> Vec<u16> {
        match span.numbers() {
            Numbers::Bf16(values) => values.to_vec(),
            Numbers::F32(_) | Numbers::I8(_) => panic!("another view"),
        }
    }

    fn store(pool: &PagePool, tensors: &[Numbers<'_>]) -> Option<Vec<Span>> {
        pool.store(tensors, &mut || ())
    }

    #[test]
    fn tensors_are_placed_first_fit_and_never_across_pages() {
        let plan = Plan::new(1024, [600, 600, 400, 64, 300, 1].into_iter()).unwrap();
        assert_eq!(plan.places, [(0, 0), (1, 0), (2, 0), (0, 640), (0, 704), (1, 640)]);
        assert_eq!(plan.pages(), 3);
        assert_eq!(Plan::new(1024, [].into_iter()).unwrap().pages(), 1);
        assert!(Plan::new(1024, [1, 1025].into_iter()).is_none());
    }

    #[test]
    fn a_page_fits_the_largest_tensor() {
        let shape = BaseShape {
            layers: 1,
            dims: [(16, 16), (16, 16), (16, 16), (16, 16), (16, 16), (16, 16), (16, 16)],
        };
        assert_eq!(PagePool::page_bytes_for(&shape, Storage::Bf16, 64), 256 << 10);
        let wide = BaseShape { layers: 1, dims: [(4097, 16); 7] };
        // 4112 rows in panels, 64 ranks.
        assert_eq!(PagePool::page_bytes_for(&wide, Storage::Bf16, 64), 1 << 20);
        assert_eq!(PagePool::page_bytes_for(&wide, Storage::F32, 64), 2 << 20);
        assert_eq!(PagePool::page_bytes_for(&wide, Storage::F32, 128), 4 << 20);
        assert_eq!(PagePool::page_bytes_for(&wide, Storage::Bf16, 512), 8 << 20);
    }

    #[test]
    fn pages_belong_to_one_adapter_until_its_last_tensor_is_gone() {
        let pool = PagePool::new(1024, 4 * 1024 + 1023);
        assert_eq!((pool.pages(), pool.free()), (4, 4));
        let full = vec![7u16; 512];
        let mut first = store(&pool, &[Numbers::Bf16(&full), Numbers::Bf16(&full)]).unwrap();
        let kept = first.remove(1);
        assert_eq!(pool.free(), 2);
        assert!(store(&pool, &[Numbers::Bf16(&full); 3]).is_none(), "two are left");
        assert_eq!(pool.free(), 2, "a refusal takes nothing");
        drop(first);
        assert_eq!(pool.free(), 3);
        let other = vec![9u16; 512];
        let second = store(&pool, &[Numbers::Bf16(&other); 3]).unwrap();
        assert_eq!(pool.free(), 0);
        assert_eq!(values(&kept), full, "in company of pages that were used again");
        assert!(second.iter().all(|span| values(span) == other));
        drop((second, kept));
        assert_eq!(pool.free(), 4);
    }

    #[test]
    fn free_pages_in_any_order_do() {
        let pool = PagePool::new(1024, 8 * 1024);
        let full = vec![1u16; 512];
        let mut all: Vec<_> = (0..8).map(|_| store(&pool, &[Numbers::Bf16(&full)]).unwrap()).collect();
        // Every second one: no two free pages are neighbours.
        for at in (0..4).rev() {
            drop(all.swap_remove(at * 2));
        }
        assert!(store(&pool, &[Numbers::Bf16(&full); 4]).is_some());
    }

    #[test]
    fn a_page_used_again_holds_nothing_of_the_last_owner() {
        let pool = PagePool::new(1024, 1024);
        drop(store(&pool, &[Numbers::F32(&[f32::NAN; 256])]).unwrap());
        let small = store(&pool, &[Numbers::F32(&[1.0]), Numbers::F32(&[2.0; 17])]).unwrap();
        let page = small[0].page.buffer.f32();
        let line = LINE / 4;
        assert_eq!((page[0], &page[line..line + 17]), (1.0, &[2.0; 17][..]));
        for left in [&page[1..line], &page[line + 17..]] {
            assert!(left.iter().all(|value| value.to_bits() == 0), "left-overs");
        }
    }
}
