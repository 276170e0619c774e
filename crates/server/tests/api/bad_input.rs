//! What is wrong with a request is said early, with the right status and the field's name.

use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};
use server::{Auth, Limits};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::{Server, chat, with};

#[tokio::test]
async fn every_number_is_checked() {
    let server = Server::new().await;
    let fields = [
        ("max_tokens", 1.0, 200.0),
        ("max_completion_tokens", 1.0, 200.0),
        ("min_tokens", 0.0, 4_294_967_295.0),
        ("temperature", 0.0, 2.0),
        ("top_p", 0.01, 1.0),
        ("top_k", -1.0, 4_294_967_295.0),
        ("min_p", 0.0, 1.0),
        ("repetition_penalty", 0.01, 10.0),
        ("frequency_penalty", -2.0, 2.0),
        ("presence_penalty", -2.0, 2.0),
        ("n", 1.0, 4.0),
        ("top_logprobs", 0.0, 20.0),
    ];
    for (field, least, most) in fields {
        // Built as text, since not every value here is one that a JSON library would write.
        let mut others = with(chat(), "logprobs", json!(true));
        others.as_object_mut().unwrap().remove(field);
        let others = others.to_string();
        let others = others.strip_suffix('}').unwrap();
        let values = [
            "-1",
            "0",
            "1",
            "-2147483649",
            "4294967295",
            "4294967296",
            "1e400",
            "-1e400",
            "\"1\"",
            "[]",
            "true",
        ];
        for value in values {
            let number: Option<f64> = value.parse().ok();
            let fine = number.is_some_and(|n| n.is_finite() && n >= least && n <= most);
            let body = format!("{others},\"{field}\":{value}}}");
            let request = Request::post("/v1/chat/completions").header("content-type", "application/json");
            let answer = server.send(request.body(Body::from(body)).unwrap()).await;
            if fine {
                let allowed = [200, 400].contains(&answer.status.as_u16());
                assert!(allowed, "{field} = {value}: {} {}", answer.status, answer.text());
            } else {
                assert_eq!(answer.status, 400, "{field} = {value}: {}", answer.text());
                let error = &answer.json()["error"];
                assert!(
                    error["message"].is_string() && error.get("param").is_some() && error["code"].is_string()
                );
            }
        }
    }
}

#[tokio::test]
async fn errors_name_the_field() {
    let server = Server::new().await;
    let chat = |field: &str, value: Value| ("/v1/chat/completions", with(chat(), field, value));
    let history = |items: Value| ("/v1/users/ann/history", json!({ "items": items }));
    for ((path, body), status, param) in [
        (chat("model", json!("nothing")), 404, "model"),
        (chat("model", json!("base:nobody")), 404, "model"),
        (chat("max_tokens", json!(-1)), 400, "max_tokens"),
        (chat("max_tokens", json!(0)), 400, "max_tokens"),
        (chat("max_tokens", json!(100_000)), 400, "messages"),
        (chat("min_tokens", json!(7)), 400, "min_tokens"),
        (chat("temperature", json!(2.1)), 400, "temperature"),
        (
            chat("messages", json!([{ "role": "user", "content": "x", "images": ["y"] }])),
            400,
            "messages[0].images",
        ),
        (
            chat("messages", json!([{ "role": "assistant", "function_call": { "name": "f" } }])),
            400,
            "messages[0].function_call",
        ),
        (chat("messages", json!([])), 400, "messages"),
        (chat("messages", json!([{ "role": "king", "content": "x" }])), 400, "messages[0].role"),
        (
            chat("messages", json!([{ "role": "user", "content": [{ "type": "image_url" }] }])),
            400,
            "messages[0].content",
        ),
        (chat("messages", json!([{ "role": "user", "content": "long ".repeat(2000) }])), 400, "messages"),
        (chat("logit_bias", json!({ "999999": 1 })), 400, "logit_bias.999999"),
        (chat("logit_bias", json!({ "1": 101 })), 400, "logit_bias.1"),
        (chat("stop", json!(["a", "b", "c", "d", "e"])), 400, "stop"),
        (chat("stop", json!([""])), 400, "stop"),
        (chat("n", json!(5)), 400, "n"),
        (chat("user", json!("../etc")), 400, "user"),
        (chat("tools", json!([{ "type": "function" }])), 400, "tools"),
        (chat("response_format", json!({ "type": "json_object" })), 400, "response_format"),
        (chat("temprature", json!(1)), 400, "temprature"),
        (chat("stream_options", json!({ "include_usage": true })), 400, "stream_options"),
        (history(json!([])), 400, "items"),
        (history(json!([{ "input": "x" }])), 400, "items[0].output"),
        (history(json!([{ "output": "" }])), 400, "items[0].output"),
        (history(json!([{ "output": "x", "id": "a b" }])), 400, "items[0].id"),
        (history(json!([{ "output": "x", "created_at": "yesterday" }])), 400, "items[0].created_at"),
        (history(json!([{ "output": "x", "created_at": 1e300 }])), 400, "items[0].created_at"),
        (history(json!([{ "output": "x".repeat(300_000) }])), 400, "items[0].output"),
        (("/v1/users/a%20b/history", json!({ "items": [{ "output": "x" }] })), 400, "user"),
    ] {
        let answer = server.post(path, body.clone()).await;
        let shown: String = body.to_string().chars().take(200).collect();
        assert_eq!(answer.status, status, "{shown}: {}", answer.text());
        assert_eq!(answer.json()["error"]["param"], param, "{shown}: {}", answer.text());
    }
}

