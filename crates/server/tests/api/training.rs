//! Training on demand and on hold, calling off, forgetting, progress.

use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};
use server::{Auth, Limits};

use crate::{Server, chat, key, outcome, with};

const HISTORY: &str = "/v1/users/ann/history";

fn items(count: usize) -> Value {
    let item = |at: usize| json!({ "id": format!("i{at}"), "input": "in", "output": format!("out {at}"), "created_at": at });
    json!({ "items": (0..count).map(item).collect::<Vec<_>>() })
}

async fn error(server: &Server, method: &str, path: &str, body: Option<&Value>) -> (u16, Value, Value) {
    let answer = server.call(method, path, body).await;
    let error = answer.json()["error"].clone();
    (answer.status.as_u16(), error["code"].clone(), error["param"].clone())
}

#[tokio::test]
async fn a_job_can_be_called_off() {
    let server = Server::new().await;
    let job = server.post(HISTORY, items(3)).await.json()["job"]["id"].as_str().unwrap().to_owned();
    let cancel = format!("/v1/jobs/{job}/cancel");
    for _ in 0..2 {
        let answer = server.call("POST", &cancel, None).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["status"]), (200, &json!("cancelled")));
    }
    let next = server.post("/v1/users/ann/train", json!({})).await.json();
    assert_ne!(next["id"], json!(job));
    let claimed = server.store.claim("worker", 1000, 3).await.unwrap().unwrap();
    server.store.fail(&claimed.fence, "no", None).await.unwrap();
    let ended = format!("/v1/jobs/{}/cancel", claimed.job.id);
    assert_eq!(error(&server, "POST", &ended, None).await, (409, json!("job_ended"), json!("id")));
    assert_eq!(error(&server, "POST", "/v1/jobs/x/cancel", None).await.0, 404);
}

#[tokio::test]
async fn training_is_had_on_demand_and_by_ones_own_numbers() {
    let server = Server::new().await;
    assert_eq!(error(&server, "POST", "/v1/users/ann/train", None).await.0, 404);
    let training = json!({
        "kind": "rslora",
        "rank": 4,
        "learning_rate": 0.001,
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "layers_to_transform": [1, 2],
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
    });
    let uploaded = server.post(HISTORY, with(items(3), "training", training.clone())).await.json();
    assert_eq!(uploaded["job"]["training"], training);
    let answer = server.call("POST", "/v1/users/ann/train", None).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["training"]), (202, &training));
    let body = json!({ "from_scratch": true, "training": { "recipe": "oppu" } });
    let job = server.post("/v1/users/ann/train", body).await.json();
    assert_eq!((&job["from_scratch"], &job["training"]), (&json!(true), &json!({ "recipe": "oppu" })));
    assert_eq!(job["id"], uploaded["job"]["id"], "one job waits");
    for (training, param) in [
        (json!({ "rank": 0 }), "training.rank"),
        (json!({ "rank": 65 }), "training.rank"),
        (json!({ "rank": -1 }), "training.rank"),
        (json!({ "epochs": 4_294_967_295u32 }), "training.epochs"),
        (json!({ "learning_rate": 5 }), "training.learning_rate"),
        (json!({ "learning_rate": "1" }), "training.learning_rate"),
        (json!({ "dropout": 1 }), "training.dropout"),
        (json!({ "kind": "ia3", "rank": 8 }), "training.rank"),
        (json!({ "target_modules": [] }), "training.target_modules"),
        (json!({ "target_modules": "q_proj" }), "training.target_modules"),
        (json!({ "target_modules": ["q_proj", "q_proj"] }), "training.target_modules"),
        (json!({ "target_modules": ["q_proj", "lm_head"] }), "training.target_modules[1]"),
        (json!({ "kind": "prompt", "target_modules": ["q_proj"] }), "training.target_modules"),
        (json!({ "layers_to_transform": [] }), "training.layers_to_transform"),
        (json!({ "layers_to_transform": [3] }), "training.layers_to_transform"),
        (json!({ "layers_to_transform": [-1] }), "training.layers_to_transform[0]"),
        (json!({ "kind": "ia3", "layers_to_transform": [0] }), "training.layers_to_transform"),
        (json!({ "adam_beta1": 1 }), "training.adam_beta1"),
        (json!({ "adam_beta2": -0.5 }), "training.adam_beta2"),
        (json!({ "adam_epsilon": 0 }), "training.adam_epsilon"),
        (json!({ "kind": "magic" }), "training.kind"),
        (json!({ "rnak": 8 }), "training.rnak"),
    ] {
        let body = json!({ "training": training });
        let (status, _, found) = error(&server, "POST", "/v1/users/ann/train", Some(&body)).await;
        assert_eq!((status, found), (400, json!(param)), "{body}");
        let upload = with(items(5), "training", body["training"].clone());
        let (status, _, found) = error(&server, "POST", HISTORY, Some(&upload)).await;
        assert_eq!((status, found), (400, json!(param)), "{body}");
    }
    assert_eq!(server.get("/v1/users/ann").await.json()["items"], 3, "nothing of a bad upload is kept");
    let limits = server.get("/v1/limits").await.json();
    assert_eq!((&limits["training"]["rank"], &limits["training"]["layers"]), (&json!(64), &json!(3)));
}

