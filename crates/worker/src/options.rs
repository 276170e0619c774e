//! The recipe of one job: the server's, its tenant's numbers over it, the job's own over those.

use peft::{AdapterConfig, Ia3Config, LoraConfig, PromptConfig};
use train::Recipe;
use types::{AdapterKind, RecipeName, TenantId, TrainingOptions};

use crate::error::WorkerError;
use crate::settings::Settings;

/// The recipe for a job of `tenant` that asks for `job`.
///
/// # Errors
/// When a number is outside the trainer's limits.
pub(crate) fn recipe(
    settings: &Settings,
    tenant: &TenantId,
    job: Option<&TrainingOptions>,
) -> Result<Recipe, WorkerError> {
    let none = TrainingOptions::default();
    let options = job.unwrap_or(&none).over(settings.tenants.get(tenant).unwrap_or(&none));
    let mut recipe = match options.recipe {
        Some(RecipeName::Oppu) => Recipe::oppu(),
        Some(RecipeName::Default) | None => settings.recipe.clone(),
    };
    let set = |to: &mut f64, from: Option<f64>| *to = from.unwrap_or(*to);
    recipe.epochs = options.epochs.unwrap_or(recipe.epochs);
    recipe.batch = options.batch.unwrap_or(recipe.batch);
    recipe.max_tokens = options.max_tokens.unwrap_or(recipe.max_tokens);
    recipe.seed = options.seed.unwrap_or(recipe.seed);
    set(&mut recipe.learning_rate, options.learning_rate);
    set(&mut recipe.weight_decay, options.weight_decay);
    set(&mut recipe.warmup_ratio, options.warmup_ratio);
    set(&mut recipe.clip, options.clip);
    adapter(&mut recipe.adapter, &options);
    recipe.check()?;
    Ok(recipe)
}

/// Virtual tokens of a prompt-tuning adapter that nobody has given a number for.
const VIRTUAL_TOKENS: usize = 20;

fn adapter(config: &mut AdapterConfig, options: &TrainingOptions) {
    // Numbers of LoRA that the options leave open are the server's, if those are of LoRA.
    let mut lora = match config {
        AdapterConfig::Lora(lora) => lora.clone(),
        AdapterConfig::Ia3(_) | AdapterConfig::Prompt(_) => LoraConfig::oppu(),
    };
    if let Some(rank) = options.rank {
        // Alpha follows the rank, as OPPU has it, unless it is given.
        (lora.r, lora.alpha) = (rank, rank as f64);
    }
    lora.alpha = options.alpha.unwrap_or(lora.alpha);
    lora.dropout = options.dropout.unwrap_or(lora.dropout);
    let of = |use_rslora, use_dora| AdapterConfig::Lora(LoraConfig { use_rslora, use_dora, ..lora.clone() });
    *config = match options.kind {
        None if matches!(config, AdapterConfig::Lora(_)) => AdapterConfig::Lora(lora),
        None => return,
        Some(AdapterKind::Lora) => of(false, false),
        Some(AdapterKind::Rslora) => of(true, false),
        Some(AdapterKind::Dora) => of(false, true),
        // As HF peft has it for Llama: keys, values and the feed-forward's input of its way down.
        Some(AdapterKind::Ia3) => {
            AdapterConfig::Ia3(Ia3Config::new(&["k_proj", "v_proj", "down_proj"], &["down_proj"]))
        }
        Some(AdapterKind::Prompt) => {
            let virtual_tokens = options.virtual_tokens.unwrap_or(VIRTUAL_TOKENS);
            AdapterConfig::Prompt(PromptConfig { virtual_tokens })
        }
    };
}
