//! The sampling parameters that chat and text completions share: their names on the wire, their ranges.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::Deserialize;
use serde_json::Value;
use types::SamplingParams;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::app::App;
use crate::error::ApiError;
use crate::json::Unsupported;

/// Fields that OpenAI's clients send and that do not change an answer here.
pub(crate) const HARMLESS: [&str; 8] = [
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
];

/// Fields that would change the answer and are not supported, with the values that ask for nothing.
pub(crate) const UNSUPPORTED: [Unsupported; 18] = [
    ("audio", never),
    ("best_of", |value| *value == 1),
    ("chat_template", never),
    ("chat_template_kwargs", is_empty),
    ("echo", |value| *value == false),
    ("function_call", |value| *value == "none" || *value == "auto"),
    ("functions", is_empty),
    ("guided_json", never),
    ("length_penalty", |value| value.as_f64() == Some(1.0)),
    ("modalities", |value| value.as_array().is_some_and(|list| list.iter().all(|entry| entry == "text"))),
    ("reasoning_effort", |value| *value == "none"),
    ("response_format", |value| value["type"] == "text"),
    ("suffix", |value| *value == ""),
    ("tool_choice", |value| *value == "none" || *value == "auto"),
    ("tools", is_empty),
    ("use_beam_search", |value| *value == false),
    ("verbosity", |value| *value == "medium"),
    ("web_search_options", never),
];

fn never(_: &Value) -> bool {
    false
}

fn is_empty(value: &Value) -> bool {
    value.as_array().map(Vec::is_empty).or(value.as_object().map(serde_json::Map::is_empty)).unwrap_or(false)
}

/// What chat and text completions have in common.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct SamplingFields {
    /// `<base>`, or `<base>:<user>` for the adapter of a user (404 if there is none).
    pub(crate) model: String,
    /// The user whose adapter answers, if there is one; otherwise the base answers.
    pub(crate) user: Option<String>,
    /// Most tokens to generate. Prompt and answer must fit the context.
    #[schema(minimum = 1)]
    pub(crate) max_tokens: Option<u32>,
    /// No end of the answer before this many tokens.
    pub(crate) min_tokens: Option<u32>,
    /// 0 takes the most likely token.
    #[schema(minimum = 0, maximum = 2, default = 1.0)]
    pub(crate) temperature: Option<f64>,
    /// Keep the smallest set of tokens with this probability mass.
    #[schema(exclusive_minimum = 0, maximum = 1, default = 1.0)]
    pub(crate) top_p: Option<f64>,
    /// Keep this many most likely tokens; 0 or -1 keeps all.
    #[schema(minimum = -1)]
    pub(crate) top_k: Option<i64>,
    /// Keep tokens with at least this share of the top token's probability.
    #[schema(minimum = 0, maximum = 1)]
    pub(crate) min_p: Option<f64>,
    /// Divides the logits of tokens seen in prompt and answer; 1 is off.
    #[schema(exclusive_minimum = 0, maximum = 10)]
    pub(crate) repetition_penalty: Option<f64>,
    /// Subtracted per occurrence in the answer.
    #[schema(minimum = -2, maximum = 2)]
    pub(crate) frequency_penalty: Option<f64>,
    /// Subtracted once for tokens that occur in the answer.
    #[schema(minimum = -2, maximum = 2)]
    pub(crate) presence_penalty: Option<f64>,
    /// Added to the logits of these tokens: token id to a number from -100 to 100.
    pub(crate) logit_bias: Option<BTreeMap<String, f64>>,
    /// The same seed gives the same answer to the same request.
    pub(crate) seed: Option<i64>,
    /// Text that ends the answer and is not part of it.
    pub(crate) stop: Option<OneOrMany>,
    /// Tokens that end the answer.
    pub(crate) stop_token_ids: Option<Vec<u32>>,
    /// Go on past the model's end-of-sequence tokens.
    pub(crate) ignore_eos: Option<bool>,
    /// Answers per prompt.
    #[schema(minimum = 1, maximum = 4, default = 1)]
    pub(crate) n: Option<u32>,
    /// Send the answer as server-sent events.
    pub(crate) stream: Option<bool>,
    /// Only with `stream`.
    pub(crate) stream_options: Option<StreamOptions>,
}

