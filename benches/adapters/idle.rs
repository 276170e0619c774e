//! What a registered user costs in memory while it is away: every user comes once, and then none does.

use std::sync::Arc;

use adapters::{AdapterCache, Answer, CacheSettings, Head, Source};
use anyhow::Context;
use kernels::Weight;
use peft::{AdapterWeights, BaseShape, FrozenBase, LoraConfig, LoraTensors, LoraWeights, Precision};
use store::{AdapterFiles, Rest};
use types::{AdapterId, GenerationId, SiteId};

use crate::row::{Goal, Row};
use crate::users::user;

/// Bytes of each tier.
const BUDGET: usize = 8 << 20;

/// A base so small that a hundred thousand adapters load in seconds; what is kept of an idle user does not depend on it.
struct Small(Weight);

impl FrozenBase for Small {
    fn shape(&self) -> BaseShape {
        BaseShape { layers: 1, dims: [(16, 16); 7] }
    }

    fn hash(&self) -> [u8; 32] {
        [0; 32]
    }

    fn linear(&self, _: SiteId) -> (&Weight, Option<&[f32]>) {
        (&self.0, None)
    }
}

/// Every user has the same adapter of rank 8 on q and v.
struct Everyone(AdapterFiles);

impl Source for Everyone {
    fn moves(&self, _: &AdapterId) -> u64 {
        0
    }

    fn head<'a>(&'a self, _: &'a AdapterId) -> Answer<'a, Option<Head>> {
        let head = Head { generation: GenerationId::from_bytes([1; 32]), base: [0; 32] };
        Box::pin(async move { Ok(Some(head)) })
    }

    fn files<'a>(&'a self, _: &'a AdapterId, _: GenerationId, _: Arc<Rest>) -> Answer<'a, AdapterFiles> {
        let files = self.0.clone();
        Box::pin(async move { Ok(files) })
    }
}

fn resident() -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024.0)
}

/// Bytes per user beyond both budgets.
pub(crate) async fn row(users: usize) -> anyhow::Result<Row> {
    let base = Small(Weight::from_f32(16, 16, &[0.1; 256])?);
    let shape = base.shape();
    let config = LoraConfig::oppu();
    let mut sites = vec![None; shape.sites()];
    for (id, rank, scale) in config.sites(&shape)? {
        let (a, b) = (vec![0.1; rank * 16], vec![0.1; 16 * rank]);
        sites[id.index()] = Some(LoraTensors { rank, scale, a, b, ..LoraTensors::default() });
    }
    let files = AdapterWeights::from(LoraWeights { config, sites }).to_files(&shape, "small")?;
    let files = AdapterFiles { config: files.config.into(), weights: files.weights.into() };
    let settings = CacheSettings { page_bytes: Some(4096), ..CacheSettings::new(Precision::Fast, BUDGET) };
    let before = resident()?;
    let cache = AdapterCache::over(Arc::new(Everyone(files)), Arc::new(base), settings);
    for number in 0..users {
        cache.acquire(&user("idle", number)?).await?;
    }
    let kept = cache.residency();
    let beyond = resident()? - before - (kept.host.bytes + kept.device.budget) as f64;
    let name =
        format!("memory of an idle user of {users} beyond the caches' budgets, bytes (other side: 1 KiB)");
    Ok(Row::against(name, &[beyond.max(0.0) / users as f64], &[1024.0]).goal(Goal::AtMost(1.0)))
}
