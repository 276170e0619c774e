//! One answer: the engine's tokens become text, up to a stop string or the end.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use engine::{Event, SampledToken, TokenStream};
use text::{Detokenizer, StopStrings, TextError, Tokenizer};
use tokio::time::{Sleep, sleep_until};
use types::{FinishReason, Usage};

use crate::error::{ApiError, Code};
use crate::fault::deadline;
use crate::generation::{End, Prompt};

/// What of an answer can be sent on.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    /// Text that no stop string can claim any more.
    pub(crate) text: String,
    /// The tokens behind it.
    pub(crate) tokens: Vec<Token>,
    /// Set on the last piece.
    pub(crate) end: Option<End>,
}

/// A token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Token {
    pub(crate) id: u32,
    pub(crate) logprob: f32,
    /// Alternatives, best first.
    pub(crate) top: Vec<(u32, f32)>,
    /// The text that this token completed.
    pub(crate) text: String,
    /// Where that text starts in the answer, in characters.
    pub(crate) offset: usize,
    /// An end-of-sequence or stop token, which is not part of the text.
    pub(crate) stop: bool,
}

/// How tokens become text.
#[derive(Debug, Clone)]
pub(crate) struct TextRules {
    pub(crate) stop: Arc<[String]>,
    pub(crate) continuing: bool,
    pub(crate) keep_stop: bool,
}

/// One answer on its way.
pub(crate) struct Choice {
    /// `None` once the answer has ended; dropping the stream cancels the sequence.
    events: Option<TokenStream>,
    /// Rings when it is waited for no longer: one timer for all events, which is set once.
    until: Pin<Box<Sleep>>,
    detokenizer: Detokenizer,
    stops: StopStrings,
    rules: TextRules,
    max_tokens: u32,
    usage: Usage,
    /// Tokens whose text is held back.
    held: VecDeque<Token>,
    /// Characters that the tokens so far stand for.
    decoded: usize,
    /// Characters that have been given out.
    sent: usize,
}

impl Choice {
    pub(crate) fn new(
        events: TokenStream,
        prompt: &Prompt,
        tokenizer: &Tokenizer,
        rules: TextRules,
        until: Instant,
    ) -> Result<Self, TextError> {
        let continuing = if rules.continuing { Detokenizer::continuing } else { Detokenizer::new };
        let prompt_tokens = u32::try_from(prompt.tokens.len()).unwrap_or(u32::MAX);
        Ok(Self {
            events: Some(events),
            until: Box::pin(sleep_until(until.into())),
            detokenizer: continuing(tokenizer),
            stops: StopStrings::new(rules.stop.to_vec())?,
            rules,
            max_tokens: prompt.max_tokens,
            usage: Usage { prompt_tokens, ..Usage::default() },
            held: VecDeque::new(),
            decoded: 0,
            sent: 0,
        })
    }

