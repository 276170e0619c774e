//! The recipe of one job: the server's, its tenant's numbers over it, the job's own over those.

use peft::{AdapterConfig, Ia3Config, LoraConfig, PromptConfig, TargetModules};
use train::{Products, Recipe, TrainError};
use types::{AdapterKind, RecipeName, Site, TenantId, TrainPrecision, TrainingOptions};

use crate::error::WorkerError;
use crate::settings::Settings;

/// The recipe for a job of `tenant` that asks for `job`.
///
/// # Errors
/// When a number is outside the trainer's limits, or the server's.
pub(crate) fn recipe(
    settings: &Settings,
    tenant: &TenantId,
    job: Option<&TrainingOptions>,
) -> Result<Recipe, WorkerError> {
    let none = TrainingOptions::default();
    let options = job.unwrap_or(&none).over(settings.tenants.get(tenant).unwrap_or(&none));
    let mut recipe = match options.recipe {
        // Memory and the numbers of products are the server's in any recipe.
        Some(RecipeName::Oppu) => {
            let Recipe { activation_bytes, products, .. } = settings.recipe;
            Recipe { activation_bytes, products, ..Recipe::oppu() }
        }
        Some(RecipeName::Default) | None => settings.recipe.clone(),
    };
    let set = |to: &mut f64, from: Option<f64>| *to = from.unwrap_or(*to);
    recipe.epochs = options.epochs.unwrap_or(recipe.epochs);
    recipe.batch = options.batch.unwrap_or(recipe.batch);
    recipe.max_tokens = options.max_tokens.unwrap_or(recipe.max_tokens);
    recipe.products = options.precision.map_or(recipe.products, |precision| match precision {
        TrainPrecision::F32 => Products::F32,
        TrainPrecision::Bf16 => Products::Bf16,
    });
    recipe.seed = options.seed.unwrap_or(recipe.seed);
    set(&mut recipe.learning_rate, options.learning_rate);
    set(&mut recipe.weight_decay, options.weight_decay);
    set(&mut recipe.adam.beta1, options.adam_beta1);
    set(&mut recipe.adam.beta2, options.adam_beta2);
    set(&mut recipe.adam.epsilon, options.adam_epsilon);
    set(&mut recipe.warmup_ratio, options.warmup_ratio);
    set(&mut recipe.clip, options.clip);
    adapter(&mut recipe.adapter, &options);
    recipe.check()?;
    match &recipe.adapter {
        AdapterConfig::Lora(lora) if lora.r > settings.max_rank => {
            let problem = format!("must be from 1 to {}", settings.max_rank);
            Err(TrainError::Recipe { field: "rank", problem }.into())
        }
        _ => Ok(recipe),
    }
}

/// Every number of a recipe but its seed, as options that ask for it.
pub(crate) fn in_full(recipe: &Recipe) -> TrainingOptions {
    let numbers = TrainingOptions {
        epochs: Some(recipe.epochs),
        batch: Some(recipe.batch),
        learning_rate: Some(recipe.learning_rate),
        weight_decay: Some(recipe.weight_decay),
        adam_beta1: Some(recipe.adam.beta1),
        adam_beta2: Some(recipe.adam.beta2),
        adam_epsilon: Some(recipe.adam.epsilon),
        warmup_ratio: Some(recipe.warmup_ratio),
        clip: Some(recipe.clip),
        max_tokens: Some(recipe.max_tokens),
        precision: Some(match recipe.products {
            Products::F32 => TrainPrecision::F32,
            Products::Bf16 => TrainPrecision::Bf16,
        }),
        ..TrainingOptions::default()
    };
    match &recipe.adapter {
        AdapterConfig::Lora(lora) => TrainingOptions {
            kind: Some(match (lora.use_dora, lora.use_rslora) {
                (true, _) => AdapterKind::Dora,
                (false, true) => AdapterKind::Rslora,
                (false, false) => AdapterKind::Lora,
            }),
            rank: Some(lora.r),
            alpha: Some(lora.alpha),
            dropout: Some(lora.dropout),
            target_modules: sites(&lora.target_modules),
            layers_to_transform: lora.layers_to_transform.clone(),
            ..numbers
        },
        AdapterConfig::Ia3(ia3) => TrainingOptions {
            kind: Some(AdapterKind::Ia3),
            target_modules: sites(&ia3.target_modules),
            ..numbers
        },
        AdapterConfig::Prompt(prompt) => TrainingOptions {
            kind: Some(AdapterKind::Prompt),
            virtual_tokens: Some(prompt.virtual_tokens),
            ..numbers
        },
    }
}

/// The sites that are named, if all names are such.
fn sites(modules: &TargetModules) -> Option<Vec<Site>> {
    let TargetModules::Names(names) = modules else { return None };
    let site = |name: &String| Site::ALL.into_iter().find(|site| site.module() == name);
    names.iter().map(site).collect()
}

