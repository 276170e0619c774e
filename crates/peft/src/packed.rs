//! An adapter as it is served, in one piece of bytes: read again without scaling or rounding, and with the fewest bytes.
//!
//! All little endian: the length of the header in four bytes, the header in JSON, then the tensors, one after the other in
//! the order in which the header names them.

use kernels::Numbers;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use types::Site;

use crate::adapter::Adapter;
use crate::shape::BaseShape;
use crate::site::{AdapterSite, Factors, SiteVectors, Values};
use crate::storage::Storage;

/// Another number for every change of this form, or of what is computed of an adapter's files.
const VERSION: &str = "packed adapter 1";

/// What a packed adapter is good for: a base (a task adapter is part of its hash), numbers of one kind, and this version.
#[must_use]
pub fn packing(base_hash: &[u8; 32], storage: Storage) -> [u8; 32] {
    let kept = [match storage {
        Storage::F32 => 0,
        Storage::Bf16 => 1,
        Storage::Int8 => 2,
    }];
    Sha256::new().chain_update(VERSION).chain_update(kept).chain_update(base_hash).finalize().into()
}

#[derive(Serialize, Deserialize)]
struct Header {
    sites: Vec<PackedSite>,
    prompt: Vec<Tensor>,
}

/// A site's index, its rank, and what there is of its [`AdapterSite::parts`].
#[derive(Serialize, Deserialize)]
struct PackedSite(usize, usize, [Option<Tensor>; 6]);

/// Kind and number of values.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Tensor(Kind, usize);

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    #[serde(rename = "f")]
    F32,
    #[serde(rename = "b")]
    Bf16,
    #[serde(rename = "i")]
    I8,
}

impl Tensor {
    fn of(values: &Values) -> Self {
        match values.numbers() {
            Numbers::F32(values) => Self(Kind::F32, values.len()),
            Numbers::Bf16(values) => Self(Kind::Bf16, values.len()),
            Numbers::I8(codes) => Self(Kind::I8, codes.len()),
        }
    }
}

impl Adapter {
    /// The adapter in one piece of bytes, for [`Adapter::unpack`].
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        let site = |(at, site): (usize, &Option<AdapterSite>)| {
            let site = site.as_ref()?;
            let rank = site.low_rank.as_ref().map_or(0, |factors| factors.rank);
            Some(PackedSite(at, rank, site.parts().map(|values| values.map(Tensor::of))))
        };
        let header = Header {
            sites: self.sites().iter().enumerate().filter_map(site).collect(),
            prompt: self.prompt().iter().map(Tensor::of).collect(),
        };
        let header = serde_json::to_vec(&header).unwrap_or_default();
        let tensors: usize = self.values().map(Values::bytes).sum();
        let mut packed = Vec::with_capacity(4 + header.len() + tensors);
        packed.extend_from_slice(&(header.len() as u32).to_le_bytes());
        packed.extend_from_slice(&header);
        for values in self.values() {
            match values.numbers() {
                Numbers::F32(values) => packed.extend(values.iter().flat_map(|value| value.to_le_bytes())),
                Numbers::Bf16(values) => packed.extend(values.iter().flat_map(|value| value.to_le_bytes())),
                Numbers::I8(codes) => packed.extend(codes.iter().map(|code| code.cast_unsigned())),
            }
        }
        packed
    }

    /// What [`Adapter::pack`] has packed, for a base of this shape; `None` if it does not fit it, or is none at all. Calls
    /// `between` after every tensor.
    #[must_use]
    pub fn unpack(bytes: &[u8], shape: &BaseShape, between: &mut dyn FnMut()) -> Option<Self> {
        let (len, rest) = bytes.split_first_chunk::<4>()?;
        let (header, tensors) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        let header: Header = serde_json::from_slice(header).ok()?;
        let mut tensors = Tensors { rest: tensors, between };
        let mut sites: Vec<Option<AdapterSite>> = Vec::new();
        if !header.sites.is_empty() {
            sites.resize_with(shape.sites(), || None);
        }
        for PackedSite(at, rank, parts) in header.sites {
            let site = tensors.site(rank, parts)?;
            let (out, input) = shape.dims[at % Site::ALL.len()];
            *sites.get_mut(at)? = Some(site.fits(out, input).then_some(site)?);
        }
        let prompt: Option<Vec<Values>> =
            header.prompt.into_iter().map(|tensor| tensors.take(Some(tensor))?).collect();
        let prompt = prompt.filter(|all| all.iter().all(|values| values.numbers().len() == shape.width()))?;
        tensors.rest.is_empty().then(|| Self::of(sites, prompt))
    }
}

/// The tensors that are still to be read.
struct Tensors<'a> {
    rest: &'a [u8],
    between: &'a mut dyn FnMut(),
}

impl Tensors<'_> {
    /// The next one, if there is one here; `None` if it is cut off.
    fn take(&mut self, tensor: Option<Tensor>) -> Option<Option<Values>> {
        let Some(Tensor(kind, len)) = tensor else { return Some(None) };
        let size = match kind {
            Kind::F32 => 4,
            Kind::Bf16 => 2,
            Kind::I8 => 1,
        };
        let (bytes, rest) = self.rest.split_at_checked(len.checked_mul(size)?)?;
        self.rest = rest;
        let values = match kind {
            Kind::F32 => {
                Values::F32(bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect())
            }
            Kind::Bf16 => {
                Values::Bf16(bytes.as_chunks().0.iter().map(|two| u16::from_le_bytes(*two)).collect())
            }
            Kind::I8 => Values::I8(bytes.iter().map(|byte| byte.cast_signed()).collect()),
        };
        (self.between)();
        Some(Some(values))
    }

    fn site(&mut self, rank: usize, parts: [Option<Tensor>; 6]) -> Option<AdapterSite> {
        let [a, b, scales, input, output, bias] = parts;
        let (a, b, scales) = (self.take(a)?, self.take(b)?, self.take(scales)?);
        let vectors =
            SiteVectors { input: self.take(input)?, output: self.take(output)?, bias: self.take(bias)? };
        let low_rank = match (a, b, scales) {
            (None, None, None) => None,
            (Some(a), Some(b), scales) => Some(Factors { rank, a, b, scales }),
            _ => return None,
        };
        Some(AdapterSite { low_rank, vectors: vectors.boxed() })
    }
}

impl AdapterSite {
    /// Whether all of it fits a layer: the kernels rely on it.
    fn fits(&self, out: usize, input: usize) -> bool {
        let is_floats = |values: &Option<Values>, len| {
            values.as_ref().is_none_or(|values| values.floats().is_some_and(|values| values.len() == len))
        };
        let vectors = self.vectors.as_ref().is_none_or(|vectors| {
            is_floats(&vectors.input, input)
                && is_floats(&vectors.output, out)
                && is_floats(&vectors.bias, out)
        });
        vectors && self.update().is_none_or(|update| update.fits(out, input).is_ok())
    }
}
