//! Keys and values that sequences take over from earlier ones: equal to the bit, and nobody else's.

use peft::{LoraConfig, LoraTensors, LoraWeights};
use types::TenantId;

use super::*;

fn cold() -> ModelEngine {
    ModelEngine::start(base(), Settings { prefix_cache: false, ..settings(64) }).unwrap()
}

fn warm() -> ModelEngine {
    ModelEngine::start(base(), settings(64)).unwrap()
}

/// A job with a prompt of `length` tokens; all of them begin alike.
fn prompt_of(length: u32, seed: u64, adapter: Option<Lease>) -> Generate {
    let mut job = job(seed, adapter);
    job.prompt = (0..length).map(|at| at * 17 % 320).collect();
    job
}

/// What one job alone took over, and its events.
async fn one(engine: &ModelEngine, job: &Generate) -> (usize, Vec<Event>) {
    let mut events = run_counted(engine, std::slice::from_ref(job)).await.remove(0);
    (cached(&mut events), events)
}

fn ids(events: &[Event]) -> Vec<u32> {
    let id = |event: &Event| match event {
        Event::Token(token) => Some(token.id),
        _ => None,
    };
    events.iter().filter_map(id).collect()
}

#[tokio::test]
async fn a_warm_prefix_changes_no_bit() {
    let (cold, warm) = (cold(), warm());
    let kinds = [None, Some(lease("lora-qv")), Some(lease("lora-all"))];
    for length in [1, 15, 16, 17, 31, 32, 33, 50, 100, 129] {
        for (seed, adapter) in (0..).zip(&kinds) {
            let job = prompt_of(length, seed, adapter.clone());
            let (none, expected) = one(&cold, &job).await;
            assert_eq!(none, 0, "the cache is off");
            // The first is warm as far as the shorter prompts before it reach.
            assert_eq!(one(&warm, &job).await.1, expected, "{length} tokens");
            // All full blocks that it stored itself, answer included; of the last one as much as agrees.
            let stored = (length + job.params.max_tokens) as usize - 1;
            let found = (stored / 16 * 16).min(length as usize - 1);
            assert_eq!(one(&warm, &job).await, (found, expected), "{length} tokens");
        }
    }
    assert!(warm.stats().prefix_hits >= 21);
    assert_eq!(cold.stats().prefix_hits, 0);
    assert_eq!(cold.stats().kv_blocks_idle, 0);
}

#[tokio::test]
async fn an_answer_is_the_beginning_of_the_next_prompt() {
    let (cold, engine) = (cold(), warm());
    let first = prompt_of(30, 5, None);
    let answer = ids(&one(&engine, &first).await.1);
    let mut next = first.clone();
    next.prompt.extend(&answer);
    next.prompt.extend([7; 20]);
    let (cached, events) = one(&engine, &next).await;
    // The last token of the answer was chosen but never run.
    assert_eq!(cached, (30 + answer.len() - 1) / 16 * 16);
    assert_eq!(events, one(&cold, &next).await.1);
}

#[tokio::test]
async fn nobody_gets_what_is_anothers() {
    let engine = warm();
    let mut newer = lease("lora-qv");
    newer.generation = GenerationId::from_bytes([2; 32]);
    let mut neighbour = lease("lora-qv");
    neighbour.id.owner = "neighbour".parse().unwrap();
    let adapters = [None, Some(lease("lora-qv")), Some(newer), Some(neighbour)];
    let tenants: [TenantId; 2] = ["t".parse().unwrap(), "u".parse().unwrap()];
    let jobs: Vec<Generate> = adapters
        .iter()
        .flat_map(|adapter| tenants.clone().map(|tenant| (adapter, tenant)))
        .map(|(adapter, tenant)| Generate { tenant, ..prompt_of(100, 3, adapter.clone()) })
        .collect();
    let mut first = Vec::new();
    for job in &jobs {
        let (cached, events) = one(&engine, job).await;
        assert_eq!(cached, 0, "{:?} {:?}", job.tenant, job.adapter);
        first.push(events);
    }
    assert_ne!(first[0], first[2], "an adapter shows");
    // Negative control: each finds its own.
    for (job, expected) in jobs.iter().zip(first) {
        assert_eq!(one(&engine, job).await, (96, expected));
    }
}

