//! Failures that were published of servers of this kind, each as a test that it does not happen here.

use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};
use server::{Auth, Limits};

use crate::form::{body, files, import, put};
use crate::{Answer, Server, chat, key, text_of, with};

async fn ask(server: &Server, key: Option<&str>, method: &str, path: &str, body: Option<Value>) -> Answer {
    let mut request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let body = body.map_or(Body::empty(), |body| Body::from(body.to_string()));
    server.send(request.body(body).unwrap()).await
}

async fn upload(server: &Server, key: &str, path: &str, kind: &str) -> Answer {
    let (config, weights) = files(&format!("tiny-llama/{kind}"));
    let bearer = format!("Bearer {key}");
    put(server, path, &[("config", &config), ("weights", &weights)], &[("authorization", &bearer)]).await
}

/// LoRAX #479: a private adapter, once cached, was served without its owner's token.
#[tokio::test]
async fn lorax_479_a_cached_adapter_is_not_served_with_a_foreign_key() {
    let keys = Auth::Keys(vec![key("key of one", "one"), key("key of two", "two")]);
    let server = Server::with(keys, Limits::default(), None).await;
    let mut generations = Vec::new();
    for root in ["/v1/users/ann/adapter", "/v1/adapters/ann"] {
        for kind in ["lora-qv", "lora-all"] {
            let answer = upload(&server, "key of one", root, kind).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            generations.push(answer.json()["generation"].as_str().unwrap().to_owned());
        }
    }
    let (old, head) = (&generations[0], &generations[1]);
    let message = json!([{ "role": "user", "content": "x" }]);
    let chat = |model: &str| Some(json!({ "model": model, "messages": message, "max_tokens": 2 }));
    let completion = |model: &str| Some(json!({ "model": model, "prompt": "x", "max_tokens": 2 }));
    let tgi =
        |id: &str| Some(json!({ "inputs": "x", "parameters": { "adapter_id": id, "max_new_tokens": 2 } }));
    let mut routes: Vec<(&str, String, Option<Value>)> = Vec::new();
    for (model, id) in [("base:ann", "ann"), ("base:@ann", "@ann")] {
        routes.push(("POST", "/v1/chat/completions".into(), chat(model)));
        routes.push(("POST", "/v1/completions".into(), completion(model)));
        routes.push(("POST", "/generate".into(), tgi(id)));
        routes.push(("POST", "/generate_stream".into(), tgi(id)));
        routes.push(("GET", format!("/v1/models/{model}"), None));
    }
    for root in ["/v1/users/ann/adapter", "/v1/adapters/ann"] {
        for path in ["", "/adapter_config.json", "/adapter_model.safetensors", "/generations"] {
            routes.push(("GET", format!("{root}{path}"), None));
        }
        for path in ["", "/adapter_config.json", "/adapter_model.safetensors"] {
            routes.push(("GET", format!("{root}/generations/{old}{path}"), None));
        }
        routes.push(("POST", format!("{root}/generations/{old}/pin"), None));
        routes.push(("DELETE", format!("{root}/generations/{old}/pin"), None));
        routes.push(("POST", format!("{root}/rollback"), Some(json!({ "generation": head }))));
        routes.push((
            "POST",
            format!("{root}/rollback"),
            Some(json!({ "generation": null, "expected_head": head })),
        ));
        routes.push((
            "POST",
            format!("{root}/rollback"),
            Some(json!({ "generation": head, "expected_head": null })),
        ));
        routes.push(("DELETE", format!("{root}/generations/{old}"), None));
        routes.push(("DELETE", root.into(), None));
    }
    for (method, path, body) in &routes {
        // It is in memory when the others knock.
        for model in ["base:ann", "base:@ann"] {
            ask(&server, Some("key of one"), "POST", "/v1/chat/completions", chat(model)).await;
        }
        for (key, status) in [(None, 401), (Some("wrong"), 401), (Some("key of two"), 404)] {
            let answer = ask(&server, key, method, path, body.clone()).await;
            assert_eq!(answer.status, status, "{method} {path} with {key:?}: {}", answer.text());
            assert!(answer.header("x-atelier-generation").is_empty(), "{method} {path}");
            // The very answer that one gets for what never was.
            if status == 404 && *method == "GET" {
                let never = path.replace("ann", "eve");
                let never = ask(&server, key, method, &never, None).await.text().replace("eve", "ann");
                assert_eq!(answer.text(), never, "{path}");
            }
        }
        // Negative control: the owner is served.
        let answer = ask(&server, Some("key of one"), method, path, body.clone()).await;
        assert_eq!(answer.status, 200, "{method} {path}: {}", answer.text());
    }
    for model in ["base:ann", "base:@ann"] {
        let answer = ask(&server, Some("key of two"), "POST", "/v1/chat/completions", chat(model)).await;
        assert_eq!(answer.status, 404);
    }
    let models = ask(&server, Some("key of two"), "GET", "/v1/models", None).await.json();
    assert_eq!(models["data"].as_array().unwrap().len(), 1);
}

