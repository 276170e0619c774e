//! The routes with their description: one list makes both, so that they cannot differ.

use utoipa::openapi::Required;
use utoipa::openapi::path::{ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::routes::{
    adapter, adapters, chat, completions, history, jobs, metrics, models, operation, pauses, progress, tgi,
    training, users,
};

#[derive(OpenApi)]
#[openapi(
    info(title = "Atelier", description = "One model, personal to everyone.", license(name = "MIT OR Apache-2.0")),
    tags(
        (name = "generate", description = "Answers, from the base or a user's adapter"),
        (name = "learn", description = "History in, adapter out"),
        (name = "users", description = "Who there is"),
        (name = "adapters", description = "Adapters of users, and adapters that users share: in, out, back and away"),
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
    let routes = OpenApiRouter::with_openapi(Description::openapi())
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
        .routes(routes!(pauses::read, pauses::pause, pauses::resume))
        .routes(routes!(pauses::read_server, pauses::pause_server, pauses::resume_server))
        .routes(routes!(pauses::read_user, pauses::pause_user, pauses::resume_user))
        .routes(routes!(adapters::list))
        .routes(routes!(jobs::job))
        .routes(routes!(jobs::cancel))
        .routes(routes!(operation::live))
        .routes(routes!(operation::ready))
        .routes(routes!(operation::limits))
        .routes(routes!(operation::description))
        .routes(routes!(operation::load_lora_adapter))
        .routes(routes!(operation::unload_lora_adapter))
        .routes(routes!(metrics::metrics));
    adapter::ROOTS.into_iter().fold(routes, |routes, root| routes.nest(root, adapter::routes()))
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
    // Routes that are the same in both roots are named apart: an operation's id is its method with its path.
    for (path, item) in &mut description.paths.paths {
        let words = path.strip_prefix("/v1").unwrap_or(path).split(['/', '{', '}', '.']);
        let name = words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join("_");
        let operations = [
            ("get", &mut item.get),
            ("put", &mut item.put),
            ("post", &mut item.post),
            ("delete", &mut item.delete),
        ];
        for (method, operation) in operations {
            let operation = operation.iter_mut();
            operation.for_each(|operation| operation.operation_id = Some(format!("{method}_{name}")));
        }
    }
    // What stands in a root is described here, as the routes below it are the same for both.
    for (path, item) in &mut description.paths.paths {
        let Some(root) = adapter::ROOTS.into_iter().find(|root| path.starts_with(root)) else { continue };
        let name = if root.contains("{user}") { "user" } else { "name" };
        let text = ObjectBuilder::new().schema_type(Type::String);
        let owner = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Path);
        let owner = owner.required(Required::True).schema(Some(text)).build();
        item.parameters.get_or_insert_default().push(owner.into());
    }
    let mut text = description.to_pretty_json().expect("plain values serialise");
    text.push('\n');
    text
}
