//! Adapters' tiers as clients see them, and a server whose slots are all in use.

use std::sync::Arc;
use std::time::Duration;

use ::adapters::{Answer, Head, Source, Tier};
use axum::http::StatusCode;
use serde_json::json;
use server::{Auth, Limits};
use store::{AdapterFiles, Rest, Store};
use testkit::{FakeEngine, Mood};
use types::{AdapterId, GenerationId};

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

/// A store whose files never come.
struct Stuck(Store);

impl Source for Stuck {
    fn moves(&self, id: &AdapterId) -> u64 {
        self.0.head_moves(id)
    }

    fn head<'a>(&'a self, id: &'a AdapterId) -> Answer<'a, Option<Head>> {
        Source::head(&self.0, id)
    }

    fn files<'a>(&'a self, _: &'a AdapterId, _: GenerationId, _: Arc<Rest>) -> Answer<'a, AdapterFiles> {
        Box::pin(std::future::pending())
    }
}

#[tokio::test]
async fn a_load_that_takes_too_long_ends_its_request_alone() {
    let limits = Limits { adapter_timeout: Duration::from_millis(50), ..Limits::default() };
    let server = Server::over(Auth::Open, limits, None, |store| Arc::new(Stuck(store))).await;
    server.adopt("default", "ann").await;
    for path in ["/v1/chat/completions", "/v1/completions"] {
        let body = match path {
            "/v1/completions" => json!({ "model": "base:ann", "prompt": "x", "max_tokens": 2 }),
            _ => with(chat(), "user", json!("ann")),
        };
        let late = server.post(path, body).await;
        let error = &late.json()["error"];
        assert_eq!((late.status.as_u16(), &error["code"]), (504, &json!("deadline_exceeded")), "{path}");
        assert!(error["message"].as_str().unwrap().contains("not loaded in time"), "{error}");
        assert_eq!(server.app.adapters.residency().waiting, 0);
    }
    // Negative control: who needs no load is answered.
    assert_eq!(server.post("/v1/chat/completions", with(chat(), "user", json!("eve"))).await.status, 200);
}

#[tokio::test]
async fn a_request_that_waits_for_its_turn_finds_its_adapter_fetched() {
    let limits =
        Limits { in_flight_per_user: 1, queue_timeout: Duration::from_secs(20), ..Limits::default() };
    let engine = Arc::new(FakeEngine::new(Mood::Silent));
    let server = Server::with(Auth::Open, limits, Some(engine.clone())).await;
    let style = AdapterId::shared("default".parse().unwrap(), "style".parse().unwrap());
    server.adopt_as(&style).await;
    let until = async |condition: &dyn Fn() -> bool| {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let body = with(chat(), "user", json!("ann"));
    // The one turn of the user goes to an answer that does not end.
    let first = server.post("/v1/chat/completions", body.clone());
    let second = async {
        until(&|| engine.readers() == 1).await;
        server.post("/v1/chat/completions", with(body.clone(), "model", json!("base:@style"))).await
    };
    let fetched = || engine.readers() == 1 && server.app.adapters.tier(&style) == Tier::Host;
    tokio::select! {
        answer = first => panic!("{}", answer.text()),
        answer = second => panic!("its time was over before its adapter was there: {}", answer.text()),
        () = until(&fetched) => {}
    }
    // It was there while its request still waited for the turn.
    assert_eq!(server.app.adapters.residency().loads, 1);
}
