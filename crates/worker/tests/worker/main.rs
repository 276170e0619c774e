//! The worker over a real store and a tiny random model.
#![expect(clippy::unwrap_used, reason = "tests")]

mod alive;
mod bad_runs;
mod basics;
mod damaged;
mod forgetting;
mod growing;
mod kills;
mod pauses;
mod rig;
mod sudden_death;
mod together;
mod turns;
