//! Adapters of every kind in one batch, and the virtual tokens of prompt tuning in context, KV, usage and sampling.

use peft::Adapter;

use super::*;

/// Virtual tokens of the fixture.
const VIRTUAL: usize = 5;

/// A prompt-tuning adapter of so many virtual tokens.
fn prompt(virtual_tokens: usize) -> Lease {
    let width = base().shape().width();
    let value = |at: usize| ((at * 37 + at / width * 11) % 29) as f32 / 14.5 - 1.0;
    let embeddings = (0..virtual_tokens * width).map(value).collect();
    let config = peft::PromptConfig { virtual_tokens };
    let weights = peft::AdapterWeights::Prompt(peft::PromptWeights { config, width, embeddings });
    let adapter = Arc::new(Adapter::build(&weights, &*base(), PRECISION).unwrap());
    Lease { adapter, ..lease("prompt") }
}

fn finished(events: &[Event]) -> (FinishReason, types::Usage) {
    match events.last() {
        Some(Event::Finished { reason, usage }) => (*reason, *usage),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn every_kind_runs_in_one_batch_and_through_preemption() {
    let kinds = ["dora", "ia3", "prompt", "lora-bias", "lora-all", "lora-layers"].map(lease);
    let jobs: Vec<Generate> = (0..14).map(|seed| job(seed, kinds.get(seed as usize % 7).cloned())).collect();
    let roomy = ModelEngine::start(base(), settings(64)).unwrap();
    let mut alone = Vec::new();
    for job in &jobs {
        alone.extend(run(&roomy, std::slice::from_ref(job)).await);
    }
    for (job, events) in jobs.iter().zip(&alone) {
        let (reason, usage) = finished(events);
        assert_eq!(reason, FinishReason::Length);
        assert_eq!(
            (usage.prompt_tokens as usize, usage.completion_tokens),
            (job.prompt.len(), job.params.max_tokens)
        );
    }
    assert_eq!(run(&roomy, &jobs).await, alone, "together");
    let tight = ModelEngine::start(base(), settings(6)).unwrap();
    assert_eq!(run(&tight, &jobs).await, alone, "with preemption");
    assert!(tight.stats().preemptions > 0);
    // Negative control: without its adapter the answer is another.
    for (at, job) in jobs.iter().enumerate().take(6) {
        let base = Generate { adapter: None, ..job.clone() };
        assert_ne!(run(&roomy, &[base]).await[0], alone[at], "{:?}", job.adapter);
    }
}

#[tokio::test]
async fn virtual_tokens_are_computed_once_and_shared_by_the_users_requests() {
    let engine = ModelEngine::start(base(), settings(64)).unwrap();
    let cold = ModelEngine::start(base(), Settings { prefix_cache: false, ..settings(64) }).unwrap();
    // Two blocks and a half of virtual tokens; the prompts have nothing in common.
    let mine = prompt(40);
    let ask = |seed, adapter: &Lease| Generate { adapter: Some(adapter.clone()), ..job(seed, None) };
    let (first, second) = (ask(1, &mine), ask(2, &mine));
    assert_ne!(first.prompt[0], second.prompt[0]);
    let expected = run(&cold, &[first.clone(), second.clone()]).await;
    assert_eq!(run(&engine, std::slice::from_ref(&first)).await[0], expected[0]);
    assert_eq!(engine.stats().prefix_hits, 0);
    let used = engine.stats().prompt_tokens;
    assert_eq!(used, first.prompt.len() as u64, "virtual tokens are not the prompt's");
    let events = run_counted(&engine, std::slice::from_ref(&second)).await.remove(0);
    let (_, usage) = finished(&events);
    assert_eq!(usage.cached_tokens, 0, "what was taken over is no token of the prompt");
    assert_eq!(events, expected[1]);
    assert_eq!(engine.stats().prefix_hits, 0, "and no hit of the prompt's");
    // The third block begins with the last eight of them, and is copied as far as that.
    let rows = |engine: &ModelEngine| engine.stats().virtual_tokens;
    assert_eq!((rows(&cold), rows(&engine)), (80, 40));
    // Negative control: another generation of the same adapter shares nothing.
    let newer = Lease { generation: GenerationId::from_bytes([9; 32]), ..mine };
    run(&engine, &[ask(2, &newer)]).await;
    assert_eq!(rows(&engine), 40 + 40);
    // Fewer than a block are shared alike.
    let (few, before) = (prompt(5), rows(&engine));
    let few = Lease { generation: GenerationId::from_bytes([8; 32]), ..few };
    for seed in [11, 12, 13] {
        let job = ask(seed, &few);
        assert!(
            job.prompt.len() + job.params.max_tokens as usize >= 12,
            "the block of the virtual tokens is full"
        );
        assert_eq!(
            run(&engine, std::slice::from_ref(&job)).await,
            run(&cold, std::slice::from_ref(&job)).await
        );
    }
    assert_eq!(rows(&engine), before + 5);
}

#[tokio::test]
async fn a_warm_prompt_behind_virtual_tokens_counts_its_own_tokens() {
    let engine = ModelEngine::start(base(), settings(64)).unwrap();
    let mut job = Generate { prompt: (0..50).collect(), adapter: Some(lease("prompt")), ..job(3, None) };
    job.params.max_tokens = 16;
    run(&engine, std::slice::from_ref(&job)).await;
    let events = run_counted(&engine, std::slice::from_ref(&job)).await.remove(0);
    let (_, usage) = finished(&events);
    // The fourth block, which ends with the answer's first tokens, is full too: all but the last token are there.
    assert_eq!((usage.prompt_tokens, usage.cached_tokens), (50, 49));
}

#[tokio::test]
async fn virtual_tokens_take_context() {
    // 64 positions in all.
    let engine = ModelEngine::start(base(), settings(4)).unwrap();
    let ask = |max_tokens, adapter| {
        let mut job = job(1, adapter);
        job.params.max_tokens = max_tokens;
        engine.submit(job)
    };
    assert_eq!(
        ask(50, Some(lease("prompt"))).map(|_| ()).unwrap_err(),
        SubmitError::TooLong { prompt: 10, max_tokens: 50, context: 64 - VIRTUAL }
    );
    let events = collect(ask(49, Some(lease("prompt"))).unwrap()).await;
    assert_eq!(finished(&events).1.completion_tokens, 49, "all that fits, and it fits");
    assert!(ask(54, None).is_ok(), "the base has them all");
}
