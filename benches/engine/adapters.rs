//! Random adapters: one set of weights, as a lease for our engine, as peft's files, and as llama.cpp's GGUF.

use std::sync::Arc;

use anyhow::Context;
use model::BaseModel;
use peft::{
    Adapter, BaseShape, Lease, LoraConfig, LoraTensors, LoraWeights, PagePool, Storage, TargetModules,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use store::{NewGeneration, Store};
use types::{AdapterId, DEFAULT_MAX_RANK, GenerationId, Site, SiteId};

const RANK: usize = 8;
/// GGUF's alignment of tensors unless a key says otherwise.
const ALIGNMENT: usize = 32;

/// Rank-8 weights on these sites, small and random.
pub(crate) fn weights(shape: &BaseShape, seed: u64, sites: &[Site]) -> LoraWeights {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut random = |len: usize| (0..len).map(|_| rng.random_range(-0.01..0.01)).collect();
    let tensors = shape.site_ids().map(|id| {
        let (out, input) = shape.dims(id.site);
        sites.contains(&id.site).then(|| LoraTensors {
            rank: RANK,
            scale: 1.0,
            a: random(RANK * input),
            b: random(out * RANK),
            ..LoraTensors::default()
        })
    });
    let sites_of = tensors.collect();
    let names = sites.iter().map(|site| site.module().to_owned()).collect();
    let config = LoraConfig { target_modules: TargetModules::Names(names), ..LoraConfig::oppu() };
    LoraWeights { config, sites: sites_of }
}

/// The name of the user with this adapter.
pub(crate) fn user(number: usize) -> String {
    format!("user-{number}")
}

fn adapter_id(number: usize) -> anyhow::Result<AdapterId> {
    Ok(AdapterId::new("default".parse()?, user(number).parse()?))
}

/// The adapters in pages of a pool, as the engine takes them in a server.
pub(crate) fn leases(
    base: &BaseShape,
    weights: &[LoraWeights],
    storage: Storage,
) -> anyhow::Result<Vec<Lease>> {
    let page = PagePool::page_bytes_for(base, storage, DEFAULT_MAX_RANK);
    let adapters: Vec<Adapter> = weights.iter().map(|weights| Adapter::new(weights, storage)).collect();
    let pages: usize = adapters.iter().filter_map(|adapter| adapter.pages(page)).sum();
    let pool = PagePool::new(page, pages * page);
    let lease = |(number, adapter): (usize, &Adapter)| {
        Ok(Lease {
            id: adapter_id(number)?,
            generation: GenerationId::from_bytes([u8::try_from(number)?; 32]),
            adapter: Arc::new(adapter.upload(&pool, &mut || ()).context("the pool is too small")?),
        })
    };
    adapters.iter().enumerate().map(lease).collect()
}

/// The two files of peft.
pub(crate) fn peft_files(weights: &LoraWeights, shape: &BaseShape) -> anyhow::Result<(Vec<u8>, Vec<u8>)> {
    Ok((weights.config.to_json("bench"), weights.to_safetensors(shape)?))
}

/// Makes it the user's adapter.
pub(crate) async fn publish(
    store: &Store,
    base: &BaseModel,
    number: usize,
    weights: &LoraWeights,
) -> anyhow::Result<()> {
    let (config, weights) = peft_files(weights, &base.shape())?;
    let generation = NewGeneration {
        id: peft::generation_id(base.hash(), &config, &weights),
        parent: None,
        base: *base.hash(),
        config: config.into(),
        weights: weights.into(),
        meta: json!({}),
    };
    store.publish(&adapter_id(number)?, generation, None, None).await?;
    Ok(())
}

/// A LoRA file as llama.cpp reads it, in float32 as its converter writes it. (A GGUF Llama has the rows of q and k in
/// another order than peft's B; for the time it takes that makes no difference, and they are left as they are.)
pub(crate) fn gguf(weights: &LoraWeights, shape: &BaseShape) -> anyhow::Result<Vec<u8>> {
    let mut tensors: Vec<(String, [usize; 2], &[f32])> = Vec::new();
    for id in shape.site_ids() {
        let Some(site) = weights.sites.get(id.index()).and_then(Option::as_ref) else { continue };
        let (out, input) = shape.dims(id.site);
        // GGUF names the innermost dimension first.
        tensors.push((tensor_name(id, "a"), [input, site.rank], &site.a));
        tensors.push((tensor_name(id, "b"), [site.rank, out], &site.b));
    }
    let texts = [("general.type", "adapter"), ("general.architecture", "llama"), ("adapter.type", "lora")];
    let mut file = Vec::new();
    file.extend(b"GGUF");
    file.extend(3_u32.to_le_bytes());
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((texts.len() as u64 + 1).to_le_bytes());
    for (key, value) in texts {
        put_text(&mut file, key);
        file.extend(8_u32.to_le_bytes());
        put_text(&mut file, value);
    }
    put_text(&mut file, "adapter.lora.alpha");
    file.extend(6_u32.to_le_bytes());
    file.extend((RANK as f32).to_le_bytes());
    let mut offset = 0;
    for (name, dims, values) in &tensors {
        put_text(&mut file, name);
        file.extend((dims.len() as u32).to_le_bytes());
        for dim in dims {
            file.extend((*dim as u64).to_le_bytes());
        }
        file.extend(0_u32.to_le_bytes());
        file.extend((offset as u64).to_le_bytes());
        offset = (offset + size_of_val(*values)).next_multiple_of(ALIGNMENT);
    }
    for (name, dims, values) in &tensors {
        (dims[0] * dims[1] == values.len()).then_some(()).context(name.clone())?;
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
    Ok(file)
}

fn put_text(file: &mut Vec<u8>, text: &str) {
    file.extend((text.len() as u64).to_le_bytes());
    file.extend(text.as_bytes());
}

fn tensor_name(id: SiteId, which: &str) -> String {
    let site = model::gguf_site_name(id.site);
    format!("blk.{}.{site}.weight.lora_{which}", id.layer)
}
