//! Every command line of the vendor's page about sessions runs as written there, with `tenki` as a link. Those about
//! templates wait for templates.

use std::fs;

use nagaya_testkit::Server;

use crate::person::{Person, can_run};

/// What the page shows, with `<session-id>` for an id as there.
const CREATE: &str = "tenki sandbox create \\
  --name my-session \\
  --cpu 4 \\
  --memory-mb 8192 \\
  --allow-inbound \\
  --allow-outbound \\
  --env APP_ENV=dev \\
  --metadata owner=alice \\
  --metadata purpose=review";
const CREATE_WITH_KEYS: &str = "tenki sandbox create \\
  --authorized-key 'ssh-ed25519 AAAA...' \\
  --authorized-keys-file ~/.ssh/authorized_keys";

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f me\n";

fn prepared(server: &Server) -> Person {
    let person = Person::of(server);
    person.file(".ssh/authorized_keys", KEY);
    person.file("config.json", "{}\n");
    person.file("local-file.txt", "from a pipe\n");
    person
}

#[test]
fn creating_listing_and_inspecting() {
    if !can_run("seed page") {
        return;
    }
    let server = Server::start();
    let person = prepared(&server);
    let id = id_in(&person.get(CREATE));
    assert!(person.get("tenki sandbox list").contains("my-session"));
    let listed = person.get("tenki sandbox list --json");
    let sessions: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(sessions[0]["id"], *id);
    assert_eq!(sessions[0]["metadata"]["purpose"], "review");
    assert_eq!((&sessions[0]["cpu_cores"], &sessions[0]["memory_mb"]), (&4.into(), &8192.into()));
    assert!(person.get(&format!("tenki sandbox get --session {id}")).contains("running"));
    person.get("tenki sandbox create --metadata owner=alice --metadata job=ci-1234");
}

#[test]
fn commands_and_files() {
    if !can_run("seed page") {
        return;
    }
    let server = Server::start();
    let person = prepared(&server);
    let id = person.create("--env APP_ENV=dev");
    // The programs of the page are not in every image; what they are told is what counts.
    person.get(&format!(
        "tenki sandbox exec --session {id} --privileged bash -c \
         'for each in go npm; do printf \"#!/bin/sh\\necho $each \\$*\\n\" >/usr/local/bin/$each; \
         chmod 755 /usr/local/bin/$each; done; install -d -o tenki /workspace'"
    ));
    let page = |line: &str| person.get(&line.replace("<session-id>", &id));
    assert_eq!(page("tenki sandbox exec --session <session-id> bash -lc 'go test ./...'"), "go test ./...\n");
    assert_eq!(
        page("tenki sandbox exec --session <session-id> --timeout 2m bash -lc 'npm ci && npm test'"),
        "npm ci\nnpm test\n"
    );
    page("tenki sandbox write --session <session-id> --path /workspace/app.env --data 'PORT=3000'");
    page("tenki sandbox write --session <session-id> --path /workspace/config.json --data-file ./config.json");
    page("cat ./local-file.txt | tenki sandbox write --session <session-id> --path /workspace/input.txt");
    assert_eq!(page("tenki sandbox read --session <session-id> --path /workspace/config.json"), "{}\n");
    assert_eq!(page("tenki sandbox read --session <session-id> --path /workspace/app.env"), "PORT=3000");
    assert_eq!(page("tenki sandbox read --session <session-id> --path /workspace/input.txt"), "from a pipe\n");
    page("tenki sandbox write --session <session-id> --path /workspace/build.log --data built");
    page("tenki sandbox read --session <session-id> --path /workspace/build.log --out ./build.log");
    assert_eq!(fs::read_to_string(person.home().join("build.log")).unwrap(), "built");
}

#[test]
fn ports_and_keys() {
    if !can_run("seed page") {
        return;
    }
    let server = Server::start();
    let person = prepared(&server);
    let id = person.create("--allow-inbound");
    let page = |line: &str| person.get(&line.replace("<session-id>", &id));
    assert!(page("tenki sandbox expose --session <session-id> --port 3000").contains("http://"));
    assert!(page("tenki sandbox ports --session <session-id>").contains("3000"));
    page("tenki sandbox unexpose --session <session-id> --port 3000");
    assert!(!page("tenki sandbox ports --session <session-id>").contains("3000"));
    page("tenki sandbox ssh-keys set --session <session-id> --keys-file ~/.ssh/authorized_keys");
    person.get(CREATE_WITH_KEYS);
}

#[test]
fn ssh_and_its_configuration() {
    if !can_run("seed page") {
        return;
    }
    let server = Server::start();
    let person = prepared(&server);
    let id = person.create("");
    let page = |line: &str| person.get(&line.replace("<session-id>", &id).replace("<session-uuid>", &id));
    // A shell that reads commands from stdin is what ssh opens without a terminal.
    let shell = person.run_with(&format!("tenki sandbox ssh --session {id}"), b"id -un\n");
    assert_eq!((shell.code, shell.stdout.trim()), (0, "root"), "{}", shell.stderr);
    let forwarded = person.run_with(&format!("tenki sandbox ssh {id} -L 8080:127.0.0.1:8080"), b"id -un\nexit 3\n");
    assert_eq!((forwarded.code, forwarded.stdout.trim()), (3, "root"), "{}", forwarded.stderr);
    page("tenki sandbox ssh config install");
    assert!(page("tenki sandbox ssh config status").contains("installed"));
    let users = person.home().join(".ssh/config");
    // OpenSSH takes the home directory from the accounts, not from HOME.
    let through = page(&format!("ssh -F {} sbx-<session-uuid> 'id -un; pwd'", users.display()));
    assert_eq!(through, "root\n/root\n");
    page("tenki sandbox ssh config uninstall");
    assert_eq!(fs::read_to_string(&users).unwrap(), "");
}

fn id_in(text: &str) -> String {
    text.lines().find_map(|line| line.strip_prefix("id:")).unwrap().trim().to_owned()
}
