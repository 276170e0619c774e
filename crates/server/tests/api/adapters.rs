//! Adapters' tiers as clients see them, and a server whose slots are all in use.

use std::time::Duration;

use axum::http::StatusCode;
use serde_json::json;
use server::{Auth, Limits};
use types::AdapterId;

use crate::{Server, chat, key, with};

fn adapter(user: &str) -> AdapterId {
    AdapterId::new("default".parse().unwrap(), user.parse().unwrap())
}

#[tokio::test]
async fn the_tier_of_every_adapter_can_be_seen() {
    let server = Server::new().await;
    let generation = server.adopt("default", "ann").await;
    server.adopt("default", "bob").await;
    server.adopt("default", "eve").await;
    server.adopt_as(&AdapterId::shared("default".parse().unwrap(), "house".parse().unwrap())).await;
    let list = server.get("/v1/adapters").await.json();
    let tiers = |list: &serde_json::Value| -> Vec<String> {
        let entry = |entry: &serde_json::Value| {
            format!("{}: {}", entry["owner"].as_str().unwrap(), entry["tier"].as_str().unwrap())
        };
        list["data"].as_array().unwrap().iter().map(entry).collect()
    };
    assert_eq!(tiers(&list), ["ann: store", "bob: store", "eve: store"]);
    assert_eq!(list["data"][0]["generation"], generation.as_str());
    assert_eq!(server.post("/v1/chat/completions", with(chat(), "user", json!("ann"))).await.status, 200);
    server.app.adapters.prefetch(&adapter("bob"));
    while server.app.adapters.residency().host.adapters < 2 {
        tokio::task::yield_now().await;
    }
    let list = server.get("/v1/adapters").await.json();
    assert_eq!(tiers(&list), ["ann: device", "bob: host", "eve: store"]);
    let page = server.get("/v1/adapters?limit=2").await.json();
    assert_eq!((tiers(&page).len(), page["has_more"].as_bool()), (2, Some(true)));
    let mut rest = Vec::new();
    let mut next = page["next"].clone();
    while let Some(after) = next.as_str() {
        let page = server.get(&format!("/v1/adapters?after={after}")).await.json();
        rest.extend(tiers(&page));
        next = page["next"].clone();
    }
    assert_eq!(rest, ["eve: store", "@house: store"]);
    assert_eq!(server.get("/v1/adapters?limit=0").await.status, StatusCode::BAD_REQUEST);
    let metrics = server.get("/metrics").await.text();
    for line in [
        r#"atelier_adapter_cache_adapters{tier="device"} 1"#,
        r#"atelier_adapter_cache_adapters{tier="host"} 2"#,
        "atelier_adapter_cache_loads_total 2",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is missing in\n{metrics}");
    }
    assert!(!metrics.contains("ann"), "a user's name in a label");
}

#[tokio::test]
async fn the_list_holds_the_callers_tenant_only() {
    let keys = vec![key("first key of all", "acme"), key("second key of all", "other")];
    let server = Server::with(Auth::Keys(keys), Limits::default(), None).await;
    server.adopt("acme", "ann").await;
    for (key, expected) in [("first key of all", 1), ("second key of all", 0)] {
        let request =
            axum::http::Request::get("/v1/adapters").header("authorization", format!("Bearer {key}"));
        let list = server.send(request.body(axum::body::Body::empty()).unwrap()).await.json();
        assert_eq!(list["data"].as_array().unwrap().len(), expected, "{key}");
    }
    assert_eq!(server.get("/v1/adapters").await.status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_request_for_a_slot_waits_until_its_time_is_over() {
    let limits = Limits { adapter_timeout: Duration::from_secs(2), ..Limits::default() };
    let server = Server::with(Auth::Open, limits, None).await;
    // Sixteen pages, a lease on each.
    let mut leases = Vec::new();
    for number in 0..16 {
        let user = format!("user{number}");
        server.adopt("default", &user).await;
        leases.push(server.app.adapters.acquire(&adapter(&user)).await.unwrap().unwrap());
    }
    server.adopt("default", "late").await;
    let request = || with(chat(), "user", json!("late"));
    let refused = server.post("/v1/chat/completions", request()).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE, "{}", refused.text());
    assert_eq!(refused.json()["error"]["code"], "overloaded");
    assert!(refused.header("retry-after").parse::<u32>().unwrap() >= 1);
    // Users who have a slot, and those who need none, go on.
    let hot = server.post("/v1/chat/completions", with(chat(), "user", json!("user3"))).await;
    assert_eq!(hot.status, 200, "{}", hot.text());
    assert_eq!(server.post("/v1/chat/completions", chat()).await.status, 200);
    leases.pop();
    let served = server.post("/v1/chat/completions", request()).await;
    assert_eq!((served.status, served.header("x-atelier-adapter")), (StatusCode::OK, "late"));
}
