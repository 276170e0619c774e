//! How things stand at a scrape: read from engine, cache and queue, written as gauges and counters.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use types::Timestamp;

/// How things stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// When it was taken.
    pub now: Timestamp,
    /// The model thread.
    pub engine: EngineSnapshot,
    /// Adapters in memory.
    pub cache: CacheSnapshot,
    /// Training jobs.
    pub queue: QueueSnapshot,
}

/// The model thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineSnapshot {
    /// Sequences that wait, in the engine's queue and before it.
    pub waiting: usize,
    /// Sequences in the batch.
    pub running: usize,
    /// Sequences that fit a batch, so also adapters that can run side by side.
    pub batch: usize,
    /// KV blocks that sequences hold.
    pub kv_blocks_used: usize,
    /// KV blocks that no sequence holds, kept for those to come.
    pub kv_blocks_idle: usize,
    /// KV blocks in all.
    pub kv_blocks: usize,
    /// Different adapters in the last step.
    pub adapters_running: usize,
    /// Steps done.
    pub steps: u64,
    /// Prompt tokens processed.
    pub prompt_tokens: u64,
    /// Sequences whose prompt began with blocks that were there already.
    pub prefix_hits: u64,
    /// Prompt tokens that were there already.
    pub prefix_tokens: u64,
    /// Blocks kept for sequences to come that had to make room.
    pub prefix_evictions: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Sequences preempted for want of KV blocks.
    pub preemptions: u64,
    /// Sequences whose reader went away.
    pub cancelled: u64,
    /// Sequences that ended by a fault.
    pub failed: u64,
}

/// Adapters in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheSnapshot {
    /// Host memory.
    pub host: TierSnapshot,
    /// Slots, which requests lease.
    pub device: TierSnapshot,
    /// Requests whose adapter was in a slot.
    pub hits: u64,
    /// Requests whose adapter was in host memory.
    pub host_hits: u64,
    /// Requests that had to wait for a load.
    pub misses: u64,
    /// Loads from the store.
    pub loads: u64,
    /// Adapters written to the store in the form that they are served in.
    pub packed: u64,
    /// Copies from host memory into slots.
    pub uploads: u64,
    /// Requests that wait for a load or for room.
    pub waiting: usize,
}

/// One tier of adapters in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierSnapshot {
    /// How many.
    pub adapters: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Bytes they may have.
    pub budget: usize,
    /// Adapters dropped for want of room.
    pub evictions: u64,
}

/// Training jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueSnapshot {
    /// Jobs that wait.
    pub queued: u64,
    /// Jobs that a worker holds.
    pub running: u64,
    /// When the job that has waited longest was enqueued.
    pub oldest_queued: Option<Timestamp>,
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut out = Writer(encoder);
        self.gateway(&mut out)?;
        self.engine.write(&mut out)?;
        self.cache.write(&mut out)?;
        self.queue.write(self.now, &mut out)
    }
}

