//! Properties of generations and heads.

use std::sync::Arc;

use store::{AdapterFile, NewGeneration, StoreError};
use types::{GenerationId, JobState};

use crate::trial::{LEASE, Trial, adapter, alice, assert_fenced, bob, generation, outcome, text};

pub(crate) async fn a_generation_comes_back(t: Trial) {
    assert_eq!(t.store.head(&alice()).await.unwrap(), None);
    let new = NewGeneration { parent: Some(GenerationId::from_bytes([9; 32])), ..generation(1) };
    let record = t.store.publish(&alice(), new.clone(), None, None).await.unwrap();
    assert_eq!((record.id, record.parent, record.base), (new.id, new.parent, new.base));
    assert_eq!((&record.meta, record.created_at), (&new.meta, t.now()));
    assert_eq!(record.bytes(), (new.config.len() + new.weights.len()) as u64);
    assert_eq!(t.store.head(&alice()).await.unwrap(), Some(record.clone()));
    assert_eq!(t.store.generation(&alice(), &new.id).await.unwrap(), Some(record));
    let files = t.store.fetch(&alice(), &new.id).await.unwrap();
    assert_eq!((&files.config, &files.weights), (&new.config, &new.weights));
    for (file, content) in [(AdapterFile::Config, new.config), (AdapterFile::Weights, new.weights)] {
        assert_eq!(t.store.fetch_file(&alice(), &new.id, file).await.unwrap(), content);
    }

    let second = t.publish(&alice(), generation(2), Some(new.id)).await;
    let empty = NewGeneration { weights: Vec::new().into(), ..generation(3) };
    t.publish(&alice(), empty, Some(second)).await;
    let ids: Vec<_> = t.store.generations(&alice()).await.unwrap().iter().map(|g| g.id).collect();
    assert_eq!(ids, [generation(3).id, second, new.id]);
    assert!(t.store.fetch(&alice(), &generation(3).id).await.unwrap().weights.is_empty());

    let missing = t.store.fetch(&alice(), &generation(4).id).await;
    assert!(matches!(missing, Err(StoreError::NotFound { what: "generation", .. })));
    assert_eq!(t.store.generation(&alice(), &generation(4).id).await.unwrap(), None);
    assert_eq!(t.store.generations(&bob()).await.unwrap(), []);
}

pub(crate) async fn what_is_packed_comes_back(t: Trial) {
    let (id, one, other) = (generation(1).id, [1; 32], [2; 32]);
    let keep = async |who: &_, packing, bytes: &'static [u8]| {
        t.store.keep_packed(who, &id, packing, bytes.into(), Arc::new(|_| {})).await.unwrap()
    };
    let packed = async |who: &_, packing| {
        let found = t.store.packed(who, &id, &packing, Arc::new(|_| {})).await.unwrap();
        found.map(|bytes| bytes.to_vec())
    };
    assert!(!keep(&alice(), one, b"nobody's").await, "there is no such user");
    for who in [alice(), bob()] {
        t.publish(&who, generation(1), None).await;
        assert_eq!(packed(&who, one).await, None);
    }
    assert!(keep(&alice(), one, b"first").await);
    assert_eq!(packed(&alice(), one).await.unwrap(), b"first");
    assert_eq!((packed(&alice(), other).await, packed(&bob(), one).await), (None, None));
    assert!(keep(&alice(), other, b"second, longer").await);
    assert_eq!(
        (packed(&alice(), one).await, packed(&alice(), other).await.unwrap()),
        (None, b"second, longer".to_vec())
    );
    // The files are those that were published, whatever lies beside them.
    assert_eq!(t.store.fetch(&alice(), &id).await.unwrap().weights, generation(1).weights);
    // Another copy of the files has nothing packed.
    t.publish(&alice(), generation(1), Some(id)).await;
    assert_eq!(packed(&alice(), other).await, None);
    assert!(keep(&alice(), other, b"third").await);
    assert!(t.store.erase_user(&alice()).await.unwrap());
    assert_eq!(packed(&alice(), other).await, None);
    assert!(!keep(&alice(), other, b"nobody's").await);
}

pub(crate) async fn publishing_ends_the_job(t: Trial) {
    let claimed = t.running_job(&alice()).await;
    let new = generation(1);
    let outcome = outcome(Some(new.id));
    let finish = Some((claimed.fence.clone(), outcome.clone()));
    t.store.publish(&alice(), new.clone(), None, finish.clone()).await.unwrap();
    let job = t.store.latest_job(&alice()).await.unwrap().unwrap();
    assert_eq!((job.state, job.outcome), (JobState::Succeeded, Some(outcome)));
    // The job has ended: it cannot publish again.
    assert_fenced(t.store.publish(&alice(), generation(2), Some(new.id), finish).await);
    assert_eq!(t.head(&alice()).await, Some(new.id));
}

