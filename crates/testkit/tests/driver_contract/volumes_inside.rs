//! What programs find in a volume, and what sandboxes try with one; they need a real driver to run.

use std::fs;
use std::path::PathBuf;
use std::process::Command as Program;
use std::sync::Arc;

use nagaya_api::ids::VolumeId;
use nagaya_engine::ports::{Command, DriverError, Guest, Process, ProcessEvent, ProcessInput};
use nagaya_testkit::{NotRun, Outcome};

use super::place::*;
use super::volumes::*;

/// Ids of sandboxes on the host start here; everything below belongs to the host's own users.
const FIRST_ID: u32 = 0x7000_0000;

/// A sandbox with a fresh volume in it.
async fn with_volume(place: &Place, path: &str, size: u64) -> (nagaya_api::ids::SessionId, Arc<dyn Guest>, VolumeId) {
    let (driver, id, volume) = (place.driver(), fresh_id(), fresh_volume());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    place.host().create_volume(volume, size).await.unwrap();
    driver.attach_volume(id, &at(volume, path)).await.unwrap();
    (id, guest, volume)
}

async fn remove(place: &Place, volume: VolumeId) {
    place.host().settle_volume(volume).await.unwrap();
    place.host().remove_volume(volume).await.unwrap();
}

fn image_of(place: &Place, volume: VolumeId) -> PathBuf {
    nagaya_testkit::storage_root(place.data()).join(format!("volumes/{volume}.ext4"))
}

/// Panics unless the file system in an image is in order.
fn assert_sound(place: &Place, volume: VolumeId) {
    let output = Program::new("e2fsck").arg("-fn").arg(image_of(place, volume)).env("PATH", "/usr/sbin:/sbin").output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

pub async fn the_smallest_volume_belongs_to_tenki_and_its_size_is_a_limit(place: &mut Place) -> Outcome {
    let (id, guest, volume) = with_volume(place, "/home/tenki/new/data", MIB).await;
    let owners =
        shell(&*guest, "stat -c '%u %g %a' /home/tenki/new /home/tenki/new/data; ls -A /home/tenki/new/data").await;
    assert_eq!(owners, "1000 1000 755\n1000 1000 755");
    let filled = run(&*guest, command(&["/bin/sh", "-c", "cat /dev/zero > /home/tenki/new/data/zeros"])).await;
    assert!(String::from_utf8_lossy(&filled.stderr).contains("No space left on device"), "{filled:?}");
    let held: u64 = shell(&*guest, "stat -c %s /home/tenki/new/data/zeros").await.parse().unwrap();
    assert!((700 << 10..=MIB).contains(&held), "a volume of 1 MiB held {held} bytes");
    shell(&*guest, "rm /home/tenki/new/data/zeros && echo fits > /home/tenki/new/data/note").await;
    destroy(place, &[id]).await;
    place.host().settle_volume(volume).await.unwrap();
    assert_sound(place, volume);
    remove(place, volume).await;
    Ok(())
}

pub async fn what_was_written_is_there_after_the_kill_of_the_sandbox(place: &mut Place) -> Outcome {
    let (id, guest, volume) = with_volume(place, "/data", 8 * MIB).await;
    let script = "import os\nf = open('/data/synced', 'wb')\nf.write(b'x' * 3000000)\nf.flush()\nos.fsync(f.fileno())\n\
                  open('/data/written', 'w').write('late')";
    run(&*guest, command(&["/usr/bin/python3", "-c", script])).await;
    place.kill_first_process(id, &*guest).await;
    let driver = place.driver();
    place.host().settle_volume(volume).await.unwrap();
    assert_sound(place, volume);
    let other = fresh_id();
    let guest = driver.start(other, &place.fresh()).await.unwrap();
    driver.attach_volume(other, &at(volume, "/data")).await.unwrap();
    assert_eq!(
        shell(&*guest, "tr -d x < /data/synced | wc -c; stat -c %s /data/synced; cat /data/written").await,
        "0\n3000000\nlate"
    );
    destroy(place, &[id, other]).await;
    remove(place, volume).await;
    Ok(())
}

pub async fn a_second_writer_is_refused(place: &mut Place) -> Outcome {
    let (id, guest, volume) = with_volume(place, "/data", MIB).await;
    let (driver, other) = (place.driver(), fresh_id());
    driver.start(other, &place.fresh()).await.unwrap();
    for mount in [at(volume, "/data"), reading(volume, "/data")] {
        assert!(matches!(driver.attach_volume(other, &mount).await, Err(DriverError::Busy)));
    }
    assert!(matches!(place.host().remove_volume(volume).await, Err(DriverError::Busy)));
    shell(&*guest, "echo still > /data/note").await;
    destroy(place, &[id, other]).await;
    remove(place, volume).await;
    Ok(())
}

/// Waits for a line of a program.
async fn line(process: &mut Process) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\n") {
        match process.events.recv().await {
            Some(ProcessEvent::Stdout(bytes)) => text.extend_from_slice(&bytes),
            other => panic!("{other:?} after {}", String::from_utf8_lossy(&text)),
        }
    }
    String::from_utf8(text).unwrap().trim_end().to_owned()
}

