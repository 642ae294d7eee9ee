//! The lists of scenarios: the only place in which they stand. Tests, reports and the tables of the broken stores and
//! sinks all come from here.

/// Calls a macro with all scenarios of the store suite: `theme::name [what it needs]`.
#[doc(hidden)]
#[macro_export]
macro_rules! __for_each_store_scenario {
    ([$($callback:tt)+] $($arguments:tt)*) => {
        $($callback)+! { $($arguments)*
            visibility::commit_makes_visible [];
            visibility::nothing_visible_before_commit [];
            visibility::rollback_leaves_nothing [];
            visibility::transaction_keeps_order [];
            visibility::refused_call_writes_nothing [];
            visibility::late_commit_with_successor [Keys, Concurrent];
            visibility::late_commit_without_successor [Concurrent];
            visibility::commit_below_the_newest [Concurrent];
            visibility::fresh_store_loses_nothing [Concurrent];
            visibility::rolled_back_gaps_stay_empty [Concurrent];
            visibility::commits_in_reverse_lose_nothing [Concurrent];

            fetch::fetch_keeps_row_limit [];
            fetch::fetch_keeps_byte_limit [];
            fetch::fetch_orders_within_key [Keys];
            fetch::fetch_orders_across_fetches [Keys];
            fetch::fetch_leaves_out_in_flight [];
            fetch::fetch_leaves_out_other_shards [Shards];
            fetch::empty_batch_means_nothing [];
            fetch::reader_can_be_replaced [Keys];
            fetch::regained_shard_restarts [];
            fetch::regained_shard_goes_on [];
            fetch::unknown_settlement_stays_out [];
            fetch::producers_beside_relay [];
            fetch::huge_transaction_flows [];

            reread::reread_key [Keys];
            reread::reread_message [];
            reread::reread_shard [];
            reread::passed_over_comes_back [Keys];
            reread::held_key_lets_others_flow [Keys];
            reread::nothing_starves [];
            reread::take_over_rereads [];
            reread::dropped_calls_do_no_harm [];

            holds::hold_stops_key [Keys];
            holds::hold_stops_key_of_topic_only [Keys, Topics];
            holds::hold_stops_topic [Topics];
            holds::hold_stops_message_alone [];
            holds::keyless_flow_beside_holds [Keys];
            holds::hold_is_durable [];
            holds::hold_put_replaces [];
            holds::hold_clear_removes [];
            holds::hold_clears_with_delivery [Keys];
            holds::hold_due_runs_down [];
            holds::holds_are_of_asked_shards [Shards];
            holds::keyless_holds_stand_apart [];
            holds::order_survives_retry [Keys];

            lease::lease_is_exclusive [];
            lease::lease_expires [];
            lease::lease_renews [];
            lease::lease_release_frees [];
            lease::release_needs_epoch [];
            lease::epoch_grows_with_owner [];
            lease::lease_takes_what_is_wanted [];
            lease::lease_gives_nothing_up [];
            lease::want_zero_only_joins [];
            lease::leases_can_be_shared [Shards];
            lease::membership_expires [];
            lease::lease_tells_time_left [];

            settle::settle_removes_delivered [];
            settle::settle_takes_any_subset [];
            settle::settle_is_fenced [];
            settle::settle_is_fenced_after_expiry [];
            settle::settle_is_partial_across_shards [Shards];
            settle::settle_needs_owner [];
            settle::settle_repeats [];
            settle::settle_matches_position_and_id [];
            settle::settle_excludes_take_over [];
            settle::settlements_run_side_by_side [];
            settle::settle_of_nothing [];

            dead::dead_letter_keeps_whole [DeadLetters];
            dead::dead_letter_list_pages [DeadLetters];
            dead::dead_letter_list_by_id [DeadLetters];
            dead::dead_letter_list_by_topic [DeadLetters, Topics];
            dead::dead_letter_requeue_once [DeadLetters];
            dead::dead_letter_requeue_whole [DeadLetters];
            dead::dead_letter_discard [DeadLetters];
            dead::nothing_is_stranded [DeadLetters];
            dead::dead_letters_may_share_an_id [DeadLetters, MessageIds];
            dead::deaths_are_refused_without_dead_letters [NoDeadLetters];

            parking::parked_is_listed [Parking];
            parking::parked_resumes [Parking];
            parking::parked_is_buried [Parking, DeadLetters];
            parking::only_parked_is_resumed [Parking];
            parking::parked_topic_is_not_buried [Parking];

            inspection::inspection_finds_every_place [Inspection];
            inspection::inspection_finds_all_of_an_id [Inspection, MessageIds];
            inspection::inspection_finds_head [Inspection, Keys];
            inspection::inspection_finds_first_of_topic [Inspection, Topics];
            inspection::inspection_tells_line [Inspection];
            inspection::inspection_tells_holds [Inspection];
            inspection::inspection_tells_owners [Inspection];
            inspection::inspection_tells_last_number [Inspection, Sequenced, Keys];
            inspection::inspection_keeps_its_bound [Inspection];

            scheduled::scheduled_waits [Scheduled];
            scheduled::scheduled_in_order [Scheduled];
            scheduled::scheduled_is_fenced [Scheduled];
            scheduled::scheduled_keeps_limit [Scheduled];
            scheduled::scheduled_in_the_past_goes_at_once [Scheduled];
            scheduled::scheduled_rolls_back [Scheduled];
            scheduled::scheduled_is_refused_without [NoScheduled];

            retention::retention_archives [Retention];
            retention::retention_purges_old_only [Retention];

            stats::stats_count_backlog [];
            stats::stats_tell_age [];
            stats::stats_count_holds [];
            stats::stats_tell_leases [];

            bytes::bytes_survive [AnyBytes];
            bytes::messages_survive [];
            bytes::no_key_is_not_an_empty_key [Keys];
            bytes::tombstone_is_not_empty [Tombstones];
            bytes::headers_survive [Headers];
            bytes::content_type_survives [ContentTypes];
            bytes::largest_survive [];
            bytes::hostile_keys_are_held [Keys, AnyBytes];
            bytes::ids_need_not_be_unique [MessageIds];
            bytes::records_are_fresh [];

            honesty::capabilities_are_constant [];
            honesty::what_cannot_be_held_is_refused [];
            honesty::no_archive_without_retention [];
            honesty::wake_up_can_be_dropped [WakeUp];

            sequenced::sequence_has_no_gaps [Sequenced, Keys];
            sequenced::sequence_counts_by_topic [Sequenced, Keys, Topics];
            sequenced::sequence_survives_rollback [Sequenced, Keys];
            sequenced::sequence_is_commit_order [Sequenced, Keys, Concurrent];
            sequenced::keyless_have_no_sequence [];
            sequenced::sequence_goes_on_after_death [Sequenced, Keys, DeadLetters];

            schedules::random_schedules [];
        }
    };
}

