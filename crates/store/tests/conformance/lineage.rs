//! Properties of generations after they are published, and of shared adapters.

use store::{Expected, Origin, StoreError};
use types::{AdapterId, GenerationId};

use crate::trial::{Trial, alice, bob, generation, outcome, shared, text};

/// The user's generations, newest first, by the seed they were made of.
async fn seeds(t: &Trial, adapter: &AdapterId) -> Vec<u8> {
    t.store.generations(adapter).await.unwrap().iter().map(|g| g.id.as_bytes()[0]).collect()
}

/// Publishes the generations of seeds 1 to `count`; the last one is head.
async fn publish_all(t: &Trial, adapter: &AdapterId, count: u8) -> GenerationId {
    let mut head = None;
    for seed in 1..=count {
        head = Some(t.publish(adapter, generation(seed), head).await);
    }
    head.unwrap()
}

pub(crate) async fn heads_can_be_moved(t: Trial) {
    let one = t.publish(&alice(), generation(1), None).await;
    let two = t.publish(&alice(), generation(2), Some(one)).await;
    let stale = t.store.set_head(&alice(), Some(one), Some(one)).await;
    assert!(matches!(stale, Err(StoreError::HeadMoved { current }) if current == Some(two)));
    t.store.set_head(&alice(), Some(one), Some(two)).await.unwrap();
    assert_eq!(t.head(&alice()).await, Some(one));
    t.store.set_head(&alice(), None, Some(one)).await.unwrap();
    assert_eq!(t.head(&alice()).await, None);
    t.store.set_head(&alice(), Some(two), None).await.unwrap();
    let unknown = t.store.set_head(&alice(), Some(generation(3).id), Some(two)).await;
    assert!(matches!(unknown, Err(StoreError::NotFound { what: "generation", .. })));
    let unknown = t.store.set_head(&bob(), None, None).await;
    assert!(matches!(unknown, Err(StoreError::NotFound { what: "user", .. })));
    assert_eq!(t.head(&alice()).await, Some(two));
}

pub(crate) async fn old_generations_are_pruned(t: Trial) {
    let mut head = None;
    for seed in 1..=5 {
        head = Some(t.publish(&alice(), generation(seed), head).await);
    }
    t.store.set_head(&alice(), Some(generation(1).id), head).await.unwrap();
    assert_eq!(t.store.prune_generations(&alice(), 2).await.unwrap(), 2);
    let ids: Vec<_> = t.store.generations(&alice()).await.unwrap().iter().map(|g| g.id).collect();
    assert_eq!(ids, [5, 4, 1].map(|seed| generation(seed).id));
    for id in ids {
        t.store.fetch(&alice(), &id).await.unwrap();
    }
    assert!(t.store.fetch(&alice(), &generation(2).id).await.is_err());
    assert_eq!(t.store.prune_generations(&alice(), 0).await.unwrap(), 2);
    assert_eq!(t.head(&alice()).await, Some(generation(1).id));
    assert_eq!(t.store.prune_generations(&bob(), 0).await.unwrap(), 0);
}

pub(crate) async fn generations_say_where_they_come_from(t: Trial) {
    let claimed = t.running_job(&alice()).await;
    let finish = Some((claimed.fence, outcome(Some(generation(1).id))));
    let trained = t.store.publish(&alice(), generation(1), None, finish).await.unwrap();
    let imported = t.store.publish(&alice(), generation(2), Some(trained.id), None).await.unwrap();
    assert_eq!((trained.origin, imported.origin), (Origin::Trained, Origin::Imported));
    assert!(imported.is_head && !imported.pinned);
    // Uploading what was trained does not change where it comes from.
    let again = t.store.publish(&alice(), generation(1), Some(imported.id), None).await.unwrap();
    assert_eq!((again.origin, again.is_head), (Origin::Trained, true));
    let all = t.store.generations(&alice()).await.unwrap();
    let facts: Vec<_> = all.iter().map(|g| (g.id, g.origin, g.is_head)).collect();
    assert_eq!(facts, [(imported.id, Origin::Imported, false), (trained.id, Origin::Trained, true)]);
}

pub(crate) async fn any_head_can_be_replaced(t: Trial) {
    t.store.publish(&alice(), generation(1), Expected::Any, None).await.unwrap();
    t.store.publish(&alice(), generation(2), Expected::Any, None).await.unwrap();
    assert_eq!(t.head(&alice()).await, Some(generation(2).id));
    t.store.set_head(&alice(), Some(generation(1).id), Expected::Any).await.unwrap();
    assert_eq!(t.head(&alice()).await, Some(generation(1).id));
    t.store.set_head(&alice(), None, Expected::Any).await.unwrap();
    assert_eq!(t.head(&alice()).await, None);
    let nothing = t.store.set_head(&bob(), None, Expected::Any).await;
    assert!(matches!(nothing, Err(StoreError::NotFound { what: "user", .. })));
    // Of several who expect nothing, none is refused, and each head is whole.
    let publishers = (3..=8).map(|seed| {
        let t = t.clone();
        tokio::spawn(async move { t.store.publish(&alice(), generation(seed), Expected::Any, None).await })
    });
    for publisher in publishers.collect::<Vec<_>>() {
        let published = publisher.await.unwrap().unwrap();
        t.store.fetch(&alice(), &published.id).await.unwrap();
    }
    assert_eq!(t.store.generations(&alice()).await.unwrap().len(), 8);
}

