//! How far a section of a benchmark has come.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar on standard error; one line where there is no terminal.
pub(crate) fn progress(what: &str, steps: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        eprintln!("{what}: {steps} measurements");
    }
    let bar = ProgressBar::new(steps as u64).with_message(what.to_owned());
    match ProgressStyle::with_template("{msg:20} [{bar:40}] {pos}/{len} {elapsed} (about {eta} more)") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