pub async fn a_volume_in_use_is_busy_until_it_is_taken_by_force(place: &mut Place) -> Outcome {
    let (id, guest, volume) = with_volume(place, "/data", 32 * MIB).await;
    let (driver, mount) = (place.driver(), at(volume, "/data"));
    let script = "import os, sys\nos.chdir('/data')\nf = open('kept', 'w+b', buffering=0)\nf.write(b'before' + bytes(9000))\n\
                  g = open('gone', 'w+b', buffering=0)\ng.write(b'x' * 90000)\nos.unlink('gone')\nprint('open', flush=True)\n\
                  for order in sys.stdin:\n\
                  \x20   try:\n        if order == 'write\\n': f.write(b'after'); os.fsync(f.fileno())\n\
                  \x20       if order == 'read\\n': f.seek(0); f.read(6)\n        print('done', flush=True)\n\
                  \x20   except OSError as error: print(error.strerror, flush=True)";
    let holds = Command { stdin: true, ..command(&["/usr/bin/python3", "-c", script]) };
    let mut process = guest.run(holds).await.unwrap();
    assert_eq!(line(&mut process).await, "open");
    assert!(matches!(driver.detach_volume(id, &mount, false).await, Err(DriverError::Busy)));
    let orders = process.input.clone();
    let order = |text: &'static str| orders.send(ProcessInput::Stdin(text.into()));
    order("write\n").await.unwrap();
    assert_eq!(line(&mut process).await, "done", "a refused detach did harm");

    driver.detach_volume(id, &mount, true).await.unwrap();
    driver.detach_volume(id, &mount, true).await.unwrap();
    for text in ["write\n", "read\n"] {
        order(text).await.unwrap();
        assert_eq!(line(&mut process).await, "Input/output error");
    }
    assert_eq!(shell(&*guest, "ls -A /data; grep -c ' /data ' /proc/mounts || true").await, "0");
    // While the old file system is still held, the volume is used elsewhere.
    let other = fresh_id();
    let elsewhere = driver.start(other, &place.fresh()).await.unwrap();
    driver.attach_volume(other, &mount).await.unwrap();
    assert_eq!(shell(&*elsewhere, "head -c 6 /data/kept; tail -c 5 /data/kept; ls -A /data").await, "beforeafterkept");
    shell(&*elsewhere, "echo second > /data/second; sync /data/second").await;
    process.input.send(ProcessInput::StdinClose).await.unwrap();
    finish(&mut process.events).await;
    shell(&*elsewhere, "cat /data/second; for i in 1 2 3 4 5; do cp /data/kept /data/copy$i; done").await;
    driver.detach_volume(other, &mount, false).await.unwrap();
    assert_sound(place, volume);
    destroy(place, &[id, other]).await;
    remove(place, volume).await;
    Ok(())
}

