//! Properties of what surrounds training: calling off, pauses, turns, checkpoints, forgetting, progress.

use store::{
    Claimed, Cost, Demand, Lesson, Manifest, NewGeneration, OldLoss, Pause, PauseScope, Pauses, Policy,
    Selection, Spent, Standing, item_hash,
};
use types::{
    AdapterId, GenerationId, HistoryStats, Job, JobOutcome, JobProgress, JobState, Timestamp, TrainingOptions,
};

use crate::trial::{
    ATTEMPTS, LEASE, Trial, adapter, alice, assert_fenced, bob, generation, item, outcome, text,
};

const WORK: [u8; 32] = [5; 32];

pub(crate) async fn a_cancelled_job_is_over(t: Trial) {
    let queued = t.append(&alice(), vec![text("a")]).await.job.unwrap();
    assert_eq!(t.store.cancel(&"globex".parse().unwrap(), &queued.id).await.unwrap(), None);
    let job = t.store.cancel(&alice().tenant, &queued.id).await.unwrap().unwrap();
    assert_eq!((job.state, job.finished_at), (JobState::Cancelled, Some(t.now())));
    assert!(job.error.unwrap().contains("cancelled"));
    assert_eq!(t.claim().await, None);
    let mut interrupts = t.store.interrupts();
    let running = t.running_job(&alice()).await;
    assert_eq!(t.store.standing(&running.fence, &Policy::AT_ONCE).await.unwrap(), Standing::Held);
    t.store.cancel(&alice().tenant, &running.job.id).await.unwrap();
    assert!(interrupts.has_changed().unwrap(), "the worker is told");
    interrupts.mark_unchanged();
    assert_eq!(t.store.standing(&running.fence, &Policy::AT_ONCE).await.unwrap(), Standing::Lost);
    assert_fenced(t.store.beat(&running.fence, None, LEASE).await);
    assert_fenced(t.store.finish(&running.fence, &outcome(None)).await);
    assert_fenced(t.store.release(&running.fence).await);
    t.clock.advance_millis(2 * LEASE);
    assert_eq!(t.claim().await, None);
    // What has ended stays as it is.
    let done = t.running_job(&alice()).await;
    let finished = t.store.finish(&done.fence, &outcome(None)).await.unwrap();
    assert_eq!(t.store.cancel(&alice().tenant, &finished.id).await.unwrap(), Some(finished));
}

pub(crate) async fn a_pause_holds_jobs_back(t: Trial) {
    let tenant = alice().tenant;
    let all = PauseScope::Tenant(tenant.clone());
    let bobs = PauseScope::User(tenant.clone(), bob().user().unwrap().clone());
    let running = t.running_job(&alice()).await;
    t.append(&bob(), vec![text("b")]).await;
    t.store.pause(&bobs, &tenant, None).await.unwrap();
    let held = async |user| {
        let Pauses { server, tenant, user } = t.store.pauses(&tenant, user).await.unwrap();
        (server.is_some(), tenant.is_some(), user.is_some())
    };
    let (alice_alone, bob_alone) = (alice(), bob());
    assert_eq!(held(bob_alone.user()).await, (false, false, true));
    assert_eq!(held(alice_alone.user()).await, (false, false, false));
    assert_eq!(t.claim().await, None, "only bob's job waits, and bob is paused");
    assert!(t.store.latest_job(&bob()).await.unwrap().unwrap().paused);
    assert_eq!(t.store.standing(&running.fence, &Policy::AT_ONCE).await.unwrap(), Standing::Held);
    t.store.pause(&all, &tenant, None).await.unwrap();
    assert_eq!(t.store.standing(&running.fence, &Policy::AT_ONCE).await.unwrap(), Standing::Paused);
    assert!(t.store.latest_job(&alice()).await.unwrap().unwrap().paused);
    t.store.beat(&running.fence, None, LEASE).await.unwrap();
    t.store.release(&running.fence).await.unwrap();
    t.store.resume(&bobs).await.unwrap();
    assert_eq!(t.claim().await, None, "the tenant is paused");
    let other = t.running_job(&adapter("globex", "carol")).await;
    assert_eq!(other.job.adapter.tenant.as_str(), "globex", "others go on");
    t.store.finish(&other.fence, &outcome(None)).await.unwrap();
    t.store.resume(&all).await.unwrap();
    assert_eq!(held(None).await, (false, false, false));
    assert!(!t.store.latest_job(&alice()).await.unwrap().unwrap().paused);
    assert_eq!(t.claim().await.unwrap().job.adapter, bob(), "who has had no turn yet");
    assert_eq!(t.claim().await.unwrap().job.adapter, alice());
}

