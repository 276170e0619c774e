//! Adapters come in by upload: whole, checked, once, and over the head that is expected.

use axum::body::Body;
use axum::http::Request;
use peft::{AdapterWeights, LoraWeights, PeftFiles};
use serde_json::{Value, json};
use server::{Auth, Limits};
use store::NewGeneration;
use types::{AdapterId, TrainingLimits};

use crate::form::{Parts, files, import, put};
use crate::{Server, chat, text_of, with};

const ADAPTER: &str = "/v1/users/ann/adapter";
const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

#[tokio::test]
async fn an_adapter_goes_in_answers_and_comes_out() {
    let server = Server::new().await;
    let base = text_of(&server.post("/v1/chat/completions", chat()).await);
    let (config, weights) = files("tiny-llama/lora-all");
    let answer = put(&server, ADAPTER, &[(CONFIG, &config), (WEIGHTS, &weights)], &[]).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let card = answer.json();
    let generation = card["generation"].as_str().unwrap();
    assert_eq!(answer.header("etag"), format!("\"{generation}\""));
    assert_eq!(
        (&card["user"], &card["name"], &card["model"]),
        (&json!("ann"), &Value::Null, &json!("base:ann"))
    );
    assert_eq!(
        (&card["origin"], &card["parent"], &card["training"]),
        (&json!("imported"), &Value::Null, &Value::Null)
    );
    assert_eq!(card["bytes"].as_u64(), Some((config.len() + weights.len()) as u64));
    assert_eq!(server.get(ADAPTER).await.json(), card);
    // What is served is the bytes that came, under the head's address and the generation's.
    for (at, content) in [&config, &weights].into_iter().enumerate() {
        let file = &card["files"][at];
        let name = file["name"].as_str().unwrap();
        for url in [file["url"].as_str().unwrap().to_owned(), format!("{ADAPTER}/{name}")] {
            let found = server.get(&url).await;
            assert_eq!((found.status.as_u16(), &found.body == content), (200, true), "{url}");
            assert_eq!(found.header("x-atelier-generation"), generation);
            assert_eq!(Some(found.header("x-atelier-base")), card["base_hash"].as_str());
        }
    }
    let answer = server.post("/v1/chat/completions", with(chat(), "model", json!("base:ann"))).await;
    assert_eq!(
        (answer.header("x-atelier-adapter"), answer.header("x-atelier-generation")),
        ("ann", generation)
    );
    assert_ne!(text_of(&answer), base);
}

#[tokio::test]
async fn the_same_files_are_the_same_generation() {
    let server = Server::new().await;
    let first = import(&server, ADAPTER, "lora-all").await;
    let (config, weights) = files("tiny-llama/lora-all");
    let parts = [("weights", &weights[..]), ("config", &config[..])];
    // Also for one who never heard of the first answer and expects no head.
    for headers in [&[][..], &[("if-none-match", "*")]] {
        let again = put(&server, ADAPTER, &parts, headers).await;
        assert_eq!(again.json()["generation"], first, "{headers:?}: {}", again.text());
    }
    let other = import(&server, ADAPTER, "lora-qv").await;
    assert_ne!(other, first);
    // An older one that comes again is head again.
    assert_eq!(import(&server, ADAPTER, "lora-all").await, first);
    assert_eq!(server.get(ADAPTER).await.json()["generation"], first);
    let list = server.get(&format!("{ADAPTER}/generations")).await.json();
    assert_eq!(list["data"].as_array().unwrap().len(), 2);
    assert_eq!(import(&server, "/v1/users/bob/adapter", "lora-all").await, first, "named by content alone");
}

