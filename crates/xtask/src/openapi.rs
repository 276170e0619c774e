//! `openapi`: writes or compares the description of the API that is under version control.

use anyhow::{Context, ensure};

use crate::workspace;

const FILE: &str = "openapi/openapi.json";

pub(crate) fn run(check: bool) -> anyhow::Result<()> {
    let path = workspace::root().join(FILE);
    let mut now = server::openapi_json();
    if !now.ends_with('\n') {
        now.push('\n');
    }
    if check {
        let stored = std::fs::read_to_string(&path).with_context(|| format!("cannot read {FILE}"))?;
        ensure!(stored == now, "{FILE} is out of date: run cargo xtask openapi");
        println!("{FILE} is up to date");
        return Ok(());
    }
    std::fs::write(&path, now).with_context(|| format!("cannot write {FILE}"))?;
    println!("wrote {FILE}");
    Ok(())
}
