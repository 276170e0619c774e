//! HF peft on PyTorch, in the environment of the reference scripts.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use train::Recipe;
use types::Example;

const SETUP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reference/setup.sh");
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/training/peft_side.py");

/// A running Python; it ends when dropped.
pub(crate) struct Peft {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peft {
    /// Makes the environment if need be, and starts it for a GGUF file.
    pub(crate) fn start(model: &Path, threads: usize) -> anyhow::Result<Self> {
        let setup = Command::new(SETUP).stderr(Stdio::inherit()).output().context("cannot run setup.sh")?;
        let printed = String::from_utf8(setup.stdout)?;
        let python = printed.lines().last().context("setup.sh printed no path")?;
        let (folder, file) = model.parent().zip(model.file_name()).context("the model has no folder")?;
        let mut command = Command::new(python);
        command.arg(SCRIPT).arg(folder).arg(file).arg(threads.to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take().context("no standard input")?;
        let output = BufReader::new(child.stdout.take().context("no standard output")?);
        Ok(Self { child, input, output })
    }

    /// Seconds that a user's training takes, `dtype` by torch's name; loading the model does not count.
    pub(crate) fn train(
        &mut self,
        dtype: &str,
        recipe: &Recipe,
        examples: &[Example],
    ) -> anyhow::Result<f64> {
        let dropout = match &recipe.adapter {
            peft::AdapterConfig::Lora(lora) => lora.dropout,
            _ => 0.0,
        };
        let tokens = |example: &Example| {
            let len = example.tokens.len().min(recipe.max_tokens);
            json!([example.tokens[..len], example.answer_start])
        };
        let job = json!({
            "dtype": dtype, "dropout": dropout, "batch": recipe.batch, "epochs": recipe.epochs,
            "examples": examples.iter().map(tokens).collect::<Vec<_>>(),
        });
        writeln!(self.input, "{job}")?;
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "peft's side ended: {:?}", self.child.try_wait()?);
        let answer: Value = serde_json::from_str(&line)?;
        answer["seconds"].as_f64().context("no seconds")
    }
}

impl Drop for Peft {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}
