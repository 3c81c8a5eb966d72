//! What people see, line by line. Ids, times and ports are replaced by words.

use nagaya_testkit::Server;

use crate::person::{Person, can_run, steady};

#[test]
fn a_sandboxs_life() {
    if !can_run("transcripts") {
        return;
    }
    let server = Server::start();
    let person = Person::of(&server);
    let said = |line: &str| person.run(line).transcript();
    steady(|| {
        insta::assert_snapshot!(said("tenki sandbox create --name web --memory-mb 512 --allow-inbound --tags b,a --metadata owner=alice"), @r"
        id:  [id]
        name:  web
        state:  running
        driver:  namespace
        isolation: shared kernel
        cpu:  2
        memory:  512 MB
        disk:  5 GB
        inbound:  yes
        outbound:  yes
        tags:  b a
        metadata:  owner=alice
        created:  [time]
        ready:  [time]
        ");
        insta::assert_snapshot!(said("tenki sandbox list"), @r"
        ID  NAME  STATE  CPU  MEMORY  DISK  AGE
        [id]  web  running  2  512 MB  5 GB  [age]
        ");
        insta::assert_snapshot!(said("tenki sandbox exec web -- sh -c 'echo out; echo err >&2; exit 3'"), @r"
        out
        ! err
        ! failed, exit code 3, [span], execution [id]
        = 3
        ");
        insta::assert_snapshot!(said("tenki sandbox exec web sh -c 'kill -9 $$'"), @r"
        ! ended by SIGKILL, exit code 137, [span], execution [id]
        = 137
        ");
        insta::assert_snapshot!(said("tenki sandbox exec web no-such-program"), @r"
        ! error: command not found: no such file or directory [command_not_found]
        !  Give an absolute path, or a name that is on the sandbox's PATH.
        = 127
        ");
        insta::assert_snapshot!(said("tenki sandbox exec --session web --timeout 50ms sleep 60"), @r"
        ! timed out, exit code 124, [span], execution [id]
        = 124
        ");
        insta::assert_snapshot!(said("tenki sandbox exec --session web --env A=1 --cwd /tmp --json -c 'echo $A; pwd'"), @r#"
        {
          "status": "succeeded",
          "exit_code": 0,
          "signal": null,
          "reason": "exit",
          "duration_ms": "[span]",
          "execution_id": "[id]",
          "stdout": "1\n/tmp\n",
          "stderr": ""
        }
        "#);
        insta::assert_snapshot!(said("tenki sandbox write web note.txt --data hello"), @"note.txt: 5 B written");
        insta::assert_snapshot!(said("tenki sandbox read web note.txt"), @"hello");
        insta::assert_snapshot!(said("tenki sandbox expose web 8000 --slug my-page"), @r"
        port: 8000
        url:  http://127.0.0.1:[port]
        slug: my-page
        ");
        insta::assert_snapshot!(said("tenki sandbox ports web"), @r"
        PORT  URL  SLUG  CLOSES
        8000  http://127.0.0.1:[port]  my-page  -
        ");
        insta::assert_snapshot!(said("tenki sandbox preview list"), @r"
        ID  SLUG  SESSION  PORT  URL  AGE
        [id]  my-page  [id]  8000  http://127.0.0.1:[port]  [age]
        ");
        insta::assert_snapshot!(said("tenki sandbox preview create --slug other-page"), @r"
        id:  [id]
        slug:  other-page
        url:  http://127.0.0.1:[port]
        created: [time]
        ");
        insta::assert_snapshot!(said("tenki sandbox preview bind other-page web 9000"), @r"
        id:  [id]
        slug:  other-page
        url:  http://127.0.0.1:[port]
        session: [id]
        port:  9000
        created: [time]
        ");
        insta::assert_snapshot!(said("tenki sandbox preview unbind other-page"), @r"
        id:  [id]
        slug:  other-page
        url:  http://127.0.0.1:[port]
        created: [time]
        ");
        insta::assert_snapshot!(said("tenki sandbox preview delete other-page"), @"[id] is deleted");
        insta::assert_snapshot!(said("tenki sandbox preview open web 8000 --json | tr -d ' ,' | cut -d: -f1"), @r#"
        {
        "port"
        "preview_url"
        "viewer_token"
        "expires_at"
        }
        "#);
        insta::assert_snapshot!(said("tenki sandbox unexpose web 8000"), @"port 8000 is closed");
        insta::assert_snapshot!(said("tenki sandbox pause web"), @"[id] is paused");
        insta::assert_snapshot!(said("tenki sandbox list --state paused -o yaml | head -n 3"), @r"
        - id: [id]
          name: web
          state: paused
        ");
        insta::assert_snapshot!(said("tenki sandbox resume web"), @"[id] is running");
        insta::assert_snapshot!(said("tenki sandbox extend web 30m"), @"[id] has no end");
        insta::assert_snapshot!(said("tenki sandbox update web --name site --tag c"), @r"
        id:  [id]
        name:  site
        state:  running
        driver:  namespace
        isolation: shared kernel
        cpu:  2
        memory:  512 MB
        disk:  5 GB
        inbound:  yes
        outbound:  yes
        tags:  c
        metadata:  owner=alice restore_degraded=false restore_mode=memory
        created:  [time]
        ready:  [time]
        ");
        insta::assert_snapshot!(said("tenki sandbox fork site --count 2"), @r"
        ID  NAME  STATE
        [id]  site-fork-1  running
        [id]  site-fork-2  running
        ");
        insta::assert_snapshot!(said("tenki sandbox terminate site site-fork-1 site-fork-2"), @r"
        [id] is terminated
        [id] is terminated
        [id] is terminated
        ");
        insta::assert_snapshot!(said("tenki sandbox list"), @"ID  NAME  STATE  CPU  MEMORY  DISK  AGE");
        insta::assert_snapshot!(said("tenki sandbox usage"), @r"
        WHAT  NOW  AT MOST
        Active sessions  0  1000
        Cores  0  unlimited
        Memory  0 B  unlimited
        Disk  0 B  unlimited
        ");
        insta::assert_snapshot!(said("tenki whoami"), @r"
        server:  http://127.0.0.1:[port]
        key from:  [directory]/api-key
        owner:  user [id]
        workspaces: [id] (default)
        ");
    });
}

#[test]
fn snapshots_and_volumes() {
    if !can_run("transcripts") {
        return;
    }
    let server = Server::start();
    let person = Person::of(&server);
    let said = |line: &str| person.run(line).transcript();
    person.create("--name box");
    steady(|| {
        insta::assert_snapshot!(said("tenki sandbox snapshot create --session box --name baseline --expires-at 2099-03-20T12:00:00Z"), @r"
        id:  [id]
        name:  baseline
        state:  ready
        durability: durable
        session:  [id]
        size:  [size]
        created:  [time]
        expires:  [time]
        ");
        insta::assert_snapshot!(said("tenki sandbox snapshot list"), @r"
        ID  NAME  STATE  SIZE  SESSION  AGE
        [id]  baseline  ready  [size]  [id]  [age]
        ");
        insta::assert_snapshot!(said("tenki sandbox snapshot restore baseline --name restored-copy | head -n 3"), @r"
        id:  [id]
        name:  restored-copy
        state:  running
        ");
        insta::assert_snapshot!(said("tenki sandbox snapshot delete baseline"), @r"
        ! error: snapshot is in use: session [id] was made from it [snapshot_in_use]
        !  End the sessions that were made from it first; a pause's snapshot goes when its session is resumed or ends.
        = 69
        ");
        insta::assert_snapshot!(said("tenki sandbox terminate restored-copy"), @"[id] is terminated");
        insta::assert_snapshot!(said("tenki sandbox snapshot delete baseline"), @"[id] is deleted");
        insta::assert_snapshot!(said("tenki sandbox volume create --name cache --size 10MiB"), @r"
        id:  [id]
        name:  cache
        state:  available
        size:  10 MiB
        created: [time]
        ");
        insta::assert_snapshot!(said("tenki sandbox volume attach box cache --mount /cache --readonly"), @"[id] is attached to [id]:/cache:ro");
        insta::assert_snapshot!(said("tenki sandbox volume get cache"), @r"
        id:  [id]
        name:  cache
        state:  in_use
        size:  10 MiB
        created:  [time]
        attached: [id]:/cache:ro
        ");
        insta::assert_snapshot!(said("tenki sandbox volume delete cache"), @r"
        ! error: volume is in use [volume_in_use]
        !  Detach it from every session first.
        = 69
        ");
        insta::assert_snapshot!(said("tenki sandbox volume detach box cache"), @"[id] is detached from [id]");
        insta::assert_snapshot!(said("tenki sandbox volume resize cache --size 20MiB"), @r"
        id:  [id]
        name:  cache
        state:  available
        size:  20 MiB
        created: [time]
        ");
        insta::assert_snapshot!(said("tenki sandbox volume delete cache"), @"[id] is deleted");
        insta::assert_snapshot!(said("tenki sandbox volume list"), @"ID  NAME  STATE  SIZE");
    });
}

#[test]
fn facts_about_a_session() {
    if !can_run("transcripts") {
        return;
    }
    let server = Server::start();
    let person = Person::of(&server);
    let said = |line: &str| person.run(line).transcript();
    person.create("--name box");
    person.run("tenki sandbox exec box no-such-program");
    person.get("tenki sandbox pause box");
    steady(|| {
        insta::assert_snapshot!(said("tenki sandbox logs box"), @r"
        [time]  created  created with an empty disk
        [time]  ready  ready after [span]
        [time]  command_not_found  no-such-program was not found in the sandbox  (execution [id])
        [time]  paused  paused by request
        ");
        insta::assert_snapshot!(said("tenki sandbox explain box"), @r"
        the session is paused by request [paused_by_request]  [time]
          it was asked to pause; visits do not resume it
          What to do: Resume it.

        commands were not found in the sandbox [command_not_found]  [time]
          no-such-program was not found in the sandbox
          What to do: Install them, or give a name that is on the sandbox's PATH.
        ");
    });
    person.get("tenki sandbox terminate box");
    // Ended sessions are found by name too, where that makes sense, and their story has an end.
    steady(|| {
        insta::assert_snapshot!(said("tenki sandbox explain box"), @r"
        the session was terminated by request [ended_by_request]  [time]
          it lived for [span]

        commands were not found in the sandbox [command_not_found]  [time]
          no-such-program was not found in the sandbox
          What to do: Install them, or give a name that is on the sandbox's PATH.
        ");
        insta::assert_snapshot!(said("tenki sandbox logs box --follow --json | tail -n 1"), @r#"{"sequence":5,"at":"[time]","kind":"terminated","summary":"terminated by request","details":{"reason":"requested"},"execution_id":null}"#);
    });
}

#[test]
fn logging_in() {
    if !can_run("transcripts") {
        return;
    }
    let server = Server::start();
    let elsewhere = tempfile::tempdir().unwrap();
    let person = Person::with_data_dir(elsewhere.path());
    let login = format!("tenki login --endpoint {}", server.endpoint());
    assert_eq!(person.run_with(&login, b"tk_wrong\n").code, 77);
    assert_eq!(person.run("tenki sandbox list").code, 77);
    let done = person.run_with(&login, format!("{}\n", server.api_key()).as_bytes());
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert_eq!(person.get("tenki sandbox list"), "ID  NAME  STATE  CPU  MEMORY  DISK  AGE\n");
    let mode = person.get("stat -c %a ~/.config/nagaya/login.yaml ~/.config/nagaya");
    assert_eq!(mode, "600\n700\n");
    person.get("tenki logout");
    assert_eq!(person.run("tenki sandbox list").code, 77);
    // What Tenki's own command line wrote is read, and stays as it is.
    let text = format!("auth_token: {}\nendpoint: {}\ncurrent_workspace_id: x\n", server.api_key(), server.endpoint());
    let file = person.file(".config/tenki/config.yaml", &text);
    person.get("tenki sandbox list");
    assert_eq!(std::fs::read_to_string(file).unwrap(), text);
}
