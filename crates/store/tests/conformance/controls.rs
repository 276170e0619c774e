//! Negative controls: on a store that is broken on purpose, the suite must fail.
//!
//! Each control breaks the store from outside, with a trigger in its database that undoes one
//! guarantee, and then runs the property that is there to notice.

use sqlx::{ConnectOptions as _, Connection as _};

use crate::trial::Trial;
use crate::{adapters, history, jobs, learning, lineage, users};

/// Runs `property` on a store with `trigger`, and asserts that it panics.
async fn must_fail<F>(trigger: impl AsRef<str>, property: impl FnOnce(Trial) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let folder = tempfile::tempdir().unwrap();
    let trial = Trial::on_disk(folder.path()).await;
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(folder.path().join("atelier.db"));
    let mut outside = options.connect().await.unwrap();
    let trigger = trigger.as_ref();
    sqlx::raw_sql(sqlx::AssertSqlSafe(trigger.to_owned())).execute(&mut outside).await.unwrap();
    outside.close().await.unwrap();
    let result = tokio::spawn(property(trial)).await;
    assert!(result.is_err_and(|error| error.is_panic()), "the suite did not notice: {trigger}");
}

#[tokio::test]
async fn a_forgotten_answer_is_noticed() {
    let trigger =
        "CREATE TRIGGER t AFTER INSERT ON requests BEGIN DELETE FROM requests WHERE rowid = NEW.rowid; END";
    must_fail(trigger, history::a_replay_changes_nothing).await;
    must_fail(trigger, history::a_key_with_another_request_is_refused).await;
    must_fail(trigger, history::concurrent_replays_store_once).await;
}

#[tokio::test]
async fn a_lost_item_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER INSERT ON items WHEN NEW.seq = 3 BEGIN DELETE FROM items WHERE seq = NEW.seq; END";
    must_fail(trigger, history::items_come_back_in_order).await;
    must_fail(trigger, history::a_cancelled_append_is_whole_or_absent).await;
}

#[tokio::test]
async fn a_token_that_does_not_grow_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF token ON jobs WHEN NEW.token <> 1
        BEGIN UPDATE jobs SET token = 1 WHERE seq = NEW.seq; END";
    must_fail(trigger, jobs::an_old_fence_can_do_nothing).await;
    must_fail(trigger, jobs::an_expired_lease_passes_the_job_on).await;
    must_fail(trigger, adapters::a_stale_publisher_changes_nothing).await;
}

#[tokio::test]
async fn a_job_that_goes_to_two_workers_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF token ON jobs WHEN NEW.seq = 7 AND NEW.token = 1
        BEGIN UPDATE jobs SET state = 'queued' WHERE seq = NEW.seq; END";
    must_fail(trigger, jobs::each_job_goes_to_one_worker).await;
}

#[tokio::test]
async fn a_head_without_compare_and_set_is_noticed() {
    // Every publisher then finds the head it expects.
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF head ON users WHEN NEW.head IS NOT NULL
        BEGIN UPDATE users SET head = NULL WHERE id = NEW.id; END";
    must_fail(trigger, adapters::one_of_two_publishers_wins).await;
    must_fail(trigger, adapters::one_of_many_equal_publishers_wins).await;
}

#[tokio::test]
async fn a_pin_that_is_lost_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF pinned ON generations WHEN NEW.pinned
        BEGIN UPDATE generations SET pinned = 0 WHERE seq = NEW.seq; END";
    must_fail(trigger, lineage::pinned_generations_stay).await;
}

#[tokio::test]
async fn a_pin_that_outlives_its_adapter_is_noticed() {
    let trigger = "CREATE TABLE pins (id BLOB);
        CREATE TRIGGER t AFTER DELETE ON generations WHEN OLD.pinned BEGIN INSERT INTO pins VALUES (OLD.id); END;
        CREATE TRIGGER u AFTER INSERT ON generations WHEN NEW.id IN (SELECT id FROM pins)
        BEGIN UPDATE generations SET pinned = 1 WHERE seq = NEW.seq; END";
    must_fail(trigger, lineage::an_erased_adapter_leaves_its_user).await;
}

#[tokio::test]
async fn a_forgotten_origin_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER INSERT ON generations
        BEGIN UPDATE generations SET origin = 'trained' WHERE seq = NEW.seq; END";
    must_fail(trigger, lineage::generations_say_where_they_come_from).await;
}

