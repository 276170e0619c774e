//! Answers in the three wire formats, streamed and not, from the base and from adapters.

use serde_json::{Value, json};

use crate::{Server, chat, with};

fn completion() -> Value {
    json!({ "model": "base", "prompt": "the river", "max_tokens": 6, "temperature": 0, "ignore_eos": true })
}

#[tokio::test]
async fn a_chat_is_answered() {
    let server = Server::new().await;
    let answer = server.post("/v1/chat/completions", with(chat(), "logprobs", json!(true))).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!((answer.header("x-atelier-adapter"), answer.header("x-atelier-generation")), ("none", "none"));
    assert!(!answer.header("x-request-id").is_empty());
    let body = answer.json();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["object"], "chat.completion");
    let choice = &body["choices"][0];
    assert_eq!(
        (&choice["message"]["role"], &choice["finish_reason"]),
        (&json!("assistant"), &json!("length"))
    );
    assert_eq!(choice["logprobs"]["content"].as_array().unwrap().len(), 6);
    let usage = &body["usage"];
    assert_eq!(usage["completion_tokens"], 6);
    assert_eq!(usage["total_tokens"].as_u64(), usage["prompt_tokens"].as_u64().map(|prompt| prompt + 6));
}

#[tokio::test]
async fn streams_say_the_same_in_pieces() {
    let server = Server::new().await;
    // The second one finds its prompt in the cache, as those that follow do.
    server.post("/v1/chat/completions", chat()).await;
    let whole = server.post("/v1/chat/completions", chat()).await.json();
    let streamed =
        with(with(chat(), "stream", json!(true)), "stream_options", json!({ "include_usage": true }));
    let answer = server.post("/v1/chat/completions", streamed).await;
    assert_eq!(answer.header("content-type"), "text/event-stream");
    let mut events = answer.events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    let chunks: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["id"] == chunks[0]["id"])
    );
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let (usage, chunks) = chunks.split_last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]), (&json!([]), &whole["usage"]));
    assert!(chunks.iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
    let text: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["message"]["content"].as_str().unwrap());

    let whole = server.post("/v1/completions", completion()).await.json();
    let answer = server.post("/v1/completions", with(completion(), "stream", json!(true))).await;
    let mut events = answer.events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    let chunks: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["text"].as_str().unwrap());
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
}

#[tokio::test]
async fn several_answers_and_prompts() {
    let server = Server::new().await;
    let body = with(with(completion(), "prompt", json!(["one", [5, 6, 7]])), "n", json!(2));
    let mixed = server.post("/v1/completions", body).await;
    assert_eq!(mixed.status, 400, "texts and tokens do not mix");
    let body = with(with(completion(), "prompt", json!(["one", "two"])), "n", json!(2));
    let body = with(with(body, "temperature", json!(1)), "seed", json!(7));
    let first = server.post("/v1/completions", body.clone()).await.json();
    assert_eq!(first["choices"].as_array().unwrap().len(), 4);
    assert_ne!(first["choices"][0]["text"], first["choices"][1]["text"]);
    assert_eq!(first["choices"], server.post("/v1/completions", body).await.json()["choices"], "same seed");
}