    /// The next piece that has something in it; `None` after the last one.
    ///
    /// The last token comes with the end of the answer in one piece, as some formats want both in one event.
    pub(crate) async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        let mut piece = Piece::default();
        while let Some(events) = &mut self.events {
            let event = tokio::select! {
                biased;
                event = events.next() => event,
                () = &mut self.until => {
                    Some(Event::Failed { deadline: true, reason: "the engine is silent".to_owned() })
                }
            };
            match event {
                Some(Event::Token(token)) => {
                    let last = token.stop || self.usage.completion_tokens + 1 >= self.max_tokens;
                    self.token(token, &mut piece);
                    if piece.end.is_none() && (last || (piece.text.is_empty() && piece.tokens.is_empty())) {
                        continue;
                    }
                }
                Some(Event::Finished { reason, usage }) => self.finish(reason, usage, &mut piece),
                Some(Event::Failed { deadline: late, reason }) => {
                    self.events = None;
                    let error = match late {
                        true => deadline("the answer is not complete"),
                        false => ApiError::new(Code::GenerationFailed, "the answer could not be completed"),
                    };
                    return Some(Err(error.cause(reason)));
                }
                None => {
                    self.events = None;
                    let message = "the answer could not be completed";
                    let cause = "the engine dropped the sequence without an end";
                    return Some(Err(ApiError::new(Code::GenerationFailed, message).cause(cause)));
                }
            }
            return Some(Ok(piece));
        }
        None
    }

    fn token(&mut self, token: SampledToken, piece: &mut Piece) {
        let SampledToken { id, logprob, top, stop } = token;
        self.usage.completion_tokens += 1;
        let text = if stop { String::new() } else { self.detokenizer.push(id).to_owned() };
        let offset = self.decoded;
        self.decoded += text.chars().count();
        let found = self.feed(&text, piece);
        self.held.push_back(Token { id, logprob, top, text, offset, stop });
        if found {
            self.end(FinishReason::StopString, piece);
        } else {
            self.release(piece);
        }
    }

    fn finish(&mut self, reason: FinishReason, usage: Usage, piece: &mut Piece) {
        self.usage = usage;
        let rest = self.detokenizer.finish().to_owned();
        if self.feed(&rest, piece) {
            return self.end(FinishReason::StopString, piece);
        }
        piece.text.push_str(&self.stops.finish());
        piece.tokens.extend(self.held.drain(..));
        self.end(reason, piece);
    }

    /// Lets `text` through as far as no stop string can begin in it; true if one is complete.
    fn feed(&mut self, text: &str, piece: &mut Piece) -> bool {
        let scan = self.stops.push(text);
        self.sent += scan.text.chars().count();
        piece.text.push_str(&scan.text);
        let Some(stop) = scan.stop else { return false };
        if self.rules.keep_stop {
            let stop = &self.rules.stop[stop];
            self.sent += stop.chars().count();
            piece.text.push_str(stop);
        }
        true
    }

    /// Gives out the tokens whose text has begun to be given out.
    fn release(&mut self, piece: &mut Piece) {
        while let Some(token) = self.held.pop_front_if(|token| token.offset < self.sent) {
            piece.tokens.push(token);
        }
    }

    fn end(&mut self, reason: FinishReason, piece: &mut Piece) {
        self.release(piece);
        // The engine's own count comes with its end; a stop string comes before that.
        if let Some(events) = self.events.take() {
            self.usage.cached_tokens = events.cached_tokens();
        }
        piece.end = Some(End { reason, usage: self.usage });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use engine::TokenSink;
    use text::Special;

    use super::*;

    /// An answer that is waited for so long, an engine's end of it, and a token that is a letter.
    fn choice(patience: Duration) -> (TokenSink, Choice, u32) {
        let (_, tokenizer) = testkit::tiny_model();
        let (sink, events) = engine::channel(8);
        let letter = tokenizer.encode("x", Special::Literal).expect("a text")[0];
        let prompt = Prompt { tokens: vec![letter], max_tokens: 8, asked: true };
        let rules = TextRules { stop: Arc::new([]), continuing: true, keep_stop: false };
        let choice = Choice::new(events, &prompt, &tokenizer, rules, Instant::now() + patience);
        (sink, choice.expect("rules"), letter)
    }

    fn send(sink: &TokenSink, id: u32) {
        assert!(sink.send(Event::Token(SampledToken { id, logprob: 0.0, top: Vec::new(), stop: false })));
    }

    #[tokio::test]
    async fn an_engine_that_falls_silent_is_given_up() {
        let (sink, mut choice, letter) = choice(Duration::ZERO);
        send(&sink, letter);
        let said = choice.next().await.expect("a piece").expect("no error");
        assert_eq!(said.text, "x", "what it said before its time was up counts");
        let error = choice.next().await.expect("an end").expect_err("nothing more comes");
        assert_eq!(error.code(), Code::DeadlineExceeded);
        assert!(choice.next().await.is_none() && sink.is_cancelled());
    }

    #[tokio::test]
    async fn an_engine_is_waited_for_until_its_time_is_up() {
        let (sink, mut choice, letter) = choice(Duration::from_secs(3600));
        assert!(tokio::time::timeout(Duration::from_millis(20), choice.next()).await.is_err());
        // The timer outlives a wait that was broken off.
        send(&sink, letter);
        assert_eq!(choice.next().await.expect("a piece").expect("no error").text, "x");
    }
}