#[tokio::test]
async fn a_form_must_be_what_is_expected() {
    let server = Server::new().await;
    let (config, weights) = files("tiny-llama/lora-qv");
    let (c, w) = (&config[..], &weights[..]);
    let changed = |field: &str, value: Value| {
        let config: Value = serde_json::from_slice(&config).unwrap();
        with(config, field, value).to_string().into_bytes()
    };
    let (wide, patterned, unknown) =
        (changed("r", json!(65)), changed("target_modules", json!("(((")), changed("new", json!(1)));
    let modules = changed("modules_to_save", json!(["lm_head"]));
    let narrow = changed("r", json!(4));
    let mut infinite = weights.clone();
    let end = infinite.len();
    infinite[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    let no_name: Parts<'_> = &[("", c)];
    let cases: &[(Parts<'_>, u16, &str, &str)] = &[
        (&[], 400, "missing_required_parameter", CONFIG),
        (&[(CONFIG, c)], 400, "missing_required_parameter", WEIGHTS),
        (&[(WEIGHTS, w)], 400, "missing_required_parameter", CONFIG),
        (&[(CONFIG, c), ("config", c), (WEIGHTS, w)], 400, "invalid_multipart", "config"),
        (&[(CONFIG, c), (WEIGHTS, w), (WEIGHTS, w)], 400, "invalid_multipart", WEIGHTS),
        (&[(CONFIG, c), (WEIGHTS, w), ("tokenizer.json", b"{}")], 400, "unknown_parameter", "tokenizer.json"),
        (no_name, 400, "unknown_parameter", ""),
        (&[(CONFIG, b""), (WEIGHTS, w)], 400, "invalid_adapter", CONFIG),
        (&[(CONFIG, b"{}"), (WEIGHTS, w)], 400, "invalid_adapter", "peft_type"),
        (&[(CONFIG, c), (WEIGHTS, b"")], 400, "invalid_adapter", WEIGHTS),
        (&[(CONFIG, c), (WEIGHTS, &w[..w.len() - 1])], 400, "invalid_adapter", WEIGHTS),
        (&[(CONFIG, w), (WEIGHTS, c)], 400, "invalid_adapter", CONFIG),
        (&[(CONFIG, &wide), (WEIGHTS, w)], 400, "invalid_adapter", "r"),
        (&[(CONFIG, &patterned), (WEIGHTS, w)], 400, "invalid_adapter", "target_modules"),
        (&[(CONFIG, &unknown), (WEIGHTS, w)], 400, "invalid_adapter", "new"),
        (&[(CONFIG, &modules), (WEIGHTS, w)], 400, "invalid_adapter", "modules_to_save"),
        (&[(CONFIG, c), (WEIGHTS, w), ("base_hash", b"x")], 400, "invalid_value", "base_hash"),
        (&[(CONFIG, c), (WEIGHTS, w), ("base_hash", &[b'0'; 65])], 413, "body_too_large", "base_hash"),
    ];
    let limits = server.get("/v1/limits").await.json();
    assert_eq!(
        (&limits["adapter_config_bytes"], &limits["adapter_weights_bytes"]),
        (&json!(65_536), &json!(67_108_864))
    );
    for (parts, status, code, param) in cases {
        let names: Vec<_> = parts.iter().map(|(name, content)| (name, content.len())).collect();
        let answer = put(&server, ADAPTER, parts, &[]).await;
        let error = &answer.json()["error"];
        assert_eq!(
            (answer.status.as_u16(), &error["code"], &error["param"]),
            (*status, &json!(code), &json!(param)),
            "{names:?}: {error}"
        );
    }
    for (config, weights) in [(&narrow[..], w), (c, &infinite[..])] {
        let answer = put(&server, ADAPTER, &[(CONFIG, config), (WEIGHTS, weights)], &[]).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status.as_u16(), &error["code"]), (400, &json!("invalid_adapter")));
        assert!(error["param"].as_str().unwrap().contains(".lora_"), "the tensor is named: {error}");
    }
    // Nothing of it was kept, not even the user; and what is sound goes in.
    assert_eq!(server.get("/v1/users/ann").await.status, 404);
    import(&server, ADAPTER, "lora-qv").await;
}

