//! Rules for the text of a file: its opening line, size, name, and what must not stand in it.
//!
//! Every needle is put together from parts, so that this file passes its own rules.

/// Lines of a source file, and of a file of tests.
const SOURCE_LINES: usize = 500;
const TEST_LINES: usize = 800;

/// Names of modules that say nothing.
const EMPTY_NAMES: [&str; 4] = ["utils", "common", "helpers", "manager"];

/// Signs of unfinished work, and of tests that do not run.
const UNFINISHED: [&str; 5] = [
    concat!("to", "do!"),
    concat!("unimpl", "emented!"),
    concat!("FIX", "ME"),
    concat!("X", "XX"),
    concat!("#[", "ignore"),
];

/// Hosts of registries: mirrors differ from machine to machine, so the clients' settings name them, never we.
const HOSTS: [&str; 6] = [
    concat!("crates", ".io"),
    concat!("pypi", ".org"),
    concat!("files.pythonhosted", ".org"),
    concat!("registry.npmjs", ".org"),
    concat!("huggingface", ".co"),
    concat!("deb.debian", ".org"),
];

const UNCHECKED: &str = concat!("un", "safe");
const ENVIRONMENT: &str = concat!("env::", "var");

/// Violations in one file, as `path:line: what`.
pub(crate) fn violations(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    // The lock file names the registry of every crate, by cargo's own doing.
    if path != "Cargo.lock" {
        for (number, line) in numbered(text) {
            for host in HOSTS.iter().filter(|host| line.contains(**host)) {
                found.push(format!("{path}:{number}: names the registry host {host}"));
            }
        }
    }
    if path.ends_with(".rs") {
        rust(path, text, &mut found);
    }
    found
}

/// Whether a Rust file holds only tests.
pub(crate) fn is_tests(path: &str) -> bool {
    path.starts_with("tests/") || path.contains("/tests/") || path.ends_with("tests.rs")
}

fn rust(path: &str, text: &str, found: &mut Vec<String>) {
    if !text.starts_with("//!") {
        found.push(format!("{path}:1: does not open with a //! line that names its job"));
    }
    let (lines, limit) = (text.lines().count(), if is_tests(path) { TEST_LINES } else { SOURCE_LINES });
    if lines > limit {
        found.push(format!("{path}:{lines}: longer than {limit} lines"));
    }
    for part in path.trim_end_matches(".rs").split('/').filter(|part| EMPTY_NAMES.contains(part)) {
        found.push(format!("{path}:1: the name {part} does not say what is in it"));
    }
    let may_be_unchecked = path.starts_with("crates/kernels/");
    // The vector unit is no setting of the program's: all crates' tests run on the one that is named.
    let may_read_environment = ["crates/app/", "crates/xtask/", "crates/kernels/src/isa.rs"]
        .iter()
        .any(|own| path.starts_with(own))
        // A test that starts itself anew tells the child its part.
        || path.contains("/tests/");
    for (number, line) in numbered(text) {
        for sign in UNFINISHED.iter().filter(|sign| line.contains(**sign)) {
            found.push(format!("{path}:{number}: {sign} is unfinished work"));
        }
        let code = line.trim_start();
        if code.starts_with("//") {
            continue;
        }
        if !may_be_unchecked && has_word(code, UNCHECKED) {
            found.push(format!("{path}:{number}: {UNCHECKED} belongs in crates/kernels only"));
        }
        if !may_read_environment && code.contains(ENVIRONMENT) {
            found.push(format!("{path}:{number}: the environment is read in crates/app only"));
        }
        if let Some(name) = module(code).filter(|name| EMPTY_NAMES.contains(name)) {
            found.push(format!("{path}:{number}: the module name {name} does not say what is in it"));
        }
    }
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(index, line)| (index + 1, line))
}

/// Whether the word stands in the line, and not as part of a longer one.
fn has_word(line: &str, word: &str) -> bool {
    let goes_on = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(goes_on) && !line[at + word.len()..].starts_with(goes_on))
}