pub(crate) async fn a_pause_of_the_server_holds_everybody(t: Trial) {
    let (operator, mine) = ("ops".parse().unwrap(), alice().tenant);
    let mut interrupts = t.store.interrupts();
    let running = t.running_job(&alice()).await;
    interrupts.mark_unchanged();
    t.store.pause(&PauseScope::Server, &operator, Some("upkeep")).await.unwrap();
    assert!(interrupts.has_changed().unwrap(), "the worker is told");
    let pause = Pause { since: Some(t.now()), by: Some(operator), reason: Some("upkeep".into()) };
    for tenant in [&mine, &"globex".parse().unwrap()] {
        let pauses = t.store.pauses(tenant, None).await.unwrap();
        assert_eq!(pauses, Pauses { server: Some(pause.clone()), ..Pauses::default() });
    }
    assert_eq!(t.store.standing(&running.fence, &Policy::AT_ONCE).await.unwrap(), Standing::Paused);
    t.store.release(&running.fence).await.unwrap();
    t.append(&adapter("globex", "carol"), vec![text("c")]).await;
    assert_eq!(t.claim().await, None);
    // A second one changes nothing, a tenant's own cannot lift it, and whoever is erased leaves it.
    t.clock.advance_millis(5);
    t.store.pause(&PauseScope::Server, &mine, None).await.unwrap();
    t.store.resume(&PauseScope::Tenant(mine.clone())).await.unwrap();
    t.append(&bob(), vec![text("b")]).await;
    assert!(t.store.erase_user(&bob()).await.unwrap());
    assert_eq!(t.store.pauses(&mine, None).await.unwrap().server, Some(pause));
    assert_eq!(t.claim().await, None);
    t.store.resume(&PauseScope::Server).await.unwrap();
    assert_eq!(t.claim().await.unwrap().job.adapter.tenant.as_str(), "globex", "it was never served");
    assert_eq!(t.claim().await.unwrap().job.adapter, alice());
}

/// What a user can see of a job that waits.
pub(crate) async fn a_job_says_what_it_waits_for(t: Trial) {
    let read = async |job: &Job| t.store.job(&alice().tenant, &job.id).await.unwrap().unwrap();
    let running = t.running_job(&alice()).await;
    assert_eq!((running.job.retry_at, running.job.held_up), (None, false));
    let next = t.append(&alice(), vec![text("b")]).await.job.unwrap();
    assert!(next.held_up && next.retry_at.is_none());
    let done = t.store.finish(&running.fence, &outcome(None)).await.unwrap();
    assert!(!done.held_up && !read(&next).await.held_up);
    let claimed = t.claim().await.unwrap();
    let job = t.store.fail(&claimed.fence, "out of memory", Some(1000)).await.unwrap();
    assert_eq!(job.retry_at, Some(t.now().plus_millis(1000)));
    assert_eq!(read(&job).await.error.as_deref(), Some("out of memory"));
    t.clock.advance_millis(1000);
    let again = t.claim().await.unwrap();
    assert_eq!((again.job.retry_at, &again.job.error), (None, &None));
    // Given back, it waits for nothing but its turn.
    assert_eq!(t.store.release(&again.fence).await.unwrap().retry_at, None);
    let last = t.claim().await.unwrap();
    let failed = t.store.fail(&last.fence, "no", None).await.unwrap();
    assert_eq!((failed.state, failed.retry_at, failed.paused), (JobState::Failed, None, false));
}

pub(crate) async fn tenants_take_turns(t: Trial) {
    for i in 0..20 {
        t.append(&adapter("busy", &format!("u{i}")), vec![text("a")]).await;
    }
    for i in 0..3 {
        t.append(&adapter("calm", &format!("u{i}")), vec![text("a")]).await;
    }
    let mut served = Vec::new();
    while let Some(claimed) = t.claim().await {
        served.push(claimed.job.adapter.tenant.to_string());
    }
    assert_eq!(served.len(), 23);
    assert_eq!(served[..7], ["busy", "calm", "busy", "calm", "busy", "calm", "busy"]);
    // Whoever comes late does not make up for lost time.
    t.append(&adapter("late", "u"), vec![text("a")]).await;
    t.append(&adapter("busy", "new"), vec![text("a")]).await;
    assert_eq!(t.claim().await.unwrap().job.adapter.tenant.as_str(), "late");
}

pub(crate) async fn a_long_job_gives_way_and_users_take_turns(t: Trial) {
    let policy =
        Policy { turn_millis: 1_000, min_new_items: 2, max_staleness_millis: 60_000, ..Policy::AT_ONCE };
    let claim = async || t.store.claim_ripe("worker", LEASE, ATTEMPTS, &policy).await.unwrap();
    let (carol, late) = (adapter("acme", "carol"), adapter("acme", "late"));
    t.append(&alice(), vec![text("a"), text("b")]).await;
    let long = claim().await.unwrap();
    let standing = async || t.store.standing(&long.fence, &policy).await.unwrap();
    t.clock.advance_millis(5_000);
    assert_eq!(standing().await, Standing::Held, "nobody waits");
    t.append(&bob(), vec![text("a")]).await;
    assert_eq!(standing().await, Standing::Held, "who waits could not begin");
    t.append(&bob(), vec![text("b")]).await;
    t.append(&carol, vec![text("a"), text("b")]).await;
    assert_eq!(standing().await, Standing::Awaited);
    // What it has done would be of no use to a job with a longer history.
    let newer = t.append(&alice(), vec![text("c")]).await.job.unwrap();
    assert_eq!(standing().await, Standing::Held);
    t.store.cancel(&alice().tenant, &newer.id).await.unwrap();
    assert_eq!(standing().await, Standing::Awaited);
    let given = t.store.release(&long.fence).await.unwrap();
    assert_eq!((given.state, given.attempts), (JobState::Queued, 0));
    // Who has not been served yet comes first, whenever they came.
    t.append(&late, vec![text("a"), text("b")]).await;
    let mut order = Vec::new();
    while let Some(claimed) = claim().await {
        assert_eq!(
            t.store.standing(&claimed.fence, &policy).await.unwrap(),
            Standing::Held,
            "its turn has begun"
        );
        order.push(claimed.job.adapter.owner.to_string());
        t.store.finish(&claimed.fence, &outcome(None)).await.unwrap();
    }
    assert_eq!(order, ["bob", "carol", "late", "alice@example.org"]);
    // Two that give way to each other take turns: neither comes before the other twice.
    for user in [&carol, &alice(), &bob()] {
        t.append(user, vec![text("c"), text("d")]).await;
    }
    let mut turns = Vec::new();
    for _ in 0..6 {
        let claimed = claim().await.unwrap();
        turns.push(claimed.job.adapter.owner.to_string());
        t.store.release(&claimed.fence).await.unwrap();
    }
    assert_eq!(turns[..3], ["bob", "carol", "alice@example.org"]);
    assert_eq!(turns[3..], turns[..3]);
}