pub async fn a_reader_is_taken_out_by_force_without_harm_to_another(place: &mut Place) -> Outcome {
    let (id, guest, volume) = with_volume(place, "/data", MIB).await;
    let (driver, mount, other) = (place.driver(), reading(volume, "/data"), fresh_id());
    shell(&*guest, "echo kept > /data/note").await;
    driver.detach_volume(id, &at(volume, "/data"), false).await.unwrap();
    driver.attach_volume(id, &mount).await.unwrap();
    let second = driver.start(other, &place.fresh()).await.unwrap();
    driver.attach_volume(other, &mount).await.unwrap();
    let script = "exec 3< /data/note; echo open; read -r _; cat <&3 || echo failed";
    let holds = Command { stdin: true, ..command(&["/bin/sh", "-c", script]) };
    let mut process = guest.run(holds).await.unwrap();
    assert_eq!(line(&mut process).await, "open");
    assert!(matches!(driver.detach_volume(id, &mount, false).await, Err(DriverError::Busy)));
    driver.detach_volume(id, &mount, true).await.unwrap();
    process.input.send(ProcessInput::Stdin("\n".into())).await.unwrap();
    assert_eq!(finish(&mut process.events).await.text(), "failed");
    assert_eq!(shell(&*second, "cat /data/note").await, "kept");
    destroy(place, &[id, other]).await;
    remove(place, volume).await;
    Ok(())
}

pub async fn a_mounted_volume_grows_while_it_is_written_to(place: &mut Place) -> Outcome {
    let (id, guest, volume) = with_volume(place, "/data", MIB).await;
    let driver = place.driver();
    match place.host().grow_volume(volume, 16 * MIB).await {
        Err(DriverError::Refused(why)) if why.contains("CAP_SYS_RESOURCE") => {
            shell(&*guest, "echo still > /data/note").await;
            destroy(place, &[id]).await;
            remove(place, volume).await;
            return Err(NotRun(format!("root of this host has not all of its powers ({why})")));
        }
        other => other.unwrap(),
    }
    let busy = "i=0; while :; do i=$((i+1)); echo $i > /data/file-$((i % 20)); test $i = 50 && echo busy; done";
    let mut process = guest.run(command(&["/bin/sh", "-c", busy])).await.unwrap();
    wait_for_line(&mut process, "busy").await;
    for megabytes in [17, 128, 129, 1_024, 102_400] {
        place.host().grow_volume(volume, megabytes * MIB).await.unwrap();
        let kib: u64 = shell(&*guest, "df -k --output=size /data | tail -1").await.trim().parse().unwrap();
        assert!((megabytes << 10) / 100 * 90 <= kib && kib <= megabytes << 10, "{kib} KiB of {megabytes} MiB");
    }
    process.input.send(ProcessInput::Signal(nagaya_engine::ports::Signal::Kill)).await.unwrap();
    finish(&mut process.events).await;
    shell(&*guest, "head -c 20000000 /dev/zero > /data/large && rm /data/large").await;
    driver.detach_volume(id, &at(volume, "/data"), false).await.unwrap();
    assert_sound(place, volume);
    destroy(place, &[id]).await;
    remove(place, volume).await;
    Ok(())
}

pub async fn paths_that_cannot_have_a_volume_are_refused_and_stay_as_they_were(place: &mut Place) -> Outcome {
    let (driver, id, volume) = (place.driver(), fresh_id(), fresh_volume());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    place.host().create_volume(volume, MIB).await.unwrap();
    shell(&*guest, "ln -s /etc link; ln -s /tmp last; ln -s .. up; echo x > file; ln -s nowhere dangling").await;
    let mounts = shell(&*guest, "cat /proc/mounts").await;
    for (path, why) in [
        ("/home/tenki/link/data", "symbolic link"),
        ("/home/tenki/last", "symbolic link"),
        ("/home/tenki/up/tenki/data", "symbolic link"),
        ("/home/tenki/dangling", "symbolic link"),
        ("/proc/self/root/data", "sandbox's own disk"),
        ("/proc/1/cwd", "sandbox's own disk"),
        ("/dev/fd", "sandbox's own disk"),
        ("/dev/shm/data", "sandbox's own disk"),
        ("/dev/shm", "sandbox's own disk"),
        ("/sys/fs/cgroup", "sandbox's own disk"),
        ("/home/tenki/file", "not a directory"),
        ("/home/tenki/file/data", "not a directory"),
        ("/usr", "mounted there already"),
        ("/proc", "mounted there already"),
        ("/", "empty"),
        ("/home/../etc/data", "`..`"),
        ("/home//data", "empty"),
        ("data", "absolute"),
    ] {
        let refused = driver.attach_volume(id, &at(volume, path)).await;
        assert!(matches!(&refused, Err(DriverError::Refused(text)) if text.contains(why)), "{path}: {refused:?}");
    }
    let long = format!("/data/{}", "x".repeat(300));
    assert!(matches!(driver.attach_volume(id, &at(volume, &long)).await, Err(DriverError::Refused(_))));
    assert_eq!(shell(&*guest, "cat /proc/mounts").await, mounts);
    // Layers of the image are the sandbox's own.
    driver.attach_volume(id, &at(volume, "/usr/local/data")).await.unwrap();
    shell(&*guest, "echo x > /usr/local/data/note").await;
    destroy(place, &[id]).await;
    remove(place, volume).await;
    Ok(())
}

