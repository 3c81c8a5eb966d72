use clap::{Args, FromArgMatches};

use super::*;

/// What the command line says.
fn flags(words: &[&str]) -> Flags {
    let command = Flags::augment_args(clap::Command::new("nagaya").no_binary_name(true));
    Flags::from_arg_matches(&command.get_matches_from(words)).unwrap()
}

fn load(text: &str, words: &[&str]) -> anyhow::Result<Config> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    Config::load(flags(&[&["--config", file.path().to_str().unwrap()], words].concat()))
}

fn parse(text: &str) -> anyhow::Result<Config> {
    load(text, &[])
}

fn problem(text: &str) -> String {
    format!("{:#}", parse(text).unwrap_err())
}

#[test]
fn an_empty_file_gives_the_defaults() {
    let config = parse("").unwrap();
    assert_eq!(config.daemon.listen.to_string(), "127.0.0.1:7070");
    assert_eq!(config.daemon.limits.message_bytes_max, 128 << 20);
    assert_eq!(config.engine.certificate_ttl_ms, 600_000);
}

#[test]
fn the_readmes_configuration_is_one() {
    let readme = include_str!("../../../../README.md");
    let (_, rest) = readme.split_once("```toml\n").unwrap();
    let config = parse(rest.split_once("```").unwrap().0).unwrap();
    assert_eq!(config.engine.idle_timeout_default_minutes, Some(30));
    assert_eq!(config.blobs.s3.unwrap().prefix, "server-1");
}

#[test]
fn an_unknown_key_is_an_error_that_names_it() {
    for (text, key) in [
        ("listn = '127.0.0.1:1'", "listn"),
        ("[limits]\nmessage_bytes = 1", "message_bytes"),
        ("[limits]\ncreate_hold_ms = 1\nmessage_bytes = 1", "message_bytes"),
        ("[tenki]\nconnections_max = 1", "connections_max"),
        ("[tls]\nkey = 'x'", "key"),
        ("[network]\ncdir = ''", "cdir"),
    ] {
        let problem = problem(text);
        assert!(problem.contains(&format!("unknown field `{key}`")), "{problem}");
        assert!(problem.contains(&format!("| {}", text.lines().last().unwrap())), "no line is shown: {problem}");
    }
}

#[test]
fn limits_of_tenki_clients_are_read_where_they_once_stood_too() {
    let said = "create_hold_ms = 1\ndeadline_margin_ms = 2\nstdin_window_bytes = 3\nread_chunk_bytes = 4096";
    for text in [
        format!("[tenki]\n{said}"),
        format!("[limits]\nconnections_max = 7\n{said}"),
        "tenki = { create_hold_ms = 1, deadline_margin_ms = 2 }\n\
         [limits]\nstdin_window_bytes = 3\nread_chunk_bytes = 4096"
            .into(),
    ] {
        let tenki = parse(&text).unwrap().daemon.tenki;
        let read = [tenki.create_hold_ms, tenki.deadline_margin_ms];
        assert_eq!((read, tenki.stdin_window_bytes, tenki.read_chunk_bytes), ([1, 2], 3, 4096), "{text}");
    }
    assert_eq!(parse("[limits]\nconnections_max = 7\ncreate_hold_ms = 1").unwrap().daemon.limits.connections_max, 7);
    let twice = problem("[limits]\ncreate_hold_ms = 1\n[tenki]\ncreate_hold_ms = 1");
    assert!(twice.contains("tenki.create_hold_ms stands in [limits] too"), "{twice}");
    let refused = problem("[limits]\ncreate_hold_ms = 'x'");
    assert!(refused.contains("| create_hold_ms = 'x'"), "no line is shown: {refused}");
}

#[test]
fn flags_win_over_the_file() {
    let text = "listen = '127.0.0.1:1'\napi_key = 'tk_file'\ndata_dir = '/a'\n[ssh]\nlisten = '127.0.0.1:3'";
    let config = load(text, &["--listen", "127.0.0.1:2", "--api-key", "tk_flag"]).unwrap();
    assert_eq!(config.daemon.listen.port(), 2);
    assert_eq!(config.api_key.as_deref(), Some("tk_flag"));
    assert_eq!(config.data_dir, PathBuf::from("/a"));
    assert_eq!(config.daemon.ssh.listen.unwrap().port(), 3);
    let config = load(text, &["--data-dir", "/b", "--ssh-listen", "127.0.0.1:4"]).unwrap();
    assert_eq!(config.data_dir, PathBuf::from("/b"));
    assert_eq!(config.daemon.ssh.listen.unwrap().port(), 4);
}

