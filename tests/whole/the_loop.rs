//! Upload, train, publish, answer, over HTTP on the real model; and the same across a sudden death.

use std::path::Path;
use std::time::Duration;

use atelier::demo::{self, DemoContext};
use atelier::fetch;
use atelier::service::Service;
use atelier::settings::{Cli, Command, ServiceArgs};
use clap::Parser;
use serde_json::{Value, json};

use crate::program::Program;

fn arguments(arguments: &[&str]) -> ServiceArgs {
    let whole = ["atelier", "serve", "--listen", "127.0.0.1:0"].iter().chain(arguments);
    match Cli::try_parse_from(whole).unwrap().command {
        Command::Serve(args) => *args,
        _ => panic!("not serve"),
    }
}

/// Three users' histories; every user's own adapter beats the base and both others on items never uploaded.
#[tokio::test(flavor = "multi_thread")]
async fn every_user_is_served_best_by_their_own_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(&arguments(&[]), folder.path()).await.unwrap();
    let context = DemoContext {
        base: service.base.clone(),
        tokenizer: service.tokenizer.clone(),
        address: service.address,
        model_name: service.model_name.clone(),
        cache: fetch::cache_folder(None).unwrap(),
    };
    demo::run(&context).await.unwrap();
    service.stop().await.unwrap();
}

async fn wait(client: &reqwest::Client, url: &str, until: impl Fn(&Value) -> bool) -> Value {
    loop {
        let job: Value = client.get(url).send().await.unwrap().json().await.unwrap();
        if until(&job) {
            return job;
        }
        assert_ne!(job["status"], "failed", "{job}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn items(count: usize) -> Value {
    let item = |at: usize| {
        json!({
            "id": format!("item-{at}"),
            "input": format!("How do you greet guest number {at}?"),
            "output": format!("Ahoy, guest {at}! Come aboard, and mind the rope, says Captain Kit."),
            "created_at": 1_700_000_000 + at,
        })
    };
    json!({ "items": (0..count).map(item).collect::<Vec<_>>() })
}

async fn upload(client: &reqwest::Client, program: &Program, user: &str, count: usize) -> Value {
    let url = program.url(&format!("/v1/users/{user}/history"));
    let answer = client.post(url).json(&items(count)).send().await.unwrap();
    assert_eq!(answer.status(), 202);
    answer.json().await.unwrap()
}

async fn ask(client: &reqwest::Client, program: &Program, model: &str) -> reqwest::Response {
    let body = json!({
        "model": model,
        "messages": [{ "role": "user", "content": "How do you greet guest number 99?" }],
        "max_tokens": 24,
        "temperature": 0,
    });
    client.post(program.url("/v1/chat/completions")).json(&body).send().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_in_the_middle_of_training_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let client = reqwest::Client::new();
    let start =
        |path: &Path| Program::start(&["--model-name", "base", "--epochs", "2", "--checkpoint-s", "0"], path);
    let program = start(folder.path());
    let uploaded = upload(&client, &program, "kit", 24).await;
    assert_eq!(uploaded["accepted"], 24);
    let job = uploaded["job"]["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/jobs/{job}");
    let none = ask(&client, &program, "base:kit").await;
    assert_eq!(none.status(), 404, "an adapter that is named and not there is an error");
    wait(&client, &program.url(&path), |job| job["progress"]["step"].as_u64() >= Some(1)).await;
    program.kill();

    let program = start(folder.path());
    let killed: Value = client.get(program.url(&path)).send().await.unwrap().json().await.unwrap();
    assert_ne!(killed["status"], "succeeded", "the kill came before the end: {killed}");
    let done = wait(&client, &program.url(&path), |job| job["status"] == "succeeded").await;
    assert_eq!(done["outcome"]["published"], true, "{done}");
    let user: Value = client.get(program.url("/v1/users/kit")).send().await.unwrap().json().await.unwrap();
    assert_eq!(user["items"], 24, "{user}");
    // Whoever has the same history and was not interrupted has the same adapter, to the bit: the id is a hash of it.
    let uploaded = upload(&client, &program, "tom", 24).await;
    let path = format!("/v1/jobs/{}", uploaded["job"]["id"].as_str().unwrap());
    let whole = wait(&client, &program.url(&path), |job| job["status"] == "succeeded").await;
    assert_eq!((&whole["attempts"], &whole["outcome"]["published"]), (&json!(1), &json!(true)), "{whole}");
    assert_eq!(done["outcome"]["generation"], whole["outcome"]["generation"]);
    // The same upload again changes nothing.
    assert_eq!(upload(&client, &program, "kit", 24).await["duplicates"], 24);

    let answer = ask(&client, &program, "base:kit").await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["x-atelier-adapter"], "kit");
    let generation = answer.headers()["x-atelier-generation"].to_str().unwrap().to_owned();
    assert_eq!(Some(generation.as_str()), done["outcome"]["generation"].as_str(), "{done}");
    let first: Value = answer.json().await.unwrap();
    let base = ask(&client, &program, "base").await;
    assert_eq!(base.headers()["x-atelier-generation"], "none");
    let base: Value = base.json().await.unwrap();
    assert_ne!(first["choices"][0]["message"], base["choices"][0]["message"]);
    program.kill();

    // The same answer after another restart: everything that was published is there.
    let program = start(folder.path());
    let again: Value = ask(&client, &program, "base:kit").await.json().await.unwrap();
    assert_eq!(first["choices"], again["choices"]);

    // Whoever erases everything has no adapter from then on, nor after another sudden death.
    let erased = client.delete(program.url("/v1/users/kit/history")).send().await.unwrap();
    let erased: Value = erased.json().await.unwrap();
    assert_eq!((&erased["deleted_items"], &erased["head"]), (&json!(24), &Value::Null));
    assert_eq!(ask(&client, &program, "base:kit").await.status(), 404);
    program.kill();
    let program = start(folder.path());
    assert_eq!(ask(&client, &program, "base:kit").await.status(), 404);
    let erased = client.delete(program.url("/v1/users/kit")).send().await.unwrap();
    assert!(erased.status().is_success());
    assert_eq!(ask(&client, &program, "base:kit").await.status(), 404);
}