#[tokio::test]
async fn a_lost_generation_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER INSERT ON generations WHEN (SELECT count(*) FROM generations) = 4
        BEGIN DELETE FROM generations WHERE seq = NEW.seq - 2; END";
    must_fail(trigger, lineage::generations_come_in_pages).await;
}

#[tokio::test]
async fn a_deletion_that_does_nothing_is_noticed() {
    let trigger = "CREATE TRIGGER t BEFORE DELETE ON generations BEGIN SELECT RAISE(IGNORE); END";
    must_fail(trigger, lineage::generations_are_deleted_singly).await;
    must_fail(trigger, lineage::an_erased_adapter_leaves_its_user).await;
    must_fail(trigger, lineage::shared_adapters_are_listed_and_erased).await;
}

#[tokio::test]
async fn an_unmoved_head_is_noticed() {
    let trigger =
        "CREATE TRIGGER t AFTER UPDATE OF head ON users WHEN OLD.head IS NOT NULL AND NEW.head IS NOT NULL
        BEGIN UPDATE users SET head = OLD.head WHERE id = NEW.id; END";
    must_fail(trigger, lineage::heads_can_be_moved).await;
    must_fail(trigger, lineage::any_head_can_be_replaced).await;
    must_fail(trigger, lineage::a_deletion_does_not_meet_a_new_head).await;
}

#[tokio::test]
async fn a_shared_adapter_that_is_its_namesake_is_noticed() {
    // As if the sign before its name were dropped on the way in.
    let trigger = "CREATE TRIGGER t AFTER INSERT ON users WHEN NEW.name LIKE '@%' BEGIN
            INSERT OR IGNORE INTO users (tenant, name, created_at) VALUES (NEW.tenant, substr(NEW.name, 2), 0);
            INSERT OR IGNORE INTO users (tenant, name, created_at) VALUES (NEW.tenant, 'x' || NEW.name, 0);
        END";
    must_fail(trigger, lineage::shared_adapters_are_listed_and_erased).await;
    must_fail(trigger, lineage::shared_adapters_are_no_users).await;
}

#[tokio::test]
async fn a_user_who_is_not_quite_erased_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER DELETE ON users
        BEGIN INSERT INTO users (id, tenant, name, created_at) VALUES (OLD.id, OLD.tenant, OLD.name, 0); END";
    must_fail(trigger, users::an_erased_user_is_gone).await;
    must_fail(trigger, users::an_erased_user_starts_from_nothing).await;
}

#[tokio::test]
async fn a_shared_key_is_noticed() {
    // As if the answers to uploads were not the user's own.
    let trigger = "CREATE TRIGGER t AFTER INSERT ON requests
        BEGIN INSERT OR IGNORE INTO requests SELECT u.id, NEW.key, NEW.hash, 0, 0, 0, NULL, NEW.created_at FROM users u; END;
        CREATE TRIGGER u AFTER INSERT ON users
        BEGIN INSERT INTO requests SELECT NEW.id, r.key, r.hash, 0, 0, 0, NULL, r.created_at FROM requests r; END";
    must_fail(trigger, history::keys_belong_to_users_and_expire).await;
    must_fail(trigger, users::tenants_are_apart).await;
}

#[tokio::test]
async fn a_job_that_cannot_be_called_off_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF state ON jobs WHEN NEW.state = 'cancelled'
        BEGIN UPDATE jobs SET state = OLD.state, token = OLD.token WHERE seq = NEW.seq; END";
    must_fail(trigger, learning::a_cancelled_job_is_over).await;
    must_fail(trigger, learning::what_has_learnt_from_an_item_is_forgotten_with_it).await;
}

#[tokio::test]
async fn a_tenant_who_pushes_in_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF served ON turns
        BEGIN UPDATE turns SET served = 0 WHERE tenant = NEW.tenant; END;
        CREATE TRIGGER u AFTER INSERT ON turns BEGIN UPDATE turns SET served = 0; END";
    must_fail(trigger, learning::tenants_take_turns).await;
}

#[tokio::test]
async fn a_pause_that_does_not_hold_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER INSERT ON pauses BEGIN DELETE FROM pauses; END";
    must_fail(trigger, learning::a_pause_holds_jobs_back).await;
    must_fail(trigger, learning::a_pause_of_the_server_holds_everybody).await;
}

