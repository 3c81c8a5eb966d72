//! What people get wrong, and what the program says then.

use std::fs;
use std::process::Stdio;

use nagaya_testkit::Server;

use crate::person::{Person, can_run, steady};

/// What needs no server.
#[test]
fn command_lines_that_are_wrong() {
    let nowhere = tempfile::tempdir().unwrap();
    let person = Person::with_data_dir(nowhere.path());
    let cases = [
        ("tenki sandbox craete", 64, "create"),
        ("tenki sandbx list", 64, "sandbox"),
        ("tenki sandbox create --name", 64, "--name"),
        ("tenki sandbox create --snapshot a --template b", 64, "--template"),
        ("tenki sandbox create --metadata owner", 64, "KEY=VALUE"),
        ("tenki sandbox create --env =x", 64, "KEY=VALUE"),
        ("tenki sandbox create --max-duration 30", 64, "1h30m"),
        ("tenki sandbox create --idle-timeout 90s", 64, "whole minutes"),
        ("tenki sandbox create --volume data", 64, "VOLUME:PATH"),
        ("tenki sandbox create --volume data:relative", 64, "absolute"),
        ("tenki sandbox create --authorized-keys-file missing.pub", 66, "missing.pub"),
        ("tenki sandbox create --cpu many", 64, "many"),
        ("tenki sandbox create -o xml", 64, "json"),
        ("tenki sandbox volume create --name a --size 20", 64, "unit"),
        ("tenki sandbox expose x --port 0", 64, "1..=65535"),
        ("tenki sandbox expose x --port 65536", 64, "65535"),
        ("tenki sandbox exec --session x", 64, "no command"),
        ("tenki sandbox exec --sesion x true", 64, "--session"),
        ("tenki sandbox exec x --timeout 1s true", 64, "Options go first"),
        ("tenki sandbox exec -c true x y", 64, "unexpected"),
        ("tenki sandbox get", 64, "NAGAYA_SESSION"),
        ("tenki sandbox get a b", 64, "unexpected"),
        ("tenki sandbox write --session x --path y --data-file none", 66, "none"),
        ("tenki sandbox write --session x --path y --data-file .", 64, "directory"),
        ("tenki sandbox write --session x --path y --mode 9", 64, "octal"),
        ("tenki sandbox cp a b", 64, "SESSION:PATH"),
        ("tenki sandbox cp missing x:/tmp", 66, "missing"),
        ("tenki sandbox update x", 64, "nothing to change"),
        ("tenki sandbox snapshot create --session x --expires-at tomorrow", 64, "2027"),
        ("tenki sandbox list", 77, "nagaya serve"),
    ];
    for (line, code, says) in cases {
        let done = person.run(line);
        assert_eq!((done.code, done.stdout.as_str()), (code, ""), "{line}\n{}", done.stderr);
        assert!(done.stderr.contains(says), "{line} should say {says:?}:\n{}", done.stderr);
    }
}

#[test]
fn a_server_that_is_down_is_named() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("address"), "http://127.0.0.1:1\n").unwrap();
    fs::write(directory.path().join("api-key"), "tk_x\n").unwrap();
    let person = Person::with_data_dir(directory.path());
    let done = person.run("tenki sandbox list");
    steady(|| {
        insta::assert_snapshot!(done.transcript(), @r"
        ! error: no connection to http://127.0.0.1:[port]: Connection refused [no_server]
        !  Start a server on this machine with `nagaya serve`, or set TENKI_API_ENDPOINT to the address of another.
        = 69
        ");
    });
}

