//! What every driver does, the fake one too.

use std::time::Duration;

use bytes::Bytes;
use nagaya_api::error::Code;
use nagaya_api::ids::ExecutionId;
use nagaya_engine::model::Limit;
use nagaya_engine::ports::{Command, DriverError, ProcessInput, Signal, WriteOptions};
use nagaya_testkit::Outcome;

use super::place::*;
use super::streams::PATIENCE;

pub async fn a_sandbox_is_created_used_and_destroyed(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    assert_eq!(run(&*guest, command(&["echo", "hello"])).await.text(), "hello");
    write(&*guest, "note", b"written").await.unwrap();
    assert_eq!(read(&*guest, "/home/tenki/note").await.unwrap(), b"written");
    assert_eq!(driver.list().await.unwrap(), [id]);
    driver.destroy(id).await.unwrap();
    place.settled().await;
    assert!(driver.list().await.unwrap().is_empty());
    assert!(guest.run(command(&["true"])).await.is_err(), "a destroyed sandbox must not run commands");
    Ok(())
}

pub async fn destroying_twice_or_the_unknown_is_no_error(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    driver.start(id, &place.fresh()).await.unwrap();
    driver.destroy(id).await.unwrap();
    driver.destroy(id).await.unwrap();
    place.settled().await;
    driver.destroy(id).await.unwrap();
    driver.destroy(fresh_id()).await.unwrap();
    Ok(())
}

pub async fn the_list_names_every_sandbox_and_no_other(place: &mut Place) -> Outcome {
    let driver = place.driver();
    let mut made = vec![fresh_id(), fresh_id(), fresh_id()];
    for id in &made {
        driver.start(*id, &place.fresh()).await.unwrap();
    }
    let listed = |mut ids: Vec<_>| {
        ids.sort();
        ids
    };
    made.sort();
    assert_eq!(listed(driver.list().await.unwrap()), made);
    driver.destroy(made.remove(1)).await.unwrap();
    place.settled().await;
    assert_eq!(listed(driver.list().await.unwrap()), made);
    for id in made {
        driver.destroy(id).await.unwrap();
    }
    place.settled().await;
    Ok(())
}

