//! Properties of users, of erasure and of tenants.

use store::{NewGeneration, StoreError, UserRecord};
use types::{AdapterId, HistoryStats};

use crate::trial::{LEASE, Trial, adapter, alice, assert_fenced, bob, generation, item, outcome, text};

pub(crate) async fn a_user_at_a_glance(t: Trial) {
    assert_eq!(t.store.user(&alice()).await.unwrap(), None);
    let created_at = t.now();
    let claimed = t.running_job(&alice()).await;
    t.clock.advance_millis(1);
    let finish = Some((claimed.fence, outcome(Some(generation(1).id))));
    let head = t.store.publish(&alice(), generation(1), None, finish).await.unwrap();
    let job = t.store.job(&alice().tenant, &claimed.job.id).await.unwrap();
    let history = HistoryStats { items: 1, bytes: "something to learn".len() as u64 };
    let expected = UserRecord { id: alice(), history, head: Some(head), job, created_at };
    assert_eq!(t.store.user(&alice()).await.unwrap(), Some(expected));
    // An uploaded adapter makes a user too.
    t.publish(&bob(), generation(2), None).await;
    let user = t.store.user(&bob()).await.unwrap().unwrap();
    assert_eq!((user.head.unwrap().id, user.job), (generation(2).id, None));
}

pub(crate) async fn users_are_listed(t: Trial) {
    let names = ["Bob", "a-b", "a.b", "a_b", "alice", "bob", "bob@example.org", "zoe"];
    for name in names.iter().rev() {
        t.append(&adapter("acme", name), vec![text("a")]).await;
    }
    t.append(&adapter("globex", "mallory"), vec![text("a")]).await;
    for limit in [0, 1, 3, 8, 9] {
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let page = t.store.users(&alice().tenant, after.as_ref(), limit).await.unwrap();
            all.extend(page.entries.into_iter().map(|user| user.id.owner.to_string()));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(all, names, "limit {limit}");
    }
    assert_eq!(t.store.users(&"nobody".parse().unwrap(), None, 10).await.unwrap().entries, []);
}

pub(crate) async fn tenants_are_apart(t: Trial) {
    let (mine, foreign) = (alice(), AdapterId { tenant: "globex".parse().unwrap(), ..alice() });
    let claimed = t.running_job(&mine).await;
    t.store.append(&mine, Some("key"), [1; 32], vec![item("x", 1)]).await.unwrap();
    let head = t.publish(&mine, generation(1), None).await;

    let nothing_there = async || {
        assert_eq!(t.store.head(&foreign).await.unwrap(), None);
        assert_eq!(t.store.generation(&foreign, &head).await.unwrap(), None);
        assert_eq!(t.store.generations(&foreign).await.unwrap(), []);
        let fetched = t.store.fetch(&foreign, &head).await;
        assert!(matches!(fetched, Err(StoreError::NotFound { .. })));
        assert_eq!(t.store.job(&foreign.tenant, &claimed.job.id).await.unwrap(), None);
        assert!(t.store.set_head(&foreign, Some(head), None).await.is_err());
        assert!(t.store.pin(&foreign, &head, true).await.is_err());
        assert!(t.store.delete_generation(&foreign, &head).await.is_err());
        assert!(!t.store.erase_adapter(&foreign).await.unwrap());
    };
    nothing_there().await;
    assert_eq!(t.store.user(&foreign).await.unwrap(), None);
    assert_eq!(t.store.history(&foreign, None, 9).await.unwrap(), None);
    assert_eq!(t.ids(&foreign).await, [""; 0]);
    assert_eq!(t.store.users(&foreign.tenant, None, 9).await.unwrap().entries, []);
    assert_eq!(t.store.jobs(&foreign.tenant, None, None, 9).await.unwrap().entries, []);
    assert_eq!(t.store.generations_page(&foreign, None, 9).await.unwrap(), None);
    assert!(!t.store.erase_user(&foreign).await.unwrap());
    assert_eq!(t.forget_all(&foreign).await, None);

    // The user of the same name, with the same item, the same key and the same generation.
    let other = t.store.append(&foreign, Some("key"), [2; 32], vec![item("x", 2)]).await.unwrap();
    assert_eq!((other.accepted, other.total_items, other.replayed), (1, 1, false));
    nothing_there().await;
    t.publish(&foreign, generation(1), None).await;
    assert!(t.store.erase_user(&foreign).await.unwrap());
    assert_eq!(t.store.user(&mine).await.unwrap().unwrap().history.items, 2);
    t.store.fetch(&mine, &head).await.unwrap();
    t.store.beat(&claimed.fence, None, LEASE).await.unwrap();
}

/// Asserts that no method knows the user any more.
async fn assert_gone(t: &Trial, user: &AdapterId) {
    assert_eq!(t.store.user(user).await.unwrap(), None);
    assert_eq!(t.store.history(user, None, 9).await.unwrap(), None);
    assert_eq!(t.store.history_stats(user).await.unwrap(), HistoryStats::default());
    assert_eq!(t.ids(user).await, [""; 0]);
    assert_eq!(t.store.latest_job(user).await.unwrap(), None);
    assert_eq!(t.store.jobs(&user.tenant, user.user(), None, 9).await.unwrap().entries, []);
    assert_eq!(t.store.generations(user).await.unwrap(), []);
    assert_eq!(t.store.generations_page(user, None, 9).await.unwrap(), None);
    assert_eq!(t.store.head(user).await.unwrap(), None);
    assert!(t.store.fetch(user, &generation(1).id).await.is_err());
}

