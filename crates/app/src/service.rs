//! The server with its worker: loads the model, opens the store, starts both roles.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use adapters::{AdapterCache, Busy, CacheSettings};
use anyhow::{Context, bail};
use engine::{Engine, ModelEngine};
use model::{BaseModel, LoadOptions, Loaded};
use peft::{PagePool, Storage};
use server::{App, AppState, Limits};
use store::{Policy, Store};
use telemetry::Metrics;
use text::Tokenizer;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use types::{SystemClock, TrainingLimits};
use worker::{Worker, WorkerError};

use crate::settings::{MIB, PrecisionArg, ServiceArgs};
use crate::{fetch, keys, model_path, task_adapter};

/// A running service.
pub struct Service {
    /// The address it listens on.
    pub address: SocketAddr,
    /// The shared base.
    pub base: Arc<BaseModel>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its name in the API.
    pub model_name: String,
    store: Store,
    stop: CancellationToken,
    server: JoinHandle<std::io::Result<()>>,
    worker: Option<JoinHandle<Result<(), WorkerError>>>,
}

impl Service {
    /// Starts the service; it runs until [`Service::stop`].
    ///
    /// # Errors
    /// When a setting is wrong, the model cannot be loaded, the data folder cannot be opened or the address cannot
    /// be had.
    pub async fn start(args: &ServiceArgs, data: &Path) -> anyhow::Result<Self> {
        // What is wrong with the settings is said at once and does not wait for the model.
        let auth = keys::auth(args)?;
        let mut worker_settings = worker_settings(args)?;
        let metrics = Metrics::default();
        let cache_settings = cache_settings(args, &metrics)?;
        // A taken port is the commonest mistake.
        let listener = TcpListener::bind(args.listen)
            .await
            .with_context(|| format!("cannot listen on {}", args.listen))?;
        let address = listener.local_addr()?;

        let cache = fetch::cache_folder(args.cache.as_deref())?;
        let path = model_path::find(args.model.as_deref(), &cache).await?;
        let model_name = model_name(args.model_name.as_deref(), &path)?;
        let options = LoadOptions { max_context: args.max_context };
        let model_file = path.clone();
        let (task, mode) = (args.task_adapter.clone(), args.task_adapter_mode.into());
        let load = move || -> anyhow::Result<Loaded> {
            let loaded = model::load(&model_file, options)?;
            let Some(folder) = task else { return Ok(loaded) };
            Ok(Loaded { model: task_adapter::apply(loaded.model, &folder, mode)?, ..loaded })
        };
        let Loaded { model, tokenizer } = tokio::task::spawn_blocking(load).await??;
        let Some(source) = tokenizer else {
            bail!(
                "{}: there is no tokenizer (tokenizer.json, or the tokenizer.* keys of a GGUF file)",
                path.display()
            );
        };
        let tokenizer =
            Tokenizer::new(&source).with_context(|| format!("tokenizer of {}", path.display()))?;
        let base = Arc::new(model);
        // How large the base is and which blocks there are is known by now.
        worker_settings.recipe = args.training.recipe(base.parameters());
        let limits = TrainingLimits { layers: base.shape().layers, ..args.training_limits() };
        for (tenant, options) in &worker_settings.tenants {
            options.check(&limits).with_context(|| format!("--tenant-training: {tenant}"))?;
        }
        let CacheSettings { storage, device_bytes, max_rank, .. } = cache_settings;
        let page = PagePool::page_bytes_for(&base.shape(), storage, max_rank);
        if page > device_bytes {
            let needed = page.div_ceil(MIB);
            bail!("--adapter-device-mib: must be at least {needed} for this model and --max-rank {max_rank}");
        }

        let store = Store::open(data, Arc::new(SystemClock)).await?;
        let engine = ModelEngine::start(Arc::clone(&base), engine_settings(args, &tokenizer))?;
        tokio::spawn(engine.carry());
        let guest = engine.guest();
        let engine: Arc<dyn Engine> = Arc::new(engine);
        let serving = Arc::clone(&engine);
        let busy: Busy = Arc::new(move || serving.stats().running > 0);
        let adapters =
            AdapterCache::new(store.clone(), base.clone(), CacheSettings { busy, ..cache_settings });
        let on_upload = Arc::new(Notify::new());
        let stop = CancellationToken::new();
        let worker = if args.training.no_training {
            None
        } else {
            let announced = adapters.clone();
            let worker = Worker::new(
                store.clone(),
                Arc::clone(&base),
                tokenizer.clone(),
                worker_settings,
                Arc::new(move |id, head, files| announced.announce(id, head, Some(files))),
            );
            let serving = Arc::clone(&engine);
            let load = move || {
                let stats = serving.stats();
                stats.running + stats.waiting > 0
            };
            let counted = metrics.clone();
            let worker = worker.reporting(Arc::new(move |step| counted.training_step(step.tokens)));
            let worker = worker.beside(Arc::new(load), Arc::new(move || Box::new(guest.visit())));
            Some(tokio::spawn(worker.run(Arc::clone(&on_upload), stop.clone())))
        };
        let app = App::new(AppState {
            engine,
            tokenizer: tokenizer.clone(),
            store: store.clone(),
            adapters,
            model_name: model_name.clone(),
            base: base.clone(),
            limits: Limits { training: limits, ..Limits::default() },
            auth,
            clock: Arc::new(SystemClock),
            metrics,
            on_upload,
        });
        let server = tokio::spawn(server::serve(listener, app, stop.clone()));
        Ok(Self { address, base, tokenizer, model_name, store, stop, server, worker })
    }