#[tokio::test]
async fn four_answers_compute_their_prompt_once() {
    let jobs = |group| -> Vec<Generate> {
        (0..4).map(|seed| Generate { group, ..prompt_of(100, seed, Some(lease("lora-all"))) }).collect()
    };
    let expected = run(&cold(), &jobs(None)).await;
    let engine = warm();
    assert_eq!(run(&engine, &jobs(Some(1))).await, expected);
    let stats = engine.stats();
    assert_eq!((stats.prompt_tokens, stats.prefix_hits, stats.prefix_tokens), (100 + 3 * 4, 3, 3 * 96));
    // Again, and all of them find it: the last block as far as the prompt goes, of one whose answer filled it.
    assert_eq!(run(&engine, &jobs(Some(2))).await, expected);
    assert_eq!(engine.stats().prompt_tokens, 112 + 4);
}

#[tokio::test]
async fn a_group_goes_on_without_its_first() {
    let jobs: Vec<Generate> =
        (0..3).map(|seed| Generate { group: Some(1), ..prompt_of(200, seed, None) }).collect();
    let expected = run(&cold(), &jobs).await;
    let engine = warm();
    drop(engine.submit(jobs[0].clone()).unwrap());
    assert_eq!(run(&engine, &jobs[1..]).await, expected[1..]);
    until(&engine, |stats| stats.kv_blocks_used == 0 && stats.cancelled == 1).await;
}

#[tokio::test]
async fn a_small_pool_forgets_and_stays_right() {
    let kinds = ["lora-qv", "lora-all"].map(lease);
    let jobs: Vec<Generate> = (0..24u64)
        .map(|seed| {
            let mut job =
                prompt_of(20 + (seed * 13 % 60) as u32, seed, kinds.get(seed as usize % 3).cloned());
            job.prompt[17] = seed as u32 % 2;
            job.group = Some(seed / 6);
            job
        })
        .collect();
    let expected = run(&cold(), &jobs).await;
    let tight = ModelEngine::start(base(), settings(8)).unwrap();
    for _ in 0..2 {
        assert_eq!(run(&tight, &jobs).await, expected);
    }
    until(&tight, |stats| stats.running == 0 && stats.kv_blocks_used == 0).await;
    let stats = tight.stats();
    assert!(stats.prefix_evictions > 0 && stats.prefix_hits > 0 && stats.preemptions > 0, "{stats:?}");
}

/// An adapter under the name and generation of `like` with which the last layer panics, when all keys and values of the
/// step are stored.
fn broken(like: &Lease) -> Lease {
    let last = base().shape().site_ids().last();
    let tensors = |id| {
        (Some(id) == last).then(|| LoraTensors {
            rank: 1,
            scale: 1.0,
            a: vec![1.0],
            b: vec![1.0],
            ..LoraTensors::default()
        })
    };
    let sites = base().shape().site_ids().map(tensors).collect();
    let weights = LoraWeights { config: LoraConfig::oppu(), sites };
    Lease { adapter: Arc::new(Adapter::new(&weights, crate::PRECISION)), ..like.clone() }
}

#[tokio::test]
async fn a_failed_step_leaves_nothing_behind() {
    let (cold, engine) = (cold(), warm());
    let good = prompt_of(50, 3, Some(lease("lora-qv")));
    let bad = Generate { adapter: Some(broken(&lease("lora-qv"))), ..good.clone() };
    let company = prompt_of(5, 4, None);
    let expected = one(&cold, &company).await.1;
    // Alone, and beside another with room for a full block in the step.
    let mut results = run(&engine, std::slice::from_ref(&bad)).await;
    results.extend(run(&engine, &[bad, company]).await);
    assert_eq!(results[2], expected, "who ran beside it is served");
    for failed in &results[..2] {
        assert!(matches!(&failed[..], [Event::Failed { deadline: false, .. }]), "{failed:?}");
    }
    let (cached, events) = one(&engine, &good).await;
    assert_eq!((cached, &events), (0, &one(&cold, &good).await.1));
    // Negative control: after a step that went well it would have been found.
    assert_eq!(one(&engine, &good).await, (48, events));
    let stats = engine.stats();
    assert_eq!(stats.failed, 2);
    until(&engine, |stats| stats.kv_blocks_used == 0).await;
}