impl Snapshot {
    /// The Kubernetes gateway's model-server protocol. The lists of adapters stay empty: their names are users.
    fn gateway(&self, out: &mut Writer<'_>) -> Result<(), fmt::Error> {
        let engine = &self.engine;
        out.gauge("vllm:num_requests_waiting", "Sequences that wait", engine.waiting as f64)?;
        out.gauge("vllm:num_requests_running", "Sequences in the batch", engine.running as f64)?;
        let used = engine.kv_blocks_used as f64 / engine.kv_blocks.max(1) as f64;
        out.gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1", used)?;
        let info = Family::<[(&'static str, String); 3], Gauge>::default();
        let labels = [
            ("max_lora", engine.batch.to_string()),
            ("running_lora_adapters", String::new()),
            ("waiting_lora_adapters", String::new()),
        ];
        info.get_or_create(&labels).set(self.now.seconds());
        let help = "Unix time; adapters are users and therefore not listed";
        out.metric("vllm:lora_requests_info", help, &info)
    }
}

impl EngineSnapshot {
    fn write(&self, out: &mut Writer<'_>) -> Result<(), fmt::Error> {
        out.gauge("atelier_adapters_running", "Adapters in the last step", self.adapters_running as f64)?;
        out.counter("atelier_steps", "Forward passes", self.steps)?;
        out.counter("atelier_prompt_tokens", "Prompt tokens processed", self.prompt_tokens)?;
        out.gauge(
            "atelier_kv_blocks_idle",
            "KV blocks kept for sequences to come",
            self.kv_blocks_idle as f64,
        )?;
        out.counter("atelier_prefix_hits", "Sequences that began like an earlier one", self.prefix_hits)?;
        out.counter("atelier_prefix_tokens", "Prompt tokens taken from earlier ones", self.prefix_tokens)?;
        out.counter("atelier_prefix_evictions", "Kept KV blocks that made room", self.prefix_evictions)?;
        out.counter("atelier_generated_tokens", "Tokens generated", self.generated_tokens)?;
        out.counter("atelier_preemptions", "Sequences preempted for want of KV blocks", self.preemptions)?;
        out.counter("atelier_sequences_cancelled", "Sequences whose reader went away", self.cancelled)?;
        out.counter("atelier_sequences_failed", "Sequences that ended by a fault", self.failed)
    }
}

impl CacheSnapshot {
    fn write(&self, out: &mut Writer<'_>) -> Result<(), fmt::Error> {
        let tiers = [("host", &self.host), ("device", &self.device)];
        type Value = fn(&TierSnapshot) -> usize;
        let gauges: [(&str, &str, Value); 3] = [
            ("atelier_adapter_cache_adapters", "Adapters in memory, by tier", |tier| tier.adapters),
            ("atelier_adapter_cache_bytes", "Bytes of adapters in memory, by tier", |tier| tier.bytes),
            ("atelier_adapter_cache_budget_bytes", "Bytes that adapters may have, by tier", |tier| {
                tier.budget
            }),
        ];
        for (name, help, value) in gauges {
            let family = Family::<[(&'static str, &'static str); 1], Gauge>::default();
            for (label, tier) in tiers {
                family.get_or_create(&[("tier", label)]).set(value(tier) as i64);
            }
            out.metric(name, help, &family)?;
        }
        let evictions = Family::<[(&'static str, &'static str); 1], Counter>::default();
        for (label, tier) in tiers {
            evictions.get_or_create(&[("tier", label)]).inc_by(tier.evictions);
        }
        out.metric(
            "atelier_adapter_cache_evictions",
            "Adapters dropped for want of room, by tier",
            &evictions,
        )?;
        let hits = Family::<[(&'static str, &'static str); 1], Counter>::default();
        hits.get_or_create(&[("tier", "host")]).inc_by(self.host_hits);
        hits.get_or_create(&[("tier", "device")]).inc_by(self.hits);
        out.metric("atelier_adapter_cache_hits", "Requests whose adapter was in memory, by tier", &hits)?;
        out.counter("atelier_adapter_cache_misses", "Requests that waited for a load", self.misses)?;
        out.counter("atelier_adapter_cache_loads", "Adapter loads from the store", self.loads)?;
        let help = "Adapters written to the store in the form that they are served in";
        out.counter("atelier_adapter_cache_packed", help, self.packed)?;
        out.counter("atelier_adapter_cache_uploads", "Adapters copied into slots", self.uploads)?;
        out.gauge("atelier_adapter_cache_waiting", "Requests that wait for an adapter", self.waiting as f64)
    }
}

impl QueueSnapshot {
    fn write(&self, now: Timestamp, out: &mut Writer<'_>) -> Result<(), fmt::Error> {
        let jobs = Family::<[(&'static str, &'static str); 1], Gauge>::default();
        jobs.get_or_create(&[("state", "queued")]).set(self.queued as i64);
        jobs.get_or_create(&[("state", "running")]).set(self.running as i64);
        out.metric("atelier_jobs", "Open training jobs", &jobs)?;
        let age = self.oldest_queued.map_or(0, |since| now.0.saturating_sub(since.0).max(0));
        out.gauge("atelier_oldest_queued_job_seconds", "Age of the oldest queued job", age as f64 / 1e3)
    }
}

struct Writer<'a>(DescriptorEncoder<'a>);

impl Writer<'_> {
    fn gauge(&mut self, name: &str, help: &str, value: f64) -> Result<(), fmt::Error> {
        self.metric(name, help, &ConstGauge::new(value))
    }

    /// `name` without its suffix `_total`.
    fn counter(&mut self, name: &str, help: &str, value: u64) -> Result<(), fmt::Error> {
        self.metric(name, help, &ConstCounter::new(value))
    }

    fn metric(&mut self, name: &str, help: &str, metric: &impl EncodeMetric) -> Result<(), fmt::Error> {
        let encoder = self.0.encode_descriptor(name, help, None, metric.metric_type())?;
        metric.encode(encoder)
    }
}
