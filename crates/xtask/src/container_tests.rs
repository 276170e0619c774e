//! The container image cannot be built in a test, so what its recipe names is looked up.

use crate::workspace;

fn read(path: &str) -> String {
    std::fs::read_to_string(workspace::root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Sources of `COPY` lines, apart from those that come from an earlier stage.
fn copied(recipe: &str) -> Vec<String> {
    let lines = recipe.lines().filter_map(|line| line.strip_prefix("COPY "));
    let own = lines.filter(|line| !line.contains("--from="));
    own.flat_map(|line| {
        let words: Vec<&str> = line.split_whitespace().filter(|word| !word.starts_with("--")).collect();
        words[..words.len().saturating_sub(1)].iter().map(|word| (*word).to_owned()).collect::<Vec<_>>()
    })
    .collect()
}

/// What of these cannot be copied: it does not exist, or is kept out of the build.
fn missing(sources: &[String], ignored: &str) -> Vec<String> {
    let is_ignored =
        |source: &str| ignored.lines().any(|line| line.trim_matches('/') == source.trim_matches('/'));
    let is_missing = |source: &&String| !workspace::root().join(source).exists() || is_ignored(source);
    sources.iter().filter(is_missing).cloned().collect()
}

#[test]
fn what_the_image_copies_is_there() {
    let sources = copied(&read("deploy/Dockerfile"));
    assert!(!sources.is_empty());
    assert_eq!(missing(&sources, &read(".dockerignore")), Vec::<String>::new());
}

#[test]
fn what_is_not_there_is_found() {
    let sources =
        copied("COPY --from=builder /a /b\nCOPY --chown=1:1 Cargo.toml target no-such-file /source/\n");
    assert_eq!(sources, ["Cargo.toml", "target", "no-such-file"]);
    assert_eq!(missing(&sources, "target/\n"), ["target", "no-such-file"]);
}

#[test]
fn the_build_needs_nothing_that_is_kept_out() {
    let ignored = read(".dockerignore");
    let needed = ["Cargo.toml", "Cargo.lock", "crates", "benches", "tests"].map(str::to_owned);
    assert_eq!(missing(&needed, &ignored), Vec::<String>::new());
}

#[test]
fn the_image_has_the_toolchain_of_the_workspace() {
    let manifest = read("Cargo.toml");
    let version = manifest.lines().find_map(|line| line.strip_prefix("rust-version = "));
    let version = version.map(|version| version.trim_matches('"')).filter(|version| !version.is_empty());
    let version = version.unwrap_or_else(|| panic!("no rust-version"));
    let recipe = read("deploy/Dockerfile");
    assert!(recipe.contains(&format!("FROM rust:{version}-")), "the image is not built with Rust {version}");
}
