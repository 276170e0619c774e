//! Properties of histories.

use store::{Page, StoreError};
use types::{HistoryStats, JobState, NewItem, Timestamp};

use crate::trial::{Trial, adapter, alice, assert_fenced, bob, item, text};

const DAY: i64 = 24 * 60 * 60 * 1000;

pub(crate) async fn items_come_back_in_order(t: Trial) {
    let items = vec![item("late", 300), item("early", 100), item("tie-1", 200), item("tie-2", 200)];
    let first = t.append(&alice(), items).await;
    assert_eq!((first.accepted, first.duplicates, first.total_items), (4, 0, 4));
    t.append(&alice(), vec![item("tie-0", 200), item("ancient", -5)]).await;
    assert_eq!(t.ids(&alice()).await, ["ancient", "early", "tie-1", "tie-2", "tie-0", "late"]);

    // What is left out is filled in on arrival.
    let metadata = Some(serde_json::json!({"z": 1, "a": [1.5, null, "é"]}));
    let bare = NewItem { metadata: metadata.clone(), ..text("bare") };
    t.append(&bob(), vec![bare]).await;
    let all = t.store.all_history(&bob()).await.unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!((all[0].created_at, &all[0].input, all[0].output.as_str()), (t.now(), &None, "bare"));
    assert_eq!(all[0].metadata, metadata);
    assert_eq!(all[0].id.as_str().len(), 36);
}

pub(crate) async fn pages_join_to_the_whole(t: Trial) {
    let items: Vec<_> = (0..25).map(|i| item(&format!("i{i}"), i % 3)).collect();
    t.append(&alice(), items).await;
    t.append(&bob(), vec![item("not-mine", 1)]).await;
    let whole = t.store.all_history(&alice()).await.unwrap();
    for limit in [0, 1, 4, 5, 24, 25, 26, u32::MAX] {
        let (mut joined, mut after, mut pages) = (Vec::new(), None, 0);
        loop {
            let Page { entries, next } = t.store.history(&alice(), after, limit).await.unwrap().unwrap();
            assert!(entries.len() <= limit.max(1) as usize);
            joined.extend(entries);
            pages += 1;
            let Some(next) = next else { break };
            after = Some(next.to_string().parse().unwrap()); // as a client hands it back
        }
        assert_eq!(joined, whole, "limit {limit}");
        assert_eq!(pages, 25usize.div_ceil((limit.max(1) as usize).min(25)), "limit {limit}");
    }
    assert_eq!(t.store.history(&adapter("acme", "nobody"), None, 9).await.unwrap(), None);
    for bad in ["", "1", "1.", ".1", "1.2.3", "a.b", "1,2", "99999999999999999999.1"] {
        let parsed = bad.parse::<store::HistoryCursor>();
        assert!(matches!(parsed, Err(StoreError::Invalid { field: "cursor", .. })), "{bad:?}");
    }
}

