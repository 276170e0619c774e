//! `lines`: how much of everything there is.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context;
use serde_json::Value;

use crate::{sources, workspace};

pub(crate) fn run() -> anyhow::Result<()> {
    let mut crates: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    for path in workspace::files()?.iter().filter(|path| path.ends_with(".rs")) {
        let text = std::fs::read_to_string(workspace::root().join(path)).with_context(|| path.clone())?;
        let [source, tests] = split(path, &text);
        let counted = crates.entry(owner(path).to_owned()).or_default();
        counted[0] += source;
        counted[1] += tests;
    }
    println!("{:<14}{:>8}{:>8}", "crate", "source", "tests");
    for (name, [source, tests]) in &crates {
        println!("{name:<14}{source:>8}{tests:>8}");
    }
    let total = |which: usize| crates.values().map(|counted| counted[which]).sum::<usize>();
    println!("{:<14}{:>8}{:>8}", "all", total(0), total(1));

    println!("\ndependency crates: {}", dependencies(&workspace::metadata(true)?));
    let tree = workspace::output("cargo", &["tree", "--duplicates", "--depth", "0"])?;
    let doubled = doubled(&tree);
    println!("in more than one version: {}", doubled.len());
    for (name, versions) in doubled {
        println!("  {name} {}", versions.into_iter().collect::<Vec<_>>().join(", "));
    }
    Ok(())
}

/// Source and test lines: a file of tests counts as a whole, in others what follows `#[cfg(test)] mod … {`.
fn split(path: &str, text: &str) -> [usize; 2] {
    let lines: Vec<&str> = text.lines().collect();
    if sources::is_tests(path) {
        return [0, lines.len()];
    }
    let is_module =
        |pair: &[&str]| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod ") && pair[1].ends_with('{');
    let source = lines.windows(2).position(is_module).unwrap_or(lines.len());
    [source, lines.len() - source]
}

/// The crate a file belongs to.
fn owner(path: &str) -> &str {
    path.strip_prefix("crates/").and_then(|path| path.split('/').next()).unwrap_or("atelier")
}

/// Crates in more than one version, from `cargo tree --duplicates`, which also lists a version built twice with
/// different features.
fn doubled(tree: &str) -> BTreeMap<&str, BTreeSet<&str>> {
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for line in tree.lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(version)) = (words.next(), words.next()) {
            versions.entry(name).or_default().insert(version);
        }
    }
    versions.retain(|_, versions| versions.len() > 1);
    versions
}

/// How many crates of others the product is built from, development dependencies left out.
fn dependencies(metadata: &Value) -> usize {
    let array = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let members: BTreeSet<String> =
        array(&metadata["workspace_members"]).iter().map(Value::to_string).collect();
    let nodes: BTreeMap<String, Value> = array(&metadata["resolve"]["nodes"])
        .into_iter()
        .map(|node| (node["id"].to_string(), node["deps"].clone()))
        .collect();
    let mut seen = members.clone();
    let mut open: Vec<String> = members.iter().cloned().collect();
    while let Some(id) = open.pop() {
        for dependency in nodes.get(&id).map(array).unwrap_or_default() {
            let used = array(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"] != "dev");
            let id = dependency["pkg"].to_string();
            if used && seen.insert(id.clone()) {
                open.push(id);
            }
        }
    }
    seen.len() - members.len()
}

#[cfg(test)]
mod tests {
    //! Counting on small examples.
    use super::*;
    use serde_json::json;

    #[test]
    fn tests_are_told_from_sources() {
        let text = "//! x\nfn a() {}\n#[cfg(test)]\nmod tests {\n}\n";
        assert_eq!(split("crates/a/src/lib.rs", text), [2, 3]);
        assert_eq!(split("crates/a/tests/b.rs", text), [0, 5]);
        assert_eq!(split("crates/a/src/lib.rs", "#[cfg(test)]\nmod tests;\nmod b;\n"), [3, 0]);
        assert_eq!(owner("crates/a/src/lib.rs"), "a");
        assert_eq!(owner("tests/whole/main.rs"), "atelier");
    }

    #[test]
    fn development_dependencies_do_not_count() {
        let dep = |id: &str, kind: Value| json!({"pkg": id, "dep_kinds": [{"kind": kind}]});
        let metadata = json!({"workspace_members": ["a"], "resolve": {"nodes": [
            {"id": "a", "deps": [dep("b", Value::Null), dep("d", json!("dev"))]},
            {"id": "b", "deps": [dep("c", json!("build"))]},
            {"id": "c", "deps": []},
            {"id": "d", "deps": [dep("e", Value::Null)]},
        ]}});
        assert_eq!(dependencies(&metadata), 2);
    }

    #[test]
    fn only_different_versions_are_doubled() {
        let found = doubled("a v1.0.0\n\na v1.0.0\n\nb v1.0.0\n\nb v2.0.0\n");
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), ["b"]);
    }
}
