use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const HEADER_BYTES_MAX: usize = 4096;
const HEAD: &str = "POST /x HTTP/1.1\r\nhost: a\r\n";

/// What is passed on of these bytes when they arrive in pieces of this size, and which request is refused.
async fn passed(bytes: &[u8], piece: usize) -> (Vec<u8>, Option<(u64, Refusal)>) {
    let (mut client, server) = tokio::io::duplex(piece);
    let (mut strict, watch) = Strict::new(server, HEADER_BYTES_MAX);
    let bytes = bytes.to_vec();
    let sending = tokio::spawn(async move {
        let _ = client.write_all(&bytes).await;
    });
    let mut all = Vec::new();
    let mut part = [0; 1000];
    loop {
        let read = strict.read(&mut part);
        tokio::select! {
            biased;
            read = read => match read {
                Ok(0) | Err(_) => break,
                Ok(length) => all.extend_from_slice(&part[..length]),
            },
            // After a refusal nothing comes any more.
            () = tokio::task::yield_now(), if watch.shared.refused.get().is_some() => break,
        }
    }
    sending.abort();
    let refused = watch.shared.refused.get().copied();
    (all, refused)
}

#[tokio::test]
async fn what_has_one_meaning_passes_unchanged_however_it_arrives() {
    let bytes = [
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "\r\nGET /a\"b\"?c={d}|e HTTP/1.0\r\n\r\n",
        &format!("{HEAD}Content-Length: 5\r\n\r\nab\n\r\n"),
        &format!("{HEAD}content-length:\t0 \r\nx: \u{e9} a\tb\r\n\r\n"),
        &format!(
            "{HEAD}Transfer-Encoding: Chunked\r\n\r\n5;x=\"y\"\r\nab\ncd\r\n00A \r\n0123456789\r\n0\r\nx: y\r\n\r\n"
        ),
        "OPTIONS * HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\n\r\n",
        "CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET http://b/c HTTP/1.1\r\nhost:\r\n\r\n",
    ]
    .concat();
    for piece in [1, 2, 3, 7, 64, 10_000] {
        let (all, refused) = passed(bytes.as_bytes(), piece).await;
        assert_eq!(String::from_utf8_lossy(&all), bytes, "in pieces of {piece}");
        assert_eq!(refused, None);
    }
}