pub async fn a_sandbox_too_many_is_refused_with_the_limits_name_and_fits_when_one_went(place: &mut Place) -> Outcome {
    let driver = place.driver();
    let mut made = Vec::new();
    let refused = loop {
        let id = fresh_id();
        match driver.start(id, &place.fresh()).await {
            Ok(_) => made.push(id),
            Err(error) => break error,
        }
        assert!(made.len() <= SLOTS_MAX as usize, "the limit is not kept");
    };
    assert!(matches!(&refused, DriverError::Exhausted(Limit::Slots)), "{refused:?}");
    driver.destroy(made.pop().unwrap()).await.unwrap();
    place.settled().await;
    // What it had is released in the background, and may be in use for a slot that is being pre-created meanwhile.
    let id = fresh_id();
    let fits = async {
        while driver.start(id, &place.fresh()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, fits).await.expect("the place of a destroyed sandbox is free again");
    made.push(id);
    for id in made {
        driver.destroy(id).await.unwrap();
    }
    place.settled().await;
    Ok(())
}

pub async fn a_sandbox_outlives_its_driver_with_files_and_running_commands(place: &mut Place) -> Outcome {
    let (id, running) = (fresh_id(), ExecutionId::new(1, [7; 10]));
    let guest = place.driver().start(id, &place.fresh()).await.unwrap();
    write(&*guest, "kept", b"kept").await.unwrap();
    let pid = guest.run_detached(running, command(&["cat", "/dev/zero"])).await;
    // The fake's `cat` ends at once; a real one runs until its output is full, and then waits.
    let pid = pid.unwrap();
    drop(guest);
    place.restart().await;
    let driver = place.driver();
    assert_eq!(driver.list().await.unwrap(), [id]);
    let guest = adopt_running(&*driver, id).await;
    assert_eq!(read(&*guest, "kept").await.unwrap(), b"kept");
    assert_eq!(guest.run_detached(running, command(&["cat", "/dev/zero"])).await.unwrap(), pid, "it was started twice");
    assert_eq!(run(&*guest, command(&["echo", "again"])).await.text(), "again");
    // Adopting what is adopted already changes nothing.
    let again = adopt_running(&*driver, id).await;
    assert_eq!(run(&*again, command(&["echo", "both"])).await.text(), "both");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn what_does_not_run_cannot_be_adopted(place: &mut Place) -> Outcome {
    let id = fresh_id();
    place.driver().start(id, &place.fresh()).await.unwrap();
    place.driver().destroy(id).await.unwrap();
    place.settled().await;
    place.restart().await;
    for id in [id, fresh_id()] {
        assert!(matches!(place.driver().adopt(id).await, Err(DriverError::Gone)));
    }
    Ok(())
}

pub async fn a_killed_first_process_is_reported_and_a_destroyed_sandbox_is_not(place: &mut Place) -> Outcome {
    let (killed, destroyed) = (fresh_id(), fresh_id());
    let driver = place.driver();
    let guest = driver.start(killed, &place.fresh()).await.unwrap();
    driver.start(destroyed, &place.fresh()).await.unwrap();
    driver.destroy(destroyed).await.unwrap();
    place.kill_first_process(killed, &*guest).await;
    let (id, powered_off, cause) = place.ended().await;
    assert_eq!((id, powered_off), (killed, false));
    assert!(cause.contains("first process"), "{cause}");
    assert_eq!(driver.list().await.unwrap(), [killed], "a dead sandbox is listed until it is destroyed");
    driver.destroy(killed).await.unwrap();
    place.settled().await;
    assert!(driver.list().await.unwrap().is_empty());
    assert!(place.events.try_recv().is_err(), "an asked-for end was reported");
    Ok(())
}

pub async fn commands_get_their_environment_directory_and_input(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let env = [("GREETING".to_owned(), "hello".to_owned())].into();
    let finished = run(&*guest, Command { env, ..command(&["env"]) }).await;
    assert!(finished.text().lines().any(|line| line == "GREETING=hello"), "{finished:?}");
    assert_eq!(run(&*guest, command(&["pwd"])).await.text(), "/home/tenki");
    assert_eq!(run(&*guest, Command { cwd: "/tmp".into(), ..command(&["pwd"]) }).await.text(), "/tmp");

    let mut process = guest.run(Command { stdin: true, ..command(&["cat"]) }).await.unwrap();
    let bytes: Vec<u8> = (0..=255).collect();
    process.input.send(ProcessInput::Stdin(Bytes::from(bytes.clone()))).await.unwrap();
    close_stdin(&process).await;
    let finished = finish(&mut process.events).await;
    assert_eq!((finished.stdout, finished.exit.code, finished.exit.reason.name()), (bytes, 0, "exit"));

    assert_eq!(run(&*guest, command(&["false"])).await.exit.code, 1);
    assert_eq!(guest.run(command(&["no-such-command"])).await.unwrap_err().code, Code::CommandNotFound);
    let nowhere = Command { cwd: "/nowhere".into(), ..command(&["true"]) };
    assert_eq!(guest.run(nowhere).await.unwrap_err().code, Code::FileNotFound);
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn signals_and_timeouts_end_commands_and_say_so(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let mut process = guest.run(Command { stdin: true, ..command(&["cat"]) }).await.unwrap();
    process.input.send(ProcessInput::Signal(Signal::Kill)).await.unwrap();
    let exit = finish(&mut process.events).await.exit;
    assert_eq!((exit.code, exit.signal.as_str(), exit.reason.name()), (-1, "SIGKILL", "signaled"));

    let waits = Command { stdin: true, timeout_ms: 100, ..command(&["cat"]) };
    let mut process = guest.run(waits).await.unwrap();
    let exit = finish(&mut process.events).await.exit;
    assert!(exit.timed_out, "{exit:?}");
    assert_eq!((exit.code, exit.reason.name()), (-1, "timeout"));
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn files_are_whole_or_absent_and_listed_in_order(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    guest.make_directory("/tmp/a/b", 0, true).await.unwrap();
    for name in ["two", ".hidden", "one"] {
        write(&*guest, &format!("/tmp/a/{name}"), name.as_bytes()).await.unwrap();
    }
    let names = |entries: Vec<nagaya_engine::ports::DirectoryEntry>| {
        entries.into_iter().map(|entry| entry.name).collect::<Vec<_>>()
    };
    assert_eq!(names(guest.list_directory("/tmp/a", false, &()).await.unwrap()), ["b", "one", "two"]);
    assert_eq!(names(guest.list_directory("/tmp/a", true, &()).await.unwrap()), [".hidden", "b", "one", "two"]);

    // A writer that gives up leaves what was there, and nothing beside it.
    let options = WriteOptions { mode: 0, truncate: true, sync: false };
    let writer = guest.write_file("/tmp/a/one", options).await.unwrap();
    writer.chunks.send(Bytes::from_static(b"half")).await.unwrap();
    drop(writer);
    assert_eq!(read(&*guest, "/tmp/a/one").await.unwrap(), b"one");
    assert_eq!(read_part(&*guest, "/tmp/a/one", 1, 1).await.unwrap(), b"n");

    assert!(guest.stat("/tmp/nothing").await.unwrap().is_none());
    let stat = guest.stat("/tmp/a/two").await.unwrap().unwrap();
    assert_eq!((stat.size, stat.is_dir, stat.mode & 0o777), (3, false, 0o644));
    assert_eq!(guest.read_file("/tmp/a", 0, 0, 0).await.unwrap_err().code, Code::IsADirectory);
    assert_eq!(guest.read_file("/tmp/nothing", 0, 0, 0).await.unwrap_err().code, Code::FileNotFound);
    assert_eq!(guest.remove("/tmp/nothing", true).await.unwrap(), 0);
    assert!(guest.remove("/tmp/a", true).await.unwrap() >= 4);
    assert!(guest.stat("/tmp/a").await.unwrap().is_none());

    let large: Vec<u8> = (0..3_000_000u32).map(|number| number as u8).collect();
    assert_eq!(write(&*guest, "large", &large).await.unwrap(), large.len() as u64);
    assert_eq!(read(&*guest, "large").await.unwrap(), large);
    assert_eq!(write(&*guest, "/tmp/not/yet/there", b"x").await.unwrap(), 1);
    assert!(guest.stat("/tmp/not/yet").await.unwrap().unwrap().is_dir);
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn a_detached_command_starts_once_and_keeps_its_output(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let execution = ExecutionId::new(2, [3; 10]);
    let pid = guest.run_detached(execution, command(&["echo", "kept"])).await.unwrap();
    assert_eq!(guest.run_detached(execution, command(&["echo", "other"])).await.unwrap(), pid);
    for _ in 0..2 {
        let mut events = guest.follow(execution).await.unwrap();
        let finished = finish(&mut events).await;
        assert_eq!((finished.text().as_str(), finished.exit.code), ("kept", 0));
    }
    guest.forget(execution).await.unwrap();
    assert_eq!(guest.follow(execution).await.unwrap_err().code, Code::ExecutionNotFound);
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn only_what_runs_tells_what_it_uses(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    assert!(matches!(driver.usage(id).await, Err(DriverError::Gone)));
    driver.start(id, &place.fresh()).await.unwrap();
    let load = driver.usage(id).await.unwrap();
    assert_eq!(load.memory_kills, 0);
    assert!(load.memory_bytes <= load.memory_limit_bytes && load.processes <= load.processes_max, "{load:?}");
    driver.stop(id).await.unwrap();
    assert!(matches!(driver.usage(id).await, Err(DriverError::Gone)));
    driver.start(id, &place.kept()).await.unwrap();
    driver.usage(id).await.unwrap();
    driver.destroy(id).await.unwrap();
    assert!(matches!(driver.usage(id).await, Err(DriverError::Gone)));
    place.settled().await;
    Ok(())
}