pub(crate) async fn a_job_waits_as_the_policy_says(t: Trial) {
    let policy =
        Policy { min_new_items: 3, debounce_millis: 100, max_staleness_millis: 10_000, ..Policy::AT_ONCE };
    let claim = async || t.store.claim_ripe("worker", LEASE, ATTEMPTS, &policy).await.unwrap();
    t.append(&alice(), vec![text("a"), text("b")]).await;
    t.clock.advance_millis(200);
    assert_eq!(claim().await, None, "too few");
    t.append(&alice(), vec![text("c")]).await;
    t.clock.advance_millis(99);
    assert_eq!(claim().await, None, "more may come");
    t.append(&alice(), vec![text("d")]).await;
    t.clock.advance_millis(99);
    assert_eq!(claim().await, None, "more has come");
    t.clock.advance_millis(1);
    let claimed = claim().await.unwrap();
    t.store.finish(&claimed.fence, &outcome(None)).await.unwrap();
    t.append(&alice(), vec![text("e")]).await;
    t.clock.advance_millis(9_999);
    assert_eq!(claim().await, None);
    t.clock.advance_millis(1);
    let stale = claim().await.unwrap();
    // What has been tried waits for its retry only, and what is urgent for nothing.
    t.store.fail(&stale.fence, "no memory", Some(50)).await.unwrap();
    assert_eq!(claim().await, None);
    t.clock.advance_millis(50);
    let again = claim().await.unwrap();
    t.store.finish(&again.fence, &outcome(None)).await.unwrap();
    t.append(&bob(), vec![text("a")]).await;
    assert_eq!(claim().await, None);
    t.store.enqueue(&bob(), &Demand { urgent: true, ..Demand::default() }).await.unwrap();
    assert_eq!(claim().await.unwrap().job.adapter, bob());
}

pub(crate) async fn who_is_turned_down_again_waits_longer(t: Trial) {
    let policy = Policy { rest_millis: 100, max_staleness_millis: 1_000, ..Policy::AT_ONCE };
    let claim = async || t.store.claim_ripe("worker", LEASE, ATTEMPTS, &policy).await.unwrap();
    // How long a user's new job waits whose last one has just ended.
    let waits = async || {
        t.append(&alice(), vec![text("more")]).await;
        let mut waited = 0;
        loop {
            if let Some(claimed) = claim().await {
                return (waited, claimed);
            }
            t.clock.advance_millis(1);
            waited += 1;
        }
    };
    let kept_back = async |claimed: &Claimed| {
        t.store.finish_lesson(&claimed.fence, &outcome(None), &Lesson::default()).await.unwrap();
    };
    let (waited, mut claimed) = waits().await;
    assert_eq!(waited, 0);
    for wait in [0, 100, 200, 400, 800, 1_000, 1_000] {
        kept_back(&claimed).await;
        // Nobody else waits for that.
        t.append(&bob(), vec![text("b")]).await;
        let bobs = claim().await.unwrap();
        assert_eq!(bobs.job.adapter, bob());
        t.store.finish(&bobs.fence, &outcome(None)).await.unwrap();
        let waited;
        (waited, claimed) = waits().await;
        assert_eq!(waited, wait);
    }
    // A training that is asked for does not wait.
    kept_back(&claimed).await;
    t.append(&alice(), vec![text("more")]).await;
    assert_eq!(claim().await, None);
    t.store.enqueue(&alice(), &Demand { urgent: true, ..Demand::default() }).await.unwrap();
    let asked = claim().await.unwrap();
    // With what is published the count begins anew; a failure counts, and what was called off does not.
    let finish = Some((asked.fence, outcome(Some(generation(1).id))));
    t.store.publish(&alice(), generation(1), None, finish).await.unwrap();
    for wait in [0, 0, 100] {
        let (waited, claimed) = waits().await;
        assert_eq!(waited, wait);
        t.store.fail(&claimed.fence, "not finite", None).await.unwrap();
    }
    let (waited, cancelled) = waits().await;
    assert_eq!(waited, 200);
    t.store.cancel(&alice().tenant, &cancelled.job.id).await.unwrap();
    assert_eq!(waits().await.0, 0, "it has rested already");
}

pub(crate) async fn demands_add_up(t: Trial) {
    let training =
        TrainingOptions { rank: Some(4), learning_rate: Some(0.1 + 0.2), ..TrainingOptions::default() };
    let items = vec![text("a")];
    let appended = t.store.append_for(&alice(), None, [0; 32], items, Some(training.clone())).await.unwrap();
    let job = appended.job.unwrap();
    assert_eq!((job.training.as_ref(), job.from_scratch), (Some(&training), false));
    let demand = Demand { from_scratch: true, ..Demand::default() };
    let same = t.store.enqueue(&alice(), &demand).await.unwrap().unwrap();
    assert_eq!((&same.id, same.training.as_ref(), same.from_scratch), (&job.id, Some(&training), true));
    t.append(&alice(), vec![text("b")]).await;
    let claimed = t.claim().await.unwrap().job;
    assert_eq!((claimed.training, claimed.from_scratch), (Some(training), true));
    // The next job begins with no demands.
    let next = t.append(&alice(), vec![text("c")]).await.job.unwrap();
    assert_eq!((next.training, next.from_scratch), (None, false));
}

