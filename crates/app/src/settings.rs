//! The command line, with its environment variables and defaults.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use model::{Precision, TaskMode};
use peft::{AdapterConfig, LoraConfig, MAX_RANK, Storage};
use train::{Products, Recipe};
use types::{DEFAULT_MAX_RANK, TenantId, TrainingLimits, TrainingOptions};

pub(crate) const MIB: usize = 1 << 20;

/// One model, personal to everyone: serves one frozen base model with an adapter per user, and trains the
/// adapters from the users' histories.
#[derive(Debug, Parser)]
#[command(name = "atelier", version, about, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the HTTP API and train in the background.
    Serve(Box<ServiceArgs>),
    /// Show the whole loop on three real users: upload, train, compare, answer; then keep serving.
    Demo {
        /// End after the table and the answers.
        #[arg(long)]
        exit: bool,
        /// Settings of the server.
        #[command(flatten)]
        service: Box<ServiceArgs>,
    },
    /// Fetch the default model into the cache folder and print its path.
    Fetch {
        /// Folder for what is fetched.
        #[arg(long, env = "ATELIER_CACHE")]
        cache: Option<PathBuf>,
    },
}

/// Everything a server needs to know.
#[derive(Debug, Clone, Args)]
pub struct ServiceArgs {
    /// Address to listen on; port 0 takes a free one. Other than loopback needs --api-key or --api-keys.
    #[arg(long, default_value = "127.0.0.1:8080", env = "ATELIER_LISTEN")]
    pub listen: SocketAddr,
    /// Folder for histories, jobs and adapters. [default: ./atelier-data; demo: in the cache folder]
    #[arg(long, env = "ATELIER_DATA")]
    pub data: Option<PathBuf>,
    /// A GGUF file, a folder in Hugging Face layout, or (feature `hub`) a hub id. [default: SmolLM2-135M-Instruct]
    #[arg(long, env = "ATELIER_MODEL")]
    pub model: Option<String>,
    /// Folder of a LoRA adapter for the task that all users share (HF peft's two files); it becomes part of the base.
    #[arg(long, env = "ATELIER_TASK_ADAPTER")]
    pub task_adapter: Option<PathBuf>,
    /// Where the task adapter goes: `merge` into the weights (quantised ones it acts on become 8-bit), `stack` under the
    /// users' adapters (the weights stay as they are). A DoRA adapter scales the weights themselves and can be merged only;
    /// the start is refused otherwise.
    #[arg(long, default_value = "merge", env = "ATELIER_TASK_ADAPTER_MODE")]
    pub task_adapter_mode: TaskModeArg,
    /// Name of the model in the API. [default: the model's own]
    #[arg(long, env = "ATELIER_MODEL_NAME")]
    pub model_name: Option<String>,
    /// Key that clients must send as bearer token: the operator's, of the tenant `default`.
    #[arg(long, env = "ATELIER_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// JSON file with the keys of tenants: a list of objects with `tenant`, `key` (or `sha256`, its hash in hexadecimal)
    /// and, for an operator's, `"operator": true`. It is read at the start only; --api-key may be given beside it.
    #[arg(long, value_name = "FILE", env = "ATELIER_API_KEYS")]
    pub api_keys: Option<PathBuf>,
    /// Folder for what is fetched. [default: ~/.cache/atelier]
    #[arg(long, env = "ATELIER_CACHE")]
    pub cache: Option<PathBuf>,
    /// Longest sequence, prompt and answer together, in tokens. [default: the model's]
    #[arg(long, env = "ATELIER_MAX_CONTEXT")]
    pub max_context: Option<usize>,
    /// Sequences that run in one batch.
    #[arg(long, default_value_t = 16, env = "ATELIER_BATCH", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub batch: u16,
    /// Sequences that may wait.
    #[arg(long, default_value_t = 128, env = "ATELIER_QUEUE", value_parser = clap::value_parser!(u16).range(1..))]
    pub queue: u16,
    /// Tokens in one step of the model; longer prompts are cut into chunks.
    #[arg(long, default_value_t = 256, env = "ATELIER_STEP_TOKENS", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub step_tokens: u32,
    /// Memory for keys and values, in MiB.
    #[arg(long, default_value_t = 1024, env = "ATELIER_KV_MIB", value_parser = clap::value_parser!(u32).range(1..))]
    pub kv_mib: u32,
    /// Compute every prompt anew, even where it begins like an earlier one.
    #[arg(long, env = "ATELIER_NO_PREFIX_CACHE")]
    pub no_prefix_cache: bool,
    /// Host memory for adapters, in MiB: those of users who were here lately.
    #[arg(long, default_value_t = 256, env = "ATELIER_ADAPTER_HOST_MIB")]
    pub adapter_host_mib: u32,
    /// Memory for adapters in use, in MiB, reserved at the start.
    #[arg(long, default_value_t = 256, env = "ATELIER_ADAPTER_DEVICE_MIB", value_parser = clap::value_parser!(u32).range(1..))]
    pub adapter_device_mib: u32,
    /// How adapters are kept; `int8` wants `--precision fast`. [default: int8, with `--precision exact` f32]
    #[arg(long, env = "ATELIER_ADAPTER_STORAGE")]
    pub adapter_storage: Option<StorageArg>,
    /// Largest rank of an adapter, trained or uploaded. The pages that adapters in use lie in grow with it.
    #[arg(long, default_value_t = DEFAULT_MAX_RANK as u16, env = "ATELIER_MAX_RANK", value_parser = clap::value_parser!(u16).range(1..=MAX_RANK as i64))]
    pub max_rank: u16,
    /// How the model computes: `fast` takes activations and adapters in 8 bits, KV in bfloat16; `exact` all in float32.
    #[arg(long, default_value = "fast", env = "ATELIER_PRECISION")]
    pub precision: PrecisionArg,
    /// Threads of the model. [default: all cores]
    #[arg(long, env = "ATELIER_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Threads that talk to clients. The model's threads are on every core already, and each that wakes puts one of them aside.
    /// [default: one for every four cores]
    #[arg(long, env = "ATELIER_IO_THREADS", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub io_threads: Option<u16>,
    /// Logs as JSON lines.
    #[arg(long, env = "ATELIER_LOG_JSON")]
    pub log_json: bool,
    /// What to log, e.g. `info` or `engine=debug,warn`.
    #[arg(long, default_value = "info", env = "ATELIER_LOG")]
    pub log: String,
    /// How adapters are trained.
    #[command(flatten)]
    pub training: TrainingArgs,
}

