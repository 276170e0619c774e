//! The plot beside the table, as SVG: two bars for each load.

use std::fmt::Write as _;
use std::path::Path;

const FILE: &str = "benches/plots/engine.svg";
const OURS: &str = "#1f6f8b";
const PEER: &str = "#d98c3f";
const WIDTH: f64 = 960.0;
const PANEL: f64 = 300.0;
/// Within a panel: left edge, top and bottom of the bars.
const LEFT: f64 = 60.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 240.0;

/// Two figures of one load.
pub(crate) struct Bar {
    pub(crate) label: String,
    pub(crate) ours: f64,
    pub(crate) peer: f64,
}

/// Writes panels of bars, one below the other.
pub(crate) fn write(panels: &[(&str, Vec<Bar>)]) -> std::io::Result<()> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE);
    std::fs::create_dir_all(file.parent().unwrap_or(Path::new(".")))?;
    std::fs::write(file, svg(panels))
}

fn svg(panels: &[(&str, Vec<Bar>)]) -> String {
    let height = PANEL * panels.len() as f64;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (number, (title, bars)) in panels.iter().enumerate() {
        let _ = writeln!(text, "<g transform=\"translate(0 {})\">", PANEL * number as f64);
        panel(&mut text, title, bars);
        text.push_str("</g>\n");
    }
    text.push_str("</svg>\n");
    text
}

/// Writing to a String cannot fail, so its results are dropped.
fn panel(text: &mut String, title: &str, bars: &[Bar]) {
    let largest = bars.iter().flat_map(|bar| [bar.ours, bar.peer]).fold(f64::MIN_POSITIVE, f64::max);
    let _ = writeln!(text, "<text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{title}</text>");
    for (at, (colour, name)) in [(OURS, "Atelier"), (PEER, "llama-server, same file")].iter().enumerate() {
        let x = WIDTH - 270.0 + 80.0 * at as f64;
        let _ = writeln!(text, "<rect x=\"{x}\" y=\"14\" width=\"11\" height=\"11\" fill=\"{colour}\"/>");
        let _ = writeln!(text, "<text x=\"{}\" y=\"24\">{name}</text>", x + 16.0);
    }
    let step = (WIDTH - LEFT - 20.0) / bars.len().max(1) as f64;
    for (number, bar) in bars.iter().enumerate() {
        let x = LEFT + step * number as f64;
        for (at, (value, colour)) in [(bar.ours, OURS), (bar.peer, PEER)].into_iter().enumerate() {
            let (x, width) = (x + step * (0.1 + 0.4 * at as f64), step * 0.38);
            let height = (BOTTOM - TOP) * value / largest;
            let y = BOTTOM - height;
            let _ = writeln!(
                text,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
            );
            let figure = if value < 10.0 { format!("{value:.2}") } else { format!("{value:.0}") };
            let (x, y) = (x + width / 2.0, y - 4.0);
            let _ = writeln!(text, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{figure}</text>");
        }
        for (line, part) in bar.label.split(", ").enumerate() {
            let (x, y) = (x + step / 2.0, BOTTOM + 16.0 + 14.0 * line as f64);
            let _ = writeln!(text, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{part}</text>");
        }
    }
    let _ = writeln!(
        text,
        "<line x1=\"{LEFT}\" y1=\"{BOTTOM}\" x2=\"{}\" y2=\"{BOTTOM}\" stroke=\"black\"/>",
        WIDTH - 20.0
    );
}