#[tokio::test]
async fn a_forgetful_manifest_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER INSERT ON manifests
        BEGIN UPDATE manifests SET items = x'' WHERE generation = NEW.generation; END";
    must_fail(trigger, learning::what_has_learnt_from_an_item_is_forgotten_with_it).await;
}

#[tokio::test]
async fn a_history_that_grows_under_a_job_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF last_item ON jobs WHEN NEW.last_item < 1000000
        BEGIN UPDATE jobs SET last_item = 1000000 WHERE seq = NEW.seq; END";
    must_fail(trigger, learning::a_job_reads_the_same_history_again).await;
}

#[tokio::test]
async fn a_checkpoint_that_outlives_its_job_is_noticed() {
    must_fail("DROP TRIGGER checkpoints_end", learning::a_checkpoint_ends_with_its_job).await;
}

#[tokio::test]
async fn lost_progress_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER INSERT ON progress WHEN NEW.scratch BEGIN DELETE FROM progress WHERE seq = NEW.seq; END";
    must_fail(trigger, learning::progress_is_kept).await;
}

#[tokio::test]
async fn costs_that_vanish_are_noticed() {
    // As it was before: every claim begins at nothing.
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF spent_tokens ON jobs WHEN NEW.spent_tokens > 0
        BEGIN UPDATE jobs SET spent_tokens = 0 WHERE seq = NEW.seq; END";
    must_fail(trigger, jobs::costs_outlive_claims).await;
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF spent_seconds ON jobs WHEN NEW.spent_seconds > 0
        BEGIN UPDATE jobs SET spent_seconds = 0 WHERE seq = NEW.seq; END";
    must_fail(trigger, jobs::costs_outlive_claims).await;
    // And a job's first training is booked under what it became.
    let trigger = "CREATE TRIGGER t AFTER INSERT ON progress WHEN NOT NEW.scratch
        BEGIN UPDATE progress SET scratch = 1 WHERE seq = NEW.seq; END";
    must_fail(trigger, learning::an_update_of_no_use_is_booked_apart).await;
    let trigger =
        "CREATE TRIGGER t AFTER UPDATE OF scratch ON jobs WHEN NEW.scratch AND NEW.state = 'running'
        BEGIN UPDATE jobs SET scratch = 0 WHERE seq = NEW.seq; END";
    must_fail(trigger, learning::an_update_of_no_use_is_booked_apart).await;
}

#[tokio::test]
async fn attempts_that_are_not_counted_are_noticed() {
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF attempts ON jobs WHEN NEW.attempts > 1
        BEGIN UPDATE jobs SET attempts = 1 WHERE seq = NEW.seq; END";
    must_fail(trigger, jobs::a_job_is_given_up_after_its_attempts).await;
    must_fail(trigger, jobs::a_failed_job_waits_for_its_retry).await;
}

#[tokio::test]
async fn a_lease_that_never_ends_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF lease_until ON jobs WHEN NEW.lease_until < 9000000000000
        BEGIN UPDATE jobs SET lease_until = 9000000000000 WHERE seq = NEW.seq; END";
    must_fail(trigger, jobs::an_expired_lease_passes_the_job_on).await;
    must_fail(trigger, jobs::a_job_is_given_up_after_its_attempts).await;
}

#[tokio::test]
async fn a_beat_that_is_not_felt_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF lease_until ON jobs
        WHEN OLD.state = 'running' AND NEW.token = OLD.token AND NEW.state = 'running'
        BEGIN UPDATE jobs SET lease_until = OLD.lease_until WHERE seq = NEW.seq; END";
    must_fail(trigger, jobs::a_beat_extends_the_lease).await;
}

#[tokio::test]
async fn a_user_who_pushes_in_is_noticed() {
    // The last to come is the first to be served.
    let trigger = "CREATE TRIGGER t AFTER INSERT ON jobs WHEN NEW.seq > 0
        BEGIN UPDATE jobs SET seq = -NEW.seq WHERE seq = NEW.seq; END";
    must_fail(trigger, jobs::the_oldest_claimable_job_is_next).await;
}