#[tokio::test]
async fn training_can_be_put_on_hold() {
    let server = Server::new().await;
    let (all, ann) = ("/v1/training/pause", "/v1/users/ann/training/pause");
    assert_eq!(error(&server, "PUT", ann, None).await.0, 404);
    let job = server.post(HISTORY, items(3)).await.json()["job"]["id"].as_str().unwrap().to_owned();
    assert_eq!(server.call("PUT", ann, None).await.json()["user_paused"], true);
    assert_eq!(server.get(all).await.json()["tenant_paused"], false);
    assert!(server.store.claim("worker", 1000, 3).await.unwrap().is_none());
    let waits = server.get(&format!("/v1/jobs/{job}")).await.json();
    assert_eq!((&waits["status"], &waits["paused"]), (&json!("queued"), &json!(true)));
    assert!(waits["next"].as_str().unwrap().contains("until the pause is lifted"), "{waits}");
    let held = server.call("PUT", all, Some(&json!({ "reason": "a new disk" }))).await.json();
    assert_eq!(held["tenant_paused"], true);
    assert_eq!(
        (&held["pauses"][0]["scope"], &held["pauses"][0]["reason"]),
        (&json!("tenant"), &json!("a new disk"))
    );
    assert_eq!(server.call("DELETE", ann, None).await.json()["user_paused"], false);
    assert!(server.store.claim("worker", 1000, 3).await.unwrap().is_none());
    let lifted = server.call("DELETE", all, None).await.json();
    assert_eq!((&lifted["tenant_paused"], &lifted["user_paused"]), (&json!(false), &Value::Null));
    assert_eq!(server.get(ann).await.json()["user_paused"], false);
    assert!(server.store.claim("worker", 1000, 3).await.unwrap().is_some());
    let long = json!({ "reason": "x".repeat(501) });
    assert_eq!(error(&server, "PUT", all, Some(&long)).await.2, "reason");
    assert_eq!(error(&server, "PUT", all, Some(&json!({ "why": "x" }))).await.2, "why");
    assert_eq!(server.get(all).await.json()["pauses"], json!([]), "nothing of a bad request is kept");
}

#[tokio::test]
async fn training_on_the_whole_server_can_be_put_on_hold() {
    let keys = vec![key("key of one", "one"), key("key of two", "two"), key("key of an operator", "ops")];
    let server = Server::with(Auth::Keys(keys), Limits::default(), None).await;
    let ask = async |who: &str, method: &str, path: &str, body: Option<Value>| {
        let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
        let request = request.header("authorization", format!("Bearer key of {who}"));
        server.send(request.body(body.map_or(Body::empty(), |body| body.to_string().into())).unwrap()).await
    };
    let path = "/v1/server/training/pause";
    let job = ask("one", "POST", HISTORY, Some(items(3))).await.json()["job"]["id"].clone();
    for method in ["PUT", "DELETE"] {
        let refused = ask("one", method, path, None).await;
        assert_eq!(
            (refused.status.as_u16(), &refused.json()["error"]["code"]),
            (403, &json!("operator_key_needed"))
        );
    }
    assert_eq!(ask("one", "GET", path, None).await.json()["server_paused"], false);
    let body = json!({ "reason": "upkeep until noon" });
    let held = ask("an operator", "PUT", path, Some(body)).await.json();
    assert_eq!((&held["server_paused"], &held["pauses"][0]["by"]), (&json!(true), &json!("ops")));
    assert!(held["pauses"][0]["since"].as_f64().unwrap() > 1.6e9, "{held}");
    // Tenants see that it is so and why, but not who the others are, and cannot lift it.
    for (who, path) in [("one", path), ("two", "/v1/training/pause"), ("one", "/v1/users/ann/training/pause")]
    {
        let seen = ask(who, "GET", path, None).await.json();
        assert_eq!(
            (&seen["server_paused"], &seen["pauses"][0]["by"]),
            (&json!(true), &Value::Null),
            "{seen}"
        );
        assert_eq!(seen["pauses"][0]["reason"], "upkeep until noon");
    }
    ask("one", "DELETE", "/v1/training/pause", None).await;
    assert!(server.store.claim("worker", 1000, 3).await.unwrap().is_none());
    let waits = ask("one", "GET", &format!("/v1/jobs/{}", job.as_str().unwrap()), None).await.json();
    assert_eq!(waits["paused"], true);
    // Serving goes on.
    assert_eq!(ask("one", "POST", "/v1/chat/completions", Some(chat())).await.status, 200);
    assert_eq!(ask("an operator", "DELETE", path, None).await.json()["pauses"], json!([]));
    assert!(server.store.claim("worker", 1000, 3).await.unwrap().is_some());
}