/// How adapters are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StorageArg {
    /// float32.
    F32,
    /// bfloat16.
    Bf16,
    /// Eight bits, with a scale for each rank: half the bytes.
    Int8,
}

impl ServiceArgs {
    /// The most that a training may be asked for.
    #[must_use]
    pub fn training_limits(&self) -> TrainingLimits {
        TrainingLimits { rank: self.max_rank.into(), ..TrainingLimits::default() }
    }

    /// How adapters are kept.
    #[must_use]
    pub fn adapter_storage(&self) -> Storage {
        match self.adapter_storage {
            None => Precision::from(self.precision).into(),
            Some(StorageArg::F32) => Storage::F32,
            Some(StorageArg::Bf16) => Storage::Bf16,
            Some(StorageArg::Int8) => Storage::Int8,
        }
    }
}

/// How the model computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrecisionArg {
    /// 8-bit activations for quantised weights, 8-bit adapters, bfloat16 KV.
    Fast,
    /// float32 throughout, as in the reference implementation.
    Exact,
}

impl From<PrecisionArg> for Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::Fast => Self::Fast,
            PrecisionArg::Exact => Self::Exact,
        }
    }
}

/// Where a task adapter goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TaskModeArg {
    /// Into the weights.
    Merge,
    /// Under the users' adapters.
    Stack,
}

impl From<TaskModeArg> for TaskMode {
    fn from(mode: TaskModeArg) -> Self {
        match mode {
            TaskModeArg::Merge => Self::Merge,
            TaskModeArg::Stack => Self::Stack,
        }
    }
}

