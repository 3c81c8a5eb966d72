//! Files and directories, in and out.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use nagaya_testkit::Server;

use crate::person::{Person, can_run};

#[test]
fn files_keep_content_and_mode_both_ways() {
    if !can_run("copies") {
        return;
    }
    let server = Server::start();
    let person = Person::of(&server);
    let id = person.create("--name box");
    let content: Vec<u8> = (0..3_000_000_u32).map(|number| (number * 7 % 251) as u8).collect();
    let file = person.home().join("data.bin");
    fs::write(&file, &content).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o750)).unwrap();
    let copied = person.run(&format!("tenki sandbox cp data.bin {id}:there.bin"));
    // Progress is for terminals only.
    assert_eq!((copied.stdout.as_str(), copied.stderr.as_str()), ("there.bin: 2.9 MiB copied\n", ""));
    assert_eq!(person.get(&format!("tenki sandbox exec -q {id} stat -c '%a %s %U' there.bin")), "750 3000000 tenki\n");
    person.get("tenki sandbox cp box:there.bin back.bin && cmp data.bin back.bin");
    assert_eq!(fs::metadata(person.home().join("back.bin")).unwrap().permissions().mode() & 0o777, 0o750);
    // Into directories, under the same name.
    fs::create_dir(person.home().join("place")).unwrap();
    person.get("tenki sandbox cp box:there.bin place && cmp data.bin place/there.bin");
    person.get(&format!("NAGAYA_SESSION={id} tenki sandbox cp data.bin :/tmp"));
    person.get(&format!("tenki sandbox exec -q {id} cmp /tmp/data.bin there.bin"));
}

#[test]
fn directories_arrive_whole() {
    if !can_run("copies") {
        return;
    }
    let server = Server::start();
    let person = Person::of(&server);
    let id = person.create("");
    for number in 0..300 {
        person.file(&format!("tree/deep/{}/file-{number}", number % 7), &"x".repeat(number));
    }
    person.file("tree/run", "#!/bin/sh\n");
    fs::set_permissions(person.home().join("tree/run"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("deep/0/file-0", person.home().join("tree/link")).unwrap();
    fs::create_dir(person.home().join("tree/empty")).unwrap();
    person.get(&format!("tenki sandbox cp tree {id}:copy"));
    person.get(&format!("tenki sandbox cp {id}:copy back && diff -r tree back && diff <(cd tree; find . -printf '%p %y %l\\n' | sort) <(cd back; find . -printf '%p %y %l\\n' | sort)"));
    // A second time: into the directory that is there now.
    person.get(&format!("tenki sandbox cp tree {id}:copy && tenki sandbox exec -q {id} test -x copy/tree/run"));
    person.get(&format!("tenki sandbox exec -q --privileged {id} mkdir /root/closed"));
    let denied = person.run(&format!("tenki sandbox cp tree {id}:/root/closed/new"));
    assert_eq!((denied.code, denied.stderr.contains("permission denied")), (77, true), "{}", denied.stderr);
    assert!(denied.stderr.contains("--privileged"), "{}", denied.stderr);
    person.get(&format!("tenki sandbox cp --privileged tree {id}:/root/closed && tenki sandbox cp --privileged {id}:/root/closed/tree two && diff -r tree two"));
    let missing = person.run(&format!("tenki sandbox cp {id}:nowhere x"));
    assert_eq!((missing.code, missing.stderr.contains("[file_not_found]")), (66, true), "{}", missing.stderr);
}

#[test]
fn stdin_feeds_commands_and_files() {
    if !can_run("copies") {
        return;
    }
    let server = Server::start();
    let person = Person::of(&server);
    let id = person.create("");
    let input = vec![b'z'; 5_000_000];
    let counted = person.run_with(&format!("tenki sandbox exec {id} wc -c"), &input);
    assert_eq!((counted.stdout.trim(), counted.code), ("5000000", 0), "{}", counted.stderr);
    let echoed = person.run_with(&format!("tenki sandbox exec -q {id} cat"), &input);
    assert_eq!((echoed.code, echoed.stdout.as_bytes() == input), (0, true), "{}", echoed.stderr);
    let written = person.run_with(&format!("tenki sandbox write {id} /tmp/in"), &input);
    assert_eq!(written.code, 0, "{}", written.stderr);
    assert_eq!(person.get(&format!("tenki sandbox exec -q {id} stat -c %s /tmp/in")), "5000000\n");
    // One that is always meant need not be named.
    let default = person.run(&format!(
        "export NAGAYA_SESSION={id}; tenki sandbox exec -q echo word; tenki sandbox get | grep -c {id}; \
         tenki sandbox read /tmp/in | wc -c; tenki sandbox get nobody"
    ));
    assert_eq!((default.stdout.as_str(), default.code), ("word\n1\n5000000\n", 66), "{}", default.stderr);
    // A loop's list stays the loop's.
    let looped = person.run(&format!(
        "printf 'a\\nb\\nc\\n' | while read word; do tenki sandbox exec -q --no-stdin {id} echo $word; done"
    ));
    assert_eq!(looped.stdout, "a\nb\nc\n", "{}", looped.stderr);
}
