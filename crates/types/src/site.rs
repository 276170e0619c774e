//! The linear layers an adapter can act on.

use serde::{Deserialize, Serialize};

/// One of the seven linear layers of a decoder block; written as [`Site::module`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Site {
    /// Query projection.
    #[serde(rename = "q_proj")]
    Q,
    /// Key projection.
    #[serde(rename = "k_proj")]
    K,
    /// Value projection.
    #[serde(rename = "v_proj")]
    V,
    /// Attention output projection.
    #[serde(rename = "o_proj")]
    O,
    /// Feed-forward gate projection.
    #[serde(rename = "gate_proj")]
    Gate,
    /// Feed-forward up projection.
    #[serde(rename = "up_proj")]
    Up,
    /// Feed-forward down projection.
    #[serde(rename = "down_proj")]
    Down,
}

impl Site {
    /// All sites, in the order of a block.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Position in [`Site::ALL`].
    #[must_use]
    pub fn index(self) -> usize {
        self as usize
    }

    /// The module's name in a Hugging Face model, e.g. `q_proj`.
    #[must_use]
    pub fn module(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The module's path within its block, e.g. `self_attn.q_proj`.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// One linear layer of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SiteId {
    /// Block, counted from 0.
    pub layer: usize,
    /// Which of the seven.
    pub site: Site,
}

impl SiteId {
    /// The site of a layer.
    #[must_use]
    pub fn new(layer: usize, site: Site) -> Self {
        Self { layer, site }
    }

    /// Position among all sites of a model, block by block.
    #[must_use]
    pub fn index(self) -> usize {
        self.layer * Site::ALL.len() + self.site.index()
    }

    /// The module path in a Hugging Face causal model, e.g. `model.layers.0.self_attn.q_proj`.
    #[must_use]
    pub fn module_path(self) -> String {
        format!("model.layers.{}.{}", self.layer, self.site.path())
    }
}
