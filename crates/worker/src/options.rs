//! The recipe of one job: the server's, its tenant's numbers over it, the job's own over those.

use peft::LoraConfig;
use train::Recipe;
use types::{AdapterKind, RecipeName, TenantId, TrainingOptions};

use crate::error::WorkerError;
use crate::settings::Settings;

/// The recipe for a job of `tenant` that asks for `job`.
///
/// # Errors
/// When a number is outside the trainer's limits, or the kind is one that it does not train.
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
    adapter(&mut recipe.lora, &options)?;
    recipe.check()?;
    Ok(recipe)
}

fn adapter(lora: &mut LoraConfig, options: &TrainingOptions) -> Result<(), WorkerError> {
    match options.kind {
        Some(AdapterKind::Rslora) => lora.use_rslora = true,
        Some(AdapterKind::Lora) => lora.use_rslora = false,
        None => {}
        Some(AdapterKind::Dora) => return Err(WorkerError::Kind("dora")),
        Some(AdapterKind::Ia3) => return Err(WorkerError::Kind("ia3")),
        Some(AdapterKind::Prompt) => return Err(WorkerError::Kind("prompt")),
    }
    if let Some(rank) = options.rank {
        // Alpha follows the rank, as OPPU has it, unless it is given.
        (lora.r, lora.alpha) = (rank, rank as f64);
    }
    lora.alpha = options.alpha.unwrap_or(lora.alpha);
    lora.dropout = options.dropout.unwrap_or(lora.dropout);
    Ok(())
}
