//! The routes with their description: one list makes both, so that they cannot differ.

use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::routes::{
    adapter, chat, completions, history, jobs, metrics, models, operation, progress, tgi, training, users,
};

#[derive(OpenApi)]
#[openapi(
    info(title = "Atelier", description = "One model, personal to everyone.", license(name = "MIT OR Apache-2.0")),
    tags(
        (name = "generate", description = "Answers, from the base or a user's adapter"),
        (name = "learn", description = "History in, adapter out"),
        (name = "users", description = "Users and their adapters"),
        (name = "models", description = "What can be named in `model`"),
        (name = "operation", description = "Health, metrics, limits"),
    ),
    security(("key" = [])),
    modifiers(&Key)
)]
struct Description;

struct Key;

impl Modify for Key {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer);
        let scheme =
            SecurityScheme::Http(bearer.description(Some("Not needed on loopback without keys")).build());
        openapi.components.get_or_insert_default().add_security_scheme("key", scheme);
    }
}

/// All routes.
pub(crate) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(chat::chat))
        .routes(routes!(completions::completions))
        .routes(routes!(tgi::generate))
        .routes(routes!(tgi::generate_stream))
        .routes(routes!(models::list))
        .routes(routes!(models::read))
        .routes(routes!(users::list))
        .routes(routes!(users::read, users::erase))
        .routes(routes!(history::upload, history::read, history::erase))
        .routes(routes!(history::forget))
        .routes(routes!(progress::progress))
        .routes(routes!(progress::manifest))
        .routes(routes!(training::train))
        .routes(routes!(training::read, training::pause, training::resume))
        .routes(routes!(training::read_user, training::pause_user, training::resume_user))
        .routes(routes!(adapter::read))
        .routes(routes!(adapter::config))
        .routes(routes!(adapter::weights))
        .routes(routes!(jobs::job))
        .routes(routes!(jobs::cancel))
        .routes(routes!(operation::live))
        .routes(routes!(operation::ready))
        .routes(routes!(operation::limits))
        .routes(routes!(operation::description))
        .routes(routes!(operation::load_lora_adapter))
        .routes(routes!(operation::unload_lora_adapter))
        .routes(routes!(metrics::metrics))
}

/// The API's description, as committed in `openapi/openapi.json`.
///
/// # Panics
/// Never: the description is made of plain values.
#[must_use]
pub fn openapi_json() -> String {
    let (_, mut description) = routes().split_for_parts();
    // axum's wildcard is a plain parameter to others.
    if let Some(item) = description.paths.paths.remove("/v1/models/{*id}") {
        description.paths.paths.insert("/v1/models/{id}".into(), item);
    }
    let mut text = description.to_pretty_json().expect("plain values serialise");
    text.push('\n');
    text
}
