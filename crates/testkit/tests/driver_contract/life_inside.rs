//! Pause, stop, boot and copies of disks as programs in the sandbox and the host see them; they need a real
//! driver.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nagaya_api::ids::{ExecutionId, SessionId};
use nagaya_engine::model::{Limit, Resources, SandboxSpec};
use nagaya_engine::ports::{Command, DriverError, HostEvent, ProcessInput};
use nagaya_testkit::{Outcome, SmallDisk, storage_root};

use super::life::{adopt_stopped, fresh_image};
use super::place::*;

/// Writes a number, one more each time, as fast as it can.
const TICKS: &str = "n=0; while :; do n=$((n + 1)); echo $n > ticks; done";

pub async fn frozen_processes_keep_their_memory_and_do_nothing(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let remember = "import sys; word = sys.stdin.readline(); print('heard', flush=True); sys.stdin.read(); print(word)";
    let python = Command { stdin: true, ..command(&["python3", "-c", remember]) };
    let mut process = guest.run(python).await.unwrap();
    process.input.send(ProcessInput::Stdin("xyzzy\n".into())).await.unwrap();
    wait_for_line(&mut process, "heard").await;
    let ticks = ExecutionId::new(11, [1; 10]);
    guest.run_detached(ticks, command(&["/bin/sh", "-c", TICKS])).await.unwrap();
    while guest.stat("ticks").await.unwrap().is_none() {}

    let mut times = Vec::new();
    for _ in 0..20 {
        let begin = Instant::now();
        driver.freeze(id).await.unwrap();
        let frozen = begin.elapsed();
        let before = read(&*guest, "ticks").await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(read(&*guest, "ticks").await.unwrap(), before, "a frozen process wrote");
        let begin = Instant::now();
        driver.thaw(id).await.unwrap();
        times.push((frozen, begin.elapsed()));
    }
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    let (freeze, thaw) = times.into_iter().unzip();
    println!("freeze takes {:?}, thaw {:?} (median of 20)", median(freeze), median(thaw));
    close_stdin(&process).await;
    assert_eq!(finish(&mut process.events).await.text(), "xyzzy");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

/// A process that waits for its child of `vfork` is no reason to give up: the shell starts each program that way.
pub async fn processes_that_start_others_all_the_time_stand_still(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    for n in 0..8 {
        let restless = ExecutionId::new(20 + n, [1; 10]);
        guest.run_detached(restless, command(&["/bin/sh", "-c", "while :; do sleep 0.01; done"])).await.unwrap();
    }
    for _ in 0..200 {
        driver.freeze(id).await.unwrap();
        driver.thaw(id).await.unwrap();
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn timeouts_stand_still_while_frozen(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let mut process = guest.run(Command { timeout_ms: 1_000, ..command(&["sleep", "1000"]) }).await.unwrap();
    driver.freeze(id).await.unwrap();
    let early = tokio::time::timeout(Duration::from_millis(2_500), process.events.recv()).await;
    assert!(early.is_err(), "it timed out while frozen: {early:?}");
    driver.thaw(id).await.unwrap();
    let exit = finish(&mut process.events).await.exit;
    assert!(exit.timed_out, "{exit:?}");
    assert!((900..2_400).contains(&exit.duration_ms), "the time it was frozen counts: {exit:?}");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn a_frozen_sandbox_is_stopped_without_running_again(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    guest.run_detached(ExecutionId::new(12, [1; 10]), command(&["/bin/sh", "-c", TICKS])).await.unwrap();
    while guest.stat("ticks").await.unwrap().is_none_or(|stat| stat.size == 0) {}
    driver.freeze(id).await.unwrap();
    let before = read(&*guest, "ticks").await.unwrap();
    driver.stop(id).await.unwrap();
    let guest = driver.start(id, &place.kept()).await.unwrap();
    assert_eq!(read(&*guest, "ticks").await.unwrap(), before, "a process ran once more");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn only_root_powers_off_and_every_way_works(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let mut guest = driver.start(id, &place.fresh()).await.unwrap();
    let refused = run(&*guest, command(&["poweroff"])).await;
    assert_eq!(refused.exit.code, 1, "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("only root"), "{refused:?}");
    for words in ["shutdown", "shutdown +5", "shutdown -r now"] {
        let later = run(&*guest, Command { user: User::Root, ..command(&["/bin/sh", "-c", words]) }).await;
        assert_eq!(later.exit.code, 1, "{words}: {later:?}");
    }
    for words in ["poweroff", "halt", "/sbin/poweroff", "/usr/sbin/halt", "shutdown -h now", "shutdown now"] {
        let asked = Command { user: User::Root, ..command(&["/bin/sh", "-c", words]) };
        let _asked = guest.run(asked).await.unwrap();
        let (ended, powered_off, _) = place.ended().await;
        assert_eq!((ended, powered_off), (id, true), "{words}");
        assert!(guest.run(command(&["true"])).await.is_err(), "commands run after {words}");
        driver.stop(id).await.unwrap();
        guest = driver.start(id, &place.kept()).await.unwrap();
    }
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn powering_off_ends_processes_in_order_and_keeps_what_they_wrote(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let polite = "trap 'echo goodbye > last; exit' TERM; echo ready; while :; do sleep 0.1; done";
    let stubborn = "trap '' TERM; echo ready; while :; do sleep 0.1; done";
    for (number, script) in [(13, polite), (14, stubborn)] {
        let execution = ExecutionId::new(number, [1; 10]);
        guest.run_detached(execution, command(&["/bin/sh", "-c", script])).await.unwrap();
        let mut events = guest.follow(execution).await.unwrap();
        assert!(events.recv().await.is_some());
    }
    let begin = Instant::now();
    place.power_off(id, &*guest).await;
    assert!(place.ended().await.1);
    assert!(begin.elapsed() >= Duration::from_secs(4), "a process that ignores TERM got no grace");
    driver.stop(id).await.unwrap();
    let guest = driver.start(id, &place.kept()).await.unwrap();
    assert_eq!(read(&*guest, "last").await.unwrap(), b"goodbye\n");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn a_power_off_while_no_server_runs_is_not_lost(place: &mut Place) -> Outcome {
    let id = fresh_id();
    let guest = place.driver().start(id, &place.fresh()).await.unwrap();
    let (_marked, host_pid) = marked_process(&*guest).await;
    let later = Command { user: User::Root, ..command(&["/bin/sh", "-c", "sleep 1; poweroff"]) };
    guest.run_detached(ExecutionId::new(15, [1; 10]), later).await.unwrap();
    let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let own = namespace(host_pid);
    drop(guest);
    place
        .restart_with(|| {
            let deadline = Instant::now() + Duration::from_secs(20);
            while host_processes().into_iter().filter(|pid| namespace(*pid) == own).count() > 1 {
                assert!(Instant::now() < deadline, "the sandbox does not power off");
                std::thread::sleep(Duration::from_millis(20));
            }
            // What is left to do is to sync.
            std::thread::sleep(Duration::from_secs(1));
        })
        .await;
    assert_eq!(adopt_stopped(&*place.driver(), id).await, (true, false));
    // What is known is not forgotten by the next server either.
    place.restart().await;
    assert_eq!(adopt_stopped(&*place.driver(), id).await, (true, false));
    place.driver().destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn a_restart_of_the_host_is_told_from_the_end_of_a_sandbox(place: &mut Place) -> Outcome {
    let id = fresh_id();
    let guest = place.driver().start(id, &place.fresh()).await.unwrap();
    write(&*guest, "note", b"kept").await.unwrap();
    place.kill_first_process(id, &*guest).await;
    place.ended().await;
    let directory = directory_of(place, id);
    place
        .restart_with(|| {
            let record = directory.join("record.json");
            let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
            let text = fs::read_to_string(&record).unwrap();
            assert!(text.contains(boot_id.trim()), "{text}");
            fs::write(&record, text.replace(boot_id.trim(), "another")).unwrap();
        })
        .await;
    assert_eq!(adopt_stopped(&*place.driver(), id).await, (false, true));
    let guest = place.driver().start(id, &place.kept()).await.unwrap();
    assert_eq!(read(&*guest, "note").await.unwrap(), b"kept");
    drop(guest);
    place.driver().stop(id).await.unwrap();
    // A power cut may take the record; the disk is what counts.
    place.restart_with(|| fs::write(directory.join("record.json"), "").unwrap()).await;
    assert!(!adopt_stopped(&*place.driver(), id).await.0);
    let guest = place.driver().start(id, &place.kept()).await.unwrap();
    assert_eq!(read(&*guest, "note").await.unwrap(), b"kept");
    place.driver().destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

fn directory_of(place: &Place, id: SessionId) -> PathBuf {
    storage_root(place.data()).join("sandboxes").join(id.to_string())
}

pub async fn a_disk_is_copied_whole_while_it_is_written_to(place: &mut Place) -> Outcome {
    let (driver, source) = (place.driver(), fresh_id());
    let guest = driver.start(source, &place.fresh()).await.unwrap();
    let writer = "n=0; while :; do n=$((n + 1)); echo line $n; echo $n > small-$((n % 50)); done > log";
    guest.run_detached(ExecutionId::new(16, [1; 10]), command(&["/bin/sh", "-c", writer])).await.unwrap();
    while guest.stat("log").await.unwrap().is_none_or(|stat| stat.size < 10_000) {}
    for _ in 0..3 {
        let image = fresh_image();
        let stopped_us = place.host().copy_disk(source, &[image]).await.unwrap();
        println!("writes were frozen for {stopped_us} us");
        // The journal has been emptied, so what is there is what counts. What the writer's output was kept in
        // had no name, and is cleared as after a crash.
        assert_sound(&place.host().image_path(image), true);
        let copy = fresh_id();
        let other = driver.start(copy, &place.from(image)).await.unwrap();
        let whole = read(&*guest, "log").await.unwrap();
        let part = read(&*other, "log").await.unwrap();
        assert!(
            part.len() >= 10_000 && whole.starts_with(&part),
            "the copy's log is not the beginning of the source's"
        );
        driver.stop(copy).await.unwrap();
        assert_sound(&directory_of(place, copy).join("disk.ext4"), false);
        driver.destroy(copy).await.unwrap();
    }
    driver.destroy(source).await.unwrap();
    place.settled().await;
    Ok(())
}

/// With `orphans`: but for files that had no name any more and were still open.
fn assert_sound(image: &Path, orphans: bool) {
    let check = |arguments: &[&str]| {
        let mut command = std::process::Command::new("/usr/sbin/e2fsck");
        let output = command.args(arguments).arg(image).stdin(Stdio::null()).env("LC_ALL", "C").output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    if orphans {
        // Clears the list of orphans; anything else it would refuse to touch, or report with a higher code.
        let (code, said) = check(&["-p"]);
        assert!(matches!(code, Some(0 | 1)), "{code:?}: {said}");
    }
    let (code, said) = check(&["-fn"]);
    assert_eq!(code, Some(0), "{said}");
}

pub async fn a_disk_grows_to_the_size_asked_for(place: &mut Place) -> Outcome {
    let (driver, source, copy) = (place.driver(), fresh_id(), fresh_id());
    let guest = driver.start(source, &place.fresh()).await.unwrap();
    write(&*guest, "note", b"kept").await.unwrap();
    let image = fresh_image();
    place.host().copy_disk(source, &[image]).await.unwrap();
    let guest =
        driver.start(copy, &SandboxSpec { resources: Resources::of(1, 256, 8), ..place.from(image) }).await.unwrap();
    let size_kib: u64 = shell(&*guest, "df -k --output=size / | tail -1").await.trim().parse().unwrap();
    assert!((7_500_000..=8 << 20).contains(&size_kib), "df shows {size_kib} KiB for a disk of 8 GiB");
    assert_eq!(read(&*guest, "note").await.unwrap(), b"kept");
    let allocated =
        std::os::unix::fs::MetadataExt::blocks(&fs::metadata(directory_of(place, copy).join("disk.ext4")).unwrap())
            * 512;
    assert!(allocated < 200 << 20, "the grown disk takes {allocated} bytes of the host");
    driver.stop(copy).await.unwrap();
    assert_sound(&directory_of(place, copy).join("disk.ext4"), false);
    for id in [source, copy] {
        driver.destroy(id).await.unwrap();
    }
    place.settled().await;
    Ok(())
}

pub async fn a_prepared_image_is_filled_by_others_and_leaves_nothing_when_it_is_not(place: &mut Place) -> Outcome {
    let (driver, source, copy) = (place.driver(), fresh_id(), fresh_id());
    let guest = driver.start(source, &place.fresh()).await.unwrap();
    write(&*guest, "note", b"kept").await.unwrap();
    let (whole, filled, removed, forgotten) = (fresh_image(), fresh_image(), fresh_image(), fresh_image());
    place.host().copy_disk(source, &[whole]).await.unwrap();
    let path = place.host().prepare_image(filled).await.unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    let copied =
        std::process::Command::new("cp").arg("--sparse=always").arg(place.host().image_path(whole)).arg(&path).status();
    assert!(copied.unwrap().success());
    assert_eq!(place.host().images().await.unwrap(), [whole], "what is being made is no image");
    let guest = driver.start(copy, &place.from(filled)).await.unwrap();
    assert_eq!(read(&*guest, "note").await.unwrap(), b"kept");
    let directory = directory_of(place, copy);
    assert!(!path.exists() && !directory.join("frozen").exists());
    assert_barriers(&directory.join("disk.ext4"));

    // As a restoration that failed, and as one during which the server was killed.
    let not_taken =
        [place.host().prepare_image(removed).await.unwrap(), place.host().prepare_image(forgotten).await.unwrap()];
    place.host().remove_image(removed).await.unwrap();
    assert!(!not_taken[0].exists());
    assert!(matches!(driver.start(fresh_id(), &place.from(removed)).await, Err(DriverError::Gone)));
    drop((driver, guest));
    place.restart().await;
    let driver = place.driver();
    assert!(!not_taken[1].exists());
    assert_eq!(place.host().images().await.unwrap(), [whole]);
    for id in [source, copy] {
        driver.destroy(id).await.unwrap();
    }
    place.host().remove_image(whole).await.unwrap();
    place.settled().await;
    Ok(())
}

/// What is synced on a disk without them is not on the host's disk.
fn assert_barriers(disk: &Path) {
    let output = std::process::Command::new("losetup").args(["-n", "-O", "NAME", "-j"]).arg(disk).output().unwrap();
    let device = String::from_utf8(output.stdout).unwrap();
    let name = Path::new(device.trim()).file_name().unwrap().to_owned();
    let options = fs::read_to_string(Path::new("/proc/fs/ext4").join(name).join("options")).unwrap();
    assert!(options.lines().any(|option| option == "barrier"), "{options}");
}

pub async fn a_freeze_that_a_killed_server_left_is_undone(place: &mut Place) -> Outcome {
    let id = fresh_id();
    let guest = place.driver().start(id, &place.fresh()).await.unwrap();
    drop(guest);
    let directory = directory_of(place, id);
    freeze_as_a_killed_server_does(&directory);
    place.restart().await;
    let guest = adopt_running(&*place.driver(), id).await;
    let written = tokio::time::timeout(Duration::from_secs(20), write(&*guest, "note", b"written")).await;
    written.expect("the disk is still frozen").unwrap();
    assert!(!directory.join("frozen").exists());
    // One that nobody adopts can be destroyed.
    drop(guest);
    freeze_as_a_killed_server_does(&directory);
    place.restart().await;
    let destroyed = tokio::time::timeout(Duration::from_secs(20), place.driver().destroy(id)).await;
    destroyed.expect("the disk is still frozen").unwrap();
    place.settled().await;
    Ok(())
}

fn freeze_as_a_killed_server_does(directory: &Path) {
    let script = r#"set -e
        device=$(losetup -j "$1/disk.ext4" | cut -d: -f1)
        place=$(mktemp -d)
        mount -t ext4 "$device" "$place"
        touch "$1/frozen"
        fsfreeze -f "$place"
        umount "$place"
        rmdir "$place""#;
    let status = std::process::Command::new("/bin/sh")
        .args(["-c", script, "sh"])
        .arg(directory)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .status()
        .unwrap();
    assert!(status.success());
}

pub async fn a_host_without_space_keeps_the_sandbox_usable_and_no_image(_place: &mut Place) -> Outcome {
    let outer = SmallDisk::mount(900);
    let data = tempfile::Builder::new().prefix("nagaya-contract-small-").tempdir_in(outer.path()).unwrap();
    let place = Place::namespace_with(data, |_| ()).await.unwrap();
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    // As much as leaves too little for a copy, and enough for whoever writes.
    shell(&*guest, "head -c 350M /dev/urandom > large && sync large").await;
    let image = fresh_image();
    let refused = place.host().copy_disk(id, &[image]).await.unwrap_err();
    assert!(matches!(&refused, DriverError::Exhausted(Limit::DiskFreeMin | Limit::HostDisk)), "{refused:?}");
    assert!(place.host().images().await.unwrap().is_empty());
    let parts = fs::read_dir(storage_root(place.data()).join("disks")).unwrap().map(|entry| entry.unwrap().file_name());
    let parts: Vec<_> = parts.filter(|name| name != "boot-id").collect();
    assert!(parts.is_empty(), "a part of a copy was left: {parts:?}");
    write(&*guest, "more", b"still writable").await.unwrap();
    shell(&*guest, "sync more").await;
    assert_eq!(read(&*guest, "more").await.unwrap(), b"still writable");
    driver.destroy(id).await.unwrap();
    drop((guest, driver));
    place.close().await;
    Ok(())
}

pub async fn low_memory_of_the_host_is_told_and_not_all_the_time(_place: &mut Place) -> Outcome {
    let data = tempfile::Builder::new().prefix("nagaya-contract-memory-").tempdir().unwrap();
    // Whatever this host has is less than that.
    let mut place = Place::namespace_with(data, |config| config.limits.memory_low_mb = u64::MAX).await.unwrap();
    let first = tokio::time::timeout(Duration::from_secs(20), place.events.recv()).await.unwrap();
    assert!(matches!(first, Some(HostEvent::MemoryLow)), "{first:?}");
    let second = tokio::time::timeout(Duration::from_secs(3), place.events.recv()).await;
    assert!(second.is_err(), "{second:?}");
    place.close().await;
    Ok(())
}