/// The names of sites, in the order of a block: whoever asks for the same in another order gets the same.
fn names(sites: &[Site]) -> Vec<&'static str> {
    Site::ALL.into_iter().filter(|site| sites.contains(site)).map(Site::module).collect()
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
    if let Some(sites) = &options.target_modules {
        lora.target_modules = TargetModules::names(&names(sites));
    }
    if let Some(layers) = &options.layers_to_transform {
        let mut layers = layers.clone();
        layers.sort_unstable();
        lora.layers_to_transform = Some(layers);
    }
    let of = |use_rslora, use_dora| AdapterConfig::Lora(LoraConfig { use_rslora, use_dora, ..lora.clone() });
    *config = match options.kind {
        None if matches!(config, AdapterConfig::Lora(_)) => AdapterConfig::Lora(lora),
        None => return,
        Some(AdapterKind::Lora) => of(false, false),
        Some(AdapterKind::Rslora) => of(true, false),
        Some(AdapterKind::Dora) => of(false, true),
        // Where nothing is said as HF peft has it for Llama; the way down is scaled at its input in any case.
        Some(AdapterKind::Ia3) => AdapterConfig::Ia3(match &options.target_modules {
            None => Ia3Config::llama(),
            Some(sites) => {
                let down: &[Site] = if sites.contains(&Site::Down) { &[Site::Down] } else { &[] };
                Ia3Config::new(&names(sites), &names(down))
            }
        }),
        Some(AdapterKind::Prompt) => {
            let virtual_tokens = options.virtual_tokens.unwrap_or(VIRTUAL_TOKENS);
            AdapterConfig::Prompt(PromptConfig { virtual_tokens })
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_in_full_asks_for_itself() {
        let tenant: TenantId = "acme".parse().unwrap_or_else(|error| panic!("{error}"));
        let asked = TrainingOptions {
            rank: Some(3),
            alpha: Some(5.5),
            dropout: Some(0.25),
            epochs: Some(7),
            batch: Some(2),
            learning_rate: Some(0.03),
            weight_decay: Some(0.2),
            warmup_ratio: Some(0.4),
            clip: Some(2.5),
            max_tokens: Some(99),
            precision: Some(TrainPrecision::Bf16),
            adam_beta1: Some(0.8),
            adam_beta2: Some(0.95),
            adam_epsilon: Some(1e-6),
            target_modules: Some(vec![Site::K, Site::O, Site::Down]),
            layers_to_transform: Some(vec![0, 2]),
            ..TrainingOptions::default()
        };
        let settings = Settings::default();
        let read = |options: &TrainingOptions| match recipe(&settings, &tenant, Some(options)) {
            Ok(recipe) => recipe,
            Err(error) => panic!("{error}"),
        };
        use AdapterKind::{Dora, Ia3, Lora, Prompt, Rslora};
        for kind in [Lora, Rslora, Dora, Ia3, Prompt] {
            let lora = matches!(kind, Lora | Rslora | Dora);
            let options = TrainingOptions {
                kind: Some(kind),
                rank: asked.rank.filter(|_| lora),
                alpha: asked.alpha.filter(|_| lora),
                dropout: asked.dropout.filter(|_| lora),
                target_modules: asked.target_modules.clone().filter(|_| kind != Prompt),
                layers_to_transform: asked.layers_to_transform.clone().filter(|_| lora),
                virtual_tokens: (kind == Prompt).then_some(6),
                ..asked.clone()
            };
            let made = read(&options);
            assert_eq!(in_full(&made), options);
            assert_eq!(read(&in_full(&made)), made);
        }
        // In whatever order sites and blocks are named.
        let turned = TrainingOptions {
            target_modules: Some(vec![Site::Down, Site::K, Site::O]),
            layers_to_transform: Some(vec![2, 0]),
            ..asked.clone()
        };
        assert_eq!(read(&turned), read(&asked));
        let scaled_at = |site| {
            let options =
                TrainingOptions { kind: Some(Ia3), target_modules: Some(vec![site]), ..Default::default() };
            match read(&options).adapter {
                AdapterConfig::Ia3(ia3) => ia3.feedforward_modules == ia3.target_modules,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!([Site::Down, Site::Up].map(scaled_at), [true, false]);
        // What nobody asked for is said too.
        let (made, said) = (read(&TrainingOptions::default()), in_full(&settings.recipe));
        assert_eq!((said.kind, said.rank, said.epochs), (Some(Lora), Some(8), Some(2)));
        assert_eq!(read(&said), made);
    }

    #[test]
    fn memory_and_precision_are_the_servers_in_any_recipe() {
        let tenant: TenantId = "acme".parse().unwrap_or_else(|error| panic!("{error}"));
        let mut settings = Settings::default();
        (settings.recipe.activation_bytes, settings.recipe.products) = (12345, Products::Bf16);
        for name in [RecipeName::Default, RecipeName::Oppu] {
            let options = TrainingOptions { recipe: Some(name), ..TrainingOptions::default() };
            let made = recipe(&settings, &tenant, Some(&options));
            let own = made.map(|made| (made.activation_bytes, made.products));
            assert!(own.is_ok_and(|own| own == (12345, Products::Bf16)), "{name:?}");
        }
    }

    #[test]
    fn the_largest_rank_is_the_servers() {
        let tenant: TenantId = "acme".parse().unwrap_or_else(|error| panic!("{error}"));
        let rank = |rank, max_rank| {
            let options = TrainingOptions { rank: Some(rank), ..TrainingOptions::default() };
            let settings = Settings { max_rank, ..Settings::default() };
            recipe(&settings, &tenant, Some(&options)).map(|_| ()).map_err(|error| error.to_string())
        };
        assert_eq!(rank(64, 64), Ok(()));
        assert_eq!(rank(65, 64), Err("rank must be from 1 to 64".into()));
        assert_eq!(rank(65, 65), Ok(()));
    }
}
