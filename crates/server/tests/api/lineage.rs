//! Generations: listed, exported, rolled back to, pinned, deleted.

use serde_json::{Value, json};
use store::Expected;
use types::{AdapterKind, GateReport, HistoryRange, Provenance, TrainingCourse, TrainingOptions};

use crate::form::{files, import};
use crate::{Server, chat, outcome, text_of, with};

const ADAPTER: &str = "/v1/users/ann/adapter";
const GENERATIONS: &str = "/v1/users/ann/adapter/generations";

async fn ask(server: &Server) -> (String, String) {
    let answer = server.post("/v1/chat/completions", with(chat(), "user", json!("ann"))).await;
    (text_of(&answer), answer.header("x-atelier-generation").to_owned())
}

#[tokio::test]
async fn every_generation_is_listed_and_exported() {
    let server = Server::new().await;
    let kinds = ["lora-qv", "lora-all", "lora-rslora"];
    let mut ids = Vec::new();
    for kind in kinds {
        ids.insert(0, import(&server, ADAPTER, kind).await);
    }
    let (mut found, mut path) = (Vec::new(), format!("{GENERATIONS}?limit=2"));
    loop {
        let page = server.get(&path).await.json();
        found.extend(page["data"].as_array().unwrap().clone());
        let Some(next) = page["next"].as_str() else { break };
        assert_eq!(page["has_more"], true);
        path = format!("{GENERATIONS}?limit=2&after={next}");
    }
    let listed: Vec<&str> = found.iter().map(|generation| generation["id"].as_str().unwrap()).collect();
    assert_eq!(listed, ids);
    let heads: Vec<bool> = found.iter().map(|generation| generation["is_head"].as_bool().unwrap()).collect();
    assert_eq!(heads, [true, false, false]);
    for (generation, kind) in found.iter().zip(kinds.iter().rev()) {
        let id = generation["id"].as_str().unwrap();
        assert_eq!(&server.get(&format!("{GENERATIONS}/{id}")).await.json(), generation);
        assert_eq!((&generation["origin"], &generation["pinned"]), (&json!("imported"), &json!(false)));
        assert_eq!(generation["base_hash"].as_str().unwrap().len(), 64);
        let (config, weights) = files(&format!("tiny-llama/{kind}"));
        for (file, content) in [("adapter_config.json", config), ("adapter_model.safetensors", weights)] {
            let answer = server.get(&format!("{GENERATIONS}/{id}/{file}")).await;
            assert_eq!(
                (answer.body == content, answer.header("x-atelier-generation")),
                (true, id),
                "{kind} {file}"
            );
        }
    }
    for (path, status, param) in [
        (format!("{GENERATIONS}?limit=0"), 400, "limit"),
        (format!("{GENERATIONS}?after=x"), 400, "after"),
        (format!("{GENERATIONS}/x"), 404, "generation"),
        (format!("{GENERATIONS}/{}", "0".repeat(64)), 404, "generation"),
        (format!("{GENERATIONS}/{}/adapter_config.json", "0".repeat(64)), 404, "generation"),
        ("/v1/users/bob/adapter/generations".to_owned(), 404, "user"),
        (format!("/v1/users/bob/adapter/generations/{}", ids[0]), 404, "generation"),
        ("/v1/users/%ff/adapter".to_owned(), 400, "user"),
        ("/v1/users/a%20b/adapter/generations".to_owned(), 400, "user"),
        ("/v1/adapters/%ff/generations".to_owned(), 400, "name"),
    ] {
        let answer = server.get(&path).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["param"]),
            (status, &json!(param)),
            "{path}"
        );
    }
}

