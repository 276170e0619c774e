//! What an adapter does at one site, in the form it is served in.

use kernels::{LowRank, Numbers};
use types::SiteId;

use crate::error::PeftError;
use crate::pages::{self, Span};
use crate::storage::Storage;

/// What an adapter does at one site, ready to serve: `y = output * (W (input * x)) + base's bias + bias + B (A x)`.
///
/// What is rare lies elsewhere.
#[derive(Debug, Default)]
pub(crate) struct AdapterSite {
    pub(crate) low_rank: Option<Factors>,
    pub(crate) vectors: Option<Box<SiteVectors>>,
}

/// Float32 whatever the factors are kept in: they are few, and the product is multiplied by them.
#[derive(Debug, Default)]
pub(crate) struct SiteVectors {
    pub(crate) input: Option<Values>,
    pub(crate) output: Option<Values>,
    pub(crate) bias: Option<Values>,
}

/// What an adapter does at any layer's site of one name.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Effects {
    /// The largest rank.
    pub(crate) rank: usize,
    /// Whether factors are in eight bits.
    pub(crate) coded: bool,
    /// Whether there are vectors.
    pub(crate) vectors: bool,
}

impl Effects {
    pub(crate) fn join(&mut self, other: Self) {
        self.rank = self.rank.max(other.rank);
        self.coded |= other.coded;
        self.vectors |= other.vectors;
    }
}

/// A as (rank, input features), B with everything that scales it folded in, in the kernels' panels.
#[derive(Debug)]
pub(crate) struct Factors {
    pub(crate) rank: usize,
    pub(crate) a: Values,
    pub(crate) b: Values,
    /// One for each rank, of factors in eight bits.
    pub(crate) scales: Option<Values>,
}

/// The bits of a bfloat16 that are all set in what is not finite.
const BF16_EXPONENT: u16 = 0x7f80;

pub(crate) const NOT_FINITE: &str = "holds a value that is not finite as it is served, scaled and rounded";

/// A tensor in the precision it is kept in.
#[derive(Debug, Clone)]
pub(crate) enum Values {
    F32(Box<[f32]>),
    Bf16(Box<[u16]>),
    I8(Box<[i8]>),
    /// In pages of a pool.
    Paged(Span),
}

impl Values {
    pub(crate) fn new(values: &[f32], scale: f32, storage: Storage) -> Self {
        let scaled = values.iter().map(|value| value * scale);
        match storage {
            Storage::F32 => Self::F32(scaled.collect()),
            Storage::Bf16 | Storage::Int8 => Self::Bf16(scaled.map(kernels::to_bf16).collect()),
        }
    }

    pub(crate) fn vector(values: &[f32]) -> Self {
        Self::F32(values.into())
    }

    pub(crate) fn numbers(&self) -> Numbers<'_> {
        match self {
            Self::F32(values) => Numbers::F32(values),
            Self::Bf16(values) => Numbers::Bf16(values),
            Self::I8(codes) => Numbers::I8(codes),
            Self::Paged(span) => span.numbers(),
        }
    }

    /// The values of a [`Values::vector`].
    pub(crate) fn floats(&self) -> Option<&[f32]> {
        match self.numbers() {
            Numbers::F32(values) => Some(values),
            Numbers::Bf16(_) | Numbers::I8(_) => None,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        pages::bytes(&self.numbers())
    }

    pub(crate) fn is_finite(&self) -> bool {
        // To the end in any case: without a way out in its middle the loop takes many values at a time.
        match self.numbers() {
            Numbers::F32(values) => values.iter().fold(true, |finite, value| finite & value.is_finite()),
            Numbers::Bf16(values) => {
                values.iter().fold(true, |finite, value| finite & (value & BF16_EXPONENT != BF16_EXPONENT))
            }
            Numbers::I8(_) => true,
        }
    }
}

impl AdapterSite {
    pub(crate) fn values(&self) -> impl Iterator<Item = &Values> {
        self.parts().into_iter().flatten()
    }

    /// A, B, their scales, and the vectors for input, output and bias: all that there can be, in a fixed order.
    pub(crate) fn parts(&self) -> [Option<&Values>; 6] {
        let (factors, vectors) = (self.low_rank.as_ref(), self.vectors.as_deref());
        [
            factors.map(|factors| &factors.a),
            factors.map(|factors| &factors.b),
            factors.and_then(|factors| factors.scales.as_ref()),
            vectors.and_then(|vectors| vectors.input.as_ref()),
            vectors.and_then(|vectors| vectors.output.as_ref()),
            vectors.and_then(|vectors| vectors.bias.as_ref()),
        ]
    }

    /// What is done here, in short.
    pub(crate) fn effects(&self) -> Effects {
        let factors = self.low_rank.as_ref();
        Effects {
            rank: factors.map_or(0, |factors| factors.rank),
            coded: factors.is_some_and(|factors| factors.scales.is_some()),
            vectors: self.vectors.is_some(),
        }
    }

    /// The low-rank update, if there is one.
    pub(crate) fn update(&self) -> Option<LowRank<'_>> {
        let factors = self.low_rank.as_ref()?;
        let scales = factors.scales.as_ref().and_then(Values::floats).unwrap_or_default();
        Some(LowRank { rank: factors.rank, a: factors.a.numbers(), b: factors.b.numbers(), scales })
    }

    /// Refuses what scaling or rounding has made infinite: the file's own values are finite.
    pub(crate) fn finite(self, id: SiteId) -> Result<Self, PeftError> {
        if self.values().all(Values::is_finite) {
            return Ok(self);
        }
        Err(PeftError::tensor(id.module_path(), NOT_FINITE))
    }

    /// The same with other values for each, in the order of [`AdapterSite::values`].
    pub(crate) fn map(&self, mut other: impl FnMut(&Values) -> Values) -> Self {
        let factors = self.low_rank.as_ref();
        Self {
            low_rank: factors.map(|Factors { rank, a, b, scales }| Factors {
                rank: *rank,
                a: other(a),
                b: other(b),
                scales: scales.as_ref().map(&mut other),
            }),
            vectors: self.vectors.as_ref().map(|vectors| Box::new(vectors.map(other))),
        }
    }
}

impl SiteVectors {
    fn map(&self, mut other: impl FnMut(&Values) -> Values) -> Self {
        let [input, output, bias] =
            [&self.input, &self.output, &self.bias].map(|values| values.as_ref().map(&mut other));
        Self { input, output, bias }
    }

    /// They, for a site that has any.
    pub(crate) fn boxed(self) -> Option<Box<Self>> {
        let any = self.input.is_some() || self.output.is_some() || self.bias.is_some();
        any.then(|| Box::new(self))
    }
}
