//! One user: decoding and prompts, beside llama.cpp's own benchmark.

use anyhow::Context;

use crate::Bench;
use crate::ours::{Job, Ours};
use crate::progress::progress;
use crate::row::{Goal, Row, median};

/// Tokens per second: decoding and prompt, of one side.
#[derive(Default)]
struct Speeds {
    decode: Vec<f64>,
    prompt: Vec<f64>,
}

impl Speeds {
    fn ours(&mut self, ours: &Ours) -> anyhow::Result<()> {
        let job = |prompt, answer| vec![Job { prompt, answer, adapter: None }];
        self.decode.push(ours.run(job(8, 64))?.decode_rate());
        self.prompt.push(512.0 / ours.run(job(512, 1))?.first_token());
        Ok(())
    }

    fn peer(&mut self, (prompt, decode): (f64, f64)) {
        self.decode.push(decode);
        self.prompt.push(prompt);
    }
}

/// The faster of two files.
fn better<'a>(one: &'a [f64], other: &'a [f64]) -> &'a [f64] {
    if median(one) >= median(other) { one } else { other }
}

/// The first four rows.
pub(crate) fn rows(bench: &Bench, ours: &Ours) -> anyhow::Result<Vec<Row>> {
    let requantised = Ours::start(&bench.best).context("our engine on llama.cpp's Q4_0")?;
    let progress = progress("one user", bench.runs * 4);
    let mut speeds: [Speeds; 4] = Default::default();
    for warm in [ours, &requantised] {
        warm.run(vec![Job { prompt: 64, answer: 8, adapter: None }])?;
    }
    for _ in 0..bench.runs {
        let [same, best, peer_same, peer_best] = &mut speeds;
        same.ours(ours)?;
        progress.inc(1);
        peer_same.peer(bench.peer.bench(&bench.model)?);
        progress.inc(1);
        best.ours(&requantised)?;
        progress.inc(1);
        peer_best.peer(bench.peer.bench(&bench.best)?);
        progress.inc(1);
    }
    progress.finish_and_clear();
    let [same, best, peer_same, peer_best] = &speeds;
    let decode = better(&same.decode, &best.decode);
    let prompt = better(&same.prompt, &best.prompt);
    let (peer_decode, peer_prompt) = (&peer_best.decode, &peer_best.prompt);
    Ok(vec![
        Row::against("decode, one user, same Q4_1 file, tok/s", &same.decode, &peer_same.decode)
            .goal(Goal::AtLeast(1.8))
            .floor(290.0),
        Row::against("decode, one user, our best quant / its best (Q4_0), tok/s", decode, peer_decode)
            .goal(Goal::AtLeast(1.3))
            .floor(315.0),
        Row::against("prompt of 512 tokens, same Q4_1 file, tok/s", &same.prompt, &peer_same.prompt)
            .goal(Goal::AtLeast(5.0))
            .floor(4_300.0),
        Row::against("prompt of 512 tokens, our best quant / its best (Q4_0), tok/s", prompt, peer_prompt)
            .goal(Goal::AtLeast(2.0))
            .floor(4_300.0),
    ])
}
