//! Answers as server-sent events, whatever the wire format.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, StreamExt as _};
use serde::Serialize;

use crate::error::ApiError;
use crate::generation::{Generation, Piece};

/// How often a comment is sent while nothing else is, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// One wire format of a stream.
pub(crate) trait Format: Send + 'static {
    /// What comes before the first piece.
    fn start(&mut self) -> Vec<Event>;
    /// A piece of the answer with number `choice`.
    fn piece(&mut self, choice: usize, piece: Piece) -> Vec<Event>;
    /// What comes after the last piece.
    fn end(&mut self) -> Vec<Event>;
    /// What comes instead of the rest.
    fn error(&mut self, error: &ApiError) -> Vec<Event>;
}

/// The response that streams a generation. Dropping its body cancels the generation.
pub(crate) fn respond(generation: Generation, mut format: impl Format) -> Response {
    let served = generation.served.clone();
    let first = format.start();
    let pieces = Box::pin(generation.into_pieces());
    let rest = stream::unfold(Some((pieces, format)), |state| async {
        let (mut pieces, mut format) = state?;
        match pieces.next().await {
            Some(Ok((choice, piece))) => Some((format.piece(choice, piece), Some((pieces, format)))),
            Some(Err(error)) => {
                error.log();
                Some((format.error(&error), None))
            }
            None => Some((format.end(), None)),
        }
    });
    let events = stream::iter([first]).chain(rest).flat_map(stream::iter).map(Ok::<_, Infallible>);
    let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    served.mark(response.headers_mut());
    // Some proxies would otherwise collect the stream before they pass it on.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// An event that carries `data` as JSON.
pub(crate) fn event(data: &impl Serialize) -> Event {
    Event::default().json_data(data).expect("wire types serialise: string keys, finite numbers")
}

/// OpenAI's end of a stream.
pub(crate) fn done() -> Event {
    Event::default().data("[DONE]")
}
