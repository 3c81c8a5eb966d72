//! The driver contract: one suite of behaviours, run on every driver that this host can start.

#![allow(clippy::unwrap_used)]

mod common;
mod inside;
mod life;
mod life_inside;
mod limits;
mod machine;
mod place;
mod roots;
mod streams;
mod streams_inside;
mod volumes;
mod volumes_inside;

use std::process::ExitCode;

use nagaya_testkit::Suite;
use place::Place;

/// Runs behaviours of a module on a place, or counts them as not run.
macro_rules! behaviours {
    ($suite:ident, $driver:literal, $place:expr, $module:ident: $($name:ident),* $(,)?) => {
        $(
            let name = concat!($driver, "::", stringify!($name));
            match &mut $place {
                Ok(place) => {
                    $suite.case(name, $module::$name(place)).await;
                    place.clear().await;
                }
                Err(reason) => $suite.skip(name, reason),
            }
        )*
    };
}

macro_rules! common_behaviours {
    ($suite:ident, $driver:literal, $place:expr) => {
        behaviours!($suite, $driver, $place, common:
            a_sandbox_is_created_used_and_destroyed,
            destroying_twice_or_the_unknown_is_no_error,
            the_list_names_every_sandbox_and_no_other,
            a_sandbox_too_many_is_refused_with_the_limits_name_and_fits_when_one_went,
            a_sandbox_outlives_its_driver_with_files_and_running_commands,
            what_does_not_run_cannot_be_adopted,
            a_killed_first_process_is_reported_and_a_destroyed_sandbox_is_not,
            commands_get_their_environment_directory_and_input,
            signals_and_timeouts_end_commands_and_say_so,
            files_are_whole_or_absent_and_listed_in_order,
            a_detached_command_starts_once_and_keeps_its_output,
            only_what_runs_tells_what_it_uses,
        );
        behaviours!($suite, $driver, $place, life:
            a_frozen_command_goes_on_where_it_was,
            a_frozen_sandbox_outlives_its_driver,
            a_stopped_sandbox_keeps_its_disk_and_boots,
            what_a_killed_first_process_left_boots,
            a_sandbox_that_powered_itself_off_says_so_and_boots,
            what_does_not_run_is_neither_frozen_nor_thawed,
            a_copied_disk_makes_another_sandbox,
            the_disk_of_a_stopped_or_frozen_sandbox_is_copied_as_well,
            a_stopped_sandbox_takes_no_slot,
        );
        behaviours!($suite, $driver, $place, streams:
            connections_meet_listeners_and_end_one_side_after_the_other,
            where_nobody_listens_connections_are_refused,
            a_hundred_megabytes_arrive_unchanged_either_way,
            connections_and_listeners_end_with_their_sandbox,
            the_next_driver_listens_where_the_last_one_did,
        );
        behaviours!($suite, $driver, $place, volumes:
            a_volume_takes_files_from_one_sandbox_to_another,
            volumes_are_made_listed_and_removed_once,
            what_is_not_there_can_be_neither_attached_nor_grown,
            a_volume_is_not_attached_over_another,
            a_volume_outlives_its_driver_and_its_sandbox,
            readers_share_a_volume_that_none_of_them_changes,
            a_volume_grows_and_keeps_its_files,
        );
    };
}