#[tokio::test]
async fn a_trained_generation_says_where_it_comes_from() {
    let server = Server::new().await;
    let parent = import(&server, ADAPTER, "lora-all").await;
    let (config, weights) = files("tiny-llama/lora-qv");
    let gate = GateReport {
        train_items: 24,
        heldout_items: 6,
        heldout_tokens: 60,
        base_bits: 4.0,
        head_bits: Some(3.0),
        new_bits: 2.5,
        p_base: Some(0.015625),
        p_head: Some(0.03125),
        head_items: Some(6),
        verdict: "better".into(),
    };
    let recipe = TrainingOptions {
        kind: Some(AdapterKind::Lora),
        rank: Some(8),
        epochs: Some(3),
        ..TrainingOptions::default()
    };
    let course = TrainingCourse {
        from_scratch: false,
        updates: 2,
        new_items: 8,
        replayed_items: 4,
        steps: 9,
        trained_tokens: 1234,
    };
    let (first, last) = ("i0".parse().unwrap(), "i23".parse().unwrap());
    let provenance = Provenance {
        history: Some(HistoryRange { first, last, items: 24 }),
        recipe,
        seed: 7,
        gate: Some(gate),
        training: course,
    };
    let trained = store::NewGeneration {
        id: peft::generation_id(&server.base, &config, &weights),
        parent: Some(parent.parse().unwrap()),
        base: server.base,
        config: config.into(),
        weights: weights.into(),
        meta: json!(provenance),
    };
    let upload = json!({ "items": [{ "id": "i0", "input": "a", "output": "b" }] });
    assert_eq!(server.post("/v1/users/ann/history", upload).await.status.as_u16(), 202);
    let claimed = server.store.claim("worker", 60_000, 3).await.unwrap().unwrap();
    let (owner, finish) = (crate::adapter("default", "ann"), (claimed.fence, outcome(Some(trained.id))));
    server.store.publish(&owner, trained, Expected::Any, Some(finish)).await.unwrap();
    let list = server.get(GENERATIONS).await.json();
    let [trained, imported] = &list["data"].as_array().unwrap()[..] else { panic!("{list}") };
    assert_eq!((&trained["origin"], &trained["parent"]), (&json!("trained"), &json!(parent)));
    assert_eq!(trained["base_hash"].as_str().unwrap().len(), 64);
    assert_eq!(trained["history"], json!({ "first_item": "i0", "last_item": "i23", "items": 24 }));
    assert_eq!(trained["recipe"], json!({ "kind": "lora", "rank": 8, "epochs": 3 }));
    assert_eq!(trained["seed"], 7);
    assert_eq!((&trained["gate"]["new_bits"], &trained["gate"]["verdict"]), (&json!(2.5), &json!("better")));
    assert_eq!(
        trained["training"],
        json!({ "from_scratch": false, "updates": 2, "new_items": 8, "replayed_items": 4, "steps": 9,
                "trained_tokens": 1234 })
    );
    assert_eq!(imported["origin"], "imported");
    for field in ["parent", "history", "recipe", "seed", "gate", "training"] {
        assert_eq!(imported.get(field), Some(&Value::Null), "{field}: there, and null");
    }
    // The adapter itself says the same of its head.
    let adapter = server.get(ADAPTER).await.json();
    for field in ["parent", "base_hash", "history", "recipe", "seed", "gate", "training"] {
        assert_eq!(adapter[field], trained[field], "{field}");
    }
}

