//! `tidy`: prints every violation of the rules of the house.

use anyhow::{Context, ensure};

use crate::{edges, licences, sources, workspace};

pub(crate) fn run() -> anyhow::Result<()> {
    let mut found = edges::violations(&workspace::metadata(false)?);
    let files = workspace::files()?;
    ensure!(!files.is_empty(), "git lists no files");
    for path in &files {
        let bytes = std::fs::read(workspace::root().join(path)).with_context(|| path.clone())?;
        // Model weights and other binary fixtures have no lines to look at.
        let Ok(text) = String::from_utf8(bytes) else { continue };
        found.extend(sources::violations(path, &text));
    }
    found.extend(licences::violations(&workspace::metadata(true)?));
    for violation in &found {
        println!("{violation}");
    }
    ensure!(found.is_empty(), "tidy: {} violations", found.len());
    println!("tidy: no violations in {} files", files.len());
    Ok(())
}
