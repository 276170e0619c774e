//! Histories, users, jobs, adapters; who may see them.

use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};
use server::{Auth, Limits};

use crate::{Answer, Server, key};

const HISTORY: &str = "/v1/users/ann/history";

fn items(count: usize) -> Value {
    let item = |at: usize| json!({ "id": format!("i{at}"), "input": "in", "output": format!("out {at}"), "created_at": at });
    json!({ "items": (0..count).map(item).collect::<Vec<_>>() })
}

#[tokio::test]
async fn history_goes_in_and_comes_out() {
    let server = Server::new().await;
    let answer = server.post(HISTORY, items(5)).await;
    assert_eq!(answer.status, 202, "{}", answer.text());
    let uploaded = answer.json();
    assert_eq!((&uploaded["accepted"], &uploaded["duplicates"]), (&json!(5), &json!(0)));
    let job = uploaded["job"]["id"].as_str().unwrap();
    assert_eq!(server.get(&format!("/v1/jobs/{job}")).await.json()["status"], "queued");
    let more = server.post(HISTORY, items(7)).await.json();
    assert_eq!(
        (&more["accepted"], &more["duplicates"], &more["total_items"]),
        (&json!(2), &json!(5), &json!(7))
    );
    assert_eq!(more["job"]["id"], job, "one job waits");

    let page = server.get(&format!("{HISTORY}?limit=4")).await.json();
    assert_eq!((page["data"].as_array().unwrap().len(), &page["has_more"]), (4, &json!(true)));
    let next = page["next"].as_str().unwrap();
    let rest = server.get(&format!("{HISTORY}?limit=4&after={next}")).await.json();
    assert_eq!((rest["data"].as_array().unwrap().len(), &rest["has_more"]), (3, &json!(false)));
    assert_eq!(rest["data"][2]["output"], "out 6");
    let user = server.get("/v1/users/ann").await.json();
    assert_eq!((&user["items"], &user["head"]), (&json!(7), &Value::Null));
    assert_eq!(server.get("/v1/users").await.json()["data"].as_array().unwrap().len(), 1);

    assert_eq!(server.call("DELETE", HISTORY, None).await.json()["deleted_items"], 7);
    assert_eq!(server.call("DELETE", "/v1/users/ann", None).await.status, 200);
    assert_eq!(server.call("DELETE", "/v1/users/ann", None).await.status, 404);
    assert_eq!(server.get("/v1/users/ann").await.status, 404);
    assert_eq!(server.get(&format!("/v1/jobs/{job}")).await.status, 404);
}

async fn keyed(server: &Server, key: &str, body: Value) -> Answer {
    let request =
        Request::post(HISTORY).header("content-type", "application/json").header("idempotency-key", key);
    server.send(request.body(Body::from(body.to_string())).unwrap()).await
}

#[tokio::test]
async fn a_key_is_answered_once() {
    let server = Server::new().await;
    let first = keyed(&server, "k", items(3)).await.json();
    let again = keyed(&server, "k", items(3)).await.json();
    assert_eq!((&again["accepted"], &again["replayed"]), (&first["accepted"], &json!(true)));
    let other = keyed(&server, "k", items(4)).await;
    assert_eq!(
        (other.status.as_u16(), &other.json()["error"]["code"]),
        (422, &json!("idempotency_key_reused"))
    );
    let changed = json!({ "items": [{ "id": "i1", "output": "something else" }] });
    assert_eq!(server.post(HISTORY, changed).await.status, 409);
}

#[tokio::test]
async fn lines_are_items_too() {
    let server = Server::new().await;
    let send = async |body: &str| {
        let request = Request::post(HISTORY).header("content-type", "application/x-ndjson");
        server.send(request.body(Body::from(body.to_owned())).unwrap()).await
    };
    let good = send("{\"output\":\"a\",\"created_at\":\"2024-02-29T12:00:00Z\"}\n\n{\"input\":\"x\",\"output\":\"b\"}\r\n").await;
    assert_eq!((good.status.as_u16(), &good.json()["accepted"]), (202, &json!(2)));
    let bad = send("{\"output\":\"c\"}\n{\"output\":7}\n").await.json();
    assert_eq!(bad["error"]["param"], "line 2.output");
    // Hyper-parameters stand before the items.
    let items = "{\"id\":\"c\",\"output\":\"c\"}\n";
    for (body, param) in [
        (format!("{{\"training\":{{\"rank\":0}}}}\n{items}"), "line 1.training.rank"),
        (format!("\n{{\"training\":{{\"rank\":\"4\"}}}}\n{items}"), "line 2.training.rank"),
        (format!("{{\"training\":{{\"rnak\":4}}}}\n{items}"), "line 1.training.rnak"),
        (format!("{{\"training\":{{\"kind\":\"ia3\",\"rank\":8}}}}\n{items}"), "line 1.training.rank"),
        (format!("{{\"training\":7}}\n{items}"), "line 1.training"),
        (format!("{{\"training\":{{}},\"output\":\"c\"}}\n{items}"), "line 1.output"),
        (format!("{items}{{\"training\":{{\"rank\":4}}}}\n"), "line 2.training"),
        (format!("{{\"training\":{{}}}}\n{{\"training\":{{}}}}\n{items}"), "line 2.training"),
        ("{\"training\":{\"rank\":4}}\n".to_owned(), "items"),
    ] {
        let bad = send(&body).await;
        assert_eq!((bad.status.as_u16(), &bad.json()["error"]["param"]), (400, &json!(param)), "{body}");
    }
    assert_eq!(server.get("/v1/users/ann").await.json()["items"], 2, "nothing of a bad upload is kept");
    let training = json!({ "kind": "rslora", "rank": 4, "learning_rate": 0.001 });
    let good = send(&format!("{}\n{items}", json!({ "training": training }))).await.json();
    assert_eq!((&good["accepted"], &good["job"]["training"]), (&json!(1), &training));
}

