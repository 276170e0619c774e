//! `POST /generate` and `/generate_stream`, in the shapes of TGI and LoRAX.

use std::time::Instant;

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use text::{ChatOptions, Message, Role, Special};
use types::{FinishReason, SamplingParams};
use utoipa::ToSchema;

use crate::app::App;
use crate::auth::Principal;
use crate::body::JsonBody;
use crate::error::{ApiError, Code, TgiErrorBody};
use crate::generation::{Ask, End, Generation, Piece, Prompt, Token};
use crate::sampling::{at_least_one, positive, random_seed, stop_strings, top_logprobs, within};
use crate::sse::{self, Format};
use crate::wanted::Wanted;

/// Length of an answer whose request names none, as in TGI.
const DEFAULT_MAX_NEW_TOKENS: u32 = 100;

/// An error of these routes, in TGI's shape.
pub(crate) struct Tgi(ApiError);

impl From<ApiError> for Tgi {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Tgi {
    fn into_response(self) -> Response {
        self.0.into_tgi_response()
    }
}

/// A text to go on with.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct GenerateRequest {
    /// The text. Special tokens written in it count as such.
    inputs: String,
    /// How to go on.
    #[serde(default)]
    parameters: Parameters,
    /// What the route does anyway.
    #[schema(ignore)]
    stream: Option<bool>,
}

/// How to go on.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
struct Parameters {
    /// The user whose adapter answers, or an `@` and the name of a shared adapter (404 if there is none); absent for
    /// the base.
    adapter_id: Option<String>,
    /// Most tokens to generate.
    #[schema(minimum = 1, default = 100)]
    max_new_tokens: Option<u32>,
    /// Draw tokens at random; implied by `temperature`, `top_k` and `top_p`. Otherwise the most likely one is taken.
    do_sample: Option<bool>,
    /// Above 0.
    temperature: Option<f64>,
    top_k: Option<u32>,
    top_p: Option<f64>,
    repetition_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    presence_penalty: Option<f64>,
    seed: Option<u64>,
    /// Texts that end the answer.
    stop: Vec<String>,
    ignore_eos_token: Option<bool>,
    /// Put the prompt in front of the answer.
    return_full_text: Option<bool>,
    /// Keep this many tokens of the prompt, the last ones.
    #[schema(minimum = 1)]
    truncate: Option<u32>,
    /// Send details.
    details: Option<bool>,
    /// Alternatives per token, in the details.
    #[serde(alias = "return_k_alternatives")]
    top_n_tokens: Option<u32>,
    /// Treat `inputs` as a user's message.
    apply_chat_template: Option<bool>,
    /// 1 is supported.
    best_of: Option<u32>,
    /// Not supported.
    watermark: Option<bool>,
    /// Not supported.
    decoder_input_details: Option<bool>,
    /// 1 is supported.
    typical_p: Option<f64>,
    /// Not supported.
    #[schema(ignore)]
    grammar: Option<Value>,
    /// Not supported.
    #[schema(ignore)]
    response_format: Option<Value>,
}

impl Parameters {
    fn refuse_unsupported(&self) -> Result<(), ApiError> {
        let asked = [
            ("best_of", self.best_of.is_some_and(|n| n != 1)),
            ("watermark", self.watermark == Some(true)),
            ("decoder_input_details", self.decoder_input_details == Some(true)),
            ("typical_p", self.typical_p.is_some_and(|p| p != 1.0)),
            ("grammar", self.grammar.is_some()),
            ("response_format", self.response_format.is_some()),
        ];
        match asked.iter().find(|(_, asked)| *asked) {
            Some((name, _)) => {
                let message = format!("parameters.{name}: this value is not supported by this server");
                Err(ApiError::new(Code::UnsupportedParameter, message).param(*name))
            }
            None => Ok(()),
        }
    }

    fn sampling(&self, app: &App) -> Result<SamplingParams, ApiError> {
        let temperature = positive("temperature", self.temperature, 100.0)?;
        let top_p = positive("top_p", self.top_p, 1.0)?;
        if self.top_k == Some(0) {
            return Err(ApiError::invalid("top_k", "must be at least 1"));
        }
        let sample =
            self.do_sample == Some(true) || temperature.is_some() || self.top_k.is_some() || top_p.is_some();
        let frequency = within("frequency_penalty", self.frequency_penalty, -2.0..=2.0)?;
        let presence = within("presence_penalty", self.presence_penalty, -2.0..=2.0)?;
        Ok(SamplingParams {
            temperature: if sample { temperature.unwrap_or(1.0) } else { 0.0 },
            top_k: self.top_k.unwrap_or(0),
            top_p: top_p.unwrap_or(1.0),
            repetition_penalty: positive("repetition_penalty", self.repetition_penalty, 10.0)?.unwrap_or(1.0),
            frequency_penalty: frequency.unwrap_or(0.0),
            presence_penalty: presence.unwrap_or(0.0),
            seed: self.seed.unwrap_or_else(random_seed),
            ignore_eos: self.ignore_eos_token == Some(true),
            logprobs: Some(top_logprobs(app, "top_n_tokens", self.top_n_tokens.unwrap_or(0))?),
            ..SamplingParams::default()
        })
    }
}

