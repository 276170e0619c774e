//! When the engine is busy, fails or panics; when a client leaves.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use server::{Auth, Limits};
use testkit::{FakeEngine, Mood};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{Server, chat, with};

async fn server(mood: Mood) -> (Server, Arc<FakeEngine>) {
    let engine = Arc::new(FakeEngine::new(mood));
    let limits = Limits { generation_timeout: Duration::from_secs(60), ..Limits::default() };
    (Server::with(Auth::Open, limits, Some(Arc::clone(&engine) as _)).await, engine)
}

#[tokio::test]
async fn a_busy_engine_says_when_to_come_back() {
    let (server, _) = server(Mood::Busy).await;
    let answer = server.post("/v1/chat/completions", chat()).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["code"]), (503, &json!("overloaded")));
    assert!(answer.header("retry-after").parse::<u32>().is_ok_and(|seconds| seconds > 0));
    let answer = server.post("/generate", json!({ "inputs": "x" })).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error_type"]), (429, &json!("overloaded")));
}

#[tokio::test]
async fn faults_are_told_without_their_causes() {
    for mood in [Mood::Failing, Mood::Panicking] {
        let (server, _) = server(mood).await;
        let answer = server.post("/v1/chat/completions", chat()).await;
        assert_eq!(answer.status, 500, "{mood:?}");
        assert!(!answer.text().contains("secret"), "{}", answer.text());
        assert_eq!(answer.json()["error"]["type"], "server_error");
        // The server goes on.
        assert_eq!(server.get("/health/live").await.status, 200);
    }
    let (server, _) = server(Mood::Failing).await;
    let events = server.post("/v1/chat/completions", with(chat(), "stream", json!(true))).await.events();
    assert!(events.iter().any(|event| event.contains("generation_failed")), "{events:?}");
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
}

#[tokio::test]
async fn a_server_whose_engine_has_stopped_is_not_ready() {
    // Negative control: an engine that fails still runs.
    for (mood, status) in [(Mood::Failing, 200), (Mood::Stopped, 503)] {
        let (server, _) = server(mood).await;
        assert_eq!(server.get("/health/live").await.status, 200);
        let answer = server.get("/health/ready").await;
        assert_eq!(answer.status, status, "{mood:?}: {}", answer.text());
    }
    let (server, _) = server(Mood::Stopped).await;
    let error = server.get("/health/ready").await.json()["error"].clone();
    assert_eq!(error["code"], "unavailable");
    assert!(error["message"].as_str().is_some_and(|told| told.contains("the engine has stopped")), "{error}");
    assert!(!error.to_string().contains("secret"), "{error}");
    assert_eq!(server.post("/v1/chat/completions", chat()).await.status, 503);
}

async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_sequence() {
    let (server, engine) = server(Mood::Silent).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/chat/completions", listener.local_addr().unwrap());
    let stop = CancellationToken::new();
    let serving = tokio::spawn(server::serve(listener, server.app.clone(), stop.clone()));
    for stream in [true, false] {
        let request = reqwest::Client::new().post(&url).json(&with(chat(), "stream", json!(stream)));
        let request = tokio::spawn(async move { request.send().await?.bytes().await });
        until(|| engine.readers() == 1).await;
        request.abort();
        until(|| engine.readers() == 0).await;
    }
    stop.cancel();
    serving.await.unwrap().unwrap();
}