/// Closes a place also when the case is left out: a pool of disks stays mounted until somebody removes it.
async fn close(suite: &mut Suite, name: &str, place: Result<Place, String>) {
    let Ok(place) = place else { return };
    match suite.wants(name) {
        true => {
            let closing = async {
                place.close().await;
                Ok(())
            };
            suite.case(name, closing).await;
        }
        false => place.close().await,
    }
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut suite = Suite::start("driver contract");
        let mut fake: Result<Place, String> = Ok(Place::fake());
        common_behaviours!(suite, "fake", fake);

        let mut namespace = if suite.is_listing() { Err("only listing".to_owned()) } else { Place::namespace().await };
        if let Err(reason) = &namespace
            && rustix::process::geteuid().is_root()
            && !suite.is_listing()
        {
            panic!("root must be able to start the namespace driver: {reason}");
        }
        common_behaviours!(suite, "namespace", namespace);
        behaviours!(suite, "namespace", namespace, limits:
            a_process_above_the_memory_limit_dies_with_that_reason_and_the_agent_answers,
            what_the_file_calls_keep_in_memory_counts_as_the_sandboxs,
            a_fork_bomb_is_contained_and_the_sandbox_stays_usable,
            a_command_that_forks_without_end_ends_when_it_is_killed,
            commands_share_processor_time_as_equals_however_many_processes_they_have,
            a_full_disk_is_told_to_commands_and_to_the_file_calls_and_the_sandbox_stays_usable,
            processor_time_is_limited_to_the_cores_asked_for,
            the_tools_inside_show_the_sandboxs_own_limits,
            what_is_used_is_told_in_figures,
        );
        behaviours!(suite, "namespace", namespace, roots:
            an_image_is_a_stack_of_layers_and_none_of_the_host_is_in_it,
            an_image_may_have_as_many_layers_as_images_have,
            part_of_a_processor_and_a_disk_of_any_size_are_given,
            two_drivers_of_one_host_keep_their_sandboxes_apart,
        );
        behaviours!(suite, "namespace", namespace, machine:
            every_source_tells_of_the_sandboxs_own_memory,
            every_source_tells_of_the_sandboxs_own_processors,
            every_source_tells_of_the_sandboxs_own_time_and_load,
            commands_cannot_look_into_each_other,
        );
        behaviours!(suite, "namespace", namespace, inside:
            commands_run_as_tenki_and_privileged_ones_as_root,
            sudo_works_where_the_host_has_it,
            a_terminal_is_one_and_changes_its_size,
            the_file_server_is_there_and_is_only_its_user,
            background_processes_live_on_and_orphans_are_reaped,
            letting_go_of_a_command_ends_it_with_its_group,
            a_command_nobody_reads_stalls_no_other,
            what_ignores_term_is_killed_and_says_so,
            a_running_command_goes_on_under_the_next_driver,
            only_sandboxes_with_outbound_access_have_a_link,
            many_sandboxes_at_once_come_and_go,
        );
        behaviours!(suite, "namespace", namespace, streams_inside:
            services_on_either_loopback_are_reached,
            a_frozen_service_answers_when_it_is_thawed,
            a_service_that_accepts_nobody_is_given_up,
            programs_reach_what_the_server_listens_on,
            only_sockets_are_connected_to_and_only_where_they_may_lie,
            a_servers_socket_is_removed_and_nothing_else,
            one_stalled_connection_stalls_no_other,
        );
        behaviours!(suite, "namespace", namespace, volumes_inside:
            the_smallest_volume_belongs_to_tenki_and_its_size_is_a_limit,
            what_was_written_is_there_after_the_kill_of_the_sandbox,
            a_second_writer_is_refused,
            a_volume_in_use_is_busy_until_it_is_taken_by_force,
            a_reader_is_taken_out_by_force_without_harm_to_another,
            a_mounted_volume_grows_while_it_is_written_to,
            paths_that_cannot_have_a_volume_are_refused_and_stay_as_they_were,
            renaming_the_mount_path_meanwhile_leads_nowhere_else,
            a_volume_that_was_moved_inside_is_found_and_taken_out,
            a_volume_gives_no_devices_no_host_root_and_nothing_to_other_sandboxes,
            many_volumes_come_and_go_at_once,
        );
        behaviours!(suite, "namespace", namespace, life_inside:
            frozen_processes_keep_their_memory_and_do_nothing,
            processes_that_start_others_all_the_time_stand_still,
            timeouts_stand_still_while_frozen,
            a_frozen_sandbox_is_stopped_without_running_again,
            only_root_powers_off_and_every_way_works,
            powering_off_ends_processes_in_order_and_keeps_what_they_wrote,
            a_power_off_while_no_server_runs_is_not_lost,
            a_restart_of_the_host_is_told_from_the_end_of_a_sandbox,
            a_disk_is_copied_whole_while_it_is_written_to,
            a_disk_grows_to_the_size_asked_for,
            a_prepared_image_is_filled_by_others_and_leaves_nothing_when_it_is_not,
            a_freeze_that_a_killed_server_left_is_undone,
            a_host_without_space_keeps_the_sandbox_usable_and_no_image,
            low_memory_of_the_host_is_told_and_not_all_the_time,
        );
        close(&mut suite, "namespace::nothing_is_left_on_the_host", namespace).await;

        // What the driver can also do from outside, done by agents alone.
        let mut agents = if suite.is_listing() {
            Err("only listing".to_owned())
        } else {
            Place::namespace_without_shortcuts().await
        };
        behaviours!(suite, "agents", agents, common:
            only_what_runs_tells_what_it_uses,
        );
        behaviours!(suite, "agents", agents, limits:
            a_process_above_the_memory_limit_dies_with_that_reason_and_the_agent_answers,
            what_is_used_is_told_in_figures,
        );
        behaviours!(suite, "agents", agents, streams:
            connections_meet_listeners_and_end_one_side_after_the_other,
            where_nobody_listens_connections_are_refused,
            a_hundred_megabytes_arrive_unchanged_either_way,
            connections_and_listeners_end_with_their_sandbox,
            the_next_driver_listens_where_the_last_one_did,
        );
        behaviours!(suite, "agents", agents, streams_inside:
            services_on_either_loopback_are_reached,
            a_frozen_service_answers_when_it_is_thawed,
            a_service_that_accepts_nobody_is_given_up,
            programs_reach_what_the_server_listens_on,
            one_stalled_connection_stalls_no_other,
        );
        close(&mut suite, "agents::nothing_is_left_on_the_host", agents).await;
        suite.finish()
    })
}
