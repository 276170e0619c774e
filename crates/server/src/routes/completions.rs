//! `POST /v1/completions`, as OpenAI has it.

use axum::Json;
use axum::extract::State;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use text::Special;
use types::Usage;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::app::App;
use crate::auth::Principal;
use crate::body::JsonBody;
use crate::error::{ApiError, ErrorBody};
use crate::generation::{Answer, Ask, Piece, Prompt};
use crate::json::fields_of;
use crate::logprobs::TextLogprobs;
use crate::routes::chat::{Head, finish_reason};
use crate::sampling::{HARMLESS, SamplingFields, Streaming, UNSUPPORTED, in_vocabulary, top_logprobs};
use crate::sse::{self, Format};
use crate::usage::WireUsage;
use crate::wanted::Wanted;

/// Length of an answer whose request names none, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// A text to go on with, besides the sampling fields.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CompletionFields {
    /// One or several texts, or token ids. Special tokens written in a text count as such.
    prompt: WirePrompt,
    /// Send the log-probabilities of the tokens, and of this many alternatives.
    #[schema(maximum = 20)]
    logprobs: Option<u32>,
}

/// The whole request.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body; its two parts are read one by one")]
pub(crate) struct CompletionRequest {
    #[schema(inline)]
    #[serde(flatten)]
    completion: CompletionFields,
    #[serde(flatten)]
    sampling: SamplingFields,
}

/// Prompts in OpenAI's four forms.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, a list of token ids, or a list of such lists"
)]
enum WirePrompt {
    /// A text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// A text in tokens.
    Tokens(Vec<u32>),
    /// Several texts in tokens.
    TokenLists(Vec<Vec<u32>>),
}

impl WirePrompt {
    fn tokens(self, app: &App) -> Result<Vec<Vec<u32>>, ApiError> {
        let known = |ids: Vec<u32>| ids.into_iter().map(|id| in_vocabulary(app, "prompt", id)).collect();
        let encode = |text: String| {
            let tokens = app.tokenizer.encode_prompt(&text, Special::Parse);
            tokens.map_err(|error| ApiError::from(error).param("prompt"))
        };
        match self {
            Self::Text(text) => Ok(vec![encode(text)?]),
            Self::Texts(texts) => texts.into_iter().map(encode).collect(),
            Self::Tokens(ids) => Ok(vec![known(ids)?]),
            Self::TokenLists(lists) => lists.into_iter().map(known).collect(),
        }
    }

    fn count(&self) -> usize {
        match self {
            Self::Text(_) | Self::Tokens(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::TokenLists(lists) => lists.len(),
        }
    }
}

/// A complete answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Completion {
    id: String,
    /// `text_completion`.
    object: &'static str,
    /// Unix time.
    created: i64,
    model: String,
    choices: Vec<TextChoice>,
    usage: WireUsage,
    system_fingerprint: String,
}

/// One of the answers; answers to prompt `i` are the choices `i * n` and following.
#[derive(Debug, Serialize, ToSchema)]
struct TextChoice {
    index: usize,
    text: String,
    #[schema(required)]
    logprobs: Option<TextLogprobs>,
    /// `stop` or `length`.
    #[schema(required)]
    finish_reason: Option<&'static str>,
}