pub(crate) async fn a_stale_publisher_changes_nothing(t: Trial) {
    // Its lease ran out and another worker has the job.
    let old = t.running_job(&alice()).await;
    t.clock.advance_millis(LEASE);
    let new = t.claim().await.unwrap();
    let finish = |fence| Some((fence, outcome(Some(generation(1).id))));
    assert_fenced(t.store.publish(&alice(), generation(1), None, finish(old.fence)).await);
    assert_eq!(t.head(&alice()).await, None);
    assert_eq!(t.store.generations(&alice()).await.unwrap(), []);

    // Somebody else has published: the job stays with its worker, who decides.
    let head = t.publish(&alice(), generation(2), None).await;
    let moved = t.store.publish(&alice(), generation(1), None, finish(new.fence.clone())).await;
    assert!(matches!(moved, Err(StoreError::HeadMoved { current }) if current == Some(head)));
    assert_eq!(t.store.generations(&alice()).await.unwrap().len(), 1);
    t.store.beat(&new.fence, None, LEASE).await.unwrap();

    // A job cannot publish for another user, not even for one who exists.
    t.append(&bob(), vec![text("b")]).await;
    assert_fenced(t.store.publish(&bob(), generation(1), None, finish(new.fence.clone())).await);
    let nobody = adapter("acme", "nobody");
    assert_fenced(t.store.publish(&nobody, generation(1), None, finish(new.fence.clone())).await);
    assert_eq!(t.store.user(&nobody).await.unwrap(), None);
    t.store.publish(&alice(), generation(1), Some(head), finish(new.fence)).await.unwrap();
}

pub(crate) async fn one_of_two_publishers_wins(t: Trial) {
    let mut head = None;
    for round in 0..20u8 {
        let publishers = [2 * round + 1, 2 * round + 2].map(|seed| {
            let t = t.clone();
            let new = NewGeneration { parent: head, ..generation(seed) };
            tokio::spawn(async move { t.store.publish(&alice(), new, head, None).await })
        });
        let [one, two] = publishers;
        let (winner, loser) = match (one.await.unwrap(), two.await.unwrap()) {
            (Ok(winner), Err(loser)) | (Err(loser), Ok(winner)) => (winner, loser),
            other => panic!("not one winner: {other:?}"),
        };
        let moved_to = match loser {
            StoreError::HeadMoved { current } => current,
            other => panic!("{other:?}"),
        };
        assert_eq!(moved_to, Some(winner.id));
        assert_eq!(t.head(&alice()).await, Some(winner.id));
        t.store.fetch(&alice(), &winner.id).await.unwrap();
        head = Some(winner.id);
    }
    assert_eq!(t.store.generations(&alice()).await.unwrap().len(), 20);
}

pub(crate) async fn one_of_many_equal_publishers_wins(t: Trial) {
    // The same bytes under the same id: whoever loses must not delete the winner's files.
    let publishers = (0..8).map(|_| {
        let t = t.clone();
        tokio::spawn(async move { t.store.publish(&alice(), generation(1), None, None).await.is_ok() })
    });
    let mut winners = 0;
    for publisher in publishers.collect::<Vec<_>>() {
        winners += u32::from(publisher.await.unwrap());
    }
    assert_eq!(winners, 1);
    assert_eq!(t.store.fetch(&alice(), &generation(1).id).await.unwrap().weights, generation(1).weights);
}

pub(crate) async fn republishing_is_harmless(t: Trial) {
    let first = t.store.publish(&alice(), generation(1), None, None).await.unwrap();
    let second = t.publish(&alice(), generation(2), Some(first.id)).await;
    t.clock.advance_millis(5);
    let again = t.store.publish(&alice(), generation(1), Some(second), None).await.unwrap();
    assert_eq!(again, first);
    assert_eq!(t.head(&alice()).await, Some(first.id));
    assert_eq!(t.store.generations(&alice()).await.unwrap().len(), 2);
    assert_eq!(t.store.fetch(&alice(), &first.id).await.unwrap().weights, generation(1).weights);
    // Readers see whole files all the while.
    let reader = tokio::spawn({
        let t = t.clone();
        async move {
            for _ in 0..50 {
                t.store.fetch(&alice(), &generation(1).id).await.unwrap();
            }
        }
    });
    while !reader.is_finished() {
        t.publish(&alice(), generation(1), Some(first.id)).await;
    }
    reader.await.unwrap();
}

pub(crate) async fn an_id_means_its_bytes(t: Trial) {
    let first = generation(1);
    let head = t.publish(&alice(), first.clone(), None).await;
    let others = [
        NewGeneration { weights: vec![0; first.weights.len()].into(), ..first.clone() },
        NewGeneration { config: b"{}".to_vec().into(), ..first.clone() },
        NewGeneration { base: [8; 32], ..first.clone() },
    ];
    for other in others {
        let refused = t.store.publish(&alice(), other, Some(head), None).await;
        assert!(matches!(refused, Err(StoreError::GenerationConflict { id }) if id == head), "{refused:?}");
    }
    assert_eq!(t.store.fetch(&alice(), &head).await.unwrap().weights, first.weights);
    // Another user has bytes of its own.
    let own = NewGeneration { config: b"{}".to_vec().into(), ..first };
    t.publish(&bob(), own, None).await;
    assert_eq!(t.store.fetch(&bob(), &head).await.unwrap().config, b"{}"[..]);
}

pub(crate) async fn a_cancelled_publish_is_whole_or_absent(t: Trial) {
    let mut head = None;
    for seed in 1..40u8 {
        let claimed = t.running_job(&alice()).await;
        let new = generation(seed);
        let finish = Some((claimed.fence.clone(), outcome(Some(new.id))));
        let user = alice();
        let publish = t.store.publish(&user, new.clone(), head, finish);
        let patience = std::time::Duration::from_micros(u64::from(seed) * 50);
        let answered = tokio::time::timeout(patience, publish).await.is_ok();
        // It runs on by itself: wait until the job has ended one way or the other.
        if !answered && t.store.finish(&claimed.fence, &outcome(None)).await.is_ok() {
            assert_eq!(t.head(&alice()).await, head);
        } else {
            assert_eq!(t.head(&alice()).await, Some(new.id));
            head = Some(new.id);
        }
        if let Some(head) = &head {
            t.store.fetch(&alice(), head).await.unwrap();
        }
    }
}