#[tokio::test]
async fn the_adapter_can_be_downloaded() {
    let server = Server::new().await;
    let generation = server.adopt("default", "ann").await;
    let card = server.get("/v1/users/ann/adapter").await.json();
    assert_eq!(card["generation"], json!(generation));
    for file in card["files"].as_array().unwrap() {
        let content = server.get(file["url"].as_str().unwrap()).await;
        assert_eq!(content.body.len() as u64, file["bytes"].as_u64().unwrap());
    }
    assert_eq!(server.get("/v1/users/bob/adapter").await.json()["error"]["code"], "adapter_not_found");
}

#[tokio::test]
async fn nobody_sees_what_is_anothers() {
    let keys = Auth::Keys(vec![key("key of one", "one"), key("key of two", "two")]);
    let server = Server::with(keys, Limits::default(), None).await;
    server.adopt("one", "ann").await;
    let ask = async |key: Option<&str>, method: &str, path: &str, body: Option<Value>| {
        let mut request =
            Request::builder().method(method).uri(path).header("content-type", "application/json");
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let body = body.map_or(Body::empty(), |body| Body::from(body.to_string()));
        server.send(request.body(body).unwrap()).await
    };
    let uploaded = ask(Some("key of one"), "POST", HISTORY, Some(items(3))).await.json();
    let job = format!("/v1/jobs/{}", uploaded["job"]["id"].as_str().unwrap());
    let cancel = format!("{job}/cancel");
    let chat =
        json!({ "model": "base:ann", "messages": [{ "role": "user", "content": "x" }], "max_tokens": 2 });
    let generate = json!({ "inputs": "x", "parameters": { "adapter_id": "ann", "max_new_tokens": 2 } });
    let routes = [
        ("GET", "/v1/users/ann", None),
        ("GET", HISTORY, None),
        ("DELETE", HISTORY, None),
        ("GET", "/v1/users/ann/adapter", None),
        ("GET", "/v1/users/ann/adapter/adapter_config.json", None),
        ("GET", "/v1/users/ann/adapter/adapter_model.safetensors", None),
        ("GET", "/v1/models/base:ann", None),
        ("GET", job.as_str(), None),
        ("GET", "/v1/users/ann/progress", None),
        ("GET", "/v1/users/ann/adapter/manifest", None),
        ("GET", "/v1/users/ann/training/pause", None),
        ("PUT", "/v1/users/ann/training/pause", None),
        ("POST", cancel.as_str(), None),
        ("DELETE", "/v1/users/ann/history/i1", None),
        ("POST", "/v1/chat/completions", Some(chat)),
        ("POST", "/generate", Some(generate)),
        ("DELETE", "/v1/users/ann", None),
    ];
    for (method, path, body) in routes {
        for (key, status) in [(None, 401), (Some("wrong"), 401), (Some("key of two"), 404)] {
            let answer = ask(key, method, path, body.clone()).await;
            assert_eq!(answer.status, status, "{method} {path} with {key:?}: {}", answer.text());
        }
        if method != "DELETE" {
            // Negative control: the owner is served, before and after the others have knocked.
            let answer = ask(Some("key of one"), method, path, body.clone()).await;
            assert_eq!(answer.status, 200, "{method} {path}: {}", answer.text());
        }
    }
    for open in ["/health/live", "/health/ready", "/metrics"] {
        assert_eq!(ask(None, "GET", open, None).await.status, 200);
    }
    let metrics = ask(None, "GET", "/metrics", None).await.text();
    assert!(metrics.contains("vllm:num_requests_waiting") && metrics.contains("atelier_requests_total"));
    assert!(!metrics.contains("ann"), "no user names in metrics");
}
