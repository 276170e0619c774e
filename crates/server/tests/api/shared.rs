//! Adapters that a tenant's users share, beside users of the same name.

use serde_json::{Value, json};

use crate::form::import;
use crate::{Server, chat, text_of, with};

#[tokio::test]
async fn a_shared_adapter_and_a_user_of_its_name_are_two() {
    let server = Server::new().await;
    let base = text_of(&server.post("/v1/chat/completions", chat()).await);
    let shared = import(&server, "/v1/adapters/style", "lora-all").await;
    let ask = async |model: &str, user: Option<&str>| {
        let body = user.map_or(chat(), |user| with(chat(), "user", json!(user)));
        server.post("/v1/chat/completions", with(body, "model", json!(model))).await
    };
    // There is no user of this name yet.
    assert_eq!(ask("base:style", None).await.status, 404);
    let unserved = ask("base", Some("style")).await;
    assert_eq!((unserved.header("x-atelier-adapter"), text_of(&unserved)), ("none", base.clone()));
    assert_eq!(server.get("/v1/users/style").await.status, 404);
    let answer = ask("base:@style", None).await;
    assert_eq!(
        (answer.header("x-atelier-adapter"), answer.header("x-atelier-generation")),
        ("@style", &shared[..])
    );
    let by_shared = text_of(&answer);
    assert_ne!(by_shared, base);

    let own = import(&server, "/v1/users/style/adapter", "lora-rslora").await;
    let answer = ask("base:style", None).await;
    assert_eq!(
        (answer.header("x-atelier-adapter"), answer.header("x-atelier-generation")),
        ("style", &own[..])
    );
    let by_user = text_of(&answer);
    assert_ne!(by_user, by_shared);
    // Their prompts begin alike, and each finds its own keys and values.
    for _ in 0..2 {
        assert_eq!(text_of(&ask("base:@style", Some("ann")).await), by_shared, "for any user");
        assert_eq!(text_of(&ask("base", Some("style")).await), by_user);
    }
    let tgi = json!({ "inputs": "x", "parameters": { "adapter_id": "@style", "max_new_tokens": 2 } });
    assert_eq!(server.post("/generate", tgi).await.header("x-adapter-id"), "@style");

    let models = server.get("/v1/models").await.json();
    let cards = models["data"].as_array().unwrap();
    let ids: Vec<&str> = cards.iter().filter_map(|card| card["id"].as_str()).collect();
    assert_eq!(ids, ["base", "base:@style", "base:style"]);
    assert_eq!((&cards[1]["parent"], &cards[1]["root"]), (&json!("base"), &json!("base")));
    assert_eq!(server.get("/v1/models/base:@style").await.json(), cards[1]);
    let users = server.get("/v1/users").await.json();
    assert_eq!(users["data"].as_array().unwrap().len(), 1, "{users}");

    // The one goes, the other stays.
    assert_eq!(server.call("DELETE", "/v1/users/style", None).await.status, 200);
    assert_eq!(text_of(&ask("base:@style", None).await), by_shared);
    assert_eq!(server.call("DELETE", "/v1/adapters/style", None).await.json()["model"], "base:@style");
    assert_eq!(server.call("DELETE", "/v1/adapters/style", None).await.status, 404);
    assert_eq!(ask("base:@style", None).await.status, 404);
    assert_eq!(server.get("/v1/models/base:@style").await.status, 404);
    assert_eq!(server.app.adapters.residency().device.adapters, 0);
}

#[tokio::test]
async fn a_shared_adapter_has_the_life_of_a_users() {
    let server = Server::new().await;
    let root = "/v1/adapters/style";
    let one = import(&server, root, "lora-all").await;
    let two = import(&server, root, "lora-qv").await;
    let card = server.get(root).await.json();
    assert_eq!(
        (&card["user"], &card["name"], &card["model"]),
        (&Value::Null, &json!("style"), &json!("base:@style"))
    );
    for file in card["files"].as_array().unwrap() {
        let (url, name) = (file["url"].as_str().unwrap(), file["name"].as_str().unwrap());
        assert!(url.starts_with(root), "{url}");
        let content = server.get(url).await;
        assert_eq!(content.body.len() as u64, file["bytes"].as_u64().unwrap());
        assert_eq!(server.get(&format!("{root}/{name}")).await.body, content.body);
    }
    let list = server.get(&format!("{root}/generations")).await.json();
    assert_eq!((&list["data"][0]["id"], &list["data"][1]["id"]), (&json!(two), &json!(one)));
    assert_eq!(server.call("DELETE", &format!("{root}/generations/{two}"), None).await.status, 409);
    assert_eq!(server.post(&format!("{root}/rollback"), json!({ "generation": one })).await.status, 200);
    assert_eq!(server.get(root).await.header("x-atelier-generation"), one);
    assert_eq!(
        server.call("POST", &format!("{root}/generations/{two}/pin"), None).await.json()["pinned"],
        true
    );
    assert_eq!(
        server.call("DELETE", &format!("{root}/generations/{two}/pin"), None).await.json()["pinned"],
        false
    );
    assert_eq!(server.call("DELETE", &format!("{root}/generations/{two}"), None).await.status, 200);
    assert_eq!(server.post(&format!("{root}/rollback"), json!({ "generation": null })).await.status, 200);
    // Without a head it is not silently the base.
    let named = server.post("/v1/chat/completions", with(chat(), "model", json!("base:@style"))).await;
    assert_eq!((named.status.as_u16(), server.get(root).await.status.as_u16()), (404, 404));
    assert_eq!(server.get("/v1/models").await.json()["data"].as_array().unwrap().len(), 1);
    for (name, status) in [("@style", 400), ("a%2fb", 400), (".x", 400), ("none", 404), ("Style", 404)] {
        let answer = server.get(&format!("/v1/adapters/{name}")).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["param"]),
            (status, &json!("name")),
            "{name}"
        );
    }
}
