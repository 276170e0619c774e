//! One suite of properties, run on every kind of store, and negative controls for the suite itself.
#![expect(clippy::unwrap_used, reason = "tests")]

mod adapters;
mod controls;
mod history;
mod jobs;
mod learning;
mod lineage;
mod trial;
mod users;

use trial::Trial;

/// Makes a test of each property for each kind of store.
macro_rules! conformance {
    ($($module:ident: $($property:ident),+;)+) => {
        mod on_disk {
            $(mod $module {
                $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
                async fn $property() {
                    let folder = tempfile::tempdir().unwrap();
                    let trial = crate::Trial::on_disk(folder.path()).await;
                    crate::$module::$property(trial).await;
                })+
            })+
        }
        mod in_memory {
            $(mod $module {
                $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
                async fn $property() {
                    crate::$module::$property(crate::Trial::in_memory().await).await;
                })+
            })+
        }
    };
}

conformance! {
    history:
        items_come_back_in_order, pages_join_to_the_whole, an_item_is_stored_once, a_conflicting_item_stores_nothing,
        a_replay_changes_nothing, a_key_with_another_request_is_refused, concurrent_replays_store_once,
        keys_belong_to_users_and_expire, the_store_counts_what_it_holds, odd_text_survives,
        erased_history_is_gone_and_its_jobs_with_it, a_cancelled_append_is_whole_or_absent;
    jobs:
        uploads_coalesce_into_the_queued_job, duplicates_enqueue_nothing, the_oldest_claimable_job_is_next,
        each_job_goes_to_one_worker, a_running_job_holds_back_the_next, an_expired_lease_passes_the_job_on,
        a_beat_extends_the_lease, an_old_fence_can_do_nothing, a_job_is_given_up_after_its_attempts,
        a_failed_job_waits_for_its_retry, a_retry_yields_to_a_queued_job, who_yields_hands_its_wait_on,
        a_job_that_yields_hands_its_demands_on, a_released_job_keeps_its_attempts,
        costs_outlive_claims, an_outcome_comes_back, jobs_are_listed, the_queue_is_counted;
    adapters:
        a_generation_comes_back, publishing_ends_the_job, a_stale_publisher_changes_nothing,
        one_of_two_publishers_wins, one_of_many_equal_publishers_wins, republishing_is_harmless,
        an_id_means_its_bytes, what_is_packed_comes_back, a_cancelled_publish_is_whole_or_absent;
    learning:
        a_cancelled_job_is_over, a_pause_holds_jobs_back, a_pause_of_the_server_holds_everybody,
        a_job_says_what_it_waits_for, tenants_take_turns, a_job_waits_as_the_policy_says,
        a_long_job_gives_way_and_users_take_turns,
        who_is_turned_down_again_waits_longer, demands_add_up, a_job_reads_the_same_history_again, a_checkpoint_comes_back, who_gets_on_is_not_given_up,
        a_checkpoint_ends_with_its_job,
        what_has_learnt_from_an_item_is_forgotten_with_it, who_was_judged_by_an_item_is_forgotten_with_it,
        a_forgotten_history_leaves_no_adapter, a_baseline_comes_back, ranges_select_what_they_say, progress_is_kept,
        updates_are_counted_whatever_comes_of_them, an_update_of_no_use_is_booked_apart,
        an_update_of_no_use_is_booked_once, trainings_without_an_end_are_booked;
    lineage:
        heads_can_be_moved, old_generations_are_pruned, generations_say_where_they_come_from,
        any_head_can_be_replaced, generations_come_in_pages, pinned_generations_stay, generations_are_deleted_singly,
        an_erased_adapter_leaves_its_user, a_deletion_does_not_meet_a_new_head,
        shared_adapters_are_no_users, shared_adapters_are_listed_and_erased;
    users:
        a_user_at_a_glance, users_are_listed, tenants_are_apart, an_erased_user_is_gone,
        an_erased_user_starts_from_nothing, a_running_job_cannot_bring_a_user_back,
        a_publish_under_way_cannot_bring_a_user_back, an_upload_under_way_yields_to_an_erasure;
}