#[tokio::test]
async fn what_two_parsers_could_read_in_two_ways_is_refused_in_its_turn() {
    let many = "x: y\r\n".repeat(FIELDS_MAX);
    let long = "a".repeat(HEADER_BYTES_MAX);
    for (request, status) in [
        (format!("{HEAD}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"), 400),
        (format!("{HEAD}transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n"), 400),
        (format!("{HEAD}content-length: 5\r\ncontent-length: 5\r\n\r\nabcde"), 400),
        (format!("{HEAD}content-length: 5, 5\r\n\r\nabcde"), 400),
        (format!("{HEAD}content-length:\r\n\r\n"), 400),
        (format!("{HEAD}content-length: +1\r\n\r\na"), 400),
        (format!("{HEAD}content-length: 99999999999999999999\r\n\r\na"), 400),
        (format!("{HEAD}transfer-encoding: gzip, chunked\r\n\r\n"), 400),
        (format!("{HEAD}transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n"), 400),
        (format!("{HEAD}transfer-encoding: identity\r\n\r\n"), 400),
        ("POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(), 400),
        (format!("{HEAD}content-length : 1\r\n\r\na"), 400),
        (format!("{HEAD}x: a\r\n y: b\r\n\r\n"), 400),
        (format!("{HEAD}x: a\nb: c\r\n\r\n"), 400),
        (format!("{HEAD}x: a\rb: c\r\n\r\n"), 400),
        (format!("{HEAD}x: a\0\r\n\r\n"), 400),
        (format!("{HEAD}x\r\n\r\n"), 400),
        (format!("{HEAD}: x\r\n\r\n"), 400),
        ("GET / HTTP/1.1\nhost: a\n\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nhost: a\n\r\n".to_owned(), 400),
        ("\nGET / HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(), 400),
        ("GET  / HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("GET /a b HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("GET /<a> HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("GET /\r\n\r\n".to_owned(), 400),
        ("G(T / HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.2\r\n\r\n".to_owned(), 505),
        ("GET / HTTP/2.0\r\n\r\n".to_owned(), 505),
        (format!("{HEAD}{many}\r\n"), 431),
        (format!("{HEAD}x: {long}\r\n\r\n"), 431),
        (format!("{HEAD}x: {long}"), 431),
    ] {
        let first = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nok";
        for piece in [1, 5, 100_000] {
            let (all, refused) = passed(format!("{first}{request}").as_bytes(), piece).await;
            let all = String::from_utf8_lossy(&all);
            assert_eq!(all.strip_prefix(first), Some(std::str::from_utf8(SUBSTITUTE).unwrap()), "{request:.80?}");
            let (number, refusal) = refused.unwrap();
            assert_eq!((number, refusal.status.as_u16()), (2, status), "{request:.80?}: {refusal:?}");
        }
    }
}

#[tokio::test]
async fn a_body_that_cannot_be_read_breaks_off() {
    let head = format!("{HEAD}transfer-encoding: chunked\r\n\r\n");
    for chunks in
        ["zz\r\n", "5\r\nabcde0\r\n\r\n", "1;\nx\r\na\r\n", "1\na\r\n", "ffffffffffffffff1\r\n", "-1\r\n", "\r\n"]
    {
        for piece in [1, 100_000] {
            let (mut client, server) = tokio::io::duplex(piece);
            let (mut strict, _watch) = Strict::new(server, HEADER_BYTES_MAX);
            let bytes = format!("{head}{chunks}");
            let sending = tokio::spawn(async move {
                let _ = client.write_all(bytes.as_bytes()).await;
                client
            });
            let mut all = Vec::new();
            assert!(strict.read_to_end(&mut all).await.is_err(), "{chunks:?}");
            sending.abort();
            assert!(all.starts_with(head.as_bytes()), "{chunks:?}");
        }
    }
}

#[tokio::test]
async fn what_follows_an_upgrade_waits_for_the_answer() {
    let ask = "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";
    for (switches, after) in [(true, "\n\0bytes\n"), (false, "GET /next HTTP/1.1\r\nhost: a\r\n\r\n")] {
        let (mut client, server) = tokio::io::duplex(10_000);
        let (mut strict, watch) = Strict::new(server, HEADER_BYTES_MAX);
        client.write_all(format!("GET / HTTP/1.1\r\n\r\n{ask}{after}").as_bytes()).await.unwrap();
        let mut both = vec![0; "GET / HTTP/1.1\r\n\r\n".len() + ask.len()];
        strict.read_exact(&mut both).await.unwrap();
        // The first one's answer says nothing about the second.
        watch.answered(false);
        let mut rest = vec![0; after.len()];
        let mut reading = std::pin::pin!(strict.read_exact(&mut rest));
        assert!(futures::poll!(&mut reading).is_pending());
        watch.answered(switches);
        reading.await.unwrap();
        assert_eq!(rest, after.as_bytes());
        assert_eq!(watch.shared.refused.get(), None);
    }
}

#[tokio::test]
async fn the_end_of_a_connection_is_noticed_while_an_upgrade_waits() {
    let (mut client, server) = tokio::io::duplex(10_000);
    let (mut strict, _watch) = Strict::new(server, HEADER_BYTES_MAX);
    client.write_all(b"GET / HTTP/1.1\r\nupgrade: x\r\n\r\n").await.unwrap();
    drop(client);
    let mut all = Vec::new();
    strict.read_to_end(&mut all).await.unwrap();
    assert!(all.ends_with(b"upgrade: x\r\n\r\n"));
}