/// Goes on with a text.
///
/// The headers `x-atelier-adapter` and `x-atelier-generation` name who answered.
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "generate",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answer; with `stream` as server-sent events, then `[DONE]`", body = Completion),
        (status = 400, description = "A parameter is wrong; `param` names it", body = ErrorBody),
        (status = 401, description = "The API key is missing or wrong", body = ErrorBody),
        (status = 404, description = "No such model or adapter", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 429, description = "Too many requests of this user; see Retry-After", body = ErrorBody),
        (status = 503, description = "The server is busy; see Retry-After", body = ErrorBody),
    )
)]
pub(crate) async fn completions(
    State(app): State<App>,
    principal: Principal,
    JsonBody(object): JsonBody,
) -> Result<Response, ApiError> {
    object.refuse_others(
        &[fields_of::<SamplingFields>(), fields_of::<CompletionFields>()],
        &HARMLESS,
        &UNSUPPORTED,
    )?;
    let sampling: SamplingFields = object.read()?;
    let CompletionFields { prompt, logprobs } = object.read()?;
    let wanted = Wanted::openai(&app.model_name, &sampling.model, sampling.user.as_deref())?;
    let mut params = sampling.params(&app)?;
    params.logprobs = logprobs.map(|count| top_logprobs(&app, "logprobs", count)).transpose()?;
    if prompt.count() == 0 {
        return Err(ApiError::invalid("prompt", "must hold at least one prompt"));
    }
    let (n, stop, streaming) =
        (sampling.choices(&app, prompt.count())?, sampling.stop(&app)?, sampling.streaming()?);
    let prompts = app.blocking(move |app| prompt.tokens(app)).await??;
    let asked = sampling.max_tokens;
    let checked = |tokens| Prompt::new(&app, tokens, asked, DEFAULT_MAX_TOKENS, "prompt");
    let prompts: Vec<Prompt> = prompts.into_iter().map(checked).collect::<Result<_, _>>()?;
    let answers = prompts.len() * n;
    let tenant = principal.tenant;
    let ask = Ask { tenant, wanted, prompts, n, params, stop, continuing: true, keep_stop: false };
    let generation = app.generate(ask).await?;
    let head = Head {
        id: format!("cmpl-{}", Uuid::new_v4().simple()),
        created: app.clock.now().seconds(),
        model: sampling.model,
        system_fingerprint: app.fingerprint(),
    };
    if let Some(streaming) = streaming {
        let usages = vec![Usage::default(); answers];
        return Ok(sse::respond(generation, TextStream { app, head, streaming, usages, n, logprobs }));
    }
    let served = generation.served.clone();
    let answers = generation.collect().await?;
    let usages: Vec<Usage> = answers.iter().filter_map(|answer| answer.end).map(|end| end.usage).collect();
    let choice = |(index, answer): (usize, Answer)| TextChoice {
        index,
        logprobs: logprobs.map(|count| TextLogprobs::of(&app.tokenizer, &answer.tokens, count)),
        text: answer.text,
        finish_reason: answer.end.map(|end| finish_reason(end.reason)),
    };
    let completion = Completion {
        id: head.id,
        object: "text_completion",
        created: head.created,
        model: head.model,
        choices: answers.into_iter().enumerate().map(choice).collect(),
        usage: WireUsage::of(&usages, n),
        system_fingerprint: head.system_fingerprint,
    };
    let mut response = Json(completion).into_response();
    served.mark(response.headers_mut());
    Ok(response)
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<TextChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<WireUsage>>,
}

struct TextStream {
    app: App,
    head: Head,
    streaming: Streaming,
    usages: Vec<Usage>,
    n: usize,
    logprobs: Option<u32>,
}

impl TextStream {
    fn chunk(&self, choices: Vec<TextChoice>, usage: Option<WireUsage>) -> Event {
        let Head { id, created, model, system_fingerprint } = &self.head;
        let usage = self.streaming.include_usage.then_some(usage);
        let object = "text_completion";
        sse::event(&Chunk { id, object, created: *created, model, system_fingerprint, choices, usage })
    }
}

impl Format for TextStream {
    fn start(&mut self) -> Vec<Event> {
        Vec::new()
    }

    fn piece(&mut self, choice: usize, piece: Piece) -> Vec<Event> {
        if let Some(end) = piece.end {
            self.usages[choice] = end.usage;
        }
        let logprobs = self.logprobs.map(|count| TextLogprobs::of(&self.app.tokenizer, &piece.tokens, count));
        let finish_reason = piece.end.map(|end| finish_reason(end.reason));
        vec![self.chunk(vec![TextChoice { index: choice, text: piece.text, logprobs, finish_reason }], None)]
    }

    fn end(&mut self) -> Vec<Event> {
        let usage = WireUsage::of(&self.usages, self.n);
        let usage = self.streaming.include_usage.then(|| self.chunk(Vec::new(), Some(usage)));
        usage.into_iter().chain([sse::done()]).collect()
    }

    fn error(&mut self, error: &ApiError) -> Vec<Event> {
        vec![sse::event(&error.body()), sse::done()]
    }
}
