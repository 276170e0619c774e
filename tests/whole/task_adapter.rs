//! A task adapter in the whole program: merged or stacked it answers the same, and not as the base without it.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::program::Program;

const BOUNDARY: &str = "a-boundary-that-no-file-holds";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama").join(name)
}

/// Gives a user an adapter of the fixtures.
async fn import(program: &Program, user: &str, adapter: &str) {
    let mut form = Vec::new();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        form.extend(
            format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{file}\"\r\n\r\n").bytes(),
        );
        form.extend(std::fs::read(fixture(adapter).join(file)).unwrap());
        form.extend(b"\r\n");
    }
    form.extend(format!("--{BOUNDARY}--\r\n").bytes());
    let request = reqwest::Client::new()
        .put(program.url(&format!("/v1/users/{user}/adapter")))
        .header("content-type", format!("multipart/form-data; boundary={BOUNDARY}"));
    let answer = request.body(form).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
}

/// A greedy answer, and the logarithms of its tokens' probabilities and of the runners-up.
async fn ask(program: &Program, model: &str) -> (String, Vec<f64>) {
    let body = json!({
        "model": model,
        "messages": [{ "role": "user", "content": "How do you greet a guest?" }],
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": true,
        "logprobs": true,
        "top_logprobs": 5,
    });
    let request = reqwest::Client::new().post(program.url("/v1/chat/completions")).json(&body);
    let answer: Value = request.send().await.unwrap().json().await.unwrap();
    let choice = &answer["choices"][0];
    let tokens = choice["logprobs"]["content"].as_array().unwrap_or_else(|| panic!("{answer}"));
    assert_eq!(tokens.len(), 24, "{answer}");
    let best = tokens.iter().flat_map(|token| token["top_logprobs"].as_array().unwrap());
    let all = tokens.iter().chain(best).map(|token| token["logprob"].as_f64().unwrap());
    (choice["message"]["content"].as_str().unwrap().to_owned(), all.collect())
}

/// What the base and a user with an adapter of their own answer.
async fn answers(task: &[&str]) -> [(String, Vec<f64>); 2] {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("");
    let rest =
        ["--model", model.to_str().unwrap(), "--model-name", "base", "--precision", "exact", "--no-training"];
    let program = Program::start(&[&rest, task].concat(), folder.path());
    import(&program, "ann", "lora-qv").await;
    [ask(&program, "base").await, ask(&program, "base:ann").await]
}

/// Largest difference.
fn distance(one: &[f64], other: &[f64]) -> f64 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(one, other)| (one - other).abs()).fold(0.0, f64::max)
}

#[tokio::test]
async fn merged_or_stacked_it_answers_the_same() {
    let task = fixture("lora-all");
    let with = async |mode: &str| {
        answers(&["--task-adapter", task.to_str().unwrap(), "--task-adapter-mode", mode]).await
    };
    let (without, merged, stacked) = (answers(&[]).await, with("merge").await, with("stack").await);
    for (at, who) in ["the base", "a user's adapter"].into_iter().enumerate() {
        let ((text, logprobs), (other_text, other)) = (&merged[at], &stacked[at]);
        assert_eq!(text, other_text, "{who}");
        let apart = distance(logprobs, other);
        assert!(apart < 1e-4, "{who}: merged and stacked are {apart} apart");
        // Negative control: the task adapter is felt.
        let felt = distance(logprobs, &without[at].1);
        assert!(felt > 0.1 && *text != without[at].0, "{who}: with and without are {felt} apart");
    }
    assert_ne!(merged[0].0, merged[1].0, "negative control: the user's adapter is felt over it");
}

#[test]
fn one_that_does_not_fit_is_refused_by_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("");
    let run = |task: &Path, mode: &str| {
        let arguments = ["--task-adapter", task.to_str().unwrap(), "--task-adapter-mode", mode];
        Program::refuses(&[&["--model", model.to_str().unwrap()], &arguments[..]].concat(), folder.path())
    };
    let dora = run(&fixture("dora"), "stack");
    assert!(dora.contains("use_dora"), "{dora}");
    let prompt = run(&fixture("prompt"), "merge");
    assert!(prompt.contains("--task-adapter") && prompt.contains("peft_type"), "{prompt}");
    let absent = run(&folder.path().join("absent"), "merge");
    assert!(absent.contains("--task-adapter") && absent.contains("adapter_config.json"), "{absent}");
}
