//! Around every request: its id, its span in the log, its place in the metrics.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use telemetry::Metrics;
use tracing::Instrument as _;
use uuid::Uuid;

use crate::app::App;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest request id that is taken over from a client.
const MAX_REQUEST_ID: usize = 128;

/// Status that stands for a client who left before there was an answer (nginx's).
const CLIENT_LEFT: u16 = 499;

/// Counts a request when it is over, however it ends.
struct Observed {
    metrics: Metrics,
    method: &'static str,
    route: Option<MatchedPath>,
    start: Instant,
    status: u16,
}

impl Drop for Observed {
    fn drop(&mut self) {
        let seconds = self.start.elapsed().as_secs_f64();
        let route = self.route.as_ref().map_or("none", MatchedPath::as_str);
        self.metrics.request(self.method, route, self.status, seconds);
        tracing::debug!(status = self.status, seconds, "answered");
    }
}

/// Names the request (`x-request-id`, the client's own if it sent a plain one), times it and logs it.
pub(crate) async fn observe(State(app): State<App>, request: Request, next: Next) -> Response {
    let id = request.headers().get(&REQUEST_ID).filter(|id| is_plain(id)).cloned();
    let id = id.unwrap_or_else(|| {
        HeaderValue::try_from(Uuid::new_v4().to_string()).expect("a uuid is a valid header value")
    });
    let method = name(request.method());
    let route = request.extensions().get::<MatchedPath>().cloned();
    // Paths hold users' names, so the log gets the route's template.
    let template = route.as_ref().map_or("none", MatchedPath::as_str);
    let span = tracing::info_span!("request", id = id.to_str().unwrap_or_default(), method, route = template);
    let work = async move {
        let metrics = app.metrics.clone();
        let mut observed = Observed { metrics, method, route, start: Instant::now(), status: CLIENT_LEFT };
        let mut response = next.run(request).await;
        observed.status = response.status().as_u16();
        response.headers_mut().insert(REQUEST_ID, id);
        response
    };
    work.instrument(span).await
}

fn is_plain(id: &HeaderValue) -> bool {
    let bytes = id.as_bytes();
    (1..=MAX_REQUEST_ID).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
}

/// The method's name; what is not one of the usual ones gets no series of its own.
fn name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}
