//! `/v1/users/{user}/train` and hyper-parameters on the wire: training on demand.

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use store::Demand;
use types::{AdapterKind, OptionError, RecipeName, Site, TrainPrecision, TrainingOptions};
use utoipa::ToSchema;

use crate::app::App;
use crate::body;
use crate::error::{ApiError, ErrorBody};
use crate::routes::PathUser;
use crate::routes::jobs::WireJob;
use crate::routes::users::unknown_user;

/// Hyper-parameters in place of the defaults; what is absent is the tenant's, or the server's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct WireTraining {
    /// The numbers that the others are laid over.
    #[serde(skip_serializing_if = "Option::is_none")]
    recipe: Option<WireRecipe>,
    /// What the adapter is made of.
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<WireKind>,
    /// Rank, for kinds of LoRA; `GET /v1/limits` has the largest.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    rank: Option<usize>,
    /// Alpha, for kinds of LoRA; the rank if only that is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    alpha: Option<f64>,
    /// Dropout on the adapter's input, for kinds of LoRA.
    #[serde(skip_serializing_if = "Option::is_none")]
    dropout: Option<f64>,
    /// The linear layers of a block that the adapter acts on, for kinds of LoRA and `ia3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    target_modules: Option<Vec<WireSite>>,
    /// The blocks it acts in, counted from 0, for kinds of LoRA; `GET /v1/limits` has their number.
    #[serde(skip_serializing_if = "Option::is_none")]
    layers_to_transform: Option<Vec<usize>>,
    /// Embeddings, for `prompt`.
    #[serde(skip_serializing_if = "Option::is_none")]
    virtual_tokens: Option<usize>,
    /// Passes over the items.
    #[serde(skip_serializing_if = "Option::is_none")]
    epochs: Option<u32>,
    /// Items per optimiser step.
    #[serde(skip_serializing_if = "Option::is_none")]
    batch: Option<usize>,
    /// Peak learning rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    learning_rate: Option<f64>,
    /// Decoupled weight decay.
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_decay: Option<f64>,
    /// AdamW's decay of the gradients' mean.
    #[serde(skip_serializing_if = "Option::is_none")]
    adam_beta1: Option<f64>,
    /// AdamW's decay of the mean of their squares.
    #[serde(skip_serializing_if = "Option::is_none")]
    adam_beta2: Option<f64>,
    /// AdamW's epsilon.
    #[serde(skip_serializing_if = "Option::is_none")]
    adam_epsilon: Option<f64>,
    /// Share of the steps in which the rate rises.
    #[serde(skip_serializing_if = "Option::is_none")]
    warmup_ratio: Option<f64>,
    /// Largest norm of the gradient.
    #[serde(skip_serializing_if = "Option::is_none")]
    clip: Option<f64>,
    /// Tokens of an item; the rest is cut off.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<usize>,
    /// Numbers of the products with the frozen weights; the server's choice for its CPU if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    precision: Option<WirePrecision>,
    /// Seed of initial weights, order and dropout.
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
}

/// A recipe by its name.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum WireRecipe {
    /// The server's own numbers.
    Default,
    /// The numbers of OPPU's released code.
    Oppu,
}

/// In what numbers activations are multiplied with the frozen weights; all else is float32.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum WirePrecision {
    /// IEEE single precision.
    F32,
    /// Rounded to bfloat16, with sums in single precision.
    Bf16,
}

/// What an adapter is made of.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum WireKind {
    Lora,
    Rslora,
    Dora,
    Ia3,
    Prompt,
}

/// A linear layer of a block, by its name in Hugging Face models.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
enum WireSite {
    #[serde(rename = "q_proj")]
    Q,
    #[serde(rename = "k_proj")]
    K,
    #[serde(rename = "v_proj")]
    V,
    #[serde(rename = "o_proj")]
    O,
    #[serde(rename = "gate_proj")]
    Gate,
    #[serde(rename = "up_proj")]
    Up,
    #[serde(rename = "down_proj")]
    Down,
}

impl From<Site> for WireSite {
    fn from(site: Site) -> Self {
        match site {
            Site::Q => Self::Q,
            Site::K => Self::K,
            Site::V => Self::V,
            Site::O => Self::O,
            Site::Gate => Self::Gate,
            Site::Up => Self::Up,
            Site::Down => Self::Down,
        }
    }
}

impl From<WireSite> for Site {
    fn from(site: WireSite) -> Self {
        match site {
            WireSite::Q => Self::Q,
            WireSite::K => Self::K,
            WireSite::V => Self::V,
            WireSite::O => Self::O,
            WireSite::Gate => Self::Gate,
            WireSite::Up => Self::Up,
            WireSite::Down => Self::Down,
        }
    }
}