/// The recipe's numbers: OPPU's, with rates fit for a small base where the base is one.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Training")]
pub struct TrainingArgs {
    /// Do not train: uploads are kept and their jobs wait.
    #[arg(long, env = "ATELIER_NO_TRAINING")]
    pub no_training: bool,
    /// Threads of the training. [default: all cores]
    #[arg(long, env = "ATELIER_TRAIN_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub train_threads: Option<u16>,
    /// Peak learning rate. [default: 1e-4, OPPU's; 2e-3 for a base below a billion parameters]
    #[arg(long, env = "ATELIER_LEARNING_RATE")]
    pub learning_rate: Option<f64>,
    /// Passes over a user's items. [default: 2, OPPU's; 3 for a base below a billion parameters]
    #[arg(long, env = "ATELIER_EPOCHS")]
    pub epochs: Option<u32>,
    /// Items per optimiser step. [default: 16, OPPU's; 4 for a base below a billion parameters]
    #[arg(long, env = "ATELIER_TRAIN_BATCH")]
    pub train_batch: Option<usize>,
    /// Rank of the adapters, at most --max-rank.
    #[arg(long, default_value_t = 8, env = "ATELIER_RANK")]
    pub rank: usize,
    /// Fewest items a user must have to be trained.
    #[arg(long, default_value_t = 8, env = "ATELIER_MIN_ITEMS")]
    pub min_items: usize,
    /// Numbers of tenants in place of these: a JSON object of tenants, each with fields as in an upload's `training`.
    #[arg(long, env = "ATELIER_TENANT_TRAINING")]
    pub tenant_training: Option<String>,
    /// How often a lead by mere chance may pass the gate, above 0 to 0.5.
    #[arg(long, default_value_t = 0.05, env = "ATELIER_GATE_LEVEL")]
    pub gate_level: f64,
    /// New items that a job waits for.
    #[arg(long, default_value_t = 1, env = "ATELIER_MIN_NEW_ITEMS")]
    pub min_new_items: u64,
    /// Milliseconds without further items that a job waits for.
    #[arg(long, default_value_t = 500, env = "ATELIER_DEBOUNCE_MS")]
    pub debounce_ms: u32,
    /// Seconds after which a job waits for no further items, nor because nothing came of the user's last trainings: after
    /// two such in a row the next one waits 5 seconds, and twice as long after each more.
    #[arg(long, default_value_t = 600, env = "ATELIER_MAX_STALENESS_S")]
    pub max_staleness_s: u32,
    /// Seconds after which a job gives way to other users' jobs that wait, and goes on after them where it was.
    #[arg(long, default_value_t = 300, env = "ATELIER_TRAIN_TURN_S")]
    pub train_turn_s: u32,
    /// Old items learnt again beside new ones, in percent of these.
    #[arg(long, default_value_t = 100, env = "ATELIER_REPLAY_PERCENT")]
    pub replay_percent: u32,
    /// Updates, published or not, after which the whole history is learnt from fresh weights; 0 always does.
    #[arg(long, default_value_t = 8, env = "ATELIER_FULL_EVERY")]
    pub full_every: u32,
    /// Jobs that are trained at once, if so many wait: a little more is learnt an hour, but all end with the last.
    #[arg(long, default_value_t = 1, env = "ATELIER_TRAIN_JOBS", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub train_jobs: u16,
    /// Memory for activations that training keeps for the way back, in MiB; what has no room is computed again. The inputs
    /// of the model's blocks are kept in any case.
    #[arg(long, default_value_t = 400, env = "ATELIER_TRAIN_ACTIVATION_MIB")]
    pub train_activation_mib: u32,
    /// Numbers in which training multiplies activations with the frozen weights; all else is float32. `auto` is bf16 where
    /// the CPU has instructions for it (AVX-512 BF16).
    #[arg(long, default_value = "auto", env = "ATELIER_TRAIN_PRECISION")]
    pub train_precision: TrainPrecisionArg,
    /// Seconds between two checkpoints of a job.
    #[arg(long, default_value_t = 10, env = "ATELIER_CHECKPOINT_S")]
    pub checkpoint_s: u32,
    /// Share of the model threads' time, above 0 to 0.9, that training gets even while requests run.
    #[arg(long, default_value_t = 0.2, env = "ATELIER_TRAIN_FLOOR")]
    pub train_floor: f64,
}

/// Numbers of training's products, on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TrainPrecisionArg {
    /// bfloat16 where that is faster.
    Auto,
    /// float32.
    F32,
    /// bfloat16.
    Bf16,
}

impl TrainPrecisionArg {
    fn products(self) -> Products {
        match self {
            Self::F32 => Products::F32,
            Self::Bf16 => Products::Bf16,
            Self::Auto => Products::fastest(),
        }
    }
}