pub async fn renaming_the_mount_path_meanwhile_leads_nowhere_else(place: &mut Place) -> Outcome {
    let (driver, id, volume) = (place.driver(), fresh_id(), fresh_volume());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    if run(&*guest, command(&["/usr/bin/python3", "-c", "import ctypes"])).await.exit.code != 0 {
        destroy(place, &[id]).await;
        return Err(NotRun("the host's Python, which the image has, cannot swap two names".into()));
    }
    place.host().create_volume(volume, MIB).await.unwrap();
    let host = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let etc: Vec<_> = fs::read_dir("/etc").unwrap().map(|entry| entry.unwrap().file_name()).collect();
    // One name is a directory and a link to /etc in turns, thousands of times a second.
    let swaps = "import ctypes, os\nos.chdir('/srv')\nos.makedirs('a/deep')\nos.symlink('/etc', 'b')\n\
                 swap = ctypes.CDLL(None, use_errno=True).renameat2\nassert swap(-100, b'a', -100, b'b', 2) == 0\n\
                 print('ready', flush=True)\nwhile True: swap(-100, b'a', -100, b'b', 2)";
    let swaps = Command { user: User::Root, ..command(&["/usr/bin/python3", "-c", swaps]) };
    let mut process = guest.run(swaps).await.unwrap();
    wait_for_line(&mut process, "ready").await;
    let (mut attached, mut refused) = (0, 0);
    for round in 0..60 {
        let mount = at(volume, if round % 2 == 0 { "/srv/a/deep" } else { "/srv/a/new/data" });
        match driver.attach_volume(id, &mount).await {
            Ok(()) => attached += 1,
            Err(DriverError::Refused(_)) => refused += 1,
            Err(error) => panic!("round {round}: {error}"),
        }
        assert_eq!(shell(&*guest, "grep -c ' /etc' /proc/mounts || true").await, "0");
        driver.detach_volume(id, &mount, false).await.unwrap();
        assert_eq!(shell(&*guest, "grep -c ext4 /proc/mounts || true").await, "0");
    }
    println!("of 60 attempts {attached} were attached and {refused} refused");
    assert!(attached > 0, "nothing was ever attached");
    // Others may mount things on this host meanwhile, but not there.
    let now = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let strays: Vec<_> = now.lines().filter(|line| !host.contains(line)).collect();
    assert!(!strays.iter().any(|line| line.contains(" /etc") || line.contains(" /srv")), "{strays:?}");
    assert_eq!(fs::read_dir("/etc").unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>(), etc);
    drop(process);
    destroy(place, &[id]).await;
    remove(place, volume).await;
    Ok(())
}

pub async fn a_volume_that_was_moved_inside_is_found_and_taken_out(place: &mut Place) -> Outcome {
    let (id, guest, volume) = with_volume(place, "/srv/a b/c/data", MIB).await;
    shell_as(&*guest, "echo x > '/srv/a b/c/data/note'; mv '/srv/a b' /srv/moved; ! rmdir /srv/moved/c/data", true)
        .await;
    place.driver().detach_volume(id, &at(volume, "/srv/a b/c/data"), false).await.unwrap();
    assert_eq!(shell_as(&*guest, "ls -A /srv/moved/c/data; grep -c ext4 /proc/mounts || true", true).await, "0");
    destroy(place, &[id]).await;
    remove(place, volume).await;
    Ok(())
}