/// Calls a macro with all scenarios of the sink suite.
#[doc(hidden)]
#[macro_export]
macro_rules! __for_each_sink_scenario {
    ([$($callback:tt)+] $($arguments:tt)*) => {
        $($callback)+! { $($arguments)*
            order::order_within_key [];
            order::order_across_batches [];
            order::order_under_pressure [];

            outcomes::one_outcome_each [];
            outcomes::outcomes_are_in_order [Poison];
            outcomes::delivered_is_durable [];
            outcomes::no_repetition_without_fault [];
            outcomes::content_arrives [];
            outcomes::dropped_receipt_does_no_harm [];

            failure::poison_is_alone [Poison];
            failure::failure_stops_key [Poison, StopsKey];
            failure::retry_stops_key [Refuse, StopsKey];
            failure::retry_needs_stopping [Refuse, GoesOn];
            failure::blocked_topic_lets_others_flow [Block];
            failure::blocked_topic_stops_key [Block];
            failure::broken_is_rebuilt [Break];

            outage::outage_blames_nobody [Outage];
            outage::outage_stops_key [Outage];
            outage::purge_resolves_everything [Delay];
            outage::purge_of_nothing_does_no_harm [];
            outage::publish_can_be_dropped [];
            outage::rebuild_does_no_harm [];
        }
    };
}

