//! `POST /v1/chat/completions`, as OpenAI has it.

use axum::Json;
use axum::extract::State;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use text::{ChatOptions, Message, Role};
use types::{FinishReason, Usage};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::app::App;
use crate::auth::Principal;
use crate::body::JsonBody;
use crate::error::{ApiError, Code, ErrorBody};
use crate::generation::{Ask, Piece, Prompt};
use crate::json::fields_of;
use crate::logprobs::ChatLogprobs;
use crate::sampling::{HARMLESS, SamplingFields, Streaming, UNSUPPORTED, at_least_one, top_logprobs};
use crate::sse::{self, Format};
use crate::usage::WireUsage;
use crate::wanted::Wanted;

/// A conversation to go on with, besides the sampling fields.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ChatFields {
    /// The conversation so far, at least one message.
    messages: Vec<WireMessage>,
    /// Most tokens to generate; wins over `max_tokens`.
    #[schema(minimum = 1)]
    max_completion_tokens: Option<u32>,
    /// Send the tokens' log-probabilities.
    logprobs: Option<bool>,
    /// Alternatives per token; only with `logprobs`.
    #[schema(maximum = 20)]
    top_logprobs: Option<u32>,
}

/// The whole request.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body; its two parts are read one by one")]
pub(crate) struct ChatRequest {
    #[schema(inline)]
    #[serde(flatten)]
    chat: ChatFields,
    #[serde(flatten)]
    sampling: SamplingFields,
}

/// One message. What clients send along with an earlier answer is accepted where it is empty or cannot matter.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct WireMessage {
    /// `system`, `developer` (the same), `user`, `assistant` or `tool`.
    role: String,
    /// Text, or a list of text parts.
    content: Option<Content>,
    /// The speaker's name, for templates that show it.
    name: Option<String>,
    /// Not supported.
    #[schema(ignore)]
    tool_calls: Option<Value>,
    /// Not supported.
    #[schema(ignore)]
    function_call: Option<Value>,
    /// Not supported.
    #[schema(ignore)]
    audio: Option<Value>,
    #[schema(ignore)]
    #[serde(rename = "tool_call_id")]
    _tool_call_id: Option<IgnoredAny>,
    #[schema(ignore)]
    #[serde(rename = "refusal")]
    _refusal: Option<IgnoredAny>,
    #[schema(ignore)]
    #[serde(rename = "annotations")]
    _annotations: Option<IgnoredAny>,
}

/// A message's content.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of parts of type text")]
enum Content {
    /// Text.
    Text(String),
    /// Parts, joined.
    Parts(Vec<Part>),
}

/// A part of a content.
#[derive(Debug, Deserialize, ToSchema)]
struct Part {
    /// `text`; other types are not supported.
    #[serde(rename = "type")]
    kind: String,
    /// The text.
    text: Option<String>,
}

impl WireMessage {
    fn read(&self, at: usize) -> Result<Message, ApiError> {
        let param = |field: &str| format!("messages[{at}].{field}");
        let role = match self.role.as_str() {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" => Role::Tool,
            _ => {
                let problem = "must be system, developer, user, assistant or tool";
                return Err(ApiError::invalid(param("role"), problem));
            }
        };
        let asks = |value: &Value| value.as_array().is_none_or(|list| !list.is_empty());
        for (field, value) in
            [("tool_calls", &self.tool_calls), ("function_call", &self.function_call), ("audio", &self.audio)]
        {
            if value.as_ref().is_some_and(asks) {
                let message = format!("{}: not supported by this server", param(field));
                return Err(ApiError::new(Code::UnsupportedParameter, message).param(param(field)));
            }
        }
        let content = match &self.content {
            None if role == Role::Assistant => String::new(),
            None => return Err(crate::json::missing(&param("content"))),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => {
                let mut whole = String::new();
                for part in parts {
                    match (part.kind.as_str(), &part.text) {
                        ("text", Some(text)) => whole.push_str(text),
                        _ => {
                            return Err(ApiError::invalid(
                                param("content"),
                                "may hold parts of type text only",
                            ));
                        }
                    }
                }
                whole
            }
        };
        Ok(Message { role, content, name: self.name.clone() })
    }
}

/// A complete answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatCompletion {
    id: String,
    /// `chat.completion`.
    object: &'static str,
    /// Unix time.
    created: i64,
    model: String,
    choices: Vec<ChatChoice>,
    usage: WireUsage,
    system_fingerprint: String,
}

/// One of the answers.
#[derive(Debug, Serialize, ToSchema)]
struct ChatChoice {
    index: usize,
    message: AnswerMessage,
    #[schema(required)]
    logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    #[schema(required)]
    finish_reason: Option<&'static str>,
}

/// The message of an answer.
#[derive(Debug, Serialize, ToSchema)]
struct AnswerMessage {
    role: &'static str,
    content: String,
    /// Always null.
    #[schema(value_type = Option<String>)]
    refusal: Option<()>,
}

/// OpenAI's word for the end of an answer.
pub(crate) fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::EndOfSequence | FinishReason::StopString => "stop",
        FinishReason::Length => "length",
    }
}

