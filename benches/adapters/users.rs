//! Users with random adapters on q and v, published in the store.

use anyhow::Context;
use model::BaseModel;
use peft::{Adapter, AdapterWeights, LoraConfig, LoraTensors, LoraWeights, Precision, generation_id};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use store::{AdapterFiles, NewGeneration, Store};
use types::{AdapterId, GenerationId};

/// A user of a group.
pub(crate) fn user(group: &str, number: usize) -> anyhow::Result<AdapterId> {
    Ok(AdapterId::new("bench".parse()?, format!("{group}-{number}").parse()?))
}

/// Weights of this rank, small and random.
pub(crate) fn weights(base: &BaseModel, rank: usize, seed: u64) -> LoraWeights {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut random = |len: usize| (0..len).map(|_| rng.random_range(-0.01..0.01)).collect();
    let shape = base.shape();
    let config = LoraConfig { r: rank, alpha: rank as f64, ..LoraConfig::oppu() };
    let mut sites = vec![None; shape.sites()];
    for (id, rank, scale) in config.sites(&shape).unwrap_or_default() {
        let (out, input) = shape.dims(id.site);
        let (a, b) = (random(rank * input), random(out * rank));
        sites[id.index()] = Some(LoraTensors { rank, scale, a, b, ..LoraTensors::default() });
    }
    LoraWeights { config, sites }
}

/// An adapter of this rank as host memory has it.
pub(crate) fn built(base: &BaseModel, rank: usize) -> anyhow::Result<Adapter> {
    Ok(Adapter::build(&weights(base, rank, 0).into(), base, Precision::Fast)?)
}

/// Makes it the user's first adapter, or replaces the head.
pub(crate) async fn publish(
    store: &Store,
    base: &BaseModel,
    id: &AdapterId,
    weights: &LoraWeights,
) -> anyhow::Result<GenerationId> {
    let head = store.head(id).await?.map(|head| head.id);
    Ok(publish_after(store, base, id, weights, head).await?.0)
}

/// Makes it the user's head after `head`; what was published.
pub(crate) async fn publish_after(
    store: &Store,
    base: &BaseModel,
    id: &AdapterId,
    weights: &LoraWeights,
    head: Option<GenerationId>,
) -> anyhow::Result<(GenerationId, AdapterFiles)> {
    let files = AdapterWeights::from(weights.clone()).to_files(&base.shape(), "bench")?;
    let generation = NewGeneration {
        id: generation_id(base.hash(), &files.config, &files.weights),
        parent: head,
        base: *base.hash(),
        config: files.config.into(),
        weights: files.weights.into(),
        meta: json!({}),
    };
    let files = generation.files();
    let record = store.publish(id, generation, head, None).await;
    Ok((record.with_context(|| format!("cannot publish {}", id.owner))?.id, files))
}
