//! Training on demand and on hold, calling off, forgetting, progress.

use serde_json::{Value, json};

use crate::{Server, with};

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
    let training = json!({ "kind": "rslora", "rank": 4, "learning_rate": 0.001 });
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
    assert_eq!(server.get("/v1/limits").await.json()["training"]["rank"], 64);
}

#[tokio::test]
async fn training_can_be_put_on_hold() {
    let server = Server::new().await;
    let (all, ann) = ("/v1/training/pause", "/v1/users/ann/training/pause");
    assert_eq!(error(&server, "PUT", ann, None).await.0, 404);
    server.post(HISTORY, items(3)).await;
    assert_eq!(server.call("PUT", ann, None).await.json()["user_paused"], true);
    assert_eq!(server.get(all).await.json()["tenant_paused"], false);
    assert!(server.store.claim("worker", 1000, 3).await.unwrap().is_none());
    assert_eq!(server.call("PUT", all, None).await.json()["tenant_paused"], true);
    assert_eq!(server.call("DELETE", ann, None).await.json()["user_paused"], false);
    assert!(server.store.claim("worker", 1000, 3).await.unwrap().is_none());
    let lifted = server.call("DELETE", all, None).await.json();
    assert_eq!((&lifted["tenant_paused"], &lifted["user_paused"]), (&json!(false), &Value::Null));
    assert_eq!(server.get(ann).await.json()["user_paused"], false);
    assert!(server.store.claim("worker", 1000, 3).await.unwrap().is_some());
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
    let outcome = types::JobOutcome {
        published: false,
        generation: None,
        gate: None,
        reason: "not published".into(),
        trained_tokens: 7,
        seconds: 0.5,
    };
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