/// Makes one named test a scenario, in a module of its own, for a [`StoreHarness`](crate::conformance::StoreHarness).
///
/// The second argument names the module (`store_conformance` unless told). What follows goes into `#[tokio::test(…)]`;
/// the calling crate needs tokio with `macros` and `rt`.
///
/// ```
/// # use outbox_core::conformance::broken::BrokenStore as MyHarness; // any harness
/// outbox_core::store_conformance!(MyHarness);
/// outbox_core::store_conformance!(MyHarness, with_archive);
/// outbox_core::store_conformance!(MyHarness, on_threads, flavor = "multi_thread");
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! store_conformance {
    ($harness:ty $(,)?) => { $crate::store_conformance!($harness, store_conformance); };
    ($harness:ty, $module:ident $(, $($option:tt)*)?) => {
        mod $module {
            #[allow(unused_imports, reason = "the harness may be named by its full path")]
            use super::*;

            $crate::__for_each_store_scenario! {
                [$crate::__conformance_tests] [prove_store report_store $harness] [$($($option)*)?]
            }
        }
    };
}

/// Makes one named test a scenario, in a module of its own, for a [`SinkHarness`](crate::conformance::SinkHarness);
/// the arguments are those of [`store_conformance!`](crate::store_conformance).
///
/// ```
/// # use outbox_core::conformance::broken::BrokenSink as MyHarness; // any harness
/// outbox_core::sink_conformance!(MyHarness);
/// outbox_core::sink_conformance!(MyHarness, on_threads, flavor = "multi_thread");
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! sink_conformance {
    ($harness:ty $(,)?) => { $crate::sink_conformance!($harness, sink_conformance); };
    ($harness:ty, $module:ident $(, $($option:tt)*)?) => {
        mod $module {
            #[allow(unused_imports, reason = "the harness may be named by its full path")]
            use super::*;

            $crate::__for_each_sink_scenario! {
                [$crate::__conformance_tests] [prove_sink report_sink $harness] [$($($option)*)?]
            }
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __conformance_tests {
    ([$prove:ident $report:ident $harness:ty] $options:tt $($theme:ident :: $name:ident $needs:tt;)*) => {
        $($crate::__conformance_test!($prove, $harness, $name, $options);)*

        /// Prints the scenarios that do not apply, with the reasons.
        #[::tokio::test]
        async fn report() {
            $crate::conformance::$report::<$harness>().await;
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __conformance_test {
    ($prove:ident, $harness:ty, $name:ident, [$($options:tt)*]) => {
        #[::tokio::test($($options)*)]
        async fn $name() {
            $crate::conformance::$prove::<$harness>(stringify!($name)).await;
        }
    };
}

macro_rules! collect_stores {
    ([$harness:ident] $($theme:ident :: $name:ident [$($need:ident),*];)*) => {
        vec![$($crate::conformance::Scenario {
            name: stringify!($name),
            theme: stringify!($theme),
            needs: &[$($crate::conformance::StoreNeed::$need),*],
            run: || Box::pin($crate::conformance::store::$theme::$name::<$harness>()),
        }),*]
    };
}
pub(super) use collect_stores;

macro_rules! collect_sinks {
    ([$harness:ident] $($theme:ident :: $name:ident [$($need:ident),*];)*) => {
        vec![$($crate::conformance::Scenario {
            name: stringify!($name),
            theme: stringify!($theme),
            needs: &[$($crate::conformance::SinkNeed::$need),*],
            run: || Box::pin($crate::conformance::sink::$theme::$name::<$harness>()),
        }),*]
    };
}
pub(super) use collect_sinks;
