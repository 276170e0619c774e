//! The HTTP role as a whole: what it is made of, and the router that clients talk to.

use std::any::Any;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use adapters::AdapterCache;
use axum::Router;
use axum::extract::OriginalUri;
use axum::http::Method;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use engine::Engine;
use peft::FrozenBase;
use store::Store;
use telemetry::Metrics;
use text::Tokenizer;
use tokio::sync::{Notify, Semaphore};
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument as _;
use types::{Clock, Timestamp, TrainingLimits};

use crate::admission::Admission;
use crate::auth::Auth;
use crate::error::{ApiError, Code};
use crate::limits::Limits;
use crate::routes::metrics::QueueGauge;
use crate::upload_rate::UploadRate;
use crate::{observe, openapi};

/// What the HTTP role works with.
#[derive(Clone)]
pub struct AppState {
    /// Where sequences are generated.
    pub engine: Arc<dyn Engine>,
    /// The base model's vocabulary and chat template.
    pub tokenizer: Tokenizer,
    /// Users, histories, jobs, generations.
    pub store: Store,
    /// Adapters in memory.
    pub adapters: AdapterCache,
    /// The base model's name, as clients write it in `model`.
    pub model_name: String,
    /// The base model, as adapters see it.
    pub base: Arc<dyn FrozenBase>,
    /// What clients may ask for.
    pub limits: Limits,
    /// Who may ask.
    pub auth: Auth,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// What is counted.
    pub metrics: Metrics,
    /// Told when history has arrived, so that a worker need not look all the time.
    pub on_upload: Arc<Notify>,
}

/// The HTTP role. Clones share everything.
#[derive(Clone)]
pub struct App(Arc<Inner>);

struct Inner {
    state: AppState,
    started: Timestamp,
    admission: Admission,
    uploads: UploadRate,
    imports: Arc<Semaphore>,
    queue: QueueGauge,
    groups: AtomicU64,
}

impl App {
    /// The role over its parts.
    #[must_use]
    pub fn new(state: AppState) -> Self {
        let started = state.clock.now();
        let admission = Admission::new(&state.limits);
        let uploads = UploadRate::new(state.limits.upload_bytes_per_minute);
        let imports = Arc::new(Semaphore::new(state.limits.imports));
        let (queue, groups) = (QueueGauge::default(), AtomicU64::new(0));
        Self(Arc::new(Inner { state, started, admission, uploads, imports, queue, groups }))
    }

    /// All routes, ready to [`crate::serve`].
    pub fn router(&self) -> Router {
        let (router, _) = openapi::routes().split_for_parts();
        router
            .fallback(unknown_route)
            .method_not_allowed_fallback(unknown_method)
            .layer(CatchPanicLayer::custom(panicked))
            .layer(from_fn_with_state(self.clone(), observe::observe))
            .with_state(self.clone())
    }

    /// OpenAI's `system_fingerprint`: which base answers.
    pub(crate) fn fingerprint(&self) -> String {
        let digits = self.base.hash().into_iter().take(6).map(|byte| format!("{byte:02x}"));
        digits.fold("atelier-".to_owned(), |whole, digits| whole + &digits)
    }

    /// The most that a training may be asked for, on this base.
    pub(crate) fn training_limits(&self) -> TrainingLimits {
        TrainingLimits { layers: self.base.shape().layers, ..self.limits.training }
    }

    /// When the server started.
    pub(crate) fn started(&self) -> Timestamp {
        self.0.started
    }

    pub(crate) fn admission(&self) -> &Admission {
        &self.0.admission
    }

    pub(crate) fn uploads(&self) -> &UploadRate {
        &self.0.uploads
    }

    /// A turn for each adapter that may be taken in at a time.
    pub(crate) fn imports(&self) -> &Arc<Semaphore> {
        &self.0.imports
    }

    pub(crate) fn queue(&self) -> &QueueGauge {
        &self.0.queue
    }

    /// A mark for the answers to one prompt, never given before.
    pub(crate) fn new_group(&self) -> u64 {
        self.0.groups.fetch_add(1, Ordering::Relaxed)
    }

    /// Runs work that takes a while (long texts through the tokenizer) where it holds up nobody.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let app = self.clone();
        tokio::task::spawn_blocking(move || work(&app)).await.map_err(ApiError::internal)
    }

    /// Runs work to its end even if the client goes away: what changes a head and then tells the cache.
    pub(crate) async fn to_the_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
    ) -> Result<T, ApiError> {
        tokio::spawn(work.in_current_span()).await.map_err(ApiError::internal)?
    }
}

impl Deref for App {
    type Target = AppState;

    fn deref(&self) -> &AppState {
        &self.0.state
    }
}

async fn unknown_route(OriginalUri(uri): OriginalUri) -> ApiError {
    ApiError::new(Code::RouteNotFound, format!("there is no route {}", uri.path()))
}

async fn unknown_method(method: Method, OriginalUri(uri): OriginalUri) -> ApiError {
    ApiError::new(Code::MethodNotAllowed, format!("{} does not know the method {method}", uri.path()))
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    ApiError::internal(format_args!("a handler panicked: {text}")).into_response()
}