#[test]
fn keys_names_and_abbreviations() {
    if !can_run("bad input") {
        return;
    }
    let server = Server::start();
    let mut person = Person::of(&server);
    let (one, two) = (person.create("--name twin"), person.create("--name twin"));
    let said = |person: &Person, line: &str| person.run(line).transcript();
    steady(|| {
        insta::assert_snapshot!(said(&person, "tenki sandbox get nobody"), @r#"
        ! error: no session has the name "nobody" or an id that begins so [not_found]
        !  `nagaya sandbox list` shows what there is.
        = 66
        "#);
        insta::assert_snapshot!(said(&person, "tenki sandbox get 01234567-89ab-7def-8123-456789abcdef"), @r"
        ! error: session not found [session_not_found]
        !  Check the id; sessions of other workspaces look the same as unknown ones.
        = 66
        ");
        insta::assert_snapshot!(said(&person, &format!("tenki sandbox read {one} /nowhere")), @r"
        ! error: no such file or directory [file_not_found]
        !  Check the path; relative paths start in the home directory of the sandbox's user.
        = 66
        ");
        insta::assert_snapshot!(said(&person, &format!("tenki sandbox exec {one} no-such-program")), @r"
        ! error: command not found: no such file or directory [command_not_found]
        !  Give an absolute path, or a name that is on the sandbox's PATH.
        = 127
        ");
        insta::assert_snapshot!(said(&person, &format!("tenki sandbox expose {one} 80")), @r"
        ! error: inbound access is disabled for this session [inbound_disabled]
        !  Create the session with inbound access allowed.
        = 69
        ");
    });
    let twins = person.run("tenki sandbox pause twin");
    assert_eq!(twins.code, 64);
    assert!(twins.stderr.contains(&one) && twins.stderr.contains(&two), "{}", twins.stderr);
    let beginning = person.run(&format!("tenki sandbox get {}", &one[..4]));
    assert!(beginning.stderr.contains("[ambiguous]") && beginning.code == 64, "{}", beginning.stderr);
    person.variables =
        vec![("TENKI_API_ENDPOINT".into(), server.endpoint().into()), ("TENKI_API_KEY".into(), "tk_wrong".into())];
    steady(|| {
        insta::assert_snapshot!(said(&person, "tenki sandbox list"), @r"
        ! error: missing or unknown credential [unauthenticated]
        !  Set TENKI_API_KEY to a key of this server, or run `nagaya login`; `nagaya serve` prints a key at its first start and keeps it in its data directory, in `api-key`.
        = 77
        ");
    });
}

/// A local disk that is full leaves what was there.
#[test]
fn a_full_disk_leaves_no_half_file() {
    if !can_run("full local disk") {
        return;
    }
    let server = Server::start();
    let person = Person::of(&server);
    let id = person.create("");
    person.get(&format!("tenki sandbox exec -q -c 'head -c 3000000 /dev/zero >big' {id}"));
    let small = nagaya_testkit::SmallDisk::mount(2);
    let out = small.path().join("out");
    fs::write(&out, "old").unwrap();
    let done = person.run(&format!("tenki sandbox read {id} big --out {}", out.display()));
    assert_eq!(done.code, 74, "{}", done.stderr);
    assert!(done.stderr.contains("no space left"), "{}", done.stderr);
    assert_eq!(fs::read_to_string(&out).unwrap(), "old");
    let names: Vec<_> = fs::read_dir(small.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| name == "out" || name == "lost+found"), "{names:?}");
    let done = person.run(&format!("tenki sandbox read {id} big >/dev/full"));
    assert_eq!(done.code, 74, "{}", done.stderr);
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    if !can_run("broken pipe") {
        return;
    }
    let server = Server::start();
    let person = Person::of(&server);
    let id = person.create("");
    person.get(&format!("tenki sandbox exec -q -c 'head -c 3000000 /dev/zero >big' {id}"));
    for line in [
        format!("tenki sandbox exec {id} yes | head -n 1"),
        format!("tenki sandbox read {id} big | head -c 1"),
        "tenki completions bash | head -n 1".to_owned(),
    ] {
        let done = person.run(&format!("{line} >/dev/null; echo ${{PIPESTATUS[*]}}"));
        assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("141 0\n", ""), "{line}");
    }
    // The command in the sandbox ended with its reader.
    let still = person.run(&format!("tenki sandbox exec -q {id} sh -c 'pgrep -x yes || true'"));
    assert_eq!(still.stdout, "", "{}", still.stderr);
}

#[test]
fn interrupts_reach_the_command() {
    if !can_run("interrupts") {
        return;
    }
    let server = Server::start();
    let person = Person::of(&server);
    let id = person.create("");
    let interrupted = |trap: &str, signals: &[&str]| {
        let line = format!("exec tenki sandbox exec {id} bash -c '{trap} echo ready; while :; do sleep 0.01; done'");
        let mut child = person.shell(&line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut said = String::new();
        for signal in signals {
            // Every signal follows a word of the command, so none is lost.
            said.clear();
            std::io::BufRead::read_line(&mut stdout, &mut said).unwrap();
            std::process::Command::new("kill").args([*signal, &child.id().to_string()]).status().unwrap();
        }
        child.wait().unwrap().code().unwrap()
    };
    assert_eq!(interrupted("trap \"exit 9\" INT;", &["-INT"]), 9);
    assert_eq!(interrupted("trap \"echo no\" INT;", &["-INT", "-INT"]), 137);
    assert_eq!(interrupted("trap \"exit 8\" TERM;", &["-TERM"]), 8);
}

#[test]
fn interrupts_get_a_person_out_of_a_command_that_does_not_read() {
    if !can_run("interrupts without reading") {
        return;
    }
    let server = Server::start();
    let person = Person::of(&server);
    let id = person.create("");
    // Far more input than anybody keeps for it, so that signals wait behind it.
    let line = format!("tenki sandbox exec {id} sh -c 'echo ready; exec sleep 98765' < /dev/zero");
    let mut child = person.shell(&format!("exec {line}")).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut said = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.as_mut().unwrap()), &mut said).unwrap();
    // As somebody does who has lost patience; signals of one kind that come too fast are one.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(std::time::Instant::now() < deadline, "three interrupts did not end it");
        std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    assert!(matches!(status.code(), Some(130 | 137)), "{status}");
    let gone = "for i in $(seq 200); do pgrep -x sleep >/dev/null || exit 0; sleep 0.1; done; exit 1";
    let done = person.run(&format!("tenki sandbox exec -q {id} bash -c '{gone}'"));
    assert_eq!((done.stdout.as_str(), done.code), ("", 0), "{}", done.stderr);
}