#[tokio::test]
async fn the_largest_rank_is_a_setting() {
    let shape = peft::FrozenBase::shape(&*testkit::tiny_model().0);
    let (config, weights) = files("tiny-llama/lora-qv");
    let mut wide = LoraWeights::parse(&config, &weights, &shape).unwrap();
    wide.config.r = 65;
    for (id, site) in shape.site_ids().zip(&mut wide.sites) {
        let Some(site) = site else { continue };
        let (out, input) = shape.dims(id.site);
        let value = |at: usize| (at * 31 % 17) as f32 * 0.01;
        (site.rank, site.a) = (65, (0..65 * input).map(value).collect());
        site.b = (0..out * 65).map(value).collect();
    }
    let PeftFiles { config: by_r, weights } =
        AdapterWeights::from(wide.clone()).to_files(&shape, "").unwrap();
    wide.config.rank_pattern = vec![("q_proj|v_proj".into(), 65)];
    wide.config.r = 1;
    let PeftFiles { config: by_pattern, .. } = AdapterWeights::from(wide).to_files(&shape, "").unwrap();
    let limited =
        |rank| Limits { training: TrainingLimits { rank, ..Default::default() }, ..Limits::default() };
    for (rank, fits) in [(64, false), (65, true), (512, true)] {
        let server = Server::with(Auth::Open, limited(rank), None).await;
        for (config, field) in [(&by_r, "r"), (&by_pattern, "rank_pattern.q_proj|v_proj")] {
            let answer = put(&server, ADAPTER, &[(CONFIG, config), (WEIGHTS, &weights)], &[]).await;
            if fits {
                assert_eq!(answer.status, 200, "{}", answer.text());
                let generation = answer.json()["generation"].clone();
                let said =
                    server.post("/v1/chat/completions", with(chat(), "model", json!("base:ann"))).await;
                assert_eq!(json!(said.header("x-atelier-generation")), generation);
                assert_eq!(said.status, 200, "{}", said.text());
            } else {
                let error = &answer.json()["error"];
                assert_eq!((answer.status.as_u16(), &error["param"]), (400, &json!(field)), "{error}");
                assert!(error["message"].as_str().unwrap().contains("from 1 to 64"), "{error}");
            }
        }
        assert_eq!(server.get("/v1/limits").await.json()["training"]["rank"], rank);
        let train = json!({ "training": { "rank": rank + 1 } });
        server.post("/v1/users/ann/history", json!({ "items": [{ "output": "a" }] })).await;
        let refused = server.post("/v1/users/ann/train", train).await;
        assert_eq!(
            (refused.status.as_u16(), &refused.json()["error"]["param"]),
            (400, &json!("training.rank"))
        );
    }
}

#[tokio::test]
async fn what_is_no_form_is_refused() {
    let server = Server::new().await;
    for (media, body, status) in [
        ("application/json", "{}", 415),
        ("text/plain", "x", 415),
        ("multipart/mixed; boundary=b", "--b--", 415),
        ("multipart/form-data", "--b--", 400),
        ("multipart/form-data; boundary=", "--b--", 400),
        ("multipart/form-data; boundary=b", "", 400),
        ("multipart/form-data; boundary=b", "--b", 400),
        (
            "multipart/form-data; boundary=b",
            "--b\r\ncontent-disposition: form-data; name=\"config\"\r\n\r\n{}",
            400,
        ),
        ("multipart/form-data; boundary=b", "--b\r\n\r\n{}\r\n--b--\r\n", 400),
        ("multipart/form-data; boundary=b", "\u{0}\u{0}", 400),
    ] {
        let request = Request::put(ADAPTER).header("content-type", media);
        let answer = server.send(request.body(Body::from(body)).unwrap()).await;
        assert_eq!(answer.status, status, "{media} {body:?}: {}", answer.text());
        assert!(answer.json()["error"]["code"].is_string());
    }
    let none = server.send(Request::put(ADAPTER).body(Body::empty()).unwrap()).await;
    assert_eq!(none.status, 415);
}

#[tokio::test]
async fn sizes_are_bounded_part_by_part() {
    let (config, weights) = files("tiny-llama/lora-qv");
    let limits = |config, weights| Limits {
        adapter_config_bytes: config,
        adapter_weights_bytes: weights,
        ..Limits::default()
    };
    for (limits, param) in [
        (limits(config.len() - 1, weights.len()), json!(CONFIG)),
        (limits(config.len(), weights.len() - 1), json!(WEIGHTS)),
        (limits(10, 10), Value::Null),
    ] {
        let server = Server::with(Auth::Open, limits, None).await;
        let answer = put(&server, ADAPTER, &[(CONFIG, &config), (WEIGHTS, &weights)], &[]).await;
        let error = &answer.json()["error"];
        assert_eq!(
            (answer.status.as_u16(), &error["code"], &error["param"]),
            (413, &json!("body_too_large"), &param)
        );
    }
    let server = Server::with(Auth::Open, limits(config.len(), weights.len()), None).await;
    import(&server, ADAPTER, "lora-qv").await;
}