#[test]
fn a_value_out_of_range_is_an_error_that_names_its_key() {
    for (text, key) in [
        ("public_url = 'ftp://x'", "public_url"),
        ("public_url = 'http://x/path'", "public_url"),
        ("public_url = 'x:7070'", "public_url"),
        ("[limits]\nmessage_bytes_max = 10", "limits.message_bytes_max"),
        ("[limits]\nbytes_under_way_max = 134217728", "limits.bytes_under_way_max"),
        ("[limits]\nstream_window_bytes = 1", "limits.stream_window_bytes"),
        ("[limits]\nconnections_max = 0", "limits.connections_max"),
        ("[engine]\nsessions_max = 0", "engine.sessions_max"),
        ("[limits]\ndownloads_max = 0", "limits.downloads_max"),
        ("[limits]\nread_chunk_bytes = 0", "tenki.read_chunk_bytes"),
        ("preview_domain = 'p_q.example'", "preview_domain"),
        ("preview_domain = '127.0.0.1'", "preview_domain"),
        ("preview_domain = 'example.com'\npublic_url = 'https://api.example.com'", "preview_domain"),
        ("[previews]\nloopback = '0.0.0.0'", "previews.loopback"),
        ("[previews]\nanswer_timeout_ms = 0", "previews.answer_timeout_ms"),
        ("[previews.tls]\ncertificate_file = 'c'\nkey_file = 'k'", "previews.tls"),
        ("preview_domain = 'p.example'\n[previews.tls]\ncertificate_file = 'c'\nkey_file = 'k'", "previews.tls"),
        ("[network]\nconnections_max = 0", "network.connections_max"),
        ("[network]\nallow = ['10.1.2.0/24', 'x']", "network.allow \"x\" is neither an IPv4 address"),
        ("[network]\ncidr = '10.1.2.3'", "network.cidr \"10.1.2.3\" is not an IPv4 network"),
        ("[network]\nname_server = 'x'", "network.name_server \"x\" is neither ADDRESS"),
        ("[ssh]\nlogins_max = 0", "ssh.logins_max"),
        ("[blobs.s3]\nbucket = 'b'\nprefix = 'a//b'", "blobs.s3.prefix"),
        ("[blobs.s3]\nbucket = ''", "blobs.s3.bucket"),
        ("[blobs.s3]\nbucket = 'b'\nendpoint = 'http://x'", "blobs.s3.endpoint"),
    ] {
        let problem = problem(text);
        assert!(problem.contains(key), "{text}: {problem}");
    }
}

#[test]
fn the_public_url_loses_its_trailing_slash() {
    assert_eq!(
        parse("public_url = 'https://sandboxes.example/'").unwrap().daemon.public_url.unwrap(),
        "https://sandboxes.example"
    );
}

#[test]
fn what_is_said_reaches_the_part_that_it_is_about() {
    let text = "listen = '127.0.0.1:1'\n[namespace]\nslots_max = 7\n[pools]\nslots_ready = 3\n\
                [network]\ncidr = '10.9.0.0/16'\nname_server = '9.9.9.9'\n[disks]\npool = 'auto'\n\
                [engine]\nsessions_max = 5\n[previews]\nexchanges_max = 6";
    let config = parse(text).unwrap();
    assert_eq!(config.daemon.listen.port(), 1);
    assert_eq!(config.host.limits.slots_max, 7);
    assert_eq!(config.namespace.pools.slots_ready, 3);
    assert_eq!(config.host.network.cidr.unwrap().to_string(), "10.9.0.0/16");
    assert_eq!(config.host.network.name_server.unwrap().to_string(), "9.9.9.9:53");
    assert_eq!(config.host.disks.pool, host::DiskPool::Auto);
    assert_eq!(config.engine.sessions_max, 5);
    assert_eq!(config.daemon.previews.exchanges_max, 6);
    assert!(config.namespace.shortcuts);
}

#[test]
fn no_two_parts_have_the_same_key() {
    let mut keys = Config::keys();
    keys.sort_unstable();
    assert!(keys.contains(&"listen") && keys.contains(&"engine") && keys.contains(&"pools"), "{keys:?}");
    assert!(keys.windows(2).all(|pair| pair[0] != pair[1]), "{keys:?}");
}