#[tokio::test]
async fn a_job_that_does_not_wait_for_more_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF touched_at ON jobs WHEN NEW.touched_at > NEW.created_at
        BEGIN UPDATE jobs SET touched_at = NEW.created_at WHERE seq = NEW.seq; END";
    must_fail(trigger, learning::a_job_waits_as_the_policy_says).await;
}

#[tokio::test]
async fn a_job_for_too_few_items_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF new_items ON jobs WHEN NEW.new_items BETWEEN 1 AND 98
        BEGIN UPDATE jobs SET new_items = 99 WHERE seq = NEW.seq; END";
    must_fail(trigger, learning::a_job_waits_as_the_policy_says).await;
}

#[tokio::test]
async fn a_job_that_grows_stale_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER INSERT ON jobs
        BEGIN UPDATE jobs SET created_at = created_at + 10 WHERE seq = NEW.seq; END";
    must_fail(trigger, learning::a_job_waits_as_the_policy_says).await;
}

#[tokio::test]
async fn a_demand_that_waits_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF urgent ON jobs WHEN NEW.urgent
        BEGIN UPDATE jobs SET urgent = 0 WHERE seq = NEW.seq; END";
    must_fail(trigger, learning::a_job_waits_as_the_policy_says).await;
    must_fail(trigger, learning::what_has_learnt_from_an_item_is_forgotten_with_it).await;
}

#[tokio::test]
async fn demands_that_are_lost_on_the_way_are_noticed() {
    // As it was before: whoever yields takes its demands along. A job that waits alone is the one that it yields to.
    for lost in [
        "new_items = OLD.new_items",
        "urgent = OLD.urgent",
        "scratch = OLD.scratch",
        "training = OLD.training",
    ] {
        let trigger = format!(
            "CREATE TRIGGER t AFTER UPDATE ON jobs WHEN NEW.state = 'queued' AND OLD.state = 'queued'
                 AND EXISTS (SELECT 1 FROM jobs r WHERE r.user_id = NEW.user_id AND r.state = 'running')
                 AND NEW.new_items > 1
             BEGIN UPDATE jobs SET {lost} WHERE seq = NEW.seq; END"
        );
        must_fail(trigger, jobs::a_job_that_yields_hands_its_demands_on).await;
    }
    // Nor may it overrule the newer one.
    let trigger = "CREATE TRIGGER t AFTER UPDATE ON jobs WHEN NEW.state = 'queued' AND OLD.state = 'queued'
             AND NEW.new_items > 1 AND NEW.training IS NOT NULL
         BEGIN UPDATE jobs SET training = (SELECT r.training FROM jobs r WHERE r.user_id = NEW.user_id AND r.state = 'running')
             WHERE seq = NEW.seq AND EXISTS (
                 SELECT 1 FROM jobs r WHERE r.user_id = NEW.user_id AND r.state = 'running'); END";
    must_fail(trigger, jobs::a_job_that_yields_hands_its_demands_on).await;
}

#[tokio::test]
async fn a_retry_that_comes_too_early_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER UPDATE OF not_before ON jobs WHEN NEW.not_before > 0
        BEGIN UPDATE jobs SET not_before = 0 WHERE seq = NEW.seq; END";
    must_fail(trigger, jobs::a_failed_job_waits_for_its_retry).await;
    must_fail(trigger, learning::a_job_says_what_it_waits_for).await;
}

#[tokio::test]
async fn an_adapter_that_outlives_its_history_is_noticed() {
    // As it was before: the items go, and what has learnt from them serves on.
    let trigger =
        "CREATE TRIGGER t BEFORE UPDATE OF head ON users WHEN OLD.head IS NOT NULL AND NEW.items = 0
        BEGIN SELECT RAISE(IGNORE); END;
        CREATE TRIGGER u BEFORE DELETE ON generations BEGIN SELECT RAISE(IGNORE); END";
    must_fail(trigger, learning::a_forgotten_history_leaves_no_adapter).await;
}

#[tokio::test]
async fn a_judge_that_is_not_remembered_is_noticed() {
    let trigger = "CREATE TRIGGER t AFTER INSERT ON manifests
        BEGIN UPDATE manifests SET judged = x'' WHERE generation = NEW.generation; END";
    must_fail(trigger, learning::who_was_judged_by_an_item_is_forgotten_with_it).await;
}