pub(crate) async fn a_job_reads_the_same_history_again(t: Trial) {
    let ids = async |claimed: &Claimed| {
        let items = t.store.history_of(&claimed.fence).await.unwrap();
        items.into_iter().map(|item| item.id.to_string()).collect::<Vec<_>>()
    };
    t.append(&alice(), vec![item("b", 2), item("a", 1)]).await;
    let first = t.claim().await.unwrap();
    t.append(&alice(), vec![item("early", 0)]).await;
    assert_eq!(ids(&first).await, ["a", "b"]);
    t.clock.advance_millis(LEASE);
    let again = t.claim().await.unwrap();
    assert_eq!(again.job.id, first.job.id);
    assert_eq!(ids(&again).await, ["a", "b"]);
    assert_fenced(t.store.history_of(&first.fence).await);
    t.store.finish(&again.fence, &outcome(None)).await.unwrap();
    let next = t.claim().await.unwrap();
    assert_eq!(ids(&next).await, ["early", "a", "b"]);
    // Back in the queue, a job takes in what comes.
    t.store.release(&next.fence).await.unwrap();
    t.append(&alice(), vec![item("late", 9)]).await;
    assert_eq!(ids(&t.claim().await.unwrap()).await, ["early", "a", "b", "late"]);
}

pub(crate) async fn a_checkpoint_comes_back(t: Trial) {
    let first = t.running_job(&alice()).await;
    assert_eq!(t.store.checkpoint(&first.fence, WORK).await.unwrap(), None);
    for state in [vec![1; 100_000], vec![2; 50], Vec::new(), vec![3; 7]] {
        t.store.save_checkpoint(&alice(), &first.fence, WORK, 1, state.clone()).await.unwrap();
        assert_eq!(t.store.checkpoint(&first.fence, WORK).await.unwrap(), Some(state));
    }
    assert_eq!(t.store.checkpoint(&first.fence, [6; 32]).await.unwrap(), None, "other work");
    t.clock.advance_millis(LEASE);
    let second = t.claim().await.unwrap();
    assert_fenced(t.store.save_checkpoint(&alice(), &first.fence, WORK, 1, vec![9]).await);
    assert_eq!(t.store.checkpoint(&second.fence, WORK).await.unwrap(), Some(vec![3; 7]));
    // Given back and claimed again, it is there still.
    t.store.release(&second.fence).await.unwrap();
    let third = t.claim().await.unwrap();
    assert_eq!(t.store.checkpoint(&third.fence, WORK).await.unwrap(), Some(vec![3; 7]));
    let other = t.running_job(&bob()).await;
    assert_fenced(t.store.save_checkpoint(&alice(), &other.fence, WORK, 1, vec![9]).await);
    assert_eq!(t.store.checkpoint(&other.fence, WORK).await.unwrap(), None);
}

pub(crate) async fn who_gets_on_is_not_given_up(t: Trial) {
    let save = async |claimed: &Claimed, work, step| {
        t.store.save_checkpoint(&alice(), &claimed.fence, work, step, vec![1]).await.unwrap()
    };
    let attempts = async || t.store.latest_job(&alice()).await.unwrap().unwrap().attempts;
    let mut claimed = t.running_job(&alice()).await;
    let killed = async || {
        t.clock.advance_millis(LEASE);
        t.claim().await
    };
    for step in 1..=3 * ATTEMPTS {
        assert!(save(&claimed, WORK, step).await);
        assert_eq!(attempts().await, 1);
        claimed = killed().await.unwrap();
        assert_eq!(claimed.job.attempts, 2);
    }
    // Other work begins at its own first step. Whoever begins anew has got on when it is further than ever.
    assert!(save(&claimed, [6; 32], 5).await);
    assert_eq!(attempts().await, 1);
    claimed = killed().await.unwrap();
    for step in [1, 4, 5] {
        assert!(!save(&claimed, [6; 32], step).await);
    }
    assert_eq!(attempts().await, 2);
    claimed = killed().await.unwrap();
    assert!(!save(&claimed, [6; 32], 5).await);
    assert_eq!(killed().await, None, "three attempts that came no further");
    let job = t.store.latest_job(&alice()).await.unwrap().unwrap();
    assert_eq!((job.state, job.attempts), (JobState::Failed, ATTEMPTS));
}

pub(crate) async fn a_checkpoint_ends_with_its_job(t: Trial) {
    for end in 0..5 {
        let claimed = t.running_job(&alice()).await;
        t.store.save_checkpoint(&alice(), &claimed.fence, WORK, 1, vec![1; 10]).await.unwrap();
        match end {
            0 => drop(t.store.finish(&claimed.fence, &outcome(None)).await.unwrap()),
            1 => drop(t.store.fail(&claimed.fence, "no", None).await.unwrap()),
            2 => drop(t.store.cancel(&alice().tenant, &claimed.job.id).await.unwrap()),
            3 => drop(t.forget_all(&alice()).await),
            _ => {
                let finish = Some((claimed.fence.clone(), outcome(Some(generation(1).id))));
                t.store.publish(&alice(), generation(1), None, finish).await.unwrap();
            }
        }
        assert_eq!(t.store.checkpoint(&claimed.fence, WORK).await.unwrap(), None, "end {end}");
    }
    let claimed = t.running_job(&alice()).await;
    t.store.save_checkpoint(&alice(), &claimed.fence, WORK, 1, vec![1; 10]).await.unwrap();
    assert!(t.store.erase_user(&alice()).await.unwrap());
    assert_eq!(t.store.checkpoint(&claimed.fence, WORK).await.unwrap(), None);
    assert!(!t.store.erase_user(&alice()).await.unwrap(), "nothing is left to erase");
}

