//! The peer at work: llama.cpp's own benchmark, its server, and its Q4_0 version of our model.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::peer_build;

const THREADS: &str = "2";
/// How long the server may take to load.
const LOADING: Duration = Duration::from_secs(120);

/// llama.cpp's programs.
pub(crate) struct Peer {
    programs: PathBuf,
}

impl Peer {
    /// Builds them if need be.
    pub(crate) fn new(cache: &Path) -> anyhow::Result<Self> {
        Ok(Self { programs: peer_build::programs(cache)? })
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.programs.join(name));
        command.stdin(Stdio::null());
        command
    }

    /// The model in Q4_0, the format llama.cpp is fastest in; made once.
    pub(crate) fn best_quant(&self, model: &Path) -> anyhow::Result<PathBuf> {
        let stem = model.file_stem().context("the model has no name")?.to_string_lossy().into_owned();
        let file = self.programs.join(format!("{stem}.as-Q4_0.gguf"));
        if file.is_file() {
            return Ok(file);
        }
        let partial = file.with_extension("partial");
        let mut command = self.program("llama-quantize");
        command.arg("--allow-requantize").arg(model).arg(&partial).args(["Q4_0", THREADS]);
        let output = command.stdout(Stdio::from(std::io::stderr()));
        ensure!(output.status()?.success(), "llama-quantize failed");
        std::fs::rename(&partial, &file).context("cannot move the Q4_0 model into place")?;
        Ok(file)
    }

    /// Tokens per second of a prompt of 512 tokens, and of decoding 64.
    pub(crate) fn bench(&self, model: &Path) -> anyhow::Result<(f64, f64)> {
        let mut command = self.program("llama-bench");
        command.arg("-m").arg(model).args(["-t", THREADS, "-p", "512", "-n", "64", "-r", "1", "-o", "json"]);
        let output = command.stderr(Stdio::null()).output().context("cannot start llama-bench")?;
        ensure!(output.status.success(), "llama-bench: {}", output.status);
        let tests: Vec<Value> =
            serde_json::from_slice(&output.stdout).context("llama-bench printed no JSON")?;
        let speed = |prompt: u64| {
            let test = tests.iter().find(|test| test["n_prompt"] == prompt)?;
            test["avg_ts"].as_f64()
        };
        speed(512).zip(speed(0)).context("llama-bench left a test out")
    }

    /// Starts the server with these LoRA files, none of them applied unless a request asks for it.
    pub(crate) fn serve(
        &self,
        model: &Path,
        adapters: &[PathBuf],
        users: usize,
    ) -> anyhow::Result<LlamaServer> {
        // The server cannot be asked which free port it took.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let files: Vec<String> = adapters.iter().map(|file| file.display().to_string()).collect();
        let context = users * 256;
        let mut command = self.program("llama-server");
        command.arg("-m").arg(model).args(["-t", THREADS, "-tb", THREADS, "--host", "127.0.0.1"]);
        command.args(["--port", &address.port().to_string(), "-np", &users.to_string()]);
        command.args(["-c", &context.to_string(), "--no-webui"]);
        if !files.is_empty() {
            command.args(["--lora", &files.join(",")]);
        }
        let name = model.file_stem().context("the model has no name")?.to_string_lossy().into_owned();
        let log = self.programs.join(format!("llama-server-{name}.log"));
        let output = std::fs::File::create(&log).context("cannot create the server's log")?;
        let child =
            command.stdout(Stdio::null()).stderr(output).spawn().context("cannot start llama-server")?;
        let mut server = LlamaServer { address, child };
        server.wait().with_context(|| format!("see {}", log.display()))?;
        Ok(server)
    }
}

/// A running llama-server; it ends when dropped.
pub(crate) struct LlamaServer {
    pub(crate) address: SocketAddr,
    child: Child,
}

impl LlamaServer {
    fn wait(&mut self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let url = format!("http://{}/health", self.address);
        let start = Instant::now();
        runtime.block_on(async {
            let client = reqwest::Client::builder().no_proxy().build()?;
            while start.elapsed() < LOADING {
                if let Some(status) = self.child.try_wait()? {
                    bail!("llama-server ended: {status}");
                }
                if client.get(&url).send().await.is_ok_and(|answer| answer.status().is_success()) {
                    return Ok(());
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            bail!("llama-server does not answer")
        })
    }
}

impl Drop for LlamaServer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _killed = self.child.kill();
        let _ended = self.child.wait();
    }
}