/// An answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct GenerateResponse {
    generated_text: String,
    /// Only if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
}

/// How an answer came about.
#[derive(Debug, Serialize, ToSchema)]
struct Details {
    /// `length`, `eos_token` or `stop_sequence`.
    finish_reason: &'static str,
    prompt_tokens: u32,
    generated_tokens: u32,
    #[schema(required)]
    seed: Option<u64>,
    /// Always empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    prefill: Option<Vec<WireToken>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<Vec<WireToken>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_tokens: Option<Vec<Vec<WireToken>>>,
}

/// A token.
#[derive(Debug, Serialize, ToSchema)]
struct WireToken {
    id: u32,
    text: String,
    /// Natural log of its probability.
    logprob: f32,
    special: bool,
}

/// An event of a stream; the last one has text and details.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StreamEvent {
    index: u32,
    token: WireToken,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_tokens: Option<Vec<WireToken>>,
    #[schema(required)]
    generated_text: Option<String>,
    #[schema(required)]
    details: Option<Details>,
}

fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::EndOfSequence => "eos_token",
        FinishReason::StopString => "stop_sequence",
        FinishReason::Length => "length",
    }
}

fn wire(app: &App, id: u32, logprob: f32) -> WireToken {
    let text = app.tokenizer.token_text(id).into_owned();
    WireToken { id, text, logprob: logprob.max(-9999.0), special: app.tokenizer.is_special(id) }
}

/// A token of an answer, with the text that it completed: a character may be spread over several tokens.
fn chosen(app: &App, token: &Token) -> WireToken {
    let wire = wire(app, token.id, token.logprob);
    if token.stop || wire.special { wire } else { WireToken { text: token.text.clone(), ..wire } }
}

fn alternatives(app: &App, token: &Token) -> Vec<WireToken> {
    token.top.iter().map(|(id, logprob)| wire(app, *id, *logprob)).collect()
}

/// A request on its way: what the answer needs of it.
struct Begun {
    generation: Generation,
    inputs: Option<String>,
    seed: u64,
    details: bool,
    top: bool,
    sample: bool,
    start: Instant,
}

async fn begin(app: &App, request: Request, streaming: bool) -> Result<Begun, ApiError> {
    let start = Instant::now();
    let (mut parts, body) = request.into_parts();
    let principal = Principal::from_request_parts(&mut parts, app).await?;
    let JsonBody(object) = JsonBody::from_request(Request::from_parts(parts, body), app).await?;
    let object = object.without_nulls();
    let GenerateRequest { inputs, parameters, stream } = object.read()?;
    if stream == Some(true) && !streaming {
        let message = "stream: for a stream use the route /generate_stream";
        return Err(ApiError::new(Code::UnsupportedParameter, message).param("stream"));
    }
    parameters.refuse_unsupported()?;
    let wanted = Wanted::tgi(&app.model_name, parameters.adapter_id.as_deref())?;
    let params = parameters.sampling(app)?;
    let stop = stop_strings(app, parameters.stop.clone())?;
    let asked = at_least_one("max_new_tokens", parameters.max_new_tokens)?;
    let truncate = at_least_one("truncate", parameters.truncate)?;
    let chat = parameters.apply_chat_template == Some(true);
    let (text, now) = (inputs.clone(), app.clock.now());
    let tokens = app.blocking(move |app| {
        if chat {
            let options = ChatOptions { add_generation_prompt: true, now };
            app.tokenizer.render_chat_tokens(&[Message::new(Role::User, text)], &options)
        } else {
            app.tokenizer.encode_prompt(&text, Special::Parse)
        }
    });
    let mut tokens = tokens.await?.map_err(|error| ApiError::from(error).param("inputs"))?;
    if let Some(keep) = truncate {
        tokens.drain(..tokens.len().saturating_sub(keep as usize));
    }
    let prompt = Prompt::new(app, tokens, asked, DEFAULT_MAX_NEW_TOKENS, "inputs")?;
    let (seed, sample) = (params.seed, params.temperature > 0.0);
    let generation = app
        .generate(Ask {
            tenant: principal.tenant,
            wanted,
            prompts: vec![prompt],
            n: 1,
            params,
            stop,
            continuing: !chat,
            keep_stop: true,
        })
        .await?;
    Ok(Begun {
        generation,
        inputs: (parameters.return_full_text == Some(true)).then_some(inputs),
        seed,
        details: parameters.details == Some(true),
        top: parameters.top_n_tokens.is_some_and(|n| n > 0),
        sample,
        start,
    })
}