#[tokio::test]
async fn what_is_no_request_is_refused() {
    let server =
        Server::with(Auth::Open, Limits { body_bytes: 1000, upload_bytes: 2000, ..Limits::default() }, None)
            .await;
    let send = async |path: &str, media: &str, body: String| {
        let request = Request::post(path).header("content-type", media);
        server.send(request.body(Body::from(body)).unwrap()).await
    };
    for path in ["/v1/chat/completions", "/v1/completions", "/v1/users/ann/history"] {
        for body in ["", "{", "[]", "null", "{\"model\":}", "\u{0}"] {
            let answer = send(path, "application/json", body.into()).await;
            assert_eq!(
                (answer.status.as_u16(), &answer.json()["error"]["code"]),
                (400, &json!("invalid_json")),
                "{body:?}"
            );
        }
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(40), "]".repeat(40));
        assert_eq!(send(path, "application/json", deep).await.status, 400);
        assert_eq!(
            send(path, "application/json", format!("{{\"a\":\"{}\"}}", "x".repeat(3000))).await.status,
            413
        );
        assert_eq!(send(path, "text/plain", "{}".into()).await.status, 415);
    }
    assert_eq!(send("/generate", "application/json", "{".into()).await.status, 422);
    assert_eq!(server.get("/v1/nothing").await.json()["error"]["code"], "route_not_found");
    assert_eq!(server.get("/v1/chat/completions").await.json()["error"]["code"], "method_not_allowed");
    assert_eq!(server.get("/v1/jobs/none").await.json()["error"]["code"], "job_not_found");
    let load =
        server.post("/v1/load_lora_adapter", json!({ "lora_name": "x", "lora_path": "/etc/passwd" })).await;
    assert_eq!((load.status.as_u16(), load.text().contains("PUT /v1/users/{user}/adapter")), (400, true));
}

#[tokio::test]
async fn paths_and_queries_are_answered_in_the_envelope() {
    let server = Server::new().await;
    for (path, param) in [
        ("/v1/jobs/%ff", "id"),
        ("/v1/models/%ff", "id"),
        ("/v1/users/%ff", "user"),
        ("/v1/users?limit=x", "limit"),
        ("/v1/users?limit=0", "limit"),
        ("/v1/users?limit=-1", "limit"),
        ("/v1/users?limit=4294967296", "limit"),
    ] {
        let answer = server.get(path).await;
        assert_eq!(answer.status, 400, "{path}: {}", answer.text());
        assert_eq!(answer.json()["error"]["param"], param, "{path}: {}", answer.text());
    }
}

#[tokio::test]
async fn a_client_that_writes_too_much_still_reads_why() {
    let server = Server::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let serving = tokio::spawn(server::serve(listener, server.app.clone(), stop.clone()));
    let size = 12 * 1024 * 1024;
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {size}\r\n\r\n"
    );
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&vec![b' '; size]).await.expect("the server takes it in");
    let mut start = [0; 12];
    stream.read_exact(&mut start).await.unwrap();
    assert_eq!(&start, b"HTTP/1.1 413");
    drop(stream);
    stop.cancel();
    serving.await.unwrap().unwrap();
}