#[tokio::test]
async fn several_answers_share_their_prompt() {
    let server = Server::new().await;
    let prompt: Vec<u32> = (0..50).map(|at| 30 + at * 7 % 200).collect();
    let body = with(with(completion(), "prompt", json!(prompt)), "temperature", json!(1));
    let several = with(with(body.clone(), "n", json!(3)), "seed", json!(7));
    let several = server.post("/v1/completions", several).await.json();
    let stats = server.app.engine.stats();
    assert_eq!((stats.prompt_tokens, stats.prefix_hits, stats.prefix_tokens), (50 + 2 * 2, 2, 2 * 48));
    assert_eq!(several["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    for number in 0..3 {
        let alone = with(with(body.clone(), "seed", json!(7 + number)), "stop", json!(["\u{0}"]));
        let alone = server.post("/v1/completions", alone).await.json();
        assert_eq!(several["choices"][number]["text"], alone["choices"][0]["text"]);
        assert_eq!(alone["usage"]["prompt_tokens_details"]["cached_tokens"], 48);
    }
    // A stop string ends it before the engine does, and the count is there all the same.
    let text = several["choices"][0]["text"].as_str().unwrap();
    let first: String = text.chars().take(1).collect();
    let stopped = with(with(body, "seed", json!(7)), "stop", json!([first]));
    let stopped = server.post("/v1/completions", stopped).await.json();
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(stopped["usage"]["prompt_tokens_details"]["cached_tokens"], 48);
}

#[tokio::test]
async fn a_stop_string_ends_an_answer() {
    let server = Server::new().await;
    let whole = server.post("/v1/completions", completion()).await.json();
    let text = whole["choices"][0]["text"].as_str().unwrap().to_owned();
    let middle: String = text.chars().skip(2).take(2).collect();
    let expected = text.split(&middle).next().unwrap();
    let stopped = server.post("/v1/completions", with(completion(), "stop", json!([middle]))).await.json();
    assert_eq!(stopped["choices"][0]["text"].as_str(), Some(expected));
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn adapters_answer_when_named_and_when_there() {
    let server = Server::new().await;
    let generation = server.adopt("default", "ann").await;
    let base = server.post("/v1/chat/completions", chat()).await.json();
    for body in [with(chat(), "model", json!("base:ann")), with(chat(), "user", json!("ann"))] {
        let answer = server.post("/v1/chat/completions", body).await;
        assert_eq!((answer.status.as_u16(), answer.header("x-atelier-adapter")), (200, "ann"));
        assert_eq!(answer.header("x-atelier-generation"), generation);
        assert_ne!(answer.json()["choices"][0]["message"], base["choices"][0]["message"]);
    }
    let newcomer = server.post("/v1/chat/completions", with(chat(), "user", json!("bob"))).await;
    assert_eq!((newcomer.status.as_u16(), newcomer.header("x-atelier-adapter")), (200, "none"));
    assert_eq!(newcomer.json()["choices"][0]["message"], base["choices"][0]["message"]);
    let models = server.get("/v1/models").await.json();
    let ids: Vec<&str> =
        models["data"].as_array().unwrap().iter().filter_map(|card| card["id"].as_str()).collect();
    assert_eq!(ids, ["base", "base:ann"]);
    assert_eq!(server.get("/v1/models/base:ann").await.json()["parent"], "base");
    assert_eq!(server.get("/v1/models/base:bob").await.status, 404);
}

#[tokio::test]
async fn tgi_speaks_its_own_shapes() {
    let server = Server::new().await;
    let generation = server.adopt("default", "ann").await;
    let body = json!({
        "inputs": "the river",
        "parameters": { "max_new_tokens": 5, "details": true, "ignore_eos_token": true, "adapter_id": "ann" },
    });
    let answer = server.post("/generate", body.clone()).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!((answer.header("x-adapter-id"), answer.header("x-generated-tokens")), ("ann", "5"));
    assert_eq!(answer.header("x-atelier-generation"), generation);
    let whole = answer.json();
    let details = &whole["details"];
    assert_eq!((&details["finish_reason"], &details["generated_tokens"]), (&json!("length"), &json!(5)));
    assert_eq!(details["tokens"].as_array().unwrap().len(), 5);
    assert!(details["tokens"][0]["logprob"].as_f64().unwrap() < 0.0);
    let answer = server.post("/generate_stream", body).await;
    let events: Vec<Value> =
        answer.events().iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    assert_eq!(events.len(), 5);
    assert!(events[..4].iter().all(|event| event["generated_text"].is_null() && event["details"].is_null()));
    assert_eq!(events[4]["generated_text"], whole["generated_text"]);
    assert_eq!(events[4]["details"]["finish_reason"], "length");
    let unknown = json!({ "inputs": "x", "parameters": { "adapter_id": "nobody" } });
    let unknown = server.post("/generate", unknown).await;
    assert_eq!((unknown.status.as_u16(), &unknown.json()["error_type"]), (404, &json!("model_not_found")));
    let wrong =
        server.post("/generate", json!({ "inputs": "x", "parameters": { "max_new_tokens": 0 } })).await;
    assert_eq!((wrong.status.as_u16(), &wrong.json()["error_type"]), (422, &json!("validation")));
}

#[tokio::test]
async fn tgi_clients_send_all_they_know() {
    let server = Server::new().await;
    // What lorax-client 0.6 sends for `generate("x", max_new_tokens=2)`.
    let parameters = json!({
        "adapter_id": null, "adapter_source": null, "merged_adapters": null, "api_token": null,
        "do_sample": false, "max_new_tokens": 2, "ignore_eos_token": false, "repetition_penalty": null,
        "return_full_text": false, "stop": [], "seed": null, "temperature": null, "top_k": null, "top_p": null,
        "truncate": null, "typical_p": null, "best_of": null, "watermark": false, "details": true,
        "decoder_input_details": false, "return_k_alternatives": null, "response_format": null,
    });
    let body = json!({ "inputs": "x", "parameters": parameters, "stream": false });
    let answer = server.post("/generate", body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let nothing = json!({ "inputs": "x", "parameters": null });
    assert_eq!(server.post("/generate", nothing).await.status, 200);
    for wrong in [
        json!({ "inputs": "x", "paramters": { "max_new_tokens": 2 } }),
        json!({ "inputs": "x", "parameters": { "adapter_source": "hub" } }),
        json!({ "inputs": "x", "stream": true }),
    ] {
        let answer = server.post("/generate", wrong.clone()).await;
        assert_eq!(answer.status, 422, "{wrong}: {}", answer.text());
    }
}

#[tokio::test]
async fn tgi_tokens_joined_are_the_text() {
    let server = Server::new().await;
    // The tiny model's tokens are mostly single bytes, so characters are often incomplete.
    for seed in 0..8 {
        let parameters = json!({
            "max_new_tokens": 24, "do_sample": true, "seed": seed, "details": true, "ignore_eos_token": true,
        });
        let body = json!({ "inputs": "x", "parameters": parameters });
        let answer = server.post("/generate", body).await.json();
        let tokens = answer["details"]["tokens"].as_array().unwrap();
        let plain = tokens.iter().filter(|token| token["special"] == false);
        let joined: String = plain.map(|token| token["text"].as_str().unwrap()).collect();
        let whole = answer["generated_text"].as_str().unwrap();
        // A character that stays incomplete at the end belongs to no token.
        let rest = whole.strip_prefix(&joined);
        assert!(rest.is_some_and(|rest| matches!(rest, "" | "\u{fffd}")), "{joined:?} {whole:?}");
    }
}