/// Goes on with a text.
#[utoipa::path(
    post,
    path = "/generate",
    tag = "generate",
    request_body = GenerateRequest,
    responses(
        (status = 200, description = "The answer; times and token counts are in the headers", body = GenerateResponse),
        (status = 404, description = "No such adapter", body = TgiErrorBody),
        (status = 422, description = "A parameter is wrong", body = TgiErrorBody),
        (status = 424, description = "The generation failed", body = TgiErrorBody),
        (status = 429, description = "The server is busy; see Retry-After", body = TgiErrorBody),
    )
)]
pub(crate) async fn generate(State(app): State<App>, request: Request) -> Result<Response, Tgi> {
    let begun = begin(&app, request, false).await?;
    let (served, queued) = (begun.generation.served.clone(), begun.generation.queued());
    let answer = begun.generation.collect().await?.pop().unwrap_or_default();
    let end = answer.end;
    let details = end.filter(|_| begun.details).map(|end| Details {
        prefill: Some(Vec::new()),
        tokens: Some(answer.tokens.iter().map(|token| chosen(&app, token)).collect()),
        top_tokens: begun.top.then(|| answer.tokens.iter().map(|token| alternatives(&app, token)).collect()),
        ..details(end, begun.sample.then_some(begun.seed))
    });
    let generated_text = begun.inputs.unwrap_or_default() + &answer.text;
    let mut response = Json(GenerateResponse { generated_text, details }).into_response();
    let headers = response.headers_mut();
    served.mark(headers);
    put(headers, "x-model-id", &app.model_name);
    put(headers, "x-adapter-id", served.adapter().as_deref().unwrap_or("none"));
    let total = begun.start.elapsed();
    let inference = total.saturating_sub(queued);
    put(headers, "x-compute-time", &format!("{:.3}", inference.as_secs_f64()));
    put(headers, "x-total-time", &total.as_millis().to_string());
    put(headers, "x-queue-time", &queued.as_millis().to_string());
    put(headers, "x-inference-time", &inference.as_millis().to_string());
    if let Some(End { usage, .. }) = end {
        let tokens = usage.completion_tokens;
        put(headers, "x-time-per-token", &(inference.as_millis() / u128::from(tokens.max(1))).to_string());
        put(headers, "x-prompt-tokens", &usage.prompt_tokens.to_string());
        put(headers, "x-generated-tokens", &tokens.to_string());
    }
    Ok(response)
}

fn details(end: End, seed: Option<u64>) -> Details {
    Details {
        finish_reason: finish_reason(end.reason),
        prompt_tokens: end.usage.prompt_tokens,
        generated_tokens: end.usage.completion_tokens,
        seed,
        prefill: None,
        tokens: None,
        top_tokens: None,
    }
}

fn put(headers: &mut HeaderMap, name: &'static str, value: &str) {
    headers.extend(HeaderValue::from_str(value).ok().map(|value| (HeaderName::from_static(name), value)));
}

/// Goes on with a text, token by token.
#[utoipa::path(
    post,
    path = "/generate_stream",
    tag = "generate",
    request_body = GenerateRequest,
    responses(
        (status = 200, description = "Server-sent events, one per token", body = StreamEvent, content_type = "text/event-stream"),
        (status = 404, description = "No such adapter", body = TgiErrorBody),
        (status = 422, description = "A parameter is wrong", body = TgiErrorBody),
        (status = 429, description = "The server is busy; see Retry-After", body = TgiErrorBody),
    )
)]
pub(crate) async fn generate_stream(State(app): State<App>, request: Request) -> Result<Response, Tgi> {
    let begun = begin(&app, request, true).await?;
    let format = TgiStream {
        text: begun.inputs.unwrap_or_default(),
        seed: begun.sample.then_some(begun.seed),
        top: begun.top,
        index: 0,
        app,
    };
    Ok(sse::respond(begun.generation, format))
}

struct TgiStream {
    app: App,
    text: String,
    seed: Option<u64>,
    top: bool,
    index: u32,
}

impl Format for TgiStream {
    fn start(&mut self) -> Vec<Event> {
        Vec::new()
    }

    fn piece(&mut self, _: usize, piece: Piece) -> Vec<Event> {
        self.text.push_str(&piece.text);
        let last = piece.tokens.len().saturating_sub(1);
        let mut events = Vec::new();
        for (at, token) in piece.tokens.iter().enumerate() {
            self.index += 1;
            let end = piece.end.filter(|_| at == last);
            events.push(sse::event(&StreamEvent {
                index: self.index,
                token: chosen(&self.app, token),
                top_tokens: self.top.then(|| alternatives(&self.app, token)),
                generated_text: end.map(|_| std::mem::take(&mut self.text)),
                details: end.map(|end| details(end, self.seed)),
            }));
        }
        events
    }

    fn end(&mut self) -> Vec<Event> {
        Vec::new()
    }

    fn error(&mut self, error: &ApiError) -> Vec<Event> {
        vec![sse::event(&error.tgi_body())]
    }
}