/// Answers a conversation.
///
/// The headers `x-atelier-adapter` and `x-atelier-generation` name who answered.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "generate",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer; with `stream` as server-sent events of `chat.completion.chunk` objects, then `[DONE]`", body = ChatCompletion),
        (status = 400, description = "A parameter is wrong; `param` names it", body = ErrorBody),
        (status = 401, description = "The API key is missing or wrong", body = ErrorBody),
        (status = 404, description = "No such model or adapter", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 429, description = "Too many requests of this user; see Retry-After", body = ErrorBody),
        (status = 503, description = "The server is busy; see Retry-After", body = ErrorBody),
    )
)]
pub(crate) async fn chat(
    State(app): State<App>,
    principal: Principal,
    JsonBody(object): JsonBody,
) -> Result<Response, ApiError> {
    object.refuse_others(
        &[fields_of::<SamplingFields>(), fields_of::<ChatFields>()],
        &HARMLESS,
        &UNSUPPORTED,
    )?;
    let sampling: SamplingFields = object.read()?;
    let fields: ChatFields = object.read()?;
    let wanted = Wanted::openai(&app.model_name, &sampling.model, sampling.user.as_deref())?;
    let asked = at_least_one("max_completion_tokens", fields.max_completion_tokens)?.or(sampling.max_tokens);
    let mut params = sampling.params(&app)?;
    params.logprobs = match (fields.logprobs == Some(true), fields.top_logprobs) {
        (true, count) => Some(top_logprobs(&app, "top_logprobs", count.unwrap_or(0))?),
        (false, Some(1..)) => return Err(ApiError::invalid("top_logprobs", "is allowed only with logprobs")),
        (false, _) => None,
    };
    let (n, stop, streaming) = (sampling.choices(&app, 1)?, sampling.stop(&app)?, sampling.streaming()?);
    if fields.messages.is_empty() {
        return Err(ApiError::invalid("messages", "must hold at least one message"));
    }
    let read = |(at, message): (usize, &WireMessage)| message.read(at);
    let messages: Vec<Message> = fields.messages.iter().enumerate().map(read).collect::<Result<_, _>>()?;
    let now = app.clock.now();
    let tokens = app
        .blocking(move |app| {
            let options = ChatOptions { add_generation_prompt: true, now };
            app.tokenizer.render_chat_tokens(&messages, &options)
        })
        .await?
        .map_err(|error| ApiError::from(error).param("messages"))?;
    let prompt = Prompt::new(&app, tokens, asked, app.limits.default_max_tokens, "messages")?;
    let with_logprobs = params.logprobs.is_some();
    let generation = app
        .generate(Ask {
            tenant: principal.tenant,
            wanted,
            prompts: vec![prompt],
            n,
            params,
            stop,
            continuing: false,
            keep_stop: false,
        })
        .await?;
    let head = Head {
        id: format!("chatcmpl-{}", Uuid::new_v4().simple()),
        created: now.seconds(),
        model: sampling.model,
        system_fingerprint: app.fingerprint(),
    };
    if let Some(streaming) = streaming {
        let usages = vec![Usage::default(); n];
        return Ok(sse::respond(generation, ChatStream { app, head, streaming, usages, with_logprobs }));
    }
    let served = generation.served.clone();
    let answers = generation.collect().await?;
    let usages: Vec<Usage> = answers.iter().filter_map(|answer| answer.end).map(|end| end.usage).collect();
    let choice = |(index, answer): (usize, crate::generation::Answer)| ChatChoice {
        index,
        logprobs: with_logprobs.then(|| ChatLogprobs::of(&app.tokenizer, &answer.tokens)),
        message: AnswerMessage { role: "assistant", content: answer.text, refusal: None },
        finish_reason: answer.end.map(|end| finish_reason(end.reason)),
    };
    let completion = ChatCompletion {
        id: head.id,
        object: "chat.completion",
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

/// What all chunks of an answer have in common.
#[derive(Clone)]
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: i64,
    pub(crate) model: String,
    pub(crate) system_fingerprint: String,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<ChunkChoice>,
    /// Absent, null, or there: as OpenAI has it with and without `include_usage`.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<WireUsage>>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize, Default)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

struct ChatStream {
    app: App,
    head: Head,
    streaming: Streaming,
    usages: Vec<Usage>,
    with_logprobs: bool,
}

impl ChatStream {
    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<WireUsage>) -> Event {
        let Head { id, created, model, system_fingerprint } = &self.head;
        let usage = self.streaming.include_usage.then_some(usage);
        let object = "chat.completion.chunk";
        sse::event(&Chunk { id, object, created: *created, model, system_fingerprint, choices, usage })
    }

    fn choice(
        &self,
        index: usize,
        delta: Delta,
        logprobs: Option<ChatLogprobs>,
        end: Option<&'static str>,
    ) -> Event {
        self.chunk(vec![ChunkChoice { index, delta, logprobs, finish_reason: end }], None)
    }
}

impl Format for ChatStream {
    fn start(&mut self) -> Vec<Event> {
        let first = |index| {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
            self.choice(index, delta, None, None)
        };
        (0..self.usages.len()).map(first).collect()
    }

    fn piece(&mut self, choice: usize, piece: Piece) -> Vec<Event> {
        let mut events = Vec::new();
        let logprobs = self.with_logprobs.then(|| ChatLogprobs::of(&self.app.tokenizer, &piece.tokens));
        if !piece.text.is_empty() || (self.with_logprobs && !piece.tokens.is_empty()) {
            let delta = Delta { role: None, content: Some(piece.text) };
            events.push(self.choice(choice, delta, logprobs, None));
        }
        if let Some(end) = piece.end {
            self.usages[choice] = end.usage;
            events.push(self.choice(choice, Delta::default(), None, Some(finish_reason(end.reason))));
        }
        events
    }

    fn end(&mut self) -> Vec<Event> {
        let usage = WireUsage::of(&self.usages, self.usages.len());
        let usage = self.streaming.include_usage.then(|| self.chunk(Vec::new(), Some(usage)));
        usage.into_iter().chain([sse::done()]).collect()
    }

    fn error(&mut self, error: &ApiError) -> Vec<Event> {
        vec![sse::event(&error.body()), sse::done()]
    }
}
