//! Synthetic Llama models in GGUF, of any size and number format, from a seed.

use std::path::Path;

use half::f16;
use kernels::Format;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// The dimensions of a synthetic model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Synthetic {
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) feed_forward: usize,
    pub(crate) vocab: usize,
    pub(crate) context: usize,
    /// How many positions back a row sees, if not all.
    pub(crate) window: Option<usize>,
    /// Format of the linear layers, by turns.
    pub(crate) formats: &'static [Format],
}

impl Synthetic {
    /// Writes the model to `path`.
    pub(crate) fn write(&self, path: &Path, seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut tensors = vec![
            ("token_embd.weight".to_owned(), Format::Q8_0, self.vocab, self.hidden),
            ("output_norm.weight".to_owned(), Format::F32, 1, self.hidden),
        ];
        let (key, format) =
            (self.hidden / self.heads * self.kv_heads, |i: usize| self.formats[i % self.formats.len()]);
        for layer in 0..self.layers {
            let mut add = |name: &str, format, rows, cols| {
                tensors.push((format!("blk.{layer}.{name}.weight"), format, rows, cols));
            };
            add("attn_norm", Format::F32, 1, self.hidden);
            add("ffn_norm", Format::F32, 1, self.hidden);
            for (i, (name, rows, cols)) in [
                ("attn_q", self.hidden, self.hidden),
                ("attn_k", key, self.hidden),
                ("attn_v", key, self.hidden),
                ("attn_output", self.hidden, self.hidden),
                ("ffn_gate", self.feed_forward, self.hidden),
                ("ffn_up", self.feed_forward, self.hidden),
                ("ffn_down", self.hidden, self.feed_forward),
            ]
            .into_iter()
            .enumerate()
            {
                add(name, format(layer + i), rows, cols);
            }
        }
        let mut file = self.header(tensors.len());
        let mut data = Vec::new();
        for (name, format, rows, cols) in &tensors {
            let shape: &[usize] = if *rows == 1 { &[*cols] } else { &[*cols, *rows] };
            text(&mut file, name);
            file.extend((shape.len() as u32).to_le_bytes());
            shape.iter().for_each(|dim| file.extend((*dim as u64).to_le_bytes()));
            file.extend(code(*format).to_le_bytes());
            file.extend((data.len() as u64).to_le_bytes());
            for _ in 0..*rows {
                row(&mut rng, *format, *cols, &mut data);
            }
            data.resize(data.len().next_multiple_of(32), 0);
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(data);
        std::fs::write(path, file).unwrap();
    }

    fn header(&self, tensors: usize) -> Vec<u8> {
        let ints = [
            ("embedding_length", self.hidden),
            ("block_count", self.layers),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("feed_forward_length", self.feed_forward),
            ("context_length", self.context),
        ];
        let ints = ints.into_iter().chain(self.window.map(|window| ("attention.sliding_window", window)));
        let ints: Vec<_> = ints.collect();
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((tensors as u64).to_le_bytes());
        file.extend((ints.len() as u64 + 2).to_le_bytes());
        text(&mut file, "general.architecture");
        file.extend(8u32.to_le_bytes());
        text(&mut file, "llama");
        text(&mut file, "llama.attention.layer_norm_rms_epsilon");
        file.extend(6u32.to_le_bytes());
        file.extend(1e-5f32.to_le_bytes());
        for (name, value) in ints {
            text(&mut file, &format!("llama.{name}"));
            file.extend(4u32.to_le_bytes());
            file.extend((value as u32).to_le_bytes());
        }
        file
    }
}

fn text(file: &mut Vec<u8>, text: &str) {
    file.extend((text.len() as u64).to_le_bytes());
    file.extend(text.as_bytes());
}

/// GGML's number of a format.
fn code(format: Format) -> u32 {
    match format {
        Format::F32 => 0,
        Format::F16 => 1,
        Format::Q4_0 => 2,
        Format::Q4_1 => 3,
        Format::Q8_0 => 8,
        Format::Q4K => 12,
        Format::Q6K => 14,
        Format::Bf16 => 30,
    }
}

/// A row of values of about ±0.04 (norms: about 1).
fn row(rng: &mut StdRng, format: Format, cols: usize, data: &mut Vec<u8>) {
    let half = |value: f32| f16::from_f32(value).to_le_bytes();
    for _ in 0..cols / format.block_len() {
        let scale: f32 = rng.random_range(0.6..1.4);
        let start = data.len();
        data.extend((0..format.block_bytes()).map(|_| rng.random::<u8>()));
        let block = &mut data[start..];
        match format {
            Format::F32 => block.copy_from_slice(&scale.to_le_bytes()),
            Format::F16 => block.copy_from_slice(&half((scale - 1.0) * 0.1)),
            Format::Bf16 => {
                block.copy_from_slice(&half::bf16::from_f32((scale - 1.0) * 0.1).to_le_bytes());
            }
            Format::Q8_0 => block[..2].copy_from_slice(&half(scale * 3e-4)),
            Format::Q4_0 => block[..2].copy_from_slice(&half(scale * 5e-3)),
            Format::Q4_1 => {
                block[..2].copy_from_slice(&half(scale * 5e-3));
                block[2..4].copy_from_slice(&half(scale * -0.0375));
            }
            Format::Q4K => {
                // Scales and minima are six-bit numbers of about 32.
                block[..2].copy_from_slice(&half(scale * 1.5e-4));
                block[2..4].copy_from_slice(&half(scale * 1.1e-3));
            }
            Format::Q6K => block[208..].copy_from_slice(&half(scale * 2e-5)),
        }
    }
}