#[tokio::test]
async fn imports_are_bounded_in_number() {
    let server = Server::with(Auth::Open, Limits { imports: 0, ..Limits::default() }, None).await;
    let (config, weights) = files("tiny-llama/lora-qv");
    let answer = put(&server, ADAPTER, &[(CONFIG, &config), (WEIGHTS, &weights)], &[]).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["code"]), (503, &json!("overloaded")));
    assert!(!answer.header("retry-after").is_empty());
    // A turn comes back, however the upload ends.
    let server = Server::with(Auth::Open, Limits { imports: 1, ..Limits::default() }, None).await;
    for _ in 0..3 {
        assert_eq!(put(&server, ADAPTER, &[(CONFIG, b"{}"), (WEIGHTS, b"")], &[]).await.status, 400);
        assert_eq!(put(&server, ADAPTER, &[("x", b"")], &[]).await.status, 400);
        import(&server, ADAPTER, "lora-qv").await;
    }
}

#[tokio::test]
async fn an_adapter_of_another_base_is_refused_by_shape_and_by_hash() {
    let server = Server::new().await;
    let (config, weights) = files("tiny-qwen2/lora-qv");
    let answer = put(&server, ADAPTER, &[(CONFIG, &config), (WEIGHTS, &weights)], &[]).await;
    let error = &answer.json()["error"];
    assert_eq!((answer.status.as_u16(), &error["code"]), (400, &json!("invalid_adapter")));
    assert!(error["message"].as_str().unwrap().contains("tensor"), "{error}");

    let (config, weights) = files("tiny-llama/lora-qv");
    let own: String = server.base.iter().map(|byte| format!("{byte:02x}")).collect();
    let other = "0".repeat(64);
    let plain = [(CONFIG, &config[..]), (WEIGHTS, &weights[..])];
    let hashed = |hash| [plain[0], plain[1], ("base_hash", hash)];
    for (answer, param) in [
        (put(&server, ADAPTER, &hashed(other.as_bytes()), &[]).await, "base_hash"),
        (put(&server, ADAPTER, &plain, &[("x-atelier-base", &other)]).await, "x-atelier-base"),
        (
            put(&server, ADAPTER, &hashed(own.as_bytes()), &[("x-atelier-base", &other)]).await,
            "x-atelier-base",
        ),
    ] {
        let error = &answer.json()["error"];
        assert_eq!(
            (answer.status.as_u16(), &error["code"], &error["param"]),
            (409, &json!("adapter_incompatible"), &json!(param))
        );
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(&own) && message.contains(&other), "{message}");
    }
    assert_eq!(put(&server, ADAPTER, &plain, &[("x-atelier-base", "zz")]).await.status, 400);
    assert_eq!(server.get("/v1/users/ann").await.status, 404);
    let answer = put(&server, ADAPTER, &hashed(own.as_bytes()), &[("x-atelier-base", &own)]).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[tokio::test]
