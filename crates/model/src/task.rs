//! A task adapter (OPPU's first stage, Tan et al. 2024): a LoRA adapter that all users share, merged into the base when it
//! is loaded or stacked under every row's own.

use std::sync::Arc;

use half::{bf16, f16};
use kernels::{Format, LowRank, Numbers, Weight, adapt, pack_b, row_norms};
use peft::{LoraTensors, LoraWeights, PeftError, generation_id};

use crate::decoder::{BaseModel, Linear};
use crate::error::ModelError;

/// Where a task adapter goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskMode {
    /// Into the weights. F32, F16 and BF16 keep their format, rounded to nearest; the sites it acts on become Q8_0 (8.5 bits
    /// a weight) where they were quantised, as fewer bits would round much of it away.
    Merge,
    /// Under every row's own adapter and under rows without; the weights stay as they are, and its factors are there once,
    /// in float32. Not for DoRA, which scales the rows of the weights themselves: no update that is added does that.
    Stack,
}

/// A stacked update of one linear layer: `y += B (A x)`.
#[derive(Debug)]
pub struct Under {
    rank: usize,
    /// Shape (rank, input features).
    a: Vec<f32>,
    /// Shape (output features, rank), times the scale.
    b: Vec<f32>,
    /// `b` in the kernels' panels.
    packed: Vec<f32>,
    /// Both turned round, for gradients: (input features, rank) and (rank, output features).
    a_turned: Vec<f32>,
    b_turned: Vec<f32>,
}

impl Under {
    fn new(site: &LoraTensors) -> Self {
        let (rank, a, b) = (site.rank, site.a.clone(), scaled_b(site));
        let (a_turned, b_turned) = (turned(&a, rank), turned(&b, b.len() / rank));
        Self { rank, packed: pack_b(&b, rank), a, b, a_turned, b_turned }
    }

    /// As the kernels take it.
    #[must_use]
    pub fn low_rank(&self) -> LowRank<'_> {
        LowRank { rank: self.rank, a: Numbers::F32(&self.a), b: Numbers::F32(&self.packed), scales: &[] }
    }

    /// `y += B (A x)` for every row.
    pub(crate) fn add(&self, x: &[f32], y: &mut [f32]) {
        adapt(self.rank, &self.a, &self.b, x, y);
    }

    /// Adds row `row` of B A.
    pub(crate) fn add_to_row(&self, row: usize, out: &mut [f32]) {
        let b = &self.b[row * self.rank..][..self.rank];
        for (factor, a) in b.iter().zip(self.a.chunks_exact(out.len())) {
            out.iter_mut().zip(a).for_each(|(value, a)| *value += factor * a);
        }
    }

    /// `dx += (dy B) A` for every row.
    pub(crate) fn add_transposed(&self, dy: &[f32], dx: &mut [f32]) {
        adapt(self.rank, &self.b_turned, &self.a_turned, dy, dx);
    }

    /// Bytes it holds in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let parts: [&[f32]; 5] = [&self.a, &self.b, &self.packed, &self.a_turned, &self.b_turned];
        parts.iter().map(|part| size_of_val(*part)).sum()
    }
}

fn scaled_b(site: &LoraTensors) -> Vec<f32> {
    site.b.iter().map(|value| value * site.scale as f32).collect()
}

/// The transpose of a matrix of so many rows.
fn turned(matrix: &[f32], rows: usize) -> Vec<f32> {
    let cols = matrix.len() / rows;
    (0..matrix.len()).map(|at| matrix[at % rows * cols + at / rows]).collect()
}

impl BaseModel {
    /// The base with a task adapter, given as its two files. Its hash is another then, the same in both modes: adapters
    /// trained over base and task belong to both together.
    ///
    /// # Errors
    /// When the files are no LoRA adapter for this base, or one that cannot be stacked.
    pub fn with_task(mut self, config: &[u8], weights: &[u8], mode: TaskMode) -> Result<Self, ModelError> {
        let task = LoraWeights::parse(config, weights, &self.shape())?;
        if task.config.use_dora && mode == TaskMode::Stack {
            let value =
                "true in a task adapter that is stacked: it scales the weights themselves, so merge it"
                    .into();
            return Err(PeftError::Unsupported { field: "use_dora".into(), value }.into());
        }
        let hash = *generation_id(self.hash(), config, weights).as_bytes();
        self.set_hash(hash);
        for (id, site) in self.shape().site_ids().zip(&task.sites) {
            let Some(site) = site else { continue };
            let linear = self.linear_mut(id);
            match mode {
                TaskMode::Merge => linear.weight = Arc::new(merged(linear, site, &id.module_path())?),
                TaskMode::Stack => linear.under = Some(Arc::new(Under::new(site))),
            }
            if let Some(bias) = &site.bias {
                let base = |at: usize| linear.bias.as_ref().map_or(0.0, |base| base[at]);
                linear.bias =
                    Some(bias.iter().enumerate().map(|(at, v)| base(at) + v * site.scale as f32).collect());
            }
        }
        Ok(self)
    }
}

/// W + s B A, each row times m / n with DoRA.
fn merged(linear: &Linear, site: &LoraTensors, name: &str) -> Result<Weight, ModelError> {
    let weight = &linear.weight;
    let (rows, cols) = (weight.rows(), weight.cols());
    let b = scaled_b(site);
    let packed = pack_b(&b, site.rank);
    let update = LowRank { rank: site.rank, a: Numbers::F32(&site.a), b: Numbers::F32(&packed), scales: &[] };
    let norms = site.magnitude.as_ref().map(|_| row_norms(weight, &[update]));
    let format = if weight.format().block_len() == 1 { weight.format() } else { Format::Q8_0 };
    let mut bytes = Vec::new();
    let mut row = vec![0.0; cols];
    for index in 0..rows {
        weight.decode_row(index, &mut row);
        for (factor, a) in b[index * site.rank..][..site.rank].iter().zip(site.a.chunks_exact(cols)) {
            row.iter_mut().zip(a).for_each(|(value, a)| *value += factor * a);
        }
        if let (Some(magnitude), Some(norms)) = (&site.magnitude, &norms) {
            row.iter_mut().for_each(|value| *value *= magnitude[index] / norms[index]);
        }
        if !row.iter().all(|value| value.is_finite()) {
            return Err(ModelError::tensor(name, "is not finite with the task adapter"));
        }
        encode(format, &row, &mut bytes);
    }
    Weight::new(format, rows, cols, bytes).map_err(|error| ModelError::tensor(name, error.to_string()))
}

/// A row in a dense format or Q8_0 (32 signed bytes after an F16 scale, as llama.cpp's `quantize_row_q8_0_ref`).
fn encode(format: Format, row: &[f32], bytes: &mut Vec<u8>) {
    match format {
        Format::F16 => bytes.extend(row.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes())),
        Format::Bf16 => bytes.extend(row.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes())),
        Format::F32 => bytes.extend(row.iter().flat_map(|value| value.to_le_bytes())),
        _ => {
            for block in row.chunks(32) {
                let scale = block.iter().fold(0.0f32, |max, value| max.max(value.abs())) / 127.0;
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                bytes.extend(f16::from_f32(scale).to_le_bytes());
                bytes.extend(block.iter().map(|value| (value * inverse).round() as i8 as u8));
            }
        }
    }
}