/// Publishes a generation that has learnt from items with these ids.
async fn learn(t: &Trial, user: &AdapterId, seed: u8, items: &[&str]) -> GenerationId {
    learn_judged(t, user, seed, items, &[], false).await
}

/// Publishes a generation that has learnt from items with these ids and was judged by others.
async fn learn_judged(
    t: &Trial,
    user: &AdapterId,
    seed: u8,
    items: &[&str],
    judges: &[&str],
    from_scratch: bool,
) -> GenerationId {
    let all = t.store.all_history(user).await.unwrap();
    let hashes = |ids: &[&str]| {
        all.iter().filter(|item| ids.contains(&item.id.as_str())).map(item_hash).collect::<Vec<_>>()
    };
    let lesson = Lesson {
        from_scratch,
        manifest: hashes(items),
        judged: hashes(judges),
        items: all.len() as u64,
        new_items: 1,
        ..Lesson::default()
    };
    t.store.enqueue(user, &Demand::default()).await.unwrap();
    let claimed = t.claim().await.unwrap();
    let head = t.head(user).await;
    let new = NewGeneration { parent: head, ..generation(seed) };
    let finish = (claimed.fence, outcome(Some(new.id)));
    t.store.publish_lesson(user, new, head, finish, lesson).await.unwrap().id
}

pub(crate) async fn what_has_learnt_from_an_item_is_forgotten_with_it(t: Trial) {
    t.append(&alice(), vec![item("a", 1), item("b", 2), item("c", 3), item("d", 4)]).await;
    let first = learn(&t, &alice(), 1, &["a"]).await;
    let imported = t.publish(&alice(), generation(2), Some(first)).await;
    let third = learn(&t, &alice(), 3, &["a", "b"]).await;
    let fourth = learn(&t, &alice(), 4, &["a", "b", "c"]).await;
    let manifest = t.store.manifest(&alice(), &third).await.unwrap().unwrap();
    let Manifest::Items(hashes) = &manifest else { panic!("unknown") };
    assert!(hashes.len() == 2 && hashes.is_sorted());
    assert_eq!(t.store.manifest(&alice(), &imported).await.unwrap(), None);
    let bytes = t.store.history_stats(&alice()).await.unwrap().bytes;

    let running = t.running_job(&alice()).await;
    t.store.save_checkpoint(&alice(), &running.fence, WORK, 1, vec![1]).await.unwrap();
    let forget = async |id: &str| {
        let selection = Selection::Item(id.parse().unwrap());
        t.store.forget_items(&alice(), &selection).await.unwrap().unwrap()
    };
    let forgotten = forget("b").await;
    assert_eq!((forgotten.items, forgotten.head), (1, Some(imported)));
    assert_eq!(forgotten.generations, [fourth, third]);
    assert_eq!(t.head(&alice()).await, Some(imported));
    assert!(t.store.fetch(&alice(), &third).await.is_err(), "its files are gone");
    assert_eq!(t.store.generations(&alice()).await.unwrap().len(), 2);
    let stats = t.store.history_stats(&alice()).await.unwrap();
    assert_eq!((stats.items, stats.bytes), (4, bytes - 5 + "something to learn".len() as u64));
    // The job that ran has read it: it can do nothing more, and its successor begins afresh and at once.
    assert_fenced(t.store.finish(&running.fence, &outcome(None)).await);
    let job = t.store.job(&alice().tenant, &running.job.id).await.unwrap().unwrap();
    assert_eq!(job.state, JobState::Cancelled);
    let policy =
        Policy { min_new_items: 99, debounce_millis: 99, max_staleness_millis: 99, ..Policy::AT_ONCE };
    let next = t.store.claim_ripe("worker", LEASE, ATTEMPTS, &policy).await.unwrap().unwrap();
    assert_eq!((&next.job.id, next.job.from_scratch), (&forgotten.job.unwrap().id, true));
    assert_eq!(t.store.checkpoint(&next.fence, WORK).await.unwrap(), None);
    // What no generation has learnt from or was judged by is nobody's loss.
    let forgotten = forget("d").await;
    assert_eq!((forgotten.items, forgotten.head, forgotten.generations.len()), (1, Some(imported), 0));
    let forgotten = forget("a").await;
    assert_eq!((forgotten.head, &forgotten.generations[..]), (Some(imported), &[first][..]));
    let nothing = forget("a").await;
    assert_eq!((nothing.items, nothing.job), (0, None));
    assert_eq!(t.store.forget_items(&bob(), &Selection::Times(None, None)).await.unwrap(), None);
    // With the last item the last reason to train goes.
    let rest = t.store.forget_items(&alice(), &Selection::Times(None, None)).await.unwrap().unwrap();
    assert_eq!((rest.items, rest.job), (2, None));
    assert_eq!(t.claim().await, None);
}