pub(crate) async fn generations_come_in_pages(t: Trial) {
    let head = publish_all(&t, &alice(), 5).await;
    publish_all(&t, &bob(), 3).await;
    let whole = t.store.generations(&alice()).await.unwrap();
    assert_eq!(whole.iter().filter(|g| g.is_head).map(|g| g.id).collect::<Vec<_>>(), [head]);
    for limit in [0, 1, 2, 5, 6] {
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let page = t.store.generations_page(&alice(), after, limit).await.unwrap().unwrap();
            assert!(page.entries.len() <= limit.max(1) as usize);
            all.extend(page.entries);
            let Some(next) = page.next else { break };
            // As a client has it, and with a generation deleted meanwhile.
            after = Some(next.to_string().parse().unwrap());
        }
        assert_eq!(all, whole, "limit {limit}");
    }
    let first = t.store.generations_page(&alice(), None, 2).await.unwrap().unwrap();
    t.store.delete_generation(&alice(), &first.entries[1].id).await.unwrap();
    let second = t.store.generations_page(&alice(), first.next, 2).await.unwrap().unwrap();
    assert_eq!(second.entries, whole[2..4]);
    assert_eq!(t.store.generations_page(&shared("acme", "alice"), None, 2).await.unwrap(), None);
}

pub(crate) async fn pinned_generations_stay(t: Trial) {
    let head = publish_all(&t, &alice(), 5).await;
    let id = |seed| generation(seed).id;
    assert!(t.store.pin(&alice(), &id(2), true).await.unwrap().pinned);
    assert!(t.store.generation(&alice(), &id(2)).await.unwrap().unwrap().pinned);
    assert!(!t.store.generation(&alice(), &id(3)).await.unwrap().unwrap().pinned);
    let refused = t.store.delete_generation(&alice(), &id(2)).await;
    assert!(matches!(refused, Err(StoreError::Pinned { id: named }) if named == id(2)));
    assert_eq!(t.store.prune_generations(&alice(), 2).await.unwrap(), 2);
    assert_eq!(seeds(&t, &alice()).await, [5, 4, 2]);
    t.store.fetch(&alice(), &id(2)).await.unwrap();
    // Published again, it is still pinned.
    assert!(t.store.publish(&alice(), generation(2), Some(head), None).await.unwrap().pinned);
    t.store.set_head(&alice(), Some(head), Expected::Any).await.unwrap();
    assert!(!t.store.pin(&alice(), &id(2), false).await.unwrap().pinned);
    assert_eq!(t.store.prune_generations(&alice(), 0).await.unwrap(), 2);
    assert_eq!(seeds(&t, &alice()).await, [5]);
    for (who, seed) in [(alice(), 2), (bob(), 5), (shared("acme", "alice"), 5)] {
        let unknown = t.store.pin(&who, &id(seed), true).await;
        assert!(matches!(unknown, Err(StoreError::NotFound { what: "generation", .. })), "{who}");
    }
}

pub(crate) async fn generations_are_deleted_singly(t: Trial) {
    let head = publish_all(&t, &alice(), 3).await;
    publish_all(&t, &bob(), 1).await;
    let refused = t.store.delete_generation(&alice(), &head).await;
    assert!(matches!(refused, Err(StoreError::IsHead { id }) if id == head));
    t.store.delete_generation(&alice(), &generation(1).id).await.unwrap();
    assert_eq!(seeds(&t, &alice()).await, [3, 2]);
    assert!(t.store.fetch(&alice(), &generation(1).id).await.is_err());
    let again = t.store.delete_generation(&alice(), &generation(1).id).await;
    assert!(matches!(again, Err(StoreError::NotFound { what: "generation", .. })));
    // Bob's of the same content is his own.
    t.store.fetch(&bob(), &generation(1).id).await.unwrap();
    t.store.set_head(&alice(), None, Some(head)).await.unwrap();
    t.store.delete_generation(&alice(), &head).await.unwrap();
    assert_eq!(seeds(&t, &alice()).await, [2]);
}

