//! The text of `benches/RESULTS.md`: one section for each area and machine, the others left as they are.

use std::fmt::Write as _;

use serde_json::Value;

const TITLE: &str = "# Benchmark results\n\n\
    Written by `cargo xtask bench`. The floor is what bytes over bandwidth or operations over peak allow at most on \
    the machine that the bench file names; the share says how much of it is reached.\n";

/// One run of an area.
pub(crate) struct Run {
    pub(crate) area: &'static str,
    pub(crate) date: String,
    pub(crate) machine: String,
    pub(crate) command: String,
    /// `name`, `ours`, `low`, `high`, and `peer`, `ratio`, `goal`, `holds`, `floor`, `note` if there are any.
    pub(crate) rows: Vec<Value>,
}

/// The section of a run.
pub(crate) fn section(run: &Run) -> String {
    let Run { date, command, rows, .. } = run;
    let mut text = format!("{}\n\n{date}. `{command}`\n\n", heading(run));
    let goals = rows.iter().any(|row| row["goal"].is_string());
    let (titles, lines) = if goals { (" goal | holds |", "---:|---:|") } else { ("", "") };
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "| measured | ours (spread) | peer | ratio |{titles} floor | share of floor |\n|---|---:|---:|---:|{lines}---:|---:|"
    );
    for row in rows {
        let number = |key: &str| row[key].as_f64();
        let cell = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), figure);
        let ours = match (number("low"), number("high")) {
            (Some(low), Some(high)) if low < high => {
                format!("{} ({} to {})", cell(number("ours")), figure(low), figure(high))
            }
            _ => cell(number("ours")),
        };
        let share = number("ours").zip(number("floor")).filter(|(_, floor)| *floor > 0.0);
        let share =
            share.map_or_else(|| "–".to_owned(), |(ours, floor)| format!("{:.0} %", 100.0 * ours / floor));
        let mut name = row["name"].as_str().unwrap_or_default().replace('|', "\\|");
        if let Some(note) = row["note"].as_str() {
            let _ = write!(name, " ({note})");
        }
        let goal = if goals { goal(row) } else { String::new() };
        let ratio = number("ratio").map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"));
        let (peer, floor) = (cell(number("peer")), cell(number("floor")));
        let _ = writeln!(text, "| {name} | {ours} | {peer} | {ratio} |{goal} {floor} | {share} |");
    }
    text
}

/// The cells of a row's goal and whether it holds.
fn goal(row: &Value) -> String {
    let holds = match row["holds"].as_bool() {
        Some(true) => "yes",
        Some(false) => "no",
        None => "–",
    };
    format!(" {} | {holds} |", row["goal"].as_str().unwrap_or("–"))
}

/// What one machine measured does not replace what another did.
fn heading(run: &Run) -> String {
    format!("## {} on {}", run.area, run.machine)
}

/// The old text with the run's section in place of the area's former one on this machine, or at the end.
pub(crate) fn with_section(old: &str, run: &Run) -> String {
    let old = if old.trim().is_empty() { TITLE } else { old };
    let heading = heading(run);
    let (mut text, mut inside, mut placed) = (String::new(), false, false);
    for line in old.lines() {
        if line.starts_with("## ") {
            inside = line.trim_end() == heading;
            if inside && !placed {
                placed = true;
                text.push_str(&section(run));
                text.push('\n');
            }
        }
        if !inside {
            text.push_str(line);
            text.push('\n');
        }
    }
    if !placed {
        text.push('\n');
        text.push_str(&section(run));
    }
    format!("{}\n", text.trim_end())
}

/// A figure with as many decimals as it needs.
fn figure(value: f64) -> String {
    if value.abs() >= 100.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

#[cfg(test)]
mod tests {
    //! Sections are made, replaced and left alone.
    use super::*;
    use serde_json::json;

    fn run(ours: f64) -> Run {
        let row = json!({"name": "decode, tok/s", "ours": ours, "low": ours - 1.0, "high": ours + 1.0,
            "peer": 100.0, "ratio": ours / 100.0, "floor": 400.0, "goal": null, "holds": null});
        let bare = json!({"name": "memory, MiB", "ours": 50.0, "low": 50.0, "high": 50.0, "peer": null});
        let text = |text: &str| text.to_owned();
        Run {
            area: "loop",
            date: text("2030-01-01"),
            machine: text("CPU"),
            command: text("cargo x"),
            rows: vec![row, bare],
        }
    }

    #[test]
    fn a_section_has_spread_ratio_and_share() {
        let text = section(&run(200.0));
        assert!(text.contains("| decode, tok/s | 200 (199 to 201) | 100 | 2.00 | 400 | 50 % |"), "{text}");
        assert!(text.contains("| memory, MiB | 50.0 | – | – | – | – |"), "{text}");
    }

    #[test]
    fn goals_have_columns_where_there_are_any() {
        let mut run = run(200.0);
        assert!(!section(&run).contains("goal"));
        run.rows[0]["goal"] = json!(">= 2.5");
        run.rows[0]["holds"] = json!(false);
        run.rows[1]["note"] = json!("roughly");
        let text = section(&run);
        assert!(text.contains("| ratio | goal | holds | floor | share of floor |\n"), "{text}");
        assert!(text.contains("| 100 | 2.00 | >= 2.5 | no | 400 | 50 % |"), "{text}");
        assert!(text.contains("| memory, MiB (roughly) | 50.0 | – | – | – | – | – | – |"), "{text}");
    }

    #[test]
    fn only_the_own_section_changes() {
        let first = with_section("", &run(200.0));
        assert!(first.starts_with("# Benchmark results\n"));
        assert_eq!(with_section(&first, &run(200.0)), first);
        let old =
            "# Title\n\nWords.\n\n## loop on PDP\n\nkept 1\n\n## loop on CPU\n\ngone\n\n## store\n\nkept 2\n";
        let new = with_section(old, &run(300.0));
        assert!(new.contains("# Title\n\nWords.\n\n## loop on PDP\n\nkept 1\n\n## loop on CPU\n"), "{new}");
        assert!(
            new.contains("\n## store\n\nkept 2\n") && new.contains("300 (") && !new.contains("gone"),
            "{new}"
        );
        assert_eq!(new.matches("## loop on CPU").count(), 1);
    }
}
