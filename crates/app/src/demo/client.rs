//! The demo's side of the HTTP API.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use types::HistoryItem;

/// A client of one server.
pub(super) struct Api {
    client: Client,
    base: String,
}

/// An answer and who gave it.
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) generation: String,
}

impl Api {
    pub(super) fn new(address: SocketAddr) -> Self {
        Self { client: Client::new(), base: format!("http://{address}") }
    }

    async fn ok(response: Response) -> anyhow::Result<Response> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        bail!("the server answered {status}: {}", response.text().await.unwrap_or_default())
    }

    async fn get(&self, path: &str) -> anyhow::Result<Response> {
        let response = self.client.get(format!("{}{path}", self.base)).send().await;
        Self::ok(response.with_context(|| format!("cannot get {path}"))?).await
    }

    /// Uploads a history; the id of the job that learns from it, if there is one.
    pub(super) async fn upload(&self, user: &str, items: &[HistoryItem]) -> anyhow::Result<Option<String>> {
        let item = |item: &HistoryItem| {
            let seconds = item.created_at.0 as f64 / 1000.0;
            json!({ "id": item.id.as_str(), "input": item.input, "output": item.output, "created_at": seconds })
        };
        let items: Vec<Value> = items.iter().map(item).collect();
        let response = self
            .client
            .post(format!("{}/v1/users/{user}/history", self.base))
            .header("idempotency-key", "demo")
            .json(&json!({ "items": items }))
            .send()
            .await?;
        let response = Self::ok(response).await?;
        ensure!(
            response.status() == StatusCode::ACCEPTED,
            "an upload was answered with {}",
            response.status()
        );
        let answer: Value = response.json().await?;
        Ok(answer["job"]["id"].as_str().map(str::to_owned))
    }

    /// Waits for a job, telling `progress` how it stands; returns its outcome in words.
    pub(super) async fn wait(&self, job: &str, mut progress: impl FnMut(&Value)) -> anyhow::Result<String> {
        loop {
            let now: Value = self.get(&format!("/v1/jobs/{job}")).await?.json().await?;
            progress(&now);
            match now["status"].as_str() {
                Some("succeeded") => {
                    return Ok(now["outcome"]["reason"].as_str().unwrap_or_default().to_owned());
                }
                Some("failed") => bail!("the job failed: {}", now["error"]),
                _ => tokio::time::sleep(Duration::from_millis(500)).await,
            }
        }
    }

    /// The two files of a user's adapter.
    pub(super) async fn adapter(&self, user: &str) -> anyhow::Result<(Vec<u8>, Vec<u8>)> {
        let folder = format!("/v1/users/{user}/adapter");
        let config = self.get(&format!("{folder}/adapter_config.json")).await?.bytes().await?;
        let weights = self.get(&format!("{folder}/adapter_model.safetensors")).await?.bytes().await?;
        Ok((config.to_vec(), weights.to_vec()))
    }

    /// One message, answered greedily by the base or, with `user`, by the user's adapter.
    pub(super) async fn chat(
        &self,
        model: &str,
        user: Option<&str>,
        message: &str,
    ) -> anyhow::Result<Answer> {
        let mut body = json!({
            "model": model,
            "messages": [{ "role": "user", "content": message }],
            "max_tokens": 48,
            "temperature": 0,
        });
        if let Some(user) = user {
            body["user"] = json!(user);
        }
        let response =
            self.client.post(format!("{}/v1/chat/completions", self.base)).json(&body).send().await?;
        let response = Self::ok(response).await?;
        let generation = response.headers().get("x-atelier-generation").and_then(|value| value.to_str().ok());
        let generation = generation.unwrap_or("unknown").chars().take(12).collect();
        let answer: Value = response.json().await?;
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap_or_default();
        Ok(Answer { text: text.split_whitespace().collect::<Vec<_>>().join(" "), generation })
    }
}