impl TrainingArgs {
    /// The recipe for a base of so many parameters with these numbers; alpha equals the rank, as OPPU has it.
    #[must_use]
    pub fn recipe(&self, parameters: usize) -> Recipe {
        let mut recipe = Recipe::for_base(parameters);
        recipe.learning_rate = self.learning_rate.unwrap_or(recipe.learning_rate);
        recipe.epochs = self.epochs.unwrap_or(recipe.epochs);
        recipe.batch = self.train_batch.unwrap_or(recipe.batch);
        recipe.activation_bytes = self.train_activation_mib as usize * MIB;
        recipe.products = self.train_precision.products();
        recipe.adapter =
            AdapterConfig::Lora(LoraConfig { r: self.rank, alpha: self.rank as f64, ..LoraConfig::oppu() });
        recipe
    }

    /// The numbers of tenants, checked.
    ///
    /// # Errors
    /// When they cannot be read, or a number is outside its limits.
    pub fn tenants(&self, limits: &TrainingLimits) -> anyhow::Result<BTreeMap<TenantId, TrainingOptions>> {
        let text = self.tenant_training.as_deref().unwrap_or("{}");
        let read: BTreeMap<String, TrainingOptions> =
            serde_json::from_str(text).context("--tenant-training")?;
        let check = |(tenant, options): (String, TrainingOptions)| {
            options.check(limits).with_context(|| format!("--tenant-training: {tenant}"))?;
            Ok((tenant.parse().context("--tenant-training")?, options))
        };
        read.into_iter().map(check).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_have_numbers_of_their_own() {
        let tenants = |json: &str, max_rank: &str| {
            let words = ["atelier", "serve", "--tenant-training", json, "--max-rank", max_rank];
            match Cli::try_parse_from(words).map(|cli| cli.command) {
                Ok(Command::Serve(args)) => args.training.tenants(&args.training_limits()),
                other => panic!("{other:?}"),
            }
        };
        let four = tenants(r#"{"acme":{"recipe":"oppu","rank":4}}"#, "4");
        assert!(four.is_ok_and(|tenants| tenants.values().all(|options| options.rank == Some(4))));
        assert!(tenants(r#"{"acme":{"rank":4}}"#, "3").is_err());
        for bad in [r#"{"acme":{"rank":0}}"#, r#"{"acme":{"rnak":4}}"#, r#"{"a b":{}}"#, "[]", "{"] {
            assert!(tenants(bad, "64").is_err(), "{bad}");
        }
    }

    /// The recipe of a server that is started with these words on a base of so many parameters.
    fn recipe(words: &[&str], parameters: usize) -> Option<Recipe> {
        match Cli::try_parse_from([&["atelier", "serve"], words].concat()) {
            Ok(Cli { command: Command::Serve(args) }) => Some(args.training.recipe(parameters)),
            _ => None,
        }
    }

    #[test]
    fn rates_are_those_of_the_base_unless_asked_for() {
        let rates = |words: &[&str], parameters| {
            recipe(words, parameters).map(|recipe| (recipe.learning_rate, recipe.epochs, recipe.batch))
        };
        let (small, large) = (135_000_000, 7_000_000_000);
        assert_eq!(rates(&[], small), Some((2e-3, 3, 4)));
        assert_eq!(rates(&[], large), Some((1e-4, 2, 16)));
        let asked = ["--learning-rate", "5e-4", "--epochs", "7", "--train-batch", "9"];
        assert_eq!([small, large].map(|size| rates(&asked, size)), [Some((5e-4, 7, 9)); 2]);
    }

    #[test]
    fn activations_have_a_budget() {
        let bytes = |words: &[&str]| recipe(words, 0).map(|recipe| recipe.activation_bytes);
        let setting = |given: &'static str| bytes(&["--train-activation-mib", given]);
        assert_eq!(bytes(&[]), Some(Recipe::oppu().activation_bytes));
        assert_eq!(["0", "7", "4096", "-1"].map(setting), [Some(0), Some(7 << 20), Some(4 << 30), None]);
    }

    #[test]
    fn the_largest_rank_has_limits_of_its_own() {
        let max_rank = |given: &str| match Cli::try_parse_from(["atelier", "serve", "--max-rank", given]) {
            Ok(Cli { command: Command::Serve(args) }) => Some(args.training_limits().rank),
            _ => None,
        };
        assert_eq!(["0", "1", "512", "513"].map(max_rank), [None, Some(1), Some(512), None]);
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
