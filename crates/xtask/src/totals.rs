//! Adds up the summaries that the test targets print.

use std::fmt;

/// Tests of a whole run.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) ignored: usize,
    /// Test targets that have come to their end.
    pub(crate) targets: usize,
}

impl Totals {
    /// Takes a line in if it is a summary: `test result: ok. 3 passed; 0 failed; 0 ignored; …`.
    pub(crate) fn add(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        self.targets += 1;
        for part in counts.split("; ") {
            match part.split_once(' ').map(|(count, what)| (count.parse::<usize>(), what)) {
                Some((Ok(count), "passed")) => self.passed += count,
                Some((Ok(count), "failed")) => self.failed += count,
                Some((Ok(count), "ignored")) => self.ignored += count,
                _ => {}
            }
        }
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, ignored, targets } = self;
        let result = if *failed == 0 { "ok" } else { "FAILED" };
        write!(
            f,
            "test result: {result}. {passed} passed; {failed} failed; {ignored} ignored; {targets} test targets in all"
        )
    }
}

#[cfg(test)]
mod tests {
    //! Lines as `cargo test` prints them.
    use super::*;

    fn totals(lines: &[&str]) -> Totals {
        let mut totals = Totals::default();
        for line in lines {
            totals.add(line);
        }
        totals
    }

    #[test]
    fn summaries_are_added_up() {
        let ok =
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.10s";
        let empty =
            "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        let all = totals(&["running 3 tests", "test a ... ok", ok, "", empty]);
        assert_eq!(all, Totals { passed: 3, failed: 0, ignored: 1, targets: 2 });
        assert!(all.to_string().starts_with("test result: ok. 3 passed; 0 failed; "), "{all}");
    }

    #[test]
    fn a_failure_shows() {
        let all = totals(&["test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out"]);
        assert_eq!(all.failed, 2);
        assert!(all.to_string().starts_with("test result: FAILED. 1 passed; 2 failed; "), "{all}");
    }
}