/// LoRAX #479 again: an upload under a foreign name makes an adapter of one's own and touches no other.
#[tokio::test]
async fn lorax_479_a_foreign_upload_is_ones_own() {
    let keys = Auth::Keys(vec![key("key of one", "one"), key("key of two", "two")]);
    let server = Server::with(keys, Limits::default(), None).await;
    for (root, model) in [("/v1/users/ann/adapter", "base:ann"), ("/v1/adapters/ann", "base:@ann")] {
        let body = Some(with(chat(), "model", json!(model)));
        let chat = async |key| ask(&server, Some(key), "POST", "/v1/chat/completions", body.clone()).await;
        let mine = upload(&server, "key of one", root, "lora-all").await.json();
        let before = text_of(&chat("key of one").await);
        let theirs = upload(&server, "key of two", root, "lora-rslora").await.json();
        assert_ne!(mine["generation"], theirs["generation"]);
        let answer = chat("key of two").await;
        assert_eq!(json!(answer.header("x-atelier-generation")), theirs["generation"]);
        assert_ne!(text_of(&answer), before);
        assert_eq!(ask(&server, Some("key of two"), "DELETE", root, None).await.status, 200);
        let answer = chat("key of one").await;
        assert_eq!(
            (text_of(&answer), json!(answer.header("x-atelier-generation"))),
            (before, mine["generation"].clone())
        );
    }
}

/// LoRAX, the documentation of vLLM, CVE-2025-62164: an adapter from an arbitrary path or URL; pickled weights.
#[tokio::test]
async fn an_adapter_comes_from_no_path_no_url_and_no_pickle() {
    let server = Server::new().await;
    for route in ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"] {
        let answer = server.post(route, json!({ "lora_name": "x", "lora_path": "/etc/passwd" })).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["code"]),
            (400, &json!("adapter_load_unsupported"))
        );
        for named in ["PUT /v1/users/{user}/adapter", "PUT /v1/adapters/{name}"] {
            assert!(answer.text().contains(named), "{}", answer.text());
        }
    }
    let (config, weights) = files("tiny-llama/lora-qv");
    let root = "/v1/users/ann/adapter";
    let parts = [("config", &config[..]), ("weights", &weights[..])];
    for path in
        ["?path=/etc/passwd", "?url=http://localhost/x", "?lora_path=x", "?expected_head=none&revision=main"]
    {
        assert_eq!(put(&server, &format!("{root}{path}"), &parts, &[]).await.status, 400, "{path}");
    }
    for part in
        ["path", "url", "adapter_model.bin", "adapter_model.pt", "../adapter_config.json", "/etc/passwd"]
    {
        let answer = put(&server, root, &[parts[0], parts[1], (part, b"x")], &[]).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["error"]["param"]), (400, &json!(part)));
    }
    // The opcodes of a pickle that runs a command, a zip as torch.save writes it, a gzip.
    let pickle: &[u8] = b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.";
    for weights in [pickle, b"PK\x03\x04archive/data.pkl", b"\x1f\x8b\x08\0\0\0\0\0"] {
        let answer = put(&server, root, &[parts[0], ("weights", weights)], &[]).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["code"]),
            (400, &json!("invalid_adapter"))
        );
    }
    for id in [
        "/etc/passwd",
        "../../etc",
        "https://example.org/a",
        "file:///x",
        "s3://b/a",
        "org/repo",
        "@../x",
        "base:@/x",
    ] {
        let answer =
            server.post("/v1/chat/completions", with(chat(), "model", json!(format!("base:{id}")))).await;
        assert_eq!(answer.status, 404, "{id}");
        let tgi = json!({ "inputs": "x", "parameters": { "adapter_id": id } });
        assert_eq!(server.post("/generate", tgi).await.status, 404, "{id}");
    }
    let source = json!({ "inputs": "x", "parameters": { "adapter_id": "ann", "adapter_source": "local" } });
    assert_eq!(server.post("/generate", source).await.status, 422);
    assert_eq!(server.get("/v1/users/ann").await.status, 404);
    import(&server, root, "lora-qv").await;
}

/// vLLM #42125 and #30931, llama.cpp #26207, SGLang #8263: a reload under the same name reused old keys and values.
#[tokio::test]
async fn vllm_42125_an_adapter_that_is_replaced_finds_no_old_keys_and_values() {
    let long = "the river runs past the mill and under the bridge, and nobody minds ".repeat(2);
    let body = json!({
        "model": "base", "user": "ann", "max_tokens": 8, "temperature": 0, "ignore_eos": true, "logprobs": true,
        "messages": [{ "role": "user", "content": long }],
    });
    let kinds = ["lora-all", "lora-rslora", "lora-patterns", "lora-all"];
    let mut cold = Vec::new();
    for kind in kinds {
        let server = Server::new().await;
        import(&server, "/v1/users/ann/adapter", kind).await;
        cold.push(server.post("/v1/chat/completions", body.clone()).await.json()["choices"].clone());
    }
    assert!(cold[0] != cold[1] && cold[1] != cold[2], "else nothing is shown");
    let server = Server::new().await;
    for round in 0..2 {
        for (kind, cold) in kinds.iter().zip(&cold) {
            import(&server, "/v1/users/ann/adapter", kind).await;
            for _ in 0..2 {
                let answer = server.post("/v1/chat/completions", body.clone()).await;
                assert_eq!(&answer.json()["choices"], cold, "{kind} in round {round}");
            }
        }
        // The same content after deletion: what is found again is equal too.
        assert_eq!(server.call("DELETE", "/v1/users/ann/adapter", None).await.status, 200);
    }
    assert!(server.app.engine.stats().prefix_tokens > 0, "the cache is on");
}