/// A string or a list of strings.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub(crate) enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// How a stream is sent.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StreamOptions {
    /// Send the usage in a chunk of its own at the end.
    pub(crate) include_usage: Option<bool>,
    /// Accepted and not done.
    #[serde(rename = "include_obfuscation")]
    _include_obfuscation: Option<bool>,
}

impl SamplingFields {
    /// The settings for the engine; `max_tokens` is checked against the context later, with the prompt at hand.
    pub(crate) fn params(&self, app: &App) -> Result<SamplingParams, ApiError> {
        at_least_one("max_tokens", self.max_tokens)?;
        let penalty = positive("repetition_penalty", self.repetition_penalty, 10.0)?;
        let seed = self.seed.map_or_else(random_seed, i64::cast_unsigned);
        Ok(SamplingParams {
            max_tokens: 0,
            min_tokens: self.min_tokens.unwrap_or(0),
            temperature: within("temperature", self.temperature, 0.0..=2.0)?.unwrap_or(1.0),
            top_k: top_k(self.top_k)?,
            top_p: positive("top_p", self.top_p, 1.0)?.unwrap_or(1.0),
            min_p: within("min_p", self.min_p, 0.0..=1.0)?.unwrap_or(0.0),
            repetition_penalty: penalty.unwrap_or(1.0),
            frequency_penalty: within("frequency_penalty", self.frequency_penalty, -2.0..=2.0)?
                .unwrap_or(0.0),
            presence_penalty: within("presence_penalty", self.presence_penalty, -2.0..=2.0)?.unwrap_or(0.0),
            logit_bias: self.logit_bias(app)?,
            seed,
            stop_token_ids: self.stop_token_ids(app)?,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            logprobs: None,
        })
    }

    /// `n`, so that with `prompts` prompts there are not too many answers.
    pub(crate) fn choices(&self, app: &App, prompts: usize) -> Result<usize, ApiError> {
        let most = app.limits.choices;
        let n = self.n.unwrap_or(1) as usize;
        if n == 0 || n > most {
            return Err(ApiError::invalid("n", format!("must be from 1 to {most}")));
        }
        if n * prompts > most {
            return Err(ApiError::invalid("prompt", format!("times n asks for more than {most} answers")));
        }
        Ok(n)
    }

    /// The stop strings.
    pub(crate) fn stop(&self, app: &App) -> Result<Vec<String>, ApiError> {
        match &self.stop {
            None => Ok(Vec::new()),
            Some(OneOrMany::One(stop)) => stop_strings(app, vec![stop.clone()]),
            Some(OneOrMany::Many(stops)) => stop_strings(app, stops.clone()),
        }
    }

    /// How the answer is streamed, if it is.
    pub(crate) fn streaming(&self) -> Result<Option<Streaming>, ApiError> {
        let include_usage = self.stream_options.as_ref().map(|options| options.include_usage == Some(true));
        match (self.stream == Some(true), include_usage) {
            (true, include_usage) => Ok(Some(Streaming { include_usage: include_usage == Some(true) })),
            (false, Some(_)) => Err(ApiError::invalid("stream_options", "is allowed only with stream")),
            (false, None) => Ok(None),
        }
    }

