//! The default model against fixtures of HF transformers on the same dequantised weights.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use atelier::fetch;
use engine::{Engine, Event, Generate, ModelEngine, Settings};
use model::{BaseModel, LoadOptions};
use serde_json::Value;
use text::{ChatOptions, Message, Role, Special, Tokenizer};
use types::{SamplingParams, Timestamp};

struct Model {
    base: Arc<BaseModel>,
    tokenizer: Tokenizer,
}

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let path = fetch::default_model(&fetch::cache_folder(None).unwrap()).unwrap();
        let loaded = model::load(&path, LoadOptions { max_context: Some(1024) }).unwrap();
        let tokenizer = Tokenizer::new(&loaded.tokenizer.unwrap()).unwrap();
        Model { base: Arc::new(loaded.model), tokenizer }
    })
}

fn fixture(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/smollm2").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn messages(value: &Value) -> Vec<Message> {
    let message = |value: &Value| {
        let role = match value["role"].as_str().unwrap() {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" => Role::Tool,
            other => panic!("role {other}"),
        };
        Message::new(role, value["content"].as_str().unwrap())
    };
    value.as_array().unwrap().iter().map(message).collect()
}

#[test]
fn greedy_continuations_equal_transformers() {
    let Model { base, tokenizer } = model();
    let settings = Settings {
        batch: 8,
        queue: 16,
        step_tokens: 64,
        kv_bytes: 256 << 20,
        prefix_cache: true,
        guest_floor: 0.2,
        threads: 2,
        precision: model::Precision::Exact,
        eos: tokenizer.eos_ids().to_vec(),
    };
    let engine = ModelEngine::start(Arc::clone(base), settings).unwrap();
    let fixture = fixture("greedy.json");
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() >= 5);
    // All at once: the sequences share the batch.
    let streams: Vec<_> = cases
        .iter()
        .map(|case| {
            let prompt = ids(&case["prompt_ids"]);
            let expected = ids(&case["ids"]);
            let params = SamplingParams {
                max_tokens: expected.len() as u32,
                temperature: 0.0,
                ignore_eos: true,
                ..SamplingParams::default()
            };
            let tenant = "t".parse().unwrap();
            let job = Generate { prompt, tenant, adapter: None, params, deadline: None, group: None };
            (expected, engine.submit(job).unwrap())
        })
        .collect();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for (expected, mut stream) in streams {
        let mut ours = Vec::new();
        while let Some(event) = runtime.block_on(stream.next()) {
            match event {
                Event::Token(token) => ours.push(token.id),
                Event::Finished { .. } => {}
                Event::Failed { reason, .. } => panic!("{reason}"),
            }
        }
        assert_eq!(ours, expected);
    }
}

#[test]
fn tokens_equal_those_of_the_reference() {
    let tokenizer = &model().tokenizer;
    for case in fixture("tokenization.json")["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, Special::Parse).unwrap(), ids(&case["ids"]), "{text:?}");
        if let Some(expected) = case.get("ids_special_as_text") {
            assert_eq!(
                tokenizer.encode(text, Special::Literal).unwrap(),
                ids(expected),
                "{text:?} literally"
            );
        }
    }
}

#[test]
fn chats_render_as_in_the_reference() {
    let tokenizer = &model().tokenizer;
    let now = Timestamp(0);
    for case in fixture("chat.json")["cases"].as_array().unwrap() {
        let messages = messages(&case["messages"]);
        for (field, add_generation_prompt) in [("text", false), ("text_with_generation_prompt", true)] {
            let options = ChatOptions { add_generation_prompt, now };
            assert_eq!(tokenizer.render_chat(&messages, &options).unwrap(), case[field].as_str().unwrap());
        }
    }
    let greedy = fixture("greedy.json");
    let chats = greedy["cases"].as_array().unwrap().iter().filter(|case| !case["messages"].is_null());
    for case in chats {
        let options = ChatOptions { add_generation_prompt: true, now };
        let ours = tokenizer.render_chat_tokens(&messages(&case["messages"]), &options).unwrap();
        assert_eq!(ours, ids(&case["prompt_ids"]));
    }
}