pub(crate) async fn who_was_judged_by_an_item_is_forgotten_with_it(t: Trial) {
    let forget = async |id: &str| {
        let selection = Selection::Item(id.parse().unwrap());
        t.store.forget_items(&alice(), &selection).await.unwrap().unwrap()
    };
    t.append(&alice(), ["a", "b", "c", "d"].into_iter().zip(1..).map(|(id, at)| item(id, at)).collect())
        .await;
    let first = learn_judged(&t, &alice(), 1, &["a"], &["b"], true).await;
    // Goes on from the first, and so has what judged that behind it too; the third does not.
    let second = learn_judged(&t, &alice(), 2, &["a"], &["c"], false).await;
    let third = learn_judged(&t, &alice(), 3, &["a"], &["d"], true).await;
    let manifest = t.store.manifest(&alice(), &second).await.unwrap().unwrap();
    assert!(matches!(manifest, Manifest::Items(items) if items.len() == 1), "judges are not learnt");
    let forgotten = forget("b").await;
    assert_eq!((&forgotten.generations[..], forgotten.head), (&[second, first][..], Some(third)));
    let forgotten = forget("c").await;
    assert_eq!((forgotten.generations.len(), forgotten.head), (0, Some(third)));
    let forgotten = forget("d").await;
    assert_eq!((&forgotten.generations[..], forgotten.head), (&[third][..], None));
}

pub(crate) async fn a_forgotten_history_leaves_no_adapter(t: Trial) {
    let forget = async || t.store.forget_items(&alice(), &Selection::All).await.unwrap().unwrap();
    assert_eq!(t.store.forget_items(&alice(), &Selection::All).await.unwrap(), None);
    t.append(&alice(), vec![item("a", 1), item("b", 2)]).await;
    let imported = t.publish(&alice(), generation(1), None).await;
    let trained = learn(&t, &alice(), 2, &["a"]).await;
    // One that knows nothing of the items that are left, and is pinned.
    let other = learn(&t, &alice(), 3, &[]).await;
    t.store.pin(&alice(), &other, true).await.unwrap();
    let running = t.running_job(&alice()).await;
    t.store.save_checkpoint(&alice(), &running.fence, WORK, 1, vec![1]).await.unwrap();
    let moves = t.store.head_moves(&alice());
    let forgotten = forget().await;
    assert_eq!((forgotten.items, forgotten.head, forgotten.job), (3, Some(imported), None));
    assert_eq!(forgotten.generations, [other, trained]);
    assert_eq!(t.head(&alice()).await, Some(imported), "it was uploaded, and has learnt from no item");
    assert_ne!(t.store.head_moves(&alice()), moves, "what is resident is stale");
    for gone in [trained, other] {
        assert!(t.store.fetch(&alice(), &gone).await.is_err(), "its files are gone");
    }
    // The job that ran can bring nothing back.
    let finish = Some((running.fence.clone(), outcome(Some(generation(4).id))));
    assert_fenced(t.store.publish(&alice(), generation(4), Some(imported), finish).await);
    assert_eq!(t.store.history_stats(&alice()).await.unwrap(), HistoryStats::default());

    // The last item takes all with it as well, and an adapter that outlived its history can still be forgotten.
    t.append(&alice(), vec![item("c", 3)]).await;
    let trained = learn(&t, &alice(), 5, &[]).await;
    let last = t.store.forget_items(&alice(), &Selection::Item("c".parse().unwrap())).await.unwrap().unwrap();
    assert_eq!((&last.generations[..], last.head), (&[trained][..], Some(imported)));
    let orphan = learn(&t, &alice(), 6, &[]).await;
    assert_eq!(t.head(&alice()).await, Some(orphan));
    let forgotten = forget().await;
    assert_eq!((forgotten.items, &forgotten.generations[..]), (0, &[orphan][..]));
    // Without an uploaded one the base is left.
    assert!(t.store.erase_adapter(&alice()).await.unwrap());
    t.append(&alice(), vec![item("d", 4)]).await;
    learn(&t, &alice(), 7, &["d"]).await;
    assert_eq!(forget().await.head, None);
    assert_eq!(t.head(&alice()).await, None);
}

pub(crate) async fn a_baseline_comes_back(t: Trial) {
    t.append(&alice(), vec![item("a", 1)]).await;
    let loss = |item, nats, tokens| OldLoss { item: [item; 32], nats, tokens };
    let losses = vec![loss(1, 0.1 + 0.2, 7), loss(2, 1e-300, u32::MAX), loss(255, 0.0, 0)];
    for (seed, baseline) in [(1, losses), (2, Vec::new())] {
        let claimed = t.running_job(&alice()).await;
        let lesson = Lesson { baseline: baseline.clone(), ..Lesson::default() };
        let (head, finish) = (t.head(&alice()).await, (claimed.fence, outcome(Some(generation(seed).id))));
        t.store.publish_lesson(&alice(), generation(seed), head, finish, lesson).await.unwrap();
        assert_eq!(t.store.baseline(&alice(), &generation(seed).id).await.unwrap(), baseline);
    }
    let unknown = [(alice(), generation(3).id), (bob(), generation(1).id)];
    for (user, id) in unknown {
        assert_eq!(t.store.baseline(&user, &id).await.unwrap(), []);
    }
}

