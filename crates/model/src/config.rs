//! The decoder's dimensions and variations, checked against each other.

use kernels::{Span, SpanAttention};
use peft::BaseShape;

use crate::error::ModelError;

/// How rotary frequencies are stretched beyond the trained context.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Positions divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a smooth band between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Where the band begins, in wavelengths per original context.
        low_freq_factor: f64,
        /// Where the band ends.
        high_freq_factor: f64,
        /// The context the model was trained on.
        original_context: f64,
    },
    /// Each frequency divided by its own factor, as GGUF files store them.
    Factors(Vec<f32>),
}

/// Everything that tells one decoder of the family from another.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Width of the feed-forward part.
    pub feed_forward: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Added to the mean square in RMS norms.
    pub norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their scaling.
    pub rope_scaling: RopeScaling,
    /// How many positions back each layer sees, itself included; `None` sees all.
    pub windows: Vec<Option<usize>>,
}

/// Memory for rotary angles at most: two million positions of heads of 128.
const MAX_ANGLE_BYTES: usize = 1 << 30;

/// Bounds that no real model exceeds and that keep every product of two dimensions within 64 bits.
const MAX_DIMENSION: usize = 1 << 20;
const MAX_LAYERS: usize = 1024;

impl ModelConfig {
    /// Checks every dimension.
    ///
    /// # Errors
    /// Names the first field that does not fit.
    pub fn check(&self) -> Result<(), ModelError> {
        for (field, value, max) in [
            ("hidden size", self.hidden, MAX_DIMENSION),
            ("number of layers", self.layers, MAX_LAYERS),
            ("number of heads", self.heads, MAX_DIMENSION),
            ("number of key/value heads", self.kv_heads, MAX_DIMENSION),
            ("head dimension", self.head_dim, MAX_DIMENSION),
            ("feed-forward size", self.feed_forward, MAX_DIMENSION),
            ("vocabulary size", self.vocab, 1 << 24),
            ("context length", self.context, 1 << 24),
        ] {
            if value == 0 || value > max {
                return Err(ModelError::config(field, format!("is {value}, must be from 1 to {max}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let problem = format!("is {}, which does not divide {} heads", self.kv_heads, self.heads);
            return Err(ModelError::config("number of key/value heads", problem));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::config("head dimension", "is odd"));
        }
        let angle_bytes = self.context * self.head_dim * size_of::<f32>();
        if angle_bytes > MAX_ANGLE_BYTES {
            let problem = format!(
                "is {}, whose rotary angles take {} MiB, more than {}; set a smaller longest context",
                self.context,
                angle_bytes >> 20,
                MAX_ANGLE_BYTES >> 20
            );
            return Err(ModelError::config("context length", problem));
        }
        for (field, value) in [("norm eps", f64::from(self.norm_eps)), ("rope theta", self.rope_theta)] {
            if !value.is_finite() || value <= 0.0 {
                return Err(ModelError::config(field, "must be a positive number"));
            }
        }
        if self.windows.len() != self.layers || self.windows.contains(&Some(0)) {
            return Err(ModelError::config("sliding window", "does not fit the layers"));
        }
        Ok(())
    }

    /// What is said of a token that is neither in the vocabulary nor the adapter's own.
    pub(crate) fn unknown_token(&self, token: u32) -> ModelError {
        ModelError::Batch(format!("token id {token} is beyond the vocabulary of {}", self.vocab))
    }

    /// The shapes adapters are checked against.
    #[must_use]
    pub fn shape(&self) -> BaseShape {
        let (query, key) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        BaseShape {
            layers: self.layers,
            dims: [
                (query, self.hidden),
                (key, self.hidden),
                (key, self.hidden),
                (self.hidden, query),
                (self.feed_forward, self.hidden),
                (self.feed_forward, self.hidden),
                (self.hidden, self.feed_forward),
            ],
        }
    }

    /// The attention of a layer over packed sequences.
    #[must_use]
    pub fn span_attention(&self, layer: usize, spans: &[Span]) -> SpanAttention {
        SpanAttention {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            window: self.windows.get(layer).copied().flatten(),
            groups: spans.iter().map(|&span| span.into()).collect(),
        }
    }

    /// One inverse frequency per pair of a head's values, scaling applied.
    ///
    /// # Errors
    /// When the scaling does not fit the head dimension.
    pub fn inverse_frequencies(&self) -> Result<Vec<f32>, ModelError> {
        let half = self.head_dim / 2;
        let plain = (0..half).map(|i| 1.0 / self.rope_theta.powf(2.0 * i as f64 / self.head_dim as f64));
        let scaled: Vec<f32> = match &self.rope_scaling {
            RopeScaling::None => plain.map(|f| f as f32).collect(),
            RopeScaling::Linear { factor } => plain.map(|f| (f / factor) as f32).collect(),
            RopeScaling::Factors(factors) => {
                plain.zip(factors).map(|(f, factor)| (f / f64::from(*factor)) as f32).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => plain
                .map(|f| {
                    let turns = original_context * f / std::f64::consts::TAU;
                    let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let smooth = smooth.clamp(0.0, 1.0);
                    ((1.0 - smooth) * f / factor + smooth * f) as f32
                })
                .collect(),
        };
        if scaled.len() == half && scaled.iter().all(|f| f.is_finite()) {
            Ok(scaled)
        } else {
            Err(ModelError::config("rope scaling", format!("does not give {half} finite frequencies")))
        }
    }
}