pub(crate) async fn an_item_is_stored_once(t: Trial) {
    let metadata = |text: &str| Some(serde_json::from_str(text).unwrap());
    let dated = NewItem { metadata: metadata(r#"{"a": 1, "b": 0.1}"#), ..item("x", 5) };
    t.append(&alice(), vec![dated.clone()]).await;
    let undated = NewItem { created_at: None, ..dated.clone() };
    let turned = NewItem { metadata: metadata(r#"{"b": 0.1, "a": 1}"#), ..dated.clone() };
    let again = t.append(&alice(), vec![dated, undated, turned, item("y", 6), item("y", 6)]).await;
    assert_eq!((again.accepted, again.duplicates, again.total_items), (1, 4, 2));
    assert_eq!(t.ids(&alice()).await, ["x", "y"]);
    // The same id is another item for another user.
    assert_eq!(t.append(&bob(), vec![item("x", 9)]).await.accepted, 1);
    // An item without a time was given one; repeating it is repeating it.
    let undated = NewItem { id: Some("z".parse().unwrap()), ..text("z") };
    t.append(&alice(), vec![undated.clone()]).await;
    t.clock.advance_millis(1000);
    assert_eq!(t.append(&alice(), vec![undated]).await.duplicates, 1);
}

pub(crate) async fn a_conflicting_item_stores_nothing(t: Trial) {
    t.append(&alice(), vec![item("x", 5)]).await;
    let stored = item("x", 5);
    let others = [
        NewItem { output: "other".to_owned(), ..stored.clone() },
        NewItem { input: None, ..stored.clone() },
        NewItem { input: Some("other".to_owned()), ..stored.clone() },
        NewItem { created_at: Some(Timestamp(6)), ..stored.clone() },
        NewItem { metadata: Some(serde_json::json!(1)), ..stored },
    ];
    for other in others {
        let request = vec![item("new", 1), other.clone()];
        let refused = t.store.append(&alice(), Some("key"), [1; 32], request).await;
        let named = matches!(&refused, Err(StoreError::ItemConflict { id }) if id.as_str() == "x");
        assert!(named, "{other:?}: {refused:?}");
    }
    // Nor within one request, nor for a user who would have been new.
    let request = vec![item("a", 1), item("a", 2)];
    assert!(t.store.append(&bob(), None, [0; 32], request).await.is_err());
    assert_eq!(t.ids(&alice()).await, ["x"]);
    assert_eq!(t.store.user(&bob()).await.unwrap(), None);
    // The refused key is not used up.
    let retry = t.store.append(&alice(), Some("key"), [2; 32], vec![item("new", 1)]).await.unwrap();
    assert!(!retry.replayed);
}

pub(crate) async fn a_replay_changes_nothing(t: Trial) {
    let upload = async || {
        let items = vec![text("a"), text("b"), item("i", 1)];
        t.store.append(&alice(), Some("key"), [1; 32], items).await.unwrap()
    };
    let first = upload().await;
    assert!(!first.replayed);
    t.append(&alice(), vec![text("c")]).await;
    let second = upload().await;
    assert!(second.replayed);
    assert_eq!((second.accepted, second.duplicates, second.total_items), (3, 0, 3));
    assert_eq!(second.job.unwrap().id, first.job.unwrap().id);
    assert_eq!(t.store.all_history(&alice()).await.unwrap().len(), 4);
    // The job is as it is now.
    let claimed = t.claim().await.unwrap();
    assert_eq!(upload().await.job.unwrap(), claimed.job);
}

pub(crate) async fn a_key_with_another_request_is_refused(t: Trial) {
    t.store.append(&alice(), Some("key"), [1; 32], vec![text("a")]).await.unwrap();
    let refused = t.store.append(&alice(), Some("key"), [2; 32], vec![text("b")]).await;
    assert!(matches!(refused, Err(StoreError::IdempotencyConflict { key }) if key == "key"));
    assert_eq!(t.store.all_history(&alice()).await.unwrap().len(), 1);
}

pub(crate) async fn concurrent_replays_store_once(t: Trial) {
    let uploads = (0..16).map(|_| {
        let t = t.clone();
        tokio::spawn(async move {
            t.store.append(&alice(), Some("key"), [1; 32], vec![text("a"), text("b")]).await.unwrap()
        })
    });
    let mut first = 0;
    for upload in uploads.collect::<Vec<_>>() {
        let answer = upload.await.unwrap();
        assert_eq!((answer.accepted, answer.total_items), (2, 2));
        first += u32::from(!answer.replayed);
    }
    assert_eq!(first, 1);
    assert_eq!(t.store.all_history(&alice()).await.unwrap().len(), 2);
}

pub(crate) async fn keys_belong_to_users_and_expire(t: Trial) {
    t.store.append(&alice(), Some("key"), [1; 32], vec![text("a")]).await.unwrap();
    assert!(!t.store.append(&bob(), Some("key"), [2; 32], vec![text("b")]).await.unwrap().replayed);
    t.clock.advance_millis(7 * DAY);
    assert!(t.store.append(&alice(), Some("key"), [1; 32], vec![text("a")]).await.unwrap().replayed);
    t.clock.advance_millis(1);
    assert!(!t.store.append(&alice(), Some("key"), [3; 32], vec![text("a")]).await.unwrap().replayed);
}

pub(crate) async fn the_store_counts_what_it_holds(t: Trial) {
    let none = HistoryStats::default();
    assert_eq!(t.store.history_stats(&alice()).await.unwrap(), none);
    let empty = t.append(&alice(), vec![]).await;
    assert_eq!((empty.accepted, empty.job), (0, None));
    t.append(&alice(), vec![item("x", 1), item("x", 1), text("é")]).await;
    t.append(&alice(), vec![item("x", 1), NewItem { input: Some("日".to_owned()), ..text("") }]).await;
    let counted = t.store.history_stats(&alice()).await.unwrap();
    assert_eq!(counted, HistoryStats { items: 3, bytes: 5 + 2 + 3 });
    assert_eq!(t.forget_all(&alice()).await, Some(3));
    assert_eq!(t.store.history_stats(&alice()).await.unwrap(), none);
}

pub(crate) async fn odd_text_survives(t: Trial) {
    let long = "x".repeat(3_000_000);
    let odd =
        ["", "\0", "a\0b", "'); DROP TABLE items; --", "\u{feff}\u{202e}", "🙂\r\n\t", "$1 ?1 :a", &long];
    let items = odd.iter().map(|odd| NewItem {
        input: Some((*odd).to_owned()),
        metadata: Some(serde_json::json!({*odd: *odd})),
        ..text(odd)
    });
    t.append(&alice(), items.collect()).await;
    let all = t.store.all_history(&alice()).await.unwrap();
    assert_eq!(all.len(), odd.len());
    for (item, odd) in all.iter().zip(odd) {
        assert_eq!((item.input.as_deref(), item.output.as_str()), (Some(odd), odd));
        assert_eq!(item.metadata, Some(serde_json::json!({odd: odd})));
    }
}

pub(crate) async fn erased_history_is_gone_and_its_jobs_with_it(t: Trial) {
    let running = t.running_job(&alice()).await;
    let queued = t.append(&alice(), vec![text("more")]).await.job.unwrap();
    assert_ne!(queued.id, running.job.id);
    let upload = async || t.store.append(&alice(), Some("key"), [1; 32], vec![text("c")]).await.unwrap();
    upload().await;

    assert_eq!(t.forget_all(&alice()).await, Some(3));
    assert_eq!(t.ids(&alice()).await, [""; 0]);
    for id in [&queued.id, &running.job.id] {
        let ended = t.store.job(&alice().tenant, id).await.unwrap().unwrap();
        let reason = Some("the history was erased");
        assert_eq!((ended.state, ended.error.as_deref()), (JobState::Cancelled, reason));
    }
    assert_fenced(t.store.beat(&running.fence, None, 1000).await);
    assert_eq!(t.claim().await, None);

    // A late repetition brings back neither the items nor their job.
    let late = upload().await;
    assert_eq!((late.replayed, late.job.map(|job| job.state)), (true, Some(JobState::Cancelled)));
    assert_eq!(t.ids(&alice()).await, [""; 0]);

    // The user goes on at once, with a job of its own.
    let next = t.running_job(&alice()).await;
    assert_ne!(next.job.id, running.job.id);
    assert_eq!(t.forget_all(&adapter("acme", "nobody")).await, None);
}

pub(crate) async fn a_cancelled_append_is_whole_or_absent(t: Trial) {
    for round in 0..60u64 {
        let user = adapter("acme", &format!("u{round}"));
        let items = (0..20).map(|i| text(&format!("item {i}"))).collect();
        let upload = t.store.append(&user, Some("key"), [1; 32], items);
        let patience = std::time::Duration::from_micros(round * round * 3);
        let answered = tokio::time::timeout(patience, upload).await.is_ok();
        // A commit may be under way still; the next write waits for it.
        t.append(&bob(), vec![]).await;
        let stored = t.store.all_history(&user).await.unwrap().len();
        assert!(stored == 20 || (stored == 0 && !answered), "{stored} items, answered: {answered}");
        assert_eq!(t.store.history_stats(&user).await.unwrap().items, stored as u64);
        assert_eq!(t.store.latest_job(&user).await.unwrap().is_some(), stored > 0);
    }
}