pub(crate) async fn ranges_select_what_they_say(t: Trial) {
    let fill = async || {
        let items = ["a", "b", "c", "d", "e"].into_iter().zip(1..);
        t.append(&alice(), items.map(|(id, at)| item(id, at)).collect()).await;
    };
    let times = |from: Option<i64>, to: Option<i64>| Selection::Times(from.map(Timestamp), to.map(Timestamp));
    let items = |from: Option<&str>, to: Option<&str>| {
        let id = |id: &str| id.parse().unwrap();
        Selection::Items(from.map(id), to.map(id))
    };
    for (selection, left) in [
        (times(Some(2), Some(4)), "ae"),
        (times(None, Some(2)), "cde"),
        (times(Some(4), None), "abc"),
        (times(Some(4), Some(3)), "abcde"),
        (items(Some("b"), Some("d")), "ae"),
        (items(None, Some("b")), "cde"),
        (items(Some("d"), None), "abc"),
        (items(Some("d"), Some("b")), "abcde"),
        (items(Some("nobody"), None), "abcde"),
        (items(None, Some("nobody")), "abcde"),
        (times(None, None), ""),
        (Selection::All, ""),
    ] {
        fill().await;
        t.store.forget_items(&alice(), &selection).await.unwrap();
        assert_eq!(t.ids(&alice()).await.concat(), left, "{selection:?}");
    }
}

pub(crate) async fn progress_is_kept(t: Trial) {
    assert_eq!(t.store.progress(&alice(), None, 10).await.unwrap(), None);
    t.append(&alice(), vec![item("a", 1), item("b", 2)]).await;
    let first = learn(&t, &alice(), 1, &["a"]).await;
    t.store.enqueue(&alice(), &Demand::default()).await.unwrap();
    let claimed = t.claim().await.unwrap();
    let lesson = Lesson { from_scratch: true, items: 2, replayed_items: 2, ..Lesson::default() };
    t.store.finish_lesson(&claimed.fence, &outcome(None), &lesson).await.unwrap();
    assert_fenced(t.store.finish_lesson(&claimed.fence, &outcome(None), &lesson).await);
    let page = t.store.progress(&alice(), None, 1).await.unwrap().unwrap();
    assert_eq!(page.points.entries[0].generation, Some(first));
    let rest = t.store.progress(&alice(), page.points.next, 1).await.unwrap().unwrap();
    let point = &rest.points.entries[0];
    assert_eq!((&point.job, point.from_scratch, point.generation), (&claimed.job.id, true, None));
    assert_eq!((point.items, point.new_items, point.replayed_items, point.tokens), (2, 0, 2, 1234));
    assert_eq!(rest.points.next, None);
    assert_eq!((rest.updates.trainings, rest.from_scratch.trainings), (1, 1));
    assert_eq!((rest.updates.tokens, rest.updates.seconds), (1234, 5.5));
}

pub(crate) async fn updates_are_counted_whatever_comes_of_them(t: Trial) {
    let updates = async || t.store.updates_since_full(&alice()).await.unwrap();
    assert_eq!(updates().await, 0);
    let lesson = |from_scratch| Lesson { from_scratch, ..Lesson::default() };
    let kept_back = async |from_scratch| {
        let claimed = t.running_job(&alice()).await;
        t.store.finish_lesson(&claimed.fence, &outcome(None), &lesson(from_scratch)).await.unwrap();
    };
    t.append(&alice(), vec![text("a")]).await;
    learn_judged(&t, &alice(), 1, &[], &[], true).await;
    assert_eq!(updates().await, 0);
    learn_judged(&t, &alice(), 2, &[], &[], false).await;
    kept_back(false).await;
    assert_eq!(updates().await, 2, "one was published, and one kept back");
    let bobs = t.running_job(&bob()).await;
    t.store.finish_lesson(&bobs.fence, &outcome(None), &lesson(true)).await.unwrap();
    let called_off = t.running_job(&alice()).await;
    t.store.give_update_up(&called_off.fence, &outcome(None), &lesson(false)).await.unwrap();
    t.store.cancel(&alice().tenant, &called_off.job.id).await.unwrap();
    assert_eq!(updates().await, 2, "what was called off is none, nor is another user's");
    kept_back(true).await;
    assert_eq!(updates().await, 0, "also one from fresh weights that was kept back");
    kept_back(false).await;
    assert_eq!(updates().await, 1);
}

/// What trainings have cost in all: tokens and seconds.
async fn costs(t: &Trial) -> (u64, f64) {
    let progress = t.store.progress(&alice(), None, 10).await.unwrap().unwrap();
    let [updates, whole] = [progress.updates, progress.from_scratch];
    (updates.tokens + whole.tokens, updates.seconds + whole.seconds)
}

/// A job whose update is booked yields to another: what the other is told of its cost is what is not booked.
pub(crate) async fn an_update_of_no_use_is_booked_once(t: Trial) {
    let cost = |trained_tokens, seconds| JobOutcome { trained_tokens, seconds, ..outcome(None) };
    let lesson = |from_scratch| Lesson { from_scratch, items: 2, new_items: 1, ..Lesson::default() };
    let first = t.running_job(&alice()).await;
    t.store.begin_lesson(&first.fence, &lesson(false)).await.unwrap();
    t.clock.advance_millis(2_000);
    t.store.give_update_up(&first.fence, &cost(100, 2.0), &lesson(false)).await.unwrap();
    t.store.begin_lesson(&first.fence, &lesson(true)).await.unwrap();
    t.clock.advance_millis(1_000);
    let progress = JobProgress { step: 1, steps: 9, loss: 1.0, tokens: 130 };
    t.store.beat(&first.fence, Some(progress), LEASE).await.unwrap();
    t.append(&alice(), vec![text("b")]).await;
    t.store.release(&first.fence).await.unwrap();
    let next = t.claim().await.unwrap();
    assert_eq!(next.spent, Spent { tokens: 30, seconds: 1.0 });
    // Ended before it has begun, it is booked as what the first was about to do.
    t.store.fail(&next.fence, "the learning rate is too large", None).await.unwrap();
    assert_eq!(costs(&t).await, (130, 3.0));
    let points = t.store.progress(&alice(), None, 10).await.unwrap().unwrap().points.entries;
    let points: Vec<_> = points.iter().map(|point| (&point.job, point.from_scratch, point.tokens)).collect();
    assert_eq!(points, [(&first.job.id, false, 100), (&next.job.id, true, 30)]);
}