/// Every way in which a job stands is told, with what happens next.
#[tokio::test]
async fn a_job_says_what_happens_next() {
    let server = Server::new().await;
    let upload = async |count| server.post(HISTORY, items(count)).await.json()["job"].clone();
    let look = async |job: &Value| {
        let job = server.get(&format!("/v1/jobs/{}", job["id"].as_str().unwrap())).await.json();
        assert!(!job["next"].as_str().unwrap().is_empty(), "{job}");
        job
    };
    let says = |job: &Value, words: &str| {
        assert!(job["next"].as_str().unwrap().contains(words), "{job}");
    };
    let first = upload(3).await;
    says(&first, "its turn");
    let claimed = server.store.claim("worker", 60_000, 3).await.unwrap().unwrap();
    says(&look(&first).await, "compared with the base");
    let second = upload(4).await;
    says(&second, "waits for another job");
    server.store.finish(&claimed.fence, &outcome(None)).await.unwrap();
    says(&look(&first).await, "done");
    // It fails, waits, and is given up: the reasons are there at every step.
    let mut attempts = 0;
    for wait in [Some(60_000), None] {
        if wait.is_some() {
            let claimed = server.store.claim("worker", 60_000, 3).await.unwrap().unwrap();
            server.store.fail(&claimed.fence, "out of memory", Some(0)).await.unwrap();
        }
        let claimed = server.store.claim("worker", 60_000, 3).await.unwrap().unwrap();
        attempts = claimed.job.attempts;
        let reason = if wait.is_some() {
            "out of memory"
        } else {
            "gave up after 3 attempts; the last one: no memory"
        };
        server.store.fail(&claimed.fence, reason, wait.map(|_| 0)).await.unwrap();
        let job = look(&second).await;
        assert_eq!(job["error"], reason);
        match wait {
            Some(_) => {
                assert_eq!(job["status"], "queued");
                assert!(job["retry_at"].as_f64().is_some(), "{job}");
                says(&job, "tried again");
            }
            None => {
                assert_eq!((&job["status"], &job["retry_at"]), (&json!("failed"), &Value::Null));
                says(&job, "make another job");
            }
        }
    }
    assert_eq!(attempts, 3);
    let third = upload(5).await;
    server.post(&format!("/v1/jobs/{}/cancel", third["id"].as_str().unwrap()), json!({})).await;
    let cancelled = look(&third).await;
    assert_eq!(
        (&cancelled["status"], &cancelled["error"]),
        (&json!("cancelled"), &json!("cancelled on request"))
    );
    // A running one that is paused.
    let fourth = upload(6).await;
    server.store.claim("worker", 60_000, 3).await.unwrap().unwrap();
    server.call("PUT", "/v1/training/pause", None).await;
    let running = look(&fourth).await;
    assert_eq!((&running["status"], &running["paused"]), (&json!("running"), &json!(true)));
    says(&running, "stops at its next step");
}

