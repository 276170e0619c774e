//! Licences of all dependencies against a list of those that ask for no more than naming the authors (and, for
//! MPL-2.0, publishing changes to its own files).

use serde_json::Value;

const ALLOWED: [&str; 14] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "CC0-1.0",
    "0BSD",
    "BSL-1.0",
    "MPL-2.0",
    "Unlicense",
    "CDLA-Permissive-2.0",
];

/// Violations in the output of a full `cargo metadata`.
pub(crate) fn violations(metadata: &Value) -> Vec<String> {
    let packages = metadata["packages"].as_array().map_or(&[][..], Vec::as_slice);
    let mut found = Vec::new();
    for package in packages {
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        let (name, version, licence) = (text("name"), text("version"), text("license"));
        match allowed(licence) {
            Some(true) => {}
            Some(false) => found.push(format!("Cargo.lock:1: {name} {version} is under {licence}")),
            None => {
                found.push(format!("Cargo.lock:1: {name} {version} has the unreadable licence {licence:?}"))
            }
        }
    }
    found
}

/// Whether an SPDX expression (<https://spdx.github.io/spdx-spec/v2.3/SPDX-license-expressions/>) leaves a choice of
/// allowed licences only. The old form `MIT/Apache-2.0` means OR. Nothing if it cannot be read.
fn allowed(expression: &str) -> Option<bool> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut words = words.as_slice();
    let result = any(&mut words)?;
    words.is_empty().then_some(result)
}

fn next<'a>(words: &mut &[&'a str]) -> Option<&'a str> {
    let (first, rest) = words.split_first()?;
    *words = rest;
    Some(first)
}

/// `all (OR all)*`
fn any(words: &mut &[&str]) -> Option<bool> {
    let mut result = all(words)?;
    while words.first() == Some(&"OR") {
        next(words)?;
        result |= all(words)?;
    }
    Some(result)
}

/// `one (AND one)*`
fn all(words: &mut &[&str]) -> Option<bool> {
    let mut result = one(words)?;
    while words.first() == Some(&"AND") {
        next(words)?;
        result &= one(words)?;
    }
    Some(result)
}

/// `( any )`, or a name with or without an exception.
fn one(words: &mut &[&str]) -> Option<bool> {
    let name = next(words)?;
    if name == "(" {
        let result = any(words)?;
        return (next(words)? == ")").then_some(result);
    }
    if [")", "AND", "OR", "WITH"].contains(&name) {
        return None;
    }
    if words.first() == Some(&"WITH") {
        next(words)?;
        let exception = next(words)?;
        return Some(ALLOWED.contains(&format!("{name} WITH {exception}").as_str()));
    }
    Some(ALLOWED.contains(&name))
}

#[cfg(test)]
mod tests {
    //! Expressions as they occur, forbidden ones, and broken ones.
    use super::*;
    use serde_json::json;

    #[test]
    fn a_choice_of_allowed_licences_passes() {
        for expression in [
            "MIT",
            "MIT OR Apache-2.0",
            "MIT/GPL-3.0-only",
            "GPL-3.0-only OR MIT",
            "Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT",
            "(MIT OR GPL-3.0-only) AND Unicode-3.0",
        ] {
            assert_eq!(allowed(expression), Some(true), "{expression}");
        }
    }

    #[test]
    fn other_licences_are_found() {
        for expression in [
            "GPL-3.0-only",
            "MIT AND GPL-3.0-only",
            "MIT AND (GPL-3.0-only OR AGPL-3.0-only)",
            "Apache-2.0 WITH Some-exception",
            "mit",
        ] {
            assert_eq!(allowed(expression), Some(false), "{expression}");
        }
        // AND binds closer than OR.
        assert_eq!(allowed("MIT OR ISC AND GPL-3.0-only"), Some(true));
        assert_eq!(allowed("(MIT OR ISC) AND GPL-3.0-only"), Some(false));
    }

    #[test]
    fn broken_expressions_are_not_read_as_allowed() {
        for expression in ["", "MIT OR", "(MIT", "MIT)", "MIT Apache-2.0", "AND MIT", "MIT WITH"] {
            assert_eq!(allowed(expression), None, "{expression}");
        }
    }

    #[test]
    fn a_package_without_licence_is_found() {
        let packages =
            json!([{"name": "a", "version": "1.0.0", "license": null}, {"name": "b", "license": "MIT"}]);
        let found = violations(&json!({ "packages": packages }));
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("a 1.0.0"), "{found:?}");
    }
}
