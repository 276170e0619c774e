//! Atelier to itself: what adapters cost in a batch, what a batch gains, and how calm it stays under long prompts.

use peft::{Lease, Storage};
use types::Site;

use crate::Bench;
use crate::adapters::{self, weights};
use crate::ours::{Batch, Job, Ours};
use crate::progress::progress;
use crate::row::{Goal, Row, percentile};

const USERS: usize = 16;
/// Users who run while long prompts arrive.
const RUNNING: usize = 8;
const LONG_PROMPT: usize = 2_000;
/// The two sets of sites, with the goals for different / same and for adapters / none.
const SITES: [(&str, &[Site], f64, f64); 2] =
    [("q and v", &[Site::Q, Site::V], 0.97, 0.95), ("all seven sites", &Site::ALL, 0.90, 0.85)];

/// The rows.
pub(crate) fn rows(bench: &Bench, ours: &Ours) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    let progress = progress("batches", bench.runs * (4 * 3 + 2 + 2));
    let kept = [("", Storage::Int8), (", in bfloat16", Storage::Bf16)];
    for ((name, sites, same_goal, none_goal), (suffix, storage)) in
        SITES.into_iter().flat_map(|sites| kept.map(|kept| (sites, kept)))
    {
        let name = format!("{name}{suffix}");
        let leases = leases(ours, sites, storage)?;
        let one: Vec<Lease> = vec![leases[0].clone(); USERS];
        let mut speeds: [Vec<f64>; 3] = Default::default();
        for _ in 0..bench.runs {
            for (speeds, leases) in speeds.iter_mut().zip([&leases[..], &one[..], &[]]) {
                speeds.push(decode(ours, USERS, leases)?.decode_rate());
                progress.inc(1);
            }
        }
        let [different, same, none] = &speeds;
        let title = format!("16 different adapters / all the same, rank 8, {name}, decode tok/s");
        rows.push(Row::paired(title, different, same).goal(Goal::AtLeast(same_goal)));
        let title = format!("rank 8 for every row (16 different) / none, batch 16, {name}, decode tok/s");
        rows.push(Row::paired(title, different, none).goal(Goal::AtLeast(none_goal)));
    }
    let others = leases(ours, SITES[0].1, Storage::Int8)?;
    let sides = alternate(bench.runs, &progress, |with_others| {
        // Those without come first; a batch's rows go in step, so their rate is half of the whole.
        let leases = if with_others { &others[..USERS / 2] } else { &[] };
        Ok(decode(ours, USERS, leases)?.decode_rate() / 2.0)
    })?;
    let title = "8 users without adapter, 8 others with (q and v) / adapters disabled, decode tok/s of the 8";
    rows.push(Row::paired(title, &sides[0], &sides[1]).goal(Goal::AtLeast(0.98)));
    let sides = alternate(bench.runs, &progress, |batch| {
        Ok(decode(ours, if batch { USERS } else { 1 }, &[])?.decode_rate())
    })?;
    rows.push(Row::paired("batch 16 / batch 1, decode tok/s", &sides[0], &sides[1]).goal(Goal::AtLeast(8.0)));
    progress.finish_and_clear();
    Ok(rows)
}

/// Eight users who decode, with and without long prompts beside them.
pub(crate) fn prompts(bench: &Bench, ours: &Ours) -> anyhow::Result<Vec<Row>> {
    let progress = progress("long prompts", bench.runs * 2);
    let mut waits = Vec::new();
    let sides = alternate(bench.runs, &progress, |busy| {
        // Nearly every step has a piece of a long prompt in it, and a prompt comes to its end within about 700.
        let jobs = jobs(RUNNING, if bench.quick { 256 } else { 1_000 }, &[]);
        let batch = if busy {
            let (batch, waited) = ours.run_beside(jobs, LONG_PROMPT)?;
            waits.extend(waited);
            batch
        } else {
            ours.run(jobs)?
        };
        Ok(percentile(&batch.gaps(), 0.99).unwrap_or(f64::NAN))
    })?;
    progress.finish_and_clear();
    let title = "8 users while prompts of 2,000 tokens keep arriving / quiet, p99 between tokens, ms";
    Ok(vec![
        Row::paired(title, &sides[0], &sides[1]).goal(Goal::AtMost(1.5)),
        Row::alone("first token of those prompts, s", &waits),
    ])
}

/// Both sides of a comparison by turns: the measured one (true) and what it is compared with.
fn alternate(
    runs: usize,
    progress: &indicatif::ProgressBar,
    mut measure: impl FnMut(bool) -> anyhow::Result<f64>,
) -> anyhow::Result<[Vec<f64>; 2]> {
    let mut sides: [Vec<f64>; 2] = Default::default();
    for _ in 0..runs {
        for (side, measured) in sides.iter_mut().zip([true, false]) {
            side.push(measure(measured)?);
            progress.inc(1);
        }
    }
    Ok(sides)
}

fn leases(ours: &Ours, sites: &[Site], storage: Storage) -> anyhow::Result<Vec<Lease>> {
    let shape = ours.base.shape();
    let weights: Vec<_> = (0..USERS).map(|user| weights(&shape, user as u64, sites)).collect();
    adapters::leases(&shape, &weights, storage)
}

/// 64 tokens for each user, after a short prompt; the last users have the adapters.
fn decode(ours: &Ours, users: usize, leases: &[Lease]) -> anyhow::Result<Batch> {
    ours.run(jobs(users, 64, leases))
}

fn jobs(users: usize, answer: u32, leases: &[Lease]) -> Vec<Job> {
    let without = users - leases.len();
    let adapter = |user: usize| user.checked_sub(without).map(|at| leases[at].clone());
    (0..users).map(|user| Job { prompt: 8, answer, adapter: adapter(user) }).collect()
}