impl From<TrainingOptions> for WireTraining {
    fn from(options: TrainingOptions) -> Self {
        Self {
            recipe: options.recipe.map(|recipe| match recipe {
                RecipeName::Default => WireRecipe::Default,
                RecipeName::Oppu => WireRecipe::Oppu,
            }),
            kind: options.kind.map(|kind| match kind {
                AdapterKind::Lora => WireKind::Lora,
                AdapterKind::Rslora => WireKind::Rslora,
                AdapterKind::Dora => WireKind::Dora,
                AdapterKind::Ia3 => WireKind::Ia3,
                AdapterKind::Prompt => WireKind::Prompt,
            }),
            rank: options.rank,
            alpha: options.alpha,
            dropout: options.dropout,
            target_modules: options.target_modules.map(|sites| sites.into_iter().map(Into::into).collect()),
            layers_to_transform: options.layers_to_transform,
            virtual_tokens: options.virtual_tokens,
            epochs: options.epochs,
            batch: options.batch,
            learning_rate: options.learning_rate,
            weight_decay: options.weight_decay,
            adam_beta1: options.adam_beta1,
            adam_beta2: options.adam_beta2,
            adam_epsilon: options.adam_epsilon,
            warmup_ratio: options.warmup_ratio,
            clip: options.clip,
            max_tokens: options.max_tokens,
            precision: options.precision.map(|precision| match precision {
                TrainPrecision::F32 => WirePrecision::F32,
                TrainPrecision::Bf16 => WirePrecision::Bf16,
            }),
            seed: options.seed,
        }
    }
}

impl WireTraining {
    /// The options, within limits; an error names the field.
    pub(crate) fn check(self, app: &App) -> Result<TrainingOptions, ApiError> {
        let options = TrainingOptions {
            recipe: self.recipe.map(|recipe| match recipe {
                WireRecipe::Default => RecipeName::Default,
                WireRecipe::Oppu => RecipeName::Oppu,
            }),
            kind: self.kind.map(|kind| match kind {
                WireKind::Lora => AdapterKind::Lora,
                WireKind::Rslora => AdapterKind::Rslora,
                WireKind::Dora => AdapterKind::Dora,
                WireKind::Ia3 => AdapterKind::Ia3,
                WireKind::Prompt => AdapterKind::Prompt,
            }),
            rank: self.rank,
            alpha: self.alpha,
            dropout: self.dropout,
            target_modules: self.target_modules.map(|sites| sites.into_iter().map(Into::into).collect()),
            layers_to_transform: self.layers_to_transform,
            virtual_tokens: self.virtual_tokens,
            epochs: self.epochs,
            batch: self.batch,
            learning_rate: self.learning_rate,
            weight_decay: self.weight_decay,
            adam_beta1: self.adam_beta1,
            adam_beta2: self.adam_beta2,
            adam_epsilon: self.adam_epsilon,
            warmup_ratio: self.warmup_ratio,
            clip: self.clip,
            max_tokens: self.max_tokens,
            precision: self.precision.map(|precision| match precision {
                WirePrecision::F32 => TrainPrecision::F32,
                WirePrecision::Bf16 => TrainPrecision::Bf16,
            }),
            seed: self.seed,
        };
        let outside = |OptionError { field, limits }| {
            ApiError::invalid(format!("training.{field}"), format!("must be {limits}"))
        };
        options.check(&app.training_limits()).map_err(outside)?;
        Ok(options)
    }
}

/// What to train now.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TrainRequest {
    /// Learn the whole history from fresh weights; otherwise what is new may be learnt on from the current adapter.
    from_scratch: Option<bool>,
    /// Hyper-parameters of this job.
    training: Option<WireTraining>,
}

/// Trains a user's adapter now, without waiting for more history. The body may be left out.
#[utoipa::path(
    post,
    path = "/v1/users/{user}/train",
    tag = "learn",
    params(("user" = String, Path)),
    request_body = Option<TrainRequest>,
    responses(
        (status = 202, description = "Enqueued, or added to the job that waits", body = WireJob),
        (status = 400, description = "A field is wrong; `param` names it", body = ErrorBody),
        (status = 404, description = "No such user", body = ErrorBody),
    )
)]
pub(crate) async fn train(
    State(app): State<App>,
    PathUser(id): PathUser,
    request: Request,
) -> Result<(StatusCode, Json<WireJob>), ApiError> {
    let wanted: TrainRequest = body::read_or_default(request, &app).await?;
    let training = wanted.training.map(|training| training.check(&app)).transpose()?;
    let from_scratch = wanted.from_scratch.unwrap_or(false);
    let demand = Demand { urgent: true, from_scratch, training, ..Demand::default() };
    let job = app.store.enqueue(&id, &demand).await?.ok_or_else(|| unknown_user(&id))?;
    app.on_upload.notify_one();
    Ok((StatusCode::ACCEPTED, Json(job.into())))
}
