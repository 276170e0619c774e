//! The one way from a checked request to answers: admission, adapter, engine, text. The wire formats come after it.

mod choice;
mod meter;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use engine::Generate;
use futures::stream::{self, BoxStream, Stream, StreamExt as _};
use peft::Lease;
use tracing::Span;
use types::{AdapterId, FinishReason, SamplingParams, TenantId, Usage};

pub(crate) use self::choice::{Piece, Token};

use self::choice::{Choice, TextRules};
use self::meter::Meter;
use crate::admission::Permit;
use crate::app::App;
use crate::error::{ApiError, Code};
use crate::wanted::{Wanted, model_of, unknown_model};

/// How much longer than its deadline an answer is waited for: the engine is the one to give it up.
const ENGINE_GRACE: Duration = Duration::from_secs(5);

const ADAPTER: HeaderName = HeaderName::from_static("x-atelier-adapter");
pub(crate) const GENERATION: HeaderName = HeaderName::from_static("x-atelier-generation");

/// One prompt and how long its answers may become; both checked against the context.
#[derive(Debug, Clone)]
pub(crate) struct Prompt {
    pub(crate) tokens: Vec<u32>,
    pub(crate) max_tokens: u32,
    /// `max_tokens` is the request's, not the default.
    asked: bool,
}

impl Prompt {
    /// A prompt with room for `asked` tokens, or for as many of `default` as fit if the request does not say.
    /// `param` names the prompt's field.
    pub(crate) fn new(
        app: &App,
        tokens: Vec<u32>,
        asked: Option<u32>,
        default: u32,
        param: &str,
    ) -> Result<Self, ApiError> {
        if tokens.is_empty() {
            return Err(ApiError::invalid(param, "holds no text"));
        }
        let context = app.engine.limits().context;
        let room = context.saturating_sub(tokens.len());
        let room = u32::try_from(room).unwrap_or(u32::MAX);
        let max_tokens = asked.unwrap_or(default.min(room).max(1));
        if max_tokens > room {
            let message = format!(
                "this model's context is {context} tokens; the prompt has {} and the answer may have {max_tokens}",
                tokens.len()
            );
            return Err(ApiError::new(Code::ContextLengthExceeded, message).param(param));
        }
        Ok(Self { tokens, max_tokens, asked: asked.is_some() })
    }

    /// The same beside the virtual tokens of an adapter: a default answer makes room for them.
    fn beside(&self, virtual_tokens: usize, context: usize) -> Self {
        let room = context.saturating_sub(self.tokens.len() + virtual_tokens);
        let room = u32::try_from(room).unwrap_or(u32::MAX).max(1);
        let max_tokens = if self.asked { self.max_tokens } else { self.max_tokens.min(room) };
        Self { max_tokens, ..self.clone() }
    }
}

/// A request, checked and turned into tokens.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) tenant: TenantId,
    pub(crate) wanted: Wanted,
    pub(crate) prompts: Vec<Prompt>,
    /// Answers per prompt.
    pub(crate) n: usize,
    /// As for one answer; `max_tokens` comes from the prompt.
    pub(crate) params: SamplingParams,
    pub(crate) stop: Vec<String>,
    /// The answer goes on the prompt's text, so a first blank belongs to it.
    pub(crate) continuing: bool,
    /// The stop string is part of the answer.
    pub(crate) keep_stop: bool,
}

/// Who answers.
#[derive(Debug, Clone)]
pub(crate) struct Served(Option<Lease>);

impl Served {
    /// Whose adapter answers: a user, or an `@` and the name of a shared adapter.
    pub(crate) fn adapter(&self) -> Option<String> {
        self.0.as_ref().map(|lease| lease.id.owner.to_string())
    }

    /// The headers that name adapter and generation; `none` for the base.
    pub(crate) fn mark(&self, headers: &mut HeaderMap) {
        let generation = self.0.as_ref().map(|lease| lease.generation.to_string());
        let value = |text: Option<&str>| HeaderValue::from_str(text.unwrap_or("none")).ok();
        headers.extend(value(self.adapter().as_deref()).map(|value| (ADAPTER, value)));
        headers.extend(value(generation.as_deref()).map(|value| (GENERATION, value)));
    }
}

/// Answers that are being generated. Dropping it, or the stream made of it, cancels them all.
pub(crate) struct Generation {
    pub(crate) served: Served,
    choices: Vec<Choice>,
    meter: Meter,
    permit: Permit,
}

/// A complete answer.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) tokens: Vec<Token>,
    pub(crate) end: Option<End>,
}

/// How an answer ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct End {
    pub(crate) reason: FinishReason,
    pub(crate) usage: Usage,
}