#[tokio::test]
async fn a_rollback_is_served_by_the_next_request() {
    let server = Server::new().await;
    let base = ask(&server).await;
    assert_eq!(base.1, "none");
    let one = import(&server, ADAPTER, "lora-all").await;
    let first = ask(&server).await;
    let two = import(&server, ADAPTER, "lora-rslora").await;
    let second = ask(&server).await;
    assert_eq!((&first.1, &second.1), (&one, &two));
    assert_ne!(first.0, second.0, "else nothing is shown");
    let rollback = async |body: Value| server.post(&format!("{ADAPTER}/rollback"), body).await;
    let back = rollback(json!({ "generation": one, "expected_head": two })).await;
    assert_eq!((back.status.as_u16(), &back.json()["generation"]), (200, &json!(one)), "{}", back.text());
    assert_eq!(ask(&server).await, first);
    assert_eq!(rollback(json!({ "generation": two })).await.status, 200);
    assert_eq!(ask(&server).await, second);
    // To the base, and back.
    let none = rollback(json!({ "generation": null, "expected_head": two })).await;
    assert_eq!((none.status.as_u16(), &none.json()["generation"]), (200, &Value::Null));
    assert_eq!(ask(&server).await, base);
    let named = server.post("/v1/chat/completions", with(chat(), "model", json!("base:ann"))).await;
    assert_eq!((named.status.as_u16(), server.get(ADAPTER).await.status.as_u16()), (404, 404));
    assert_eq!(server.get(GENERATIONS).await.json()["data"].as_array().unwrap().len(), 2);
    assert_eq!(rollback(json!({ "generation": one, "expected_head": null })).await.status, 200);
    assert_eq!(ask(&server).await, first);

    for (body, status, code, param) in [
        (json!({ "generation": two, "expected_head": two }), 409, "head_moved", "expected_head"),
        (json!({ "generation": two, "expected_head": null }), 409, "head_moved", "expected_head"),
        (json!({ "generation": "0".repeat(64) }), 404, "generation_not_found", "generation"),
        (json!({}), 400, "missing_required_parameter", "generation"),
        (json!({ "generation": "x" }), 400, "invalid_value", "generation"),
        (json!({ "generation": 7 }), 400, "invalid_value", "generation"),
        (json!({ "generation": one, "expected_head": "none" }), 400, "invalid_value", "expected_head"),
        (json!({ "generation": one, "head": one }), 400, "unknown_parameter", "head"),
    ] {
        let answer = rollback(body.clone()).await;
        let error = &answer.json()["error"];
        assert_eq!(
            (answer.status.as_u16(), &error["code"], &error["param"]),
            (status, &json!(code), &json!(param)),
            "{body}: {error}"
        );
        assert!(status != 409 || error["current_head"] == json!(one), "{error}");
    }
    let nobody = server.post("/v1/users/bob/adapter/rollback", json!({ "generation": null })).await;
    assert_eq!((nobody.status.as_u16(), &nobody.json()["error"]["code"]), (404, &json!("adapter_not_found")));
    assert_eq!(ask(&server).await, first, "refusals change nothing");
}

#[tokio::test]
async fn a_generation_of_another_base_does_not_become_head_again() {
    let server = Server::new().await;
    let (config, weights) = files("tiny-llama/lora-all");
    let old = store::NewGeneration {
        id: peft::generation_id(&[9; 32], &config, &weights),
        parent: None,
        base: [9; 32],
        config: config.into(),
        weights: weights.into(),
        meta: json!({}),
    };
    let old = server
        .store
        .publish(&crate::adapter("default", "ann"), old, None, None)
        .await
        .unwrap()
        .id
        .to_string();
    let new = import(&server, ADAPTER, "lora-qv").await;
    let refused = server.post(&format!("{ADAPTER}/rollback"), json!({ "generation": old })).await;
    assert_eq!(
        (refused.status.as_u16(), &refused.json()["error"]["code"]),
        (409, &json!("adapter_incompatible"))
    );
    assert_eq!(ask(&server).await.1, new);
    assert_eq!(server.get(&format!("{GENERATIONS}/{old}/adapter_config.json")).await.status, 200);
}