/// Whoever erases everything is answered by the base from then on, whatever was resident.
#[tokio::test]
async fn an_erased_history_takes_its_adapter_with_it() {
    let server = Server::new().await;
    let ask = async || {
        let answer = server.post("/v1/chat/completions", with(chat(), "user", json!("ann"))).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.header("x-atelier-generation").to_owned()
    };
    server.post(HISTORY, items(10)).await;
    let generation = server.learn("ann").await;
    assert_eq!(ask().await, generation);
    server.call("PUT", &format!("/v1/users/ann/adapter/generations/{generation}/pin"), None).await;
    server.post(HISTORY, items(11)).await;
    let running = server.store.claim("worker", 60_000, 3).await.unwrap().unwrap();
    let erased = server.call("DELETE", HISTORY, None).await;
    assert_eq!(erased.status, 200, "{}", erased.text());
    let erased = erased.json();
    assert_eq!((&erased["deleted_items"], &erased["head"]), (&json!(11), &Value::Null));
    assert_eq!((&erased["deleted_generations"], &erased["job"]), (&json!([generation]), &Value::Null));
    assert_eq!(ask().await, "none");
    let named = with(chat(), "model", json!("base:ann"));
    assert_eq!(server.post("/v1/chat/completions", named).await.status, 404);
    let job = server.get(&format!("/v1/jobs/{}", running.job.id)).await.json();
    assert_eq!((&job["status"], &job["error"]), (&json!("cancelled"), &json!("the history was erased")));
    // What was uploaded has learnt from no item, and stays.
    let uploaded = server.adopt("default", "ann").await;
    let erased = server.call("DELETE", HISTORY, None).await.json();
    assert_eq!((&erased["head"], &erased["deleted_generations"]), (&json!(uploaded), &json!([])));
    assert_eq!(ask().await, uploaded);
}

#[tokio::test]
async fn items_can_be_forgotten() {
    let server = Server::new().await;
    server.post(HISTORY, items(10)).await;
    let gone = server.call("DELETE", "/v1/users/ann/history/i3", None).await;
    assert_eq!(gone.status, 200, "{}", gone.text());
    let gone = gone.json();
    assert_eq!((&gone["deleted_items"], &gone["job"]["from_scratch"]), (&json!(1), &json!(true)));
    let missing = error(&server, "DELETE", "/v1/users/ann/history/i3", None).await;
    assert_eq!(missing, (404, json!("item_not_found"), json!("item")));
    assert_eq!(error(&server, "DELETE", "/v1/users/bob/history/i3", None).await.1, "user_not_found");
    let delete = async |query: &str| server.call("DELETE", &format!("{HISTORY}?{query}"), None).await;
    for bad in ["form=1", "from=x", "from=NaN", "from=1&to_item=i2", "from_item=a%20b"] {
        assert_eq!(delete(bad).await.status, 400, "{bad}");
        assert_eq!(server.get("/v1/users/ann").await.json()["items"], 9, "{bad} has erased something");
    }
    assert_eq!(delete("from=1&to=2").await.json()["deleted_items"], 2);
    assert_eq!(delete("to=1970-01-01T00:00:00Z").await.json()["deleted_items"], 1);
    assert_eq!(delete("from_item=i8").await.json()["deleted_items"], 2);
    assert_eq!(server.get("/v1/users/ann").await.json()["items"], 4);
    assert_eq!(delete("from_item=nobody").await.json()["job"], Value::Null);
}

#[tokio::test]
async fn progress_and_manifests_are_shown() {
    let server = Server::new().await;
    assert_eq!(error(&server, "GET", "/v1/users/ann/progress", None).await.0, 404);
    server.post(HISTORY, items(3)).await;
    let claimed = server.store.claim("worker", 1000, 3).await.unwrap().unwrap();
    let outcome = outcome(None);
    let lesson = store::Lesson { from_scratch: true, items: 3, new_items: 3, ..store::Lesson::default() };
    server.store.finish_lesson(&claimed.fence, &outcome, &lesson).await.unwrap();
    let page = server.get("/v1/users/ann/progress").await.json();
    let point = &page["data"][0];
    assert_eq!(
        (&point["items"], &point["trained_tokens"], &point["base_bits"]),
        (&json!(3), &json!(7), &Value::Null)
    );
    assert_eq!(page["from_scratch"], json!({ "trainings": 1, "trained_tokens": 7, "seconds": 0.5 }));
    assert_eq!(page["updates"]["trainings"], 0);
    assert_eq!(error(&server, "GET", "/v1/users/ann/progress?after=x", None).await.2, "after");

    let manifest = "/v1/users/ann/adapter/manifest";
    assert_eq!(error(&server, "GET", manifest, None).await.1, "adapter_not_found");
    let generation = server.adopt("default", "ann").await;
    let shown = server.get(manifest).await.json();
    assert_eq!((&shown["generation"], &shown["items"]), (&json!(generation), &Value::Null));
    assert_eq!(server.get(&format!("{manifest}?generation={generation}")).await.status, 200);
    assert_eq!(error(&server, "GET", &format!("{manifest}?generation=x"), None).await.0, 400);
}