pub(crate) async fn an_erased_adapter_leaves_its_user(t: Trial) {
    assert!(!t.store.erase_adapter(&alice()).await.unwrap());
    t.append(&alice(), vec![text("a"), text("b")]).await;
    assert!(!t.store.erase_adapter(&alice()).await.unwrap(), "there is none yet");
    publish_all(&t, &alice(), 3).await;
    publish_all(&t, &bob(), 1).await;
    t.store.pin(&alice(), &generation(2).id, true).await.unwrap();
    assert!(t.store.erase_adapter(&alice()).await.unwrap());
    assert_eq!((t.head(&alice()).await, seeds(&t, &alice()).await), (None, vec![]));
    for seed in 1..=3 {
        assert!(t.store.fetch(&alice(), &generation(seed).id).await.is_err());
    }
    let user = t.store.user(&alice()).await.unwrap().unwrap();
    assert_eq!((user.history.items, user.head), (2, None));
    assert!(!t.store.erase_adapter(&alice()).await.unwrap());
    t.store.fetch(&bob(), &generation(1).id).await.unwrap();
    let again = t.publish(&alice(), generation(2), None).await;
    assert!(!t.store.generation(&alice(), &again).await.unwrap().unwrap().pinned, "a new life");
}

pub(crate) async fn a_deletion_does_not_meet_a_new_head(t: Trial) {
    // Whichever comes first, the head is whole afterwards.
    publish_all(&t, &alice(), 2).await;
    for round in 0..40u8 {
        let (one, two) = (generation(1 + round % 2).id, generation(2 - round % 2).id);
        let rollback = tokio::spawn({
            let t = t.clone();
            async move { t.store.set_head(&alice(), Some(one), Some(two)).await }
        });
        tokio::time::sleep(std::time::Duration::from_micros(u64::from(round) * 30)).await;
        let deleted = t.store.delete_generation(&alice(), &one).await;
        let moved = rollback.await.unwrap();
        let head = t.head(&alice()).await.unwrap();
        t.store.fetch(&alice(), &head).await.unwrap();
        assert_eq!((moved.is_ok(), deleted.is_ok()), (head == one, head == two), "{moved:?} {deleted:?}");
        if head == two {
            t.publish(&alice(), generation(1 + round % 2), Some(two)).await;
        }
    }
}

pub(crate) async fn shared_adapters_are_no_users(t: Trial) {
    let (person, style) =
        (AdapterId::new("acme".parse().unwrap(), "style".parse().unwrap()), shared("acme", "style"));
    let foreign = shared("globex", "style");
    t.append(&person, vec![text("a")]).await;
    t.publish(&person, generation(1), None).await;
    assert_eq!(t.head(&style).await, None);
    t.publish(&style, generation(2), None).await;
    t.publish(&foreign, generation(3), None).await;
    for (who, seed) in [(&person, 1), (&style, 2), (&foreign, 3)] {
        assert_eq!(seeds(&t, who).await, [seed], "{who}");
        t.store.fetch(who, &generation(seed).id).await.unwrap();
    }
    assert!(t.store.fetch(&style, &generation(3).id).await.is_err());
    let users = t.store.users(&person.tenant, None, 9).await.unwrap().entries;
    assert_eq!(users.iter().map(|user| &user.id).collect::<Vec<_>>(), [&person]);
    let refused = t.store.append(&style, None, [0; 32], vec![text("b")]).await;
    assert!(
        matches!(refused, Err(StoreError::Invalid { field: "user", .. })),
        "it has no history: {refused:?}"
    );
    assert_eq!(t.store.history_stats(&style).await.unwrap().items, 0);
    // Erasing the one leaves the other.
    assert!(t.store.erase_user(&person).await.unwrap());
    t.store.fetch(&style, &generation(2).id).await.unwrap();
}

pub(crate) async fn shared_adapters_are_listed_and_erased(t: Trial) {
    let names = ["Z", "a", "a.b", "zoe"];
    for name in names.iter().rev() {
        t.publish(&shared("acme", name), generation(1), None).await;
    }
    t.publish(&shared("globex", "foreign"), generation(1), None).await;
    for name in ["0", "Ann", "a", "zzz"] {
        t.append(&AdapterId::new("acme".parse().unwrap(), name.parse().unwrap()), vec![text("a")]).await;
    }
    let tenant = alice().tenant;
    for limit in [0, 1, 3, 4, 5] {
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let page = t.store.shared_adapters(&tenant, after.as_ref(), limit).await.unwrap();
            all.extend(
                page.entries.into_iter().map(|adapter| (adapter.name.to_string(), adapter.head.unwrap().id)),
            );
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(all, names.map(|name| (name.to_owned(), generation(1).id)), "limit {limit}");
    }
    assert!(t.store.erase_adapter(&shared("acme", "a")).await.unwrap());
    assert!(!t.store.erase_adapter(&shared("acme", "a")).await.unwrap());
    assert_eq!(t.store.shared_adapters(&tenant, None, 9).await.unwrap().entries.len(), 3);
    assert!(t.store.fetch(&shared("acme", "a"), &generation(1).id).await.is_err());
    t.store.fetch(&shared("globex", "foreign"), &generation(1).id).await.unwrap();
    assert_eq!(t.store.users(&tenant, None, 9).await.unwrap().entries.len(), 4);
}