#[tokio::test]
async fn generations_are_pinned_and_deleted() {
    let server = Server::new().await;
    let one = import(&server, ADAPTER, "lora-all").await;
    let two = import(&server, ADAPTER, "lora-qv").await;
    let call = async |method: &str, path: String| server.call(method, &path, None).await;
    let pin = format!("{GENERATIONS}/{one}/pin");
    assert_eq!(call("POST", pin.clone()).await.json()["pinned"], true);
    for (generation, current) in [(&one, Value::Null), (&two, json!(two))] {
        let refused = call("DELETE", format!("{GENERATIONS}/{generation}")).await;
        let error = &refused.json()["error"];
        assert_eq!((refused.status.as_u16(), &error["code"]), (409, &json!("generation_in_use")));
        assert_eq!(error["current_head"], current);
    }
    let adapter = crate::adapter("default", "ann");
    assert_eq!(
        server.store.prune_generations(&adapter, 0).await.unwrap(),
        0,
        "the one is pinned, the other head"
    );
    assert_eq!(call("DELETE", pin.clone()).await.json()["pinned"], false);
    assert_eq!(call("DELETE", format!("{GENERATIONS}/{one}")).await.json()["deleted"], true);
    for (method, path) in [
        ("DELETE", format!("{GENERATIONS}/{one}")),
        ("POST", pin.clone()),
        ("DELETE", pin),
        ("GET", format!("{GENERATIONS}/{one}")),
    ] {
        let gone = call(method, path.clone()).await;
        assert_eq!(
            (gone.status.as_u16(), &gone.json()["error"]["code"]),
            (404, &json!("generation_not_found")),
            "{method} {path}"
        );
    }
    assert_eq!(server.post(&format!("{ADAPTER}/rollback"), json!({ "generation": one })).await.status, 404);
    assert_eq!(ask(&server).await.1, two);
    assert_eq!(
        server.get(&format!("{GENERATIONS}/{one}/nothing")).await.json()["error"]["code"],
        "route_not_found"
    );
    let method = server.call("PUT", &format!("{GENERATIONS}/{one}"), None).await.json();
    assert_eq!(method["error"]["code"], "method_not_allowed");
    assert!(method["error"]["message"].as_str().unwrap().contains("/v1/users/ann/adapter"), "{method}");
}

#[tokio::test]
async fn a_deleted_adapter_is_gone_and_its_user_is_not() {
    let server = Server::new().await;
    let base = ask(&server).await;
    let item = json!({ "items": [{ "output": "a" }] });
    assert_eq!(server.post("/v1/users/ann/history", item).await.status, 202);
    let one = import(&server, ADAPTER, "lora-all").await;
    let two = import(&server, ADAPTER, "lora-qv").await;
    server.call("POST", &format!("{GENERATIONS}/{one}/pin"), None).await;
    assert_eq!(ask(&server).await.1, two, "it is in memory");
    let deleted = server.call("DELETE", ADAPTER, None).await;
    assert_eq!((deleted.status.as_u16(), &deleted.json()["deleted"]), (200, &json!(true)));
    assert_eq!(server.app.adapters.residency().device.adapters, 0);
    assert_eq!(ask(&server).await, base);
    for path in [
        ADAPTER.to_owned(),
        format!("{ADAPTER}/adapter_config.json"),
        format!("{GENERATIONS}/{one}"),
        format!("{GENERATIONS}/{two}/adapter_config.json"),
        "/v1/models/base:ann".to_owned(),
    ] {
        assert_eq!(server.get(&path).await.status, 404, "{path}");
    }
    assert_eq!(server.call("DELETE", ADAPTER, None).await.status, 404);
    let user = server.get("/v1/users/ann").await.json();
    assert_eq!((&user["items"], &user["head"]), (&json!(1), &Value::Null));
    assert_eq!(server.get(GENERATIONS).await.json()["data"], json!([]));
}

#[tokio::test]
async fn erasing_a_user_removes_every_generation() {
    let server = Server::new().await;
    let one = import(&server, ADAPTER, "lora-all").await;
    server.call("POST", &format!("{GENERATIONS}/{one}/pin"), None).await;
    import(&server, ADAPTER, "lora-qv").await;
    ask(&server).await;
    assert_eq!(server.call("DELETE", "/v1/users/ann", None).await.status, 200);
    for path in [
        ADAPTER.to_owned(),
        GENERATIONS.to_owned(),
        format!("{GENERATIONS}/{one}"),
        format!("{GENERATIONS}/{one}/adapter_model.safetensors"),
    ] {
        assert_eq!(server.get(&path).await.status, 404, "{path}");
    }
    assert_eq!(server.app.adapters.residency().device.adapters, 0);
    assert_eq!(ask(&server).await.1, "none");
    // Who comes back starts from nothing.
    let again = import(&server, ADAPTER, "lora-all").await;
    assert_eq!(again, one);
    let list = server.get(GENERATIONS).await.json();
    assert_eq!((list["data"].as_array().unwrap().len(), &list["data"][0]["pinned"]), (1, &json!(false)));
}
