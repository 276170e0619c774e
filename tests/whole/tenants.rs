//! Tenants with keys of a file: whose user it is depends on the key, and so does who may pause the whole server.

use std::path::Path;

use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::program::Program;

const ACME: &str = "the first tenant's key";
const INITECH: &str = "the second tenant's key";
const OPERATOR: &str = "the operator's own key";

/// Asks with a key; returns status and body.
async fn ask(program: &Program, key: &str, method: Method, path: &str, body: Option<Value>) -> (u16, Value) {
    let mut request = reqwest::Client::new().request(method, program.url(path)).bearer_auth(key);
    if let Some(body) = body {
        request = request.json(&body);
    }
    let answer = request.send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap_or_default())
}

#[tokio::test]
async fn every_key_sees_its_own_tenant_only() {
    let folder = tempfile::tempdir().unwrap();
    let hash: String = Sha256::digest(INITECH).iter().map(|byte| format!("{byte:02x}")).collect();
    let keys = json!([{"tenant": "acme", "key": ACME}, {"tenant": "initech", "sha256": hash}]);
    let file = folder.path().join("keys.json");
    std::fs::write(&file, keys.to_string()).unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama");
    let program = Program::start(
        &[
            &["--model", model.to_str().unwrap(), "--no-training"],
            &["--api-keys", file.to_str().unwrap(), "--api-key", OPERATOR][..],
        ]
        .concat(),
        folder.path(),
    );
    let get = async |key, path: &str| ask(&program, key, Method::GET, path, None).await;

    let history = "/v1/users/ann/history";
    let upload = async |key, output: &str| {
        let body = json!({ "items": [{"id": "i", "output": output}] });
        let (status, answer) = ask(&program, key, Method::POST, history, Some(body)).await;
        // Were it the same user, the second would be told that the item is there already.
        assert_eq!((status, &answer["accepted"]), (202, &json!(1)), "{answer}");
        format!("/v1/jobs/{}", answer["job"]["id"].as_str().unwrap())
    };
    let jobs = [(ACME, upload(ACME, "ahoy").await), (INITECH, upload(INITECH, "good day").await)];
    for (key, own, others) in [(ACME, "ahoy", "good day"), (INITECH, "good day", "ahoy")] {
        let (status, answer) = get(key, history).await;
        let text = answer.to_string();
        assert_eq!(status, 200, "{text}");
        assert!(text.contains(own) && !text.contains(others), "{text}");
        for (owner, job) in &jobs {
            let (status, answer) = get(key, job).await;
            assert_eq!(status, if *owner == key { 200 } else { 404 }, "{answer}");
        }
    }
    // Nor is there an `ann` of the operator's tenant, whose key sees that one alone.
    assert_eq!(get(OPERATOR, "/v1/users/ann").await.0, 404);
    let (status, users) = get(OPERATOR, "/v1/users").await;
    assert!(status == 200 && !users.to_string().contains("ann"), "{users}");
    // One tenant erases its user, and the other's is still there.
    assert!(ask(&program, ACME, Method::DELETE, "/v1/users/ann", None).await.0 < 300);
    assert_eq!(get(ACME, "/v1/users/ann").await.0, 404);
    assert_eq!(get(INITECH, "/v1/users/ann").await.1["items"], 1);

    for (key, may) in [(ACME, 403), (INITECH, 403), (OPERATOR, 200), ("nobody's key at all", 401)] {
        let (status, answer) = ask(&program, key, Method::PUT, "/v1/server/training/pause", None).await;
        assert_eq!(status, may, "{key}: {answer}");
    }
}
