//! Uploads of adapters as the tests make them.

use axum::body::Body;
use axum::http::Request;
use testkit::fixture;

use crate::{Answer, Server};

const BOUNDARY: &str = "a-boundary-that-no-file-holds";

/// The two files of an adapter of the fixtures.
pub(crate) fn files(adapter: &str) -> (Vec<u8>, Vec<u8>) {
    let read = |file: &str| std::fs::read(fixture(adapter).join(file)).unwrap();
    (read("adapter_config.json"), read("adapter_model.safetensors"))
}

/// Names and contents.
pub(crate) type Parts<'a> = &'a [(&'a str, &'a [u8])];

/// A form with these parts.
pub(crate) fn body(parts: Parts<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, content) in parts {
        let head = format!(
            "--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{name}\"; filename=\"{name}\"\r\n\r\n"
        );
        body.extend(head.as_bytes());
        body.extend(*content);
        body.extend(b"\r\n");
    }
    body.extend(format!("--{BOUNDARY}--\r\n").as_bytes());
    body
}

/// Uploads a form, with headers.
pub(crate) async fn put(server: &Server, path: &str, parts: Parts<'_>, headers: &[(&str, &str)]) -> Answer {
    let media = format!("multipart/form-data; boundary={BOUNDARY}");
    let request = Request::put(path).header("content-type", media);
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    server.send(request.body(Body::from(body(parts))).unwrap()).await
}

/// Uploads an adapter of the fixture model and returns its generation.
pub(crate) async fn import(server: &Server, path: &str, adapter: &str) -> String {
    let (config, weights) = files(&format!("tiny-llama/{adapter}"));
    let parts = [("adapter_config.json", &config[..]), ("adapter_model.safetensors", &weights[..])];
    let answer = put(server, path, &parts, &[]).await;
    assert_eq!(answer.status, 200, "{adapter}: {}", answer.text());
    answer.json()["generation"].as_str().unwrap().to_owned()
}