    /// Stops accepting, lets running answers finish, hands an unfinished job back and closes the store.
    ///
    /// # Errors
    /// When the server had failed.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.stop.cancel();
        let served = self.server.await;
        if let Some(worker) = self.worker {
            // The training thread looks at the signal after every step.
            match tokio::time::timeout(Duration::from_secs(60), worker).await {
                Ok(Ok(Ok(()))) => {}
                Ok(Ok(Err(error))) => tracing::error!(%error, "the worker had stopped"),
                Ok(Err(error)) => tracing::error!(%error, "the worker had stopped"),
                Err(_) => {
                    tracing::warn!("the worker did not stop in time; its job is taken up at the next start");
                }
            }
        }
        self.store.close().await;
        served??;
        Ok(())
    }
}

/// The name clients write in `model`: no colon (it separates base and user), no blank.
fn model_name(given: Option<&str>, path: &Path) -> anyhow::Result<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    if let Some(name) = given {
        if name.is_empty() || !name.chars().all(is_name) {
            bail!("--model-name: may hold letters, digits and - _ . / only");
        }
        return Ok(name.to_owned());
    }
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let whole = path.file_name().and_then(|name| name.to_str()).unwrap_or("base");
    let stem = whole.strip_suffix(".gguf").unwrap_or(whole);
    // What is left of `Name.Q4_1.gguf` is the model's name, not its number format.
    let is_format = |end: &str| {
        ["Q", "F", "BF", "IQ"].iter().any(|kind| {
            end.strip_prefix(kind).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
    };
    let stem = stem.rsplit_once('.').filter(|(_, end)| is_format(end)).map_or(stem, |(name, _)| name);
    let name: String = stem.chars().map(|c| if is_name(c) { c } else { '-' }).collect();
    Ok(if name.trim_matches('-').is_empty() { "base".to_owned() } else { name })
}

/// Threads that talk to clients.
#[must_use]
pub fn io_threads(given: Option<u16>) -> usize {
    given.map_or_else(|| cores().div_ceil(4), usize::from)
}

/// Threads that run at once.
#[must_use]
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The engine's sizes as the settings ask for.
#[must_use]
pub fn engine_settings(args: &ServiceArgs, tokenizer: &Tokenizer) -> engine::Settings {
    engine::Settings {
        batch: args.batch.into(),
        queue: args.queue.into(),
        step_tokens: args.step_tokens as usize,
        kv_bytes: args.kv_mib as usize * MIB,
        prefix_cache: !args.no_prefix_cache,
        guest_floor: args.training.train_floor,
        threads: args.threads.map_or_else(cores, usize::from),
        precision: args.precision.into(),
        eos: tokenizer.eos_ids().to_vec(),
    }
}

fn cache_settings(args: &ServiceArgs, metrics: &Metrics) -> anyhow::Result<CacheSettings> {
    let storage = args.adapter_storage();
    if storage == Storage::Int8 && args.precision == PrecisionArg::Exact {
        bail!("--adapter-storage int8: needs --precision fast, which quantises activations");
    }
    let metrics = metrics.clone();
    let device_bytes = args.adapter_device_mib as usize * MIB;
    Ok(CacheSettings {
        host_bytes: args.adapter_host_mib as usize * MIB,
        max_rank: args.max_rank.into(),
        on_load: Arc::new(move |time| metrics.adapter_load(time.as_secs_f64())),
        ..CacheSettings::new(storage, device_bytes)
    })
}

fn worker_settings(service: &ServiceArgs) -> anyhow::Result<worker::Settings> {
    let (args, limits) = (&service.training, service.training_limits());
    let defaults = worker::Settings::default();
    // The base is not known yet; what nobody asked for is within the limits for any.
    let recipe = args.recipe(usize::MAX);
    recipe.check().context("training settings")?;
    if args.rank > limits.rank {
        bail!("--rank {}: must be at most --max-rank, {}", args.rank, limits.rank);
    }
    if !(args.train_floor > 0.0 && args.train_floor <= 0.9) {
        bail!("--train-floor: must be above 0, at most 0.9");
    }
    if !(args.gate_level > 0.0 && args.gate_level <= 0.5) {
        bail!("--gate-level: must be above 0, at most 0.5");
    }
    Ok(worker::Settings {
        recipe,
        tenants: args.tenants(&limits)?,
        max_rank: limits.rank,
        min_items: args.min_items,
        threads: args.train_threads.map_or_else(cores, usize::from),
        gate: worker::GateRules { level: args.gate_level, ..defaults.gate },
        growth: worker::Growth {
            replay: f64::from(args.replay_percent) / 100.0,
            full_every: args.full_every,
            ..defaults.growth
        },
        policy: Policy {
            min_new_items: args.min_new_items,
            debounce_millis: i64::from(args.debounce_ms),
            max_staleness_millis: i64::from(args.max_staleness_s) * 1000,
            turn_millis: i64::from(args.train_turn_s) * 1000,
            ..defaults.policy
        },
        jobs_at_once: args.train_jobs.into(),
        checkpoint_millis: u64::from(args.checkpoint_s) * 1000,
        floor: args.train_floor,
        ..defaults
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_files_and_are_plain() {
        let name = |path: &str| model_name(None, Path::new(path)).unwrap_or_default();
        assert_eq!(name("/models/SmolLM2-135M-Instruct.Q4_1.gguf"), "SmolLM2-135M-Instruct");
        assert_eq!(name("/models/Llama-3.2-1B.gguf"), "Llama-3.2-1B");
        assert_eq!(name("/models/my model:v2"), "my-model-v2");
        assert!(model_name(Some("a:b"), Path::new("x")).is_err());
        assert_eq!(model_name(Some("org/base"), Path::new("x")).unwrap_or_default(), "org/base");
    }
}
