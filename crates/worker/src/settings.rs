//! The worker's numbers.

use std::collections::BTreeMap;

use personalize::Holdout;
use store::Policy;
use train::Recipe;
use types::{DEFAULT_MAX_RANK, TenantId, TrainingOptions};

/// The worker's numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// How adapters are trained, where neither tenant nor job says otherwise.
    pub recipe: Recipe,
    /// What tenants have in place of the recipe's numbers.
    pub tenants: BTreeMap<TenantId, TrainingOptions>,
    /// What is held out for the gate.
    pub holdout: Holdout,
    /// What the gate asks for.
    pub gate: GateRules,
    /// How adapters grow with their histories.
    pub growth: Growth,
    /// When a job is worth doing. Who asks for a training (`POST /v1/users/{user}/train`) waits for none of it; nor does
    /// anybody longer than `max_staleness_millis`, however often the gate has said no.
    pub policy: Policy,
    /// Largest rank of an adapter.
    pub max_rank: usize,
    /// Fewest items a user must have.
    pub min_items: usize,
    /// Jobs that are trained at once, if so many wait: a little more is learnt an hour, but all end with the last.
    pub jobs_at_once: usize,
    /// Threads of the arithmetic.
    pub threads: usize,
    /// How long a claim lasts without progress.
    pub lease_millis: i64,
    /// Claims after which a job is given up that ends in none of them and gets no further than in the first.
    pub max_attempts: u32,
    /// Time between two checkpoints of a job.
    pub checkpoint_millis: u64,
    /// Share of the time, above 0 to 1, that training takes even while requests run.
    pub floor: f64,
    /// Generations of a user that are kept, the head among them.
    pub keep_generations: usize,
    /// How often to look for jobs that nobody announced.
    pub poll_millis: u64,
}

/// What a generation must be to become head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateRules {
    /// The paired tests' level: how often, at most, a lead that is mere chance may pass.
    ///
    /// With n held-out items the smallest p is 2^-n, so at 0.05 no fewer than five items can decide: with fewer the
    /// head stays.
    pub level: f64,
    /// The share of the other's loss by which the new one must be ahead: the tests ask whether it is ahead by more. A
    /// smaller lead changes no answer that anyone would notice, and every adapter that has learnt where answers end has
    /// one, even of noise.
    pub min_gain: f64,
    /// Largest root mean square, over an adapted layer's outputs, of the norm of what the adapter adds to a row of
    /// weights. A row of a base layer has a norm of about 1.
    pub max_norm: f64,
}

/// How an adapter grows with its history.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Growth {
    /// Old items that are learnt again beside new ones, per new item.
    pub replay: f64,
    /// At least so many old items, if there are.
    pub min_replay: usize,
    /// Updates, published or not, after which the whole history is learnt from fresh weights.
    pub full_every: u32,
    /// Largest rise of the loss on old items by an update, and by all updates since everything was learnt from fresh
    /// weights, as a share; beyond it the whole history is learnt instead.
    pub max_drift: f64,
    /// Old items that drift is measured on: so many of all, and so many of those learnt from fresh weights.
    pub drift_items: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            recipe: Recipe::oppu(),
            tenants: BTreeMap::new(),
            holdout: Holdout { share: 0.2, min: 5, max: 64 },
            gate: GateRules { level: 0.05, min_gain: 0.005, max_norm: 10.0 },
            growth: Growth { replay: 1.0, min_replay: 8, full_every: 8, max_drift: 0.05, drift_items: 32 },
            policy: Policy {
                min_new_items: 1,
                debounce_millis: 500,
                rest_millis: 5_000,
                max_staleness_millis: 600_000,
                turn_millis: 300_000,
            },
            max_rank: DEFAULT_MAX_RANK,
            min_items: 8,
            jobs_at_once: 1,
            threads: 1,
            lease_millis: 60_000,
            max_attempts: 5,
            checkpoint_millis: 10_000,
            floor: 0.2,
            keep_generations: 10,
            poll_millis: 5_000,
        }
    }
}
