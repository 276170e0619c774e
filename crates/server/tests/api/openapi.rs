//! The committed description of the API is that of the code.

use std::path::Path;

use crate::Server;

#[tokio::test]
async fn the_committed_description_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../openapi/openapi.json");
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(committed == server::openapi_json(), "openapi/openapi.json differs: run `cargo xtask openapi`");
    assert_eq!(Server::new().await.get("/openapi.json").await.text(), committed);
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