async fn what_is_downloaded_can_be_handed_in_under_the_same_hash() {
    let server = Server::new().await;
    let generation = import(&server, ADAPTER, "lora-all").await;
    // An adapter of another base, as one server hands it to another.
    let foreign = server.fixture();
    let foreign = NewGeneration { id: "1".repeat(64).parse().unwrap(), base: [9; 32], ..foreign };
    let bob = AdapterId::new("default".parse().unwrap(), "bob".parse().unwrap());
    server.store.publish(&bob, foreign, None, None).await.unwrap();
    for (root, status) in [(ADAPTER, 200), ("/v1/users/bob/adapter", 409)] {
        let at = async |file: &str| server.get(&format!("{root}/{file}")).await;
        let (config, weights) = (at(CONFIG).await, at(WEIGHTS).await);
        assert_eq!(config.header("x-atelier-base"), weights.header("x-atelier-base"));
        let parts = [(CONFIG, &config.body[..]), (WEIGHTS, &weights.body[..])];
        let headers = [("x-atelier-base", weights.header("x-atelier-base"))];
        let answer = put(&server, "/v1/adapters/copy", &parts, &headers).await;
        assert_eq!(answer.status, status, "{}", answer.text());
        if status == 200 {
            assert_eq!(answer.json()["generation"], generation);
        } else {
            assert_eq!(answer.json()["error"]["param"], "x-atelier-base");
            // Negative control: without the header the shapes are all there is to tell, and they fit.
            assert_eq!(put(&server, "/v1/adapters/copy", &parts, &[]).await.status, 200);
        }
    }
}

#[tokio::test]
async fn a_lost_race_names_the_head() {
    let server = Server::new().await;
    let first = import(&server, ADAPTER, "lora-all").await;
    let (config, weights) = files("tiny-llama/lora-qv");
    let parts = [(CONFIG, &config[..]), (WEIGHTS, &weights[..])];
    let zeros = "0".repeat(64);
    let queried = |head: &str| format!("{ADAPTER}?expected_head={head}");
    for answer in [
        put(&server, ADAPTER, &parts, &[("if-none-match", "*")]).await,
        put(&server, ADAPTER, &parts, &[("if-match", &format!("\"{zeros}\""))]).await,
        put(&server, &queried("none"), &parts, &[]).await,
        put(&server, &queried(&zeros), &parts, &[]).await,
    ] {
        let error = &answer.json()["error"];
        assert_eq!(
            (answer.status.as_u16(), &error["code"], &error["current_head"]),
            (409, &json!("head_moved"), &json!(first))
        );
        assert!(error["message"].as_str().unwrap().contains(&first), "{error}");
    }
    let nobody = put(&server, "/v1/users/bob/adapter", &parts, &[("if-match", &first)]).await;
    assert_eq!(nobody.json()["error"]["current_head"], "none");
    assert_eq!(server.get("/v1/users/bob").await.status, 404, "and made no user");
    let both = put(&server, &queried(&first), &parts, &[("if-match", &first)]).await;
    assert_eq!((both.status.as_u16(), &both.json()["error"]["param"]), (400, &json!("If-Match")));
    for (headers, param) in [
        (("if-match", "*"), "If-Match"),
        (("if-match", "\"x\""), "If-Match"),
        (("if-none-match", "x"), "If-None-Match"),
    ] {
        let answer = put(&server, ADAPTER, &parts, &[headers]).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["error"]["param"]), (400, &json!(param)));
    }
    assert_eq!(put(&server, &queried("x"), &parts, &[]).await.json()["error"]["param"], "expected_head");
    let second = put(&server, ADAPTER, &parts, &[("if-match", &format!("\"{first}\""))]).await;
    assert_eq!(second.status, 200, "{}", second.text());
    // Of those who expect the same head, one wins.
    let head = second.json()["generation"].as_str().unwrap().to_owned();
    let kinds = ["lora-all", "lora-patterns", "lora-rslora"].map(|kind| files(&format!("tiny-llama/{kind}")));
    let racers =
        kinds.iter().map(|(config, weights)| {
            let (server, head) = (&server, &head);
            async move {
                put(server, ADAPTER, &[(CONFIG, config), (WEIGHTS, weights)], &[("if-match", head)]).await
            }
        });
    let generous = futures::future::join_all(racers).await;
    let mut tally = generous.iter().map(|answer| answer.status.as_u16()).collect::<Vec<_>>();
    tally.sort_unstable();
    let busy = tally.iter().filter(|status| **status == 503).count();
    assert_eq!((tally[0], tally.iter().filter(|status| **status == 200).count()), (200, 1), "{tally:?}");
    assert_eq!(tally.iter().filter(|status| **status == 409).count(), 2 - busy, "{tally:?}");
    let winner = generous.iter().find(|answer| answer.status == 200).unwrap().json();
    assert_eq!(server.get(ADAPTER).await.json()["generation"], winner["generation"]);
}