impl App {
    /// Starts the answers to a request, prompt by prompt: choice `i` answers prompt `i / n`.
    pub(crate) async fn generate(&self, ask: Ask) -> Result<Generation, ApiError> {
        if ask.prompts.iter().any(|prompt| ask.params.min_tokens > prompt.max_tokens) {
            return Err(ApiError::invalid("min_tokens", "must not be above max_tokens"));
        }
        let meter = Meter::new(self.metrics.clone(), ask.prompts.len() * ask.n);
        let until = Instant::now() + self.limits.generation_timeout;
        let user = ask.wanted.user().map(|user| AdapterId::new(ask.tenant.clone(), user.clone()));
        let who = ask.wanted.owner().map(|owner| AdapterId { tenant: ask.tenant.clone(), owner });
        // While it waits for its turn, its adapter comes nearer.
        who.iter().for_each(|who| self.adapters.prefetch(who));
        let permit = self.admission().enter(user, ask.prompts.len() * ask.n).await?;
        let lease = self.lease(&ask.wanted, who.as_ref(), until).await?;
        let context = self.engine.limits().context;
        let virtual_tokens = lease.as_ref().map_or(0, |lease| lease.adapter.virtual_tokens());
        let mut choices = Vec::with_capacity(ask.prompts.len() * ask.n);
        for prompt in &ask.prompts {
            let prompt = &prompt.beside(virtual_tokens, context);
            let group = (ask.n > 1).then(|| self.new_group());
            for number in 0..ask.n {
                let params = SamplingParams {
                    max_tokens: prompt.max_tokens,
                    seed: ask.params.seed.wrapping_add(number as u64),
                    ..ask.params.clone()
                };
                let tokens = self.engine.submit(Generate {
                    prompt: prompt.tokens.clone(),
                    tenant: ask.tenant.clone(),
                    adapter: lease.clone(),
                    params,
                    deadline: Some(until),
                    group,
                })?;
                let rules = TextRules {
                    stop: Arc::from(ask.stop.as_slice()),
                    continuing: ask.continuing,
                    keep_stop: ask.keep_stop,
                };
                choices.push(Choice::new(tokens, prompt, &self.tokenizer, rules, until + ENGINE_GRACE)?);
            }
        }
        Ok(Generation { served: Served(lease), choices, meter: meter.submitted(), permit })
    }

    async fn lease(
        &self,
        wanted: &Wanted,
        who: Option<&AdapterId>,
        until: Instant,
    ) -> Result<Option<Lease>, ApiError> {
        let Some(who) = who else { return Ok(None) };
        let patience = self.limits.adapter_timeout.min(until.saturating_duration_since(Instant::now()));
        match (self.adapters.acquire_within(who, patience).await?, wanted) {
            (None, Wanted::Named(_) | Wanted::Shared(..)) => {
                Err(unknown_model(&model_of(&self.model_name, &who.owner)))
            }
            (lease, _) => Ok(lease),
        }
    }
}

impl Generation {
    /// Time from the request to its place in the engine's queue.
    pub(crate) fn queued(&self) -> Duration {
        self.meter.queued()
    }

    /// The pieces of all answers as they come, each with the number of its choice. After an error nothing follows.
    pub(crate) fn into_pieces(self) -> impl Stream<Item = Result<(usize, Piece), ApiError>> + Send + 'static {
        struct State {
            pieces: stream::SelectAll<BoxStream<'static, (usize, Result<Piece, ApiError>)>>,
            meter: Meter,
            span: Span,
            // Given back when the answers are over or nobody wants them any more.
            _permit: Permit,
        }
        let numbered = |(number, choice): (usize, Choice)| {
            let next = |mut choice: Choice| async move { choice.next().await.map(|piece| (piece, choice)) };
            stream::unfold(choice, next).map(move |piece| (number, piece)).boxed()
        };
        let pieces = stream::select_all(self.choices.into_iter().enumerate().map(numbered));
        let state = State { pieces, meter: self.meter, span: Span::current(), _permit: self.permit };
        stream::unfold(Some(state), |state| async {
            let mut state = state?;
            let (number, piece) = state.pieces.next().await?;
            let _entered = state.span.clone().entered();
            match piece {
                Ok(piece) => {
                    state.meter.piece(&piece);
                    Some((Ok((number, piece)), Some(state)))
                }
                Err(error) => {
                    state.meter.failed();
                    Some((Err(error), None))
                }
            }
        })
    }

    /// Waits for all answers.
    pub(crate) async fn collect(self) -> Result<Vec<Answer>, ApiError> {
        let mut answers: Vec<Answer> = self.choices.iter().map(|_| Answer::default()).collect();
        let mut pieces = std::pin::pin!(self.into_pieces());
        while let Some(piece) = pieces.next().await {
            let (number, piece) = piece?;
            let answer = &mut answers[number];
            answer.text.push_str(&piece.text);
            answer.tokens.extend(piece.tokens);
            answer.end = answer.end.or(piece.end);
        }
        Ok(answers)
    }
}
