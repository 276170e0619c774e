//! What a scrape sees.

use telemetry::{
    CacheSnapshot, EngineSnapshot, GenerationOutcome, Metrics, QueueSnapshot, Snapshot, TierSnapshot,
};
use types::Timestamp;

fn snapshot() -> Snapshot {
    Snapshot {
        now: Timestamp(1_800_000_012_500),
        engine: EngineSnapshot {
            waiting: 3,
            running: 2,
            batch: 8,
            kv_blocks_used: 5,
            kv_blocks_idle: 7,
            kv_blocks: 20,
            prefix_hits: 6,
            prefix_tokens: 96,
            prefix_evictions: 11,
            prompt_tokens: 70,
            generated_tokens: 40,
            ..EngineSnapshot::default()
        },
        cache: CacheSnapshot {
            host: TierSnapshot { adapters: 3, bytes: 300, budget: 1000, evictions: 2 },
            device: TierSnapshot { adapters: 2, bytes: 256, budget: 512, evictions: 4 },
            hits: 9,
            host_hits: 5,
            misses: 1,
            loads: 8,
            packed: 3,
            uploads: 12,
            waiting: 6,
        },
        queue: QueueSnapshot { queued: 4, running: 1, oldest_queued: Some(Timestamp(1_800_000_010_000)) },
    }
}

#[test]
fn names_and_values() {
    let metrics = Metrics::new();
    metrics.request("GET", "/v1/users/{user}", 200, 0.004);
    metrics.request("GET", "/v1/users/{user}", 404, 3.0);
    metrics.generation(GenerationOutcome::Completed);
    metrics.generation(GenerationOutcome::Cancelled);
    metrics.first_token(0.2);
    metrics.per_token(0.02);
    metrics.adapter_load(0.03);
    metrics.history(5, 2);
    metrics.training_step(300);
    metrics.training_step(200);
    let text = metrics.render(&snapshot()).expect("renders");
    for line in [
        "vllm:num_requests_waiting 3.0",
        "vllm:num_requests_running 2.0",
        "vllm:kv_cache_usage_perc 0.25",
        r#"vllm:lora_requests_info{max_lora="8",running_lora_adapters="",waiting_lora_adapters=""} 1800000012"#,
        "atelier_prompt_tokens_total 70",
        "atelier_generated_tokens_total 40",
        "atelier_kv_blocks_idle 7.0",
        "atelier_prefix_hits_total 6",
        "atelier_prefix_tokens_total 96",
        "atelier_prefix_evictions_total 11",
        r#"atelier_adapter_cache_hits_total{tier="device"} 9"#,
        r#"atelier_adapter_cache_hits_total{tier="host"} 5"#,
        "atelier_adapter_cache_misses_total 1",
        "atelier_adapter_cache_loads_total 8",
        "atelier_adapter_cache_packed_total 3",
        "atelier_adapter_cache_uploads_total 12",
        "atelier_adapter_cache_waiting 6.0",
        r#"atelier_adapter_cache_adapters{tier="host"} 3"#,
        r#"atelier_adapter_cache_bytes{tier="device"} 256"#,
        r#"atelier_adapter_cache_budget_bytes{tier="device"} 512"#,
        r#"atelier_adapter_cache_evictions_total{tier="host"} 2"#,
        r#"atelier_adapter_load_seconds_bucket{le="0.05"} 1"#,
        r#"atelier_jobs{state="queued"} 4"#,
        r#"atelier_jobs{state="running"} 1"#,
        "atelier_oldest_queued_job_seconds 2.5",
        "atelier_training_steps_total 2",
        "atelier_training_tokens_total 500",
        r#"atelier_requests_total{method="GET",route="/v1/users/{user}",status="404"} 1"#,
        r#"atelier_request_seconds_bucket{le="0.005",method="GET",route="/v1/users/{user}"} 1"#,
        r#"atelier_request_seconds_bucket{le="+Inf",method="GET",route="/v1/users/{user}"} 2"#,
        r#"atelier_request_seconds_sum{method="GET",route="/v1/users/{user}"} 3.004"#,
        r#"atelier_generations_total{outcome="cancelled"} 1"#,
        "atelier_time_to_first_token_seconds_count 1",
        "atelier_history_items_total 5",
        "atelier_history_duplicates_total 2",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn strange_durations_do_no_harm() {
    let metrics = Metrics::new();
    for seconds in [f64::NAN, f64::INFINITY, -1.0, 1e300] {
        metrics.first_token(seconds);
    }
    let text = metrics.render(&Snapshot::default()).expect("renders");
    assert!(text.contains("atelier_time_to_first_token_seconds_count 4"), "{text}");
}