/// What failed for good, was called off or given up has cost something, too.
pub(crate) async fn trainings_without_an_end_are_booked(t: Trial) {
    let lesson =
        Lesson { from_scratch: true, items: 5, new_items: 3, replayed_items: 2, ..Lesson::default() };
    let at = |tokens| Some(JobProgress { step: 1, steps: 9, loss: 1.0, tokens });
    let begun = async |tokens| {
        let claimed = t.claim().await.unwrap();
        t.store.begin_lesson(&claimed.fence, &lesson).await.unwrap();
        t.clock.advance_millis(1_000);
        t.store.beat(&claimed.fence, at(tokens), LEASE).await.unwrap();
        claimed
    };
    t.append(&alice(), vec![text("a")]).await;
    let failed = begun(1).await;
    t.store.fail(&failed.fence, "not finite", None).await.unwrap();
    assert_eq!(costs(&t).await, (1, 1.0));
    let point = t.store.progress(&alice(), None, 10).await.unwrap().unwrap().points.entries.remove(0);
    assert_eq!((&point.job, point.at, point.from_scratch), (&failed.job.id, t.now(), true));
    assert_eq!((point.items, point.new_items, point.replayed_items), (5, 3, 2));
    assert_eq!((point.new_bits, point.generation), (None, None));

    t.append(&alice(), vec![text("b")]).await;
    let cancelled = begun(10).await;
    t.store.cancel(&alice().tenant, &cancelled.job.id).await.unwrap();
    t.store.cancel(&alice().tenant, &cancelled.job.id).await.unwrap();
    assert_eq!(costs(&t).await, (11, 2.0));
    // Also where it waits for another try, or its end is that of what it has read.
    t.append(&alice(), vec![text("c")]).await;
    let waiting = begun(100).await;
    t.store.fail(&waiting.fence, "out of memory", Some(1 << 40)).await.unwrap();
    assert_eq!(costs(&t).await, (11, 2.0), "it is not over");
    t.store.cancel(&alice().tenant, &waiting.job.id).await.unwrap();
    assert_eq!(costs(&t).await, (111, 3.0));
    t.append(&alice(), vec![text("d")]).await;
    begun(1_000).await;
    t.forget_all(&alice()).await;
    assert_eq!(costs(&t).await, (1_111, 4.0));
    // Killed again and again: up to the last sign of life of each.
    t.append(&alice(), vec![text("e")]).await;
    for _ in 0..ATTEMPTS {
        begun(10_000).await;
        t.clock.advance_millis(LEASE);
    }
    assert_eq!(t.claim().await, None);
    let (tokens, seconds) = (10_000 * u64::from(ATTEMPTS), f64::from(ATTEMPTS));
    assert_eq!(costs(&t).await, (1_111 + tokens, 4.0 + seconds));
    // What has not begun to train has cost nothing.
    t.append(&alice(), vec![text("f")]).await;
    let idle = t.claim().await.unwrap();
    t.store.fail(&idle.fence, "no", None).await.unwrap();
    let progress = t.store.progress(&alice(), None, 10).await.unwrap().unwrap();
    assert_eq!(progress.from_scratch.trainings, 5);
    assert_fenced(t.store.begin_lesson(&idle.fence, &lesson).await);
}

pub(crate) async fn an_update_of_no_use_is_booked_apart(t: Trial) {
    let cost = |trained_tokens, seconds| JobOutcome { trained_tokens, seconds, ..outcome(None) };
    let lesson = |from_scratch, new_items| Lesson { from_scratch, items: 2, new_items, ..Lesson::default() };
    let first = t.running_job(&alice()).await;
    assert!(!first.job.from_scratch);
    t.store.give_update_up(&first.fence, &cost(100, 2.0), &lesson(false, 1)).await.unwrap();
    // Whoever takes the job up then begins where it was.
    t.clock.advance_millis(LEASE);
    let second = t.claim().await.unwrap();
    assert!(second.job.from_scratch && second.job.id == first.job.id);
    assert_fenced(t.store.give_update_up(&first.fence, &cost(100, 2.0), &lesson(false, 1)).await);
    // The whole of it comes with the end.
    let done = t.store.finish_lesson(&second.fence, &cost(350, 7.5), &lesson(true, 2)).await.unwrap();
    assert_eq!(done.outcome.map(|outcome| (outcome.trained_tokens, outcome.seconds)), Some((350, 7.5)));
    let other = t.running_job(&alice()).await;
    t.store.finish_lesson(&other.fence, &cost(10, 1.0), &lesson(false, 1)).await.unwrap();
    let progress = t.store.progress(&alice(), None, 10).await.unwrap().unwrap();
    let points = progress.points.entries.iter();
    let points: Vec<_> =
        points.map(|point| (&point.job, point.from_scratch, point.tokens, point.seconds)).collect();
    let (first, other) = (&first.job.id, &other.job.id);
    assert_eq!(points, [(first, false, 100, 2.0), (first, true, 250, 5.5), (other, false, 10, 1.0)]);
    let costs = |cost: Cost| (cost.trainings, cost.tokens, cost.seconds);
    assert_eq!(costs(progress.updates), (2, 110, 3.0));
    assert_eq!(costs(progress.from_scratch), (1, 250, 5.5));
}