/// The name of the module that a line declares.
fn module(code: &str) -> Option<&str> {
    let declared = code
        .strip_prefix("mod ")
        .or_else(|| code.strip_prefix("pub mod "))
        .or_else(|| code.strip_prefix("pub(crate) mod "))?;
    declared.split([' ', ';', '{']).next()
}

#[cfg(test)]
mod tests {
    //! Every rule with a file that breaks it, and the same file elsewhere or repaired.
    use super::*;

    fn count(path: &str, text: &str) -> usize {
        violations(path, text).len()
    }

    #[test]
    fn a_good_file_passes() {
        assert_eq!(violations("crates/a/src/lib.rs", "//! A job.\nfn main() {}\n"), Vec::<String>::new());
    }

    #[test]
    fn violations_name_path_and_line() {
        let text = format!("//! A job.\n\n{}\n", UNFINISHED[2]);
        let found = violations("crates/a/src/lib.rs", &text);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("crates/a/src/lib.rs:3: "), "{found:?}");
    }

    #[test]
    fn the_opening_line_is_required() {
        assert_eq!(count("crates/a/src/lib.rs", "fn main() {}\n"), 1);
        assert_eq!(count("crates/a/src/lib.rs", "\n//! Late.\n"), 1);
        assert_eq!(count("crates/a/src/lib.rs", ""), 1);
        assert_eq!(count("tests/reference/a.py", "x = 1\n"), 0);
    }

    #[test]
    fn long_files_are_found() {
        let lines = |n: usize| "//! x\n".repeat(n);
        assert_eq!(count("crates/a/src/lib.rs", &lines(500)), 0);
        assert_eq!(count("crates/a/src/lib.rs", &lines(501)), 1);
        for tests in ["crates/a/tests/b.rs", "crates/a/src/b_tests.rs", "tests/whole/main.rs"] {
            assert_eq!(count(tests, &lines(800)), 0, "{tests}");
            assert_eq!(count(tests, &lines(801)), 1, "{tests}");
        }
    }

    #[test]
    fn empty_names_are_found() {
        assert_eq!(count("crates/a/src/utils.rs", "//! x\n"), 1);
        assert_eq!(count("crates/a/tests/common/mod.rs", "//! x\n"), 1);
        assert_eq!(count("crates/a/src/lib.rs", "//! x\npub(crate) mod helpers;\n"), 1);
        assert_eq!(count("crates/a/src/lib.rs", "//! x\nmod commonplace;\n"), 0);
        assert_eq!(count("tests/reference/common.py", "\n"), 0);
    }

    #[test]
    fn code_in_the_wrong_crate_is_found() {
        for code in [" {}", "{", " fn f() {", "(no_mangle)]"] {
            let unchecked = format!("//! x\n#[{UNCHECKED}{code}\n");
            assert_eq!(count("crates/a/src/lib.rs", &unchecked), 1, "{code}");
            assert_eq!(count("crates/kernels/src/lib.rs", &unchecked), 0, "{code}");
        }
        assert_eq!(count("crates/a/src/lib.rs", &format!("//! x\n// {UNCHECKED} is a word here\n")), 0);
        assert_eq!(count("crates/a/src/lib.rs", &format!("//! x\n#![deny({UNCHECKED}_code)]\n")), 0);
        let environment = format!("//! x\nlet x = std::{ENVIRONMENT}(\"HOME\");\n");
        assert_eq!(count("crates/a/src/lib.rs", &environment), 1);
        assert_eq!(count("crates/app/src/lib.rs", &environment), 0);
    }

    #[test]
    fn unfinished_work_is_found() {
        for sign in UNFINISHED {
            assert_eq!(count("crates/a/src/lib.rs", &format!("//! x\n// {sign}\n")), 1, "{sign}");
        }
    }

    #[test]
    fn registry_hosts_are_found_in_any_file() {
        for host in HOSTS {
            let text = format!("see https://{host}/x\n");
            assert_eq!(count("README.md", &text), 1, "{host}");
            assert_eq!(count("Cargo.lock", &text), 0, "{host}");
        }
    }
}