/// vLLM #16529 and others: a bad request kills the shared engine. Here: bad names, each followed by a healthy request.
#[tokio::test]
async fn vllm_16529_a_poisoned_id_harms_nobody() {
    let server = Server::new().await;
    import(&server, "/v1/users/ann/adapter", "lora-all").await;
    let healthy = with(chat(), "user", json!("ann"));
    let expected = text_of(&server.post("/v1/chat/completions", healthy.clone()).await);
    let long = "a".repeat(5_000);
    let ids = [
        "",
        " ",
        ".",
        "..",
        "@",
        "@@",
        "@ann",
        "-1",
        "a/../ann",
        "ann\0",
        "ann\n",
        "ANN ",
        "an\u{301}n",
        "\u{202e}nna",
        "'; DROP TABLE users; --",
        "%",
        "ann%00",
        "${jndi:ldap://x}",
        "{{7*7}}",
        "null",
        "[]",
        "ann:ann",
        &long,
    ];
    for id in ids {
        for body in [with(chat(), "user", json!(id)), with(chat(), "model", json!(format!("base:{id}")))] {
            let answer = server.post("/v1/chat/completions", body).await;
            let status = answer.status.as_u16();
            // Some are plain ids of nobody: the base answers for them when they are users.
            assert!([200, 400, 404].contains(&status), "{id:?}: {status}");
            assert!(status != 200 || answer.header("x-atelier-adapter") == "none", "{id:?}");
        }
        let encoded: String = id.bytes().take(2_000).map(|byte| format!("%{byte:02x}")).collect();
        for path in [
            format!("/v1/users/{encoded}/adapter"),
            format!("/v1/adapters/{encoded}"),
            format!("/v1/adapters/x/generations/{encoded}"),
        ] {
            for method in ["GET", "DELETE"] {
                let answer = server.call(method, &path, None).await;
                assert!(answer.status.is_client_error(), "{method} {path}: {}", answer.text());
            }
        }
        let (config, weights) = files("tiny-llama/lora-qv");
        if id.parse::<types::UserId>().is_err() && !id.is_empty() && !matches!(id, "." | "..") {
            let path = format!("/v1/users/{encoded}/adapter");
            let answer = put(&server, &path, &[("config", &config), ("weights", &weights)], &[]).await;
            assert_eq!(answer.status, 400, "{id:?}: {}", answer.text());
        }
        assert_eq!(
            text_of(&server.post("/v1/chat/completions", healthy.clone()).await),
            expected,
            "after {id:?}"
        );
    }
    assert_eq!(server.get("/v1/users").await.json()["data"].as_array().unwrap().len(), 1);
}

/// ainode #186: training "succeeded" with all-NaN weights. Such an upload does not get in either.
#[tokio::test]
async fn ainode_186_weights_that_are_not_finite_are_refused() {
    let server = Server::new().await;
    let (config, weights) = files("tiny-llama/lora-qv");
    let header = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize + 8;
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in (header..weights.len()).step_by((weights.len() - header) / 16 / 4 * 4) {
            let mut damaged = weights.clone();
            damaged[at..at + 4].copy_from_slice(&value.to_le_bytes());
            let answer =
                put(&server, "/v1/adapters/x", &[("config", &config), ("weights", &damaged)], &[]).await;
            assert_eq!(
                (answer.status.as_u16(), answer.text().contains("finite")),
                (400, true),
                "{value} at {at}"
            );
        }
    }
    assert_eq!(server.get("/v1/adapters/x").await.status, 404);
}

/// A client that leaves in the middle of an upload leaves nothing behind, and holds up nobody.
#[tokio::test]
async fn an_upload_that_breaks_off_leaves_nothing() {
    let server = Server::with(Auth::Open, Limits { imports: 1, ..Limits::default() }, None).await;
    let (config, weights) = files("tiny-llama/lora-qv");
    let whole = body(&[("config", &config), ("weights", &weights)]);
    let media = "multipart/form-data; boundary=a-boundary-that-no-file-holds";
    for part in 1..16 {
        let cut = whole[..whole.len() * part / 16].to_vec();
        let request = Request::put("/v1/users/ann/adapter").header("content-type", media);
        let answer = server.send(request.body(Body::from(cut)).unwrap()).await;
        assert_eq!(answer.status, 400, "{}", answer.text());
    }
    assert_eq!(server.get("/v1/users/ann").await.status, 404);
    import(&server, "/v1/users/ann/adapter", "lora-qv").await;
}