    fn logit_bias(&self, app: &App) -> Result<Vec<(u32, f32)>, ApiError> {
        let Some(biases) = &self.logit_bias else { return Ok(Vec::new()) };
        if biases.len() > app.limits.logit_bias {
            return Err(ApiError::invalid(
                "logit_bias",
                format!("holds more than {} tokens", app.limits.logit_bias),
            ));
        }
        let bias = |(id, bias): (&String, &f64)| {
            let param = || format!("logit_bias.{id}");
            let id: u32 =
                id.parse().map_err(|_| ApiError::invalid(param(), "does not start with a token id"))?;
            let bias = within(&param(), Some(*bias), -100.0..=100.0)?.unwrap_or(0.0);
            in_vocabulary(app, &param(), id).map(|id| (id, bias))
        };
        biases.iter().map(bias).collect()
    }

    fn stop_token_ids(&self, app: &App) -> Result<Vec<u32>, ApiError> {
        let ids = self.stop_token_ids.as_deref().unwrap_or_default();
        if ids.len() > app.limits.stop_tokens {
            let problem = format!("holds more than {} tokens", app.limits.stop_tokens);
            return Err(ApiError::invalid("stop_token_ids", problem));
        }
        ids.iter().map(|id| in_vocabulary(app, "stop_token_ids", *id)).collect()
    }
}

/// How an answer is streamed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Streaming {
    pub(crate) include_usage: bool,
}

/// A token id that the model knows.
pub(crate) fn in_vocabulary(app: &App, param: &str, id: u32) -> Result<u32, ApiError> {
    let size = app.engine.limits().vocabulary;
    if id as usize >= size {
        return Err(ApiError::invalid(param, format!("names the token {id}, but the vocabulary has {size}")));
    }
    Ok(id)
}

/// Checks the number and length of stop strings.
pub(crate) fn stop_strings(app: &App, stops: Vec<String>) -> Result<Vec<String>, ApiError> {
    let limits = &app.limits;
    if stops.len() > limits.stop_strings {
        return Err(ApiError::invalid("stop", format!("holds more than {} strings", limits.stop_strings)));
    }
    if stops.iter().any(|stop| stop.is_empty() || stop.len() > limits.stop_bytes) {
        return Err(ApiError::invalid(
            "stop",
            format!("must hold strings of 1 to {} bytes", limits.stop_bytes),
        ));
    }
    Ok(stops)
}

/// A number of alternatives per token.
pub(crate) fn top_logprobs(app: &App, param: &str, count: u32) -> Result<u32, ApiError> {
    let most = app.limits.top_logprobs;
    if count > most {
        return Err(ApiError::invalid(param, format!("must be from 0 to {most}")));
    }
    Ok(count)
}

/// A number of tokens that must not be zero.
pub(crate) fn at_least_one(param: &str, value: Option<u32>) -> Result<Option<u32>, ApiError> {
    if value == Some(0) {
        return Err(ApiError::invalid(param, "must be at least 1"));
    }
    Ok(value)
}

/// A number in a range.
pub(crate) fn within(
    param: &str,
    value: Option<f64>,
    range: RangeInclusive<f64>,
) -> Result<Option<f32>, ApiError> {
    match value {
        Some(value) if !range.contains(&value) => {
            let problem = format!("must be from {} to {}, not {value}", range.start(), range.end());
            Err(ApiError::invalid(param, problem))
        }
        value => Ok(value.map(|value| value as f32)),
    }
}

/// A number above zero.
pub(crate) fn positive(param: &str, value: Option<f64>, most: f64) -> Result<Option<f32>, ApiError> {
    // What is too small for 32 bits would be zero inside.
    match within(param, value, 0.0..=most)? {
        Some(0.0) => Err(ApiError::invalid(param, "must be above 0")),
        value => Ok(value),
    }
}

fn top_k(value: Option<i64>) -> Result<u32, ApiError> {
    match value {
        None | Some(-1) => Ok(0),
        Some(k) => {
            u32::try_from(k).map_err(|_| ApiError::invalid("top_k", format!("must be -1 or above, not {k}")))
        }
    }
}

/// A seed for a request that names none.
pub(crate) fn random_seed() -> u64 {
    Uuid::new_v4().as_u64_pair().0
}