pub async fn a_volume_gives_no_devices_no_host_root_and_nothing_to_other_sandboxes(place: &mut Place) -> Outcome {
    let (id, guest, volume) = with_volume(place, "/data", 4 * MIB).await;
    let (driver, other) = (place.driver(), fresh_id());
    let stranger = driver.start(other, &place.fresh()).await.unwrap();
    shell(&*guest, "echo secret > /data/secret").await;
    assert_eq!(shell_as(&*stranger, "ls -d /data 2>/dev/null; grep -c ext4 /proc/mounts || true", true).await, "0");
    let device = "mknod /data/device b 7 0 && head -c 1 /data/device && echo opened; \
                  mknod /data/null c 1 3 && head -c 1 /data/null && echo opened; grep ' /data ' /proc/mounts | grep -c nodev";
    assert_eq!(shell_as(&*guest, device, true).await, "1");
    for call in ["umount /data", "mount -o remount,dev /data", "mount --bind /data /mnt"] {
        assert_ne!(
            run(&*guest, Command { user: User::Root, ..command(&["/bin/sh", "-c", call]) }).await.exit.code,
            0,
            "{call}"
        );
    }
    // What is root's and setuid in a volume is the sandbox's root, there and in any other sandbox.
    shell_as(&*guest, "cp /bin/sleep /data/sleep-as-root && chmod 4755 /data/sleep-as-root", true).await;
    driver.detach_volume(id, &at(volume, "/data"), false).await.unwrap();
    driver.attach_volume(other, &at(volume, "/data")).await.unwrap();
    let marker = format!("{}.5", 1_000_000 + std::process::id());
    let _sleeps = stranger.run(command(&["/data/sleep-as-root", &marker])).await.unwrap();
    let mut ids = String::new();
    eventually("the program runs", || {
        for pid in host_processes() {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if words.starts_with(b"/data/sleep-as-root") && String::from_utf8_lossy(&words).contains(&marker) {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                ids = status
                    .lines()
                    .filter(|line| line.starts_with("Uid:") || line.starts_with("Gid:"))
                    .collect::<Vec<_>>()
                    .join(" ");
            }
        }
        !ids.is_empty()
    })
    .await;
    let numbers = ids.split_whitespace().filter_map(|word| word.parse::<u32>().ok());
    assert!(numbers.clone().count() == 8 && numbers.clone().all(|number| number >= FIRST_ID), "{ids}");
    destroy(place, &[id, other]).await;
    remove(place, volume).await;
    Ok(())
}

pub async fn many_volumes_come_and_go_at_once(place: &mut Place) -> Outcome {
    let (driver, ids) = (place.driver(), [fresh_id(), fresh_id()]);
    let mut guests = Vec::new();
    for id in ids {
        guests.push(driver.start(id, &place.fresh()).await.unwrap());
    }
    let volumes: Vec<VolumeId> = (0..12).map(|_| fresh_volume()).collect();
    let work = volumes.iter().enumerate().map(|(number, volume)| {
        let (driver, host, volume, id) = (driver.clone(), place.host(), *volume, ids[number % 2]);
        tokio::spawn(async move {
            let mount = at(volume, &format!("/data/{number}"));
            host.create_volume(volume, MIB).await.unwrap();
            for _ in 0..3 {
                driver.attach_volume(id, &mount).await.unwrap();
                driver.detach_volume(id, &mount, false).await.unwrap();
            }
            driver.attach_volume(id, &mount).await.unwrap();
        })
    });
    for work in work.collect::<Vec<_>>() {
        work.await.unwrap();
    }
    for guest in &guests {
        assert_eq!(
            shell(&**guest, "grep -c ' /data/' /proc/mounts; for d in /data/*; do echo x > $d/x; done").await,
            "6"
        );
    }
    destroy(place, &ids).await;
    for volume in volumes {
        remove(place, volume).await;
    }
    Ok(())
}