pub(crate) async fn an_erased_user_is_gone(t: Trial) {
    assert!(!t.store.erase_user(&alice()).await.unwrap());
    let job = t.running_job(&alice()).await.job;
    t.append(&alice(), vec![text("b")]).await;
    let one = t.publish(&alice(), generation(1), None).await;
    t.publish(&alice(), generation(2), Some(one)).await;
    t.append(&bob(), vec![text("mine")]).await;
    t.publish(&bob(), generation(1), None).await;

    assert!(t.store.erase_user(&alice()).await.unwrap());
    assert_gone(&t, &alice()).await;
    assert_eq!(t.store.job(&alice().tenant, &job.id).await.unwrap(), None);
    assert!(!t.store.erase_user(&alice()).await.unwrap());
    // Bob is untouched, and his job is next.
    t.store.fetch(&bob(), &one).await.unwrap();
    assert_eq!(t.claim().await.unwrap().job.adapter, bob());
    assert_eq!(t.claim().await, None);
}

pub(crate) async fn an_erased_user_starts_from_nothing(t: Trial) {
    let upload = async || t.store.append(&alice(), Some("key"), [1; 32], vec![item("x", 1)]).await.unwrap();
    let first = upload().await;
    t.publish(&alice(), generation(1), None).await;
    t.clock.advance_millis(1);
    assert!(t.store.erase_user(&alice()).await.unwrap());

    let again = upload().await;
    assert_eq!((again.accepted, again.total_items, again.replayed), (1, 1, false));
    assert_ne!(again.job.as_ref().unwrap().id, first.job.unwrap().id);
    let user = t.store.user(&alice()).await.unwrap().unwrap();
    assert_eq!((user.created_at, user.head, user.job), (t.now(), None, again.job));
    assert_eq!(t.store.generations(&alice()).await.unwrap(), []);
    assert!(t.store.fetch(&alice(), &generation(1).id).await.is_err());
    t.publish(&alice(), generation(1), None).await;
    t.store.fetch(&alice(), &generation(1).id).await.unwrap();
}

pub(crate) async fn a_running_job_cannot_bring_a_user_back(t: Trial) {
    let claimed = t.running_job(&alice()).await;
    assert!(t.store.erase_user(&alice()).await.unwrap());
    let all_refused = async || {
        assert_fenced(t.store.beat(&claimed.fence, None, LEASE).await);
        assert_fenced(t.store.finish(&claimed.fence, &outcome(None)).await);
        assert_fenced(t.store.fail(&claimed.fence, "error", Some(0)).await);
        let finish = Some((claimed.fence.clone(), outcome(Some(generation(1).id))));
        assert_fenced(t.store.publish(&alice(), generation(1), None, finish).await);
    };
    all_refused().await;
    assert_gone(&t, &alice()).await;
    // Nor touch the user who comes back, whose job runs.
    let next = t.running_job(&alice()).await;
    all_refused().await;
    assert_eq!(t.head(&alice()).await, None);
    t.store.beat(&next.fence, None, LEASE).await.unwrap();
}

pub(crate) async fn a_publish_under_way_cannot_bring_a_user_back(t: Trial) {
    for round in 0..30u64 {
        let user = adapter("acme", &format!("u{round}"));
        let claimed = t.running_job(&user).await;
        let finish = Some((claimed.fence, outcome(Some(generation(1).id))));
        let publish = tokio::spawn({
            let (t, user) = (t.clone(), user.clone());
            async move { t.store.publish(&user, generation(1), None, finish).await }
        });
        tokio::time::sleep(std::time::Duration::from_micros(round * 100)).await;
        assert!(t.store.erase_user(&user).await.unwrap());
        let published = publish.await.unwrap();
        assert!(matches!(published, Ok(_) | Err(StoreError::Fenced { .. })), "{published:?}");
        assert_gone(&t, &user).await;
    }
}

pub(crate) async fn an_upload_under_way_yields_to_an_erasure(t: Trial) {
    for round in 0..30u64 {
        let user = adapter("acme", &format!("u{round}"));
        t.append(&user, vec![text("a"), text("b")]).await;
        let upload = tokio::spawn({
            let (t, user) = (t.clone(), user.clone());
            // Large enough that its user can go and come back while it is written.
            let new = NewGeneration { weights: vec![1; 4_000_000].into(), ..generation(1) };
            async move { t.store.publish(&user, new, None, None).await }
        });
        tokio::time::sleep(std::time::Duration::from_micros(round * 100)).await;
        assert!(t.store.erase_user(&user).await.unwrap());
        t.append(&user, vec![text("c")]).await;
        let uploaded = upload.await.unwrap();
        let found = t.store.user(&user).await.unwrap().unwrap();
        assert_eq!(found.history.items, 1);
        match uploaded {
            Err(StoreError::NotFound { what: "user", .. }) => assert_eq!(found.head, None),
            // It came first and was erased, or last and is the new user's.
            Ok(_) => assert_eq!(found.head.is_some(), t.store.fetch(&user, &generation(1).id).await.is_ok()),
            other => panic!("{other:?}"),
        }
    }
}
