//! The committed description of the API is that of the code.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::Server;

#[tokio::test]
async fn the_committed_description_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../openapi/openapi.json");
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(committed == server::openapi_json(), "openapi/openapi.json differs: run `cargo xtask openapi`");
    assert_eq!(Server::new().await.get("/openapi.json").await.text(), committed);
}

#[test]
fn every_operation_has_an_id_of_its_own() {
    let described: Value = serde_json::from_str(&server::openapi_json()).unwrap();
    let mut ids = BTreeMap::new();
    for (path, item) in described["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap().iter().filter(|(key, _)| *key != "parameters") {
            let id = operation["operationId"].as_str().unwrap_or_else(|| panic!("{method} {path} has no id"));
            let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
            assert!(id.chars().all(is_word), "{id}: a client's generator makes a function of it");
            let place = format!("{method} {path}");
            if let Some(other) = ids.insert(id.to_owned(), place.clone()) {
                panic!("{id} is both {other} and {place}");
            }
        }
    }
    assert!(ids.len() > 50, "{} operations", ids.len());
}

#[test]
fn every_route_of_the_issue_is_described() {
    let text = server::openapi_json();
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/generate",
        "/generate_stream",
        "/v1/users/{user}/history",
        "/v1/users/{user}",
        "/v1/users/{user}/adapter",
        "/v1/jobs/{id}",
        "/v1/jobs/{id}/cancel",
        "/v1/users/{user}/history/{item}",
        "/v1/users/{user}/progress",
        "/v1/users/{user}/train",
        "/v1/training/pause",
        "/v1/server/training/pause",
        "/health/live",
        "/health/ready",
        "/metrics",
    ] {
        assert!(text.contains(&format!("\"{path}\"")), "{path}");
    }
}
