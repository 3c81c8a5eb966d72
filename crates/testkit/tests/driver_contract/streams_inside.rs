//! Connections to programs in real sandboxes.

use nagaya_api::error::Code;
use nagaya_engine::ports::{Address, Bind, Guest, Process};
use nagaya_testkit::Outcome;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::place::*;
use super::streams::*;

/// A program that listens and answers every connection with what it is sent, in capitals.
async fn service(guest: &dyn Guest, listen: &str) -> Process {
    let program = format!(
        r#"
import socket, threading
{listen}
print("listening", flush=True)
def serve(peer):
    while data := peer.recv(65536):
        peer.sendall(data.upper())
    peer.close()
while True:
    peer, _ = listener.accept()
    threading.Thread(target=serve, args=(peer,), daemon=True).start()
"#
    );
    let mut process = guest.run(command(&["python3", "-c", &program])).await.unwrap();
    wait_for_line(&mut process, "listening").await;
    process
}

async fn answers(guest: &dyn Guest, address: &Address) {
    let mut stream = soon(guest.connect(address)).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(read_all(&mut stream).await, b"HELLO");
}

pub async fn services_on_either_loopback_are_reached(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let mut services = Vec::new();
    for (port, listen) in [
        (8_001, r#"listener = socket.create_server(("127.0.0.1", 8001))"#),
        (8_002, r#"listener = socket.create_server(("0.0.0.0", 8002))"#),
        (8_003, r#"listener = socket.create_server(("::", 8003), family=socket.AF_INET6, dualstack_ipv6=True)"#),
        (8_004, r#"listener = socket.create_server(("::1", 8004), family=socket.AF_INET6)"#),
    ] {
        services.push(service(&*guest, listen).await);
        answers(&*guest, &Address::Tcp { port }).await;
    }
    driver.destroy(id).await.unwrap();
    Ok(())
}

pub async fn a_frozen_service_answers_when_it_is_thawed(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let _service = service(&*guest, r#"listener = socket.create_server(("127.0.0.1", 8001))"#).await;
    let address = Address::Tcp { port: 8_001 };
    let mut before = guest.connect(&address).await.unwrap();
    before.write_all(b"before").await.unwrap();
    let mut answer = [0; 6];
    soon(before.read_exact(&mut answer)).await.unwrap();
    driver.freeze(id).await.unwrap();
    before.write_all(b"frozen").await.unwrap();
    let connecting = soon(guest.connect(&address)).await;
    let mut stream = connecting.unwrap();
    stream.write_all(b"hello").await.unwrap();
    let silent = std::time::Duration::from_millis(200);
    assert!(tokio::time::timeout(silent, stream.read(&mut answer)).await.is_err(), "a frozen service answered");
    driver.thaw(id).await.unwrap();
    soon(stream.read_exact(&mut answer[..5])).await.unwrap();
    assert_eq!(&answer[..5], b"HELLO");
    soon(before.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"FROZEN");
    driver.destroy(id).await.unwrap();
    Ok(())
}

pub async fn a_service_that_accepts_nobody_is_given_up(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let program = r#"
import socket, time
tcp = socket.create_server(("127.0.0.1", 8001), backlog=0)
unix = socket.socket(socket.AF_UNIX)
unix.bind("/home/tenki/full.sock")
unix.listen(0)
print("listening", flush=True)
time.sleep(600)
"#;
    let mut process = guest.run(command(&["python3", "-c", program])).await.unwrap();
    wait_for_line(&mut process, "listening").await;
    for address in [Address::Tcp { port: 8_001 }, unix("/home/tenki/full.sock")] {
        let mut held = Vec::new();
        let error = loop {
            match soon(guest.connect(&address)).await {
                Ok(stream) => held.push(stream),
                Err(error) => break error,
            }
            assert!(held.len() < 100, "the queue has no end");
        };
        assert_eq!((error.code, error.errno), (Code::DeadlineExceeded, 110), "{address:?}: {error:?}");
    }
    assert_eq!(run(&*guest, command(&["echo", "well"])).await.text(), "well");
    driver.destroy(id).await.unwrap();
    Ok(())
}

pub async fn programs_reach_what_the_server_listens_on(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let path = "/home/tenki/served.sock";
    let mut tcp = guest.listen(&loopback(80)).await.unwrap();
    let mut listener = guest.listen(&Bind::Unix { path: path.into() }).await.unwrap();
    assert_eq!(shell(&*guest, &format!("stat -c '%u %a %F' {path}")).await, "1000 600 socket");
    let client = |connect: &str| {
        let program = format!(
            "import socket\n{connect}\npeer.sendall(b'ask')\npeer.shutdown(1)\nprint(peer.recv(99).decode(), flush=True)"
        );
        command(&["python3", "-c", &program])
    };
    for (listener, connect) in [
        (&mut tcp, "peer = socket.create_connection(('127.0.0.1', 80))".to_owned()),
        (&mut listener, format!("peer = socket.socket(socket.AF_UNIX); peer.connect('{path}')")),
    ] {
        let mut process = guest.run(client(&connect)).await.unwrap();
        let mut stream = soon(listener.incoming.recv()).await.unwrap().stream;
        assert_eq!(read_all(&mut stream).await, b"ask");
        stream.write_all(b"served").await.unwrap();
        drop(stream);
        assert_eq!(soon(finish(&mut process.events)).await.text(), "served");
    }
    driver.destroy(id).await.unwrap();
    Ok(())
}

pub async fn only_sockets_are_connected_to_and_only_where_they_may_lie(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let listen = r#"
import os
def unix(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    return listener
outside = unix("/tmp/outside.sock")
listener = unix("/home/tenki/inside.sock")
threading.Thread(target=lambda: [outside.accept() for _ in range(9)], daemon=True).start()
os.symlink("/tmp/outside.sock", "/home/tenki/escape.sock")
os.symlink("/tmp", "/home/tenki/escape")
os.symlink("../../tmp/outside.sock", "/home/tenki/relative.sock")
os.symlink("/home/tenki/inside.sock", "/home/tenki/link.sock")
os.symlink("/proc/self/root/tmp/outside.sock", "/home/tenki/magic.sock")
os.symlink(f"/proc/{os.getpid()}/root/tmp/outside.sock", "/home/tenki/other.sock")
os.symlink("/home/tenki/round.sock", "/home/tenki/round.sock")
open("/home/tenki/file", "w").close()
"#;
    let _service = service(&*guest, listen).await;
    let within = |path: &str| Address::UnixWithin { path: path.into(), allowed: vec!["/home/tenki".into()] };
    answers(&*guest, &within("/home/tenki/inside.sock")).await;
    answers(&*guest, &within("/home/tenki/link.sock")).await;
    answers(&*guest, &unix("/home/tenki/link.sock")).await;
    drop(guest.connect(&unix("/home/tenki/escape.sock")).await.unwrap());
    for (path, code) in [
        ("/tmp/outside.sock", Code::PermissionDenied),
        ("/home/tenki/../../tmp/outside.sock", Code::PermissionDenied),
        ("/home/tenki/escape.sock", Code::PermissionDenied),
        ("/home/tenki/escape/outside.sock", Code::PermissionDenied),
        ("/home/tenki/relative.sock", Code::PermissionDenied),
        ("/home/tenki/magic.sock", Code::FileSystem),
        ("/home/tenki/other.sock", Code::PermissionDenied),
        ("/proc/self/root/home/tenki/inside.sock", Code::FileSystem),
        ("/home/tenki/round.sock", Code::FileSystem),
        ("/home/tenki/file", Code::ConnectionRefused),
        ("/home/tenki", Code::ConnectionRefused),
        ("/home/tenki/nothing.sock", Code::FileNotFound),
        ("/home/tenki/file/nothing.sock", Code::NotADirectory),
        ("/home/tenkisix/nothing.sock", Code::FileNotFound),
        ("/", Code::PermissionDenied),
    ] {
        let error = soon(guest.connect(&within(path))).await.map(drop).unwrap_err();
        assert_eq!(error.code, code, "{path}: {error:?}");
    }
    driver.destroy(id).await.unwrap();
    Ok(())
}

pub async fn a_servers_socket_is_removed_and_nothing_else(place: &mut Place) -> Outcome {
    let id = fresh_id();
    let driver = place.driver();
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let bind = |path: &str| Bind::Unix { path: path.into() };
    let there =
        |guest: std::sync::Arc<dyn Guest>, path: &'static str| async move { guest.stat(path).await.unwrap().is_some() };
    let listener = guest.listen(&bind("/home/tenki/one.sock")).await.unwrap();
    let taken = guest.listen(&bind("/home/tenki/one.sock")).await.map(drop).unwrap_err();
    assert_eq!((taken.code, taken.errno), (Code::BindFailed, 98), "{taken:?}");
    drop(listener);
    while there(guest.clone(), "/home/tenki/one.sock").await {
        tokio::task::yield_now().await;
    }
    // What somebody put in its place is not ours.
    let listener = guest.listen(&bind("/home/tenki/two.sock")).await.unwrap();
    shell(&*guest, "rm /home/tenki/two.sock && echo mine > /home/tenki/two.sock").await;
    drop(listener);
    shell(&*guest, "ln -s /home/tenki/elsewhere /home/tenki/three.sock; echo mine > /home/tenki/four.sock").await;
    for path in ["/home/tenki/three.sock", "/home/tenki/four.sock", "relative.sock", "/", "/home/tenki/"] {
        let refused = guest.listen(&bind(path)).await.map(drop).unwrap_err();
        assert_eq!(refused.code, Code::BindFailed, "{path}: {refused:?}");
    }
    assert_eq!(shell(&*guest, "cat two.sock four.sock").await, "mine\nmine");
    // A server that is gone leaves none behind either.
    let listener = guest.listen(&bind("/home/tenki/five.sock")).await.unwrap();
    drop((listener, guest, driver));
    place.restart().await;
    let guest = adopt_running(&*place.driver(), id).await;
    while there(guest.clone(), "/home/tenki/five.sock").await {
        tokio::task::yield_now().await;
    }
    place.driver().destroy(id).await.unwrap();
    Ok(())
}

pub async fn one_stalled_connection_stalls_no_other(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let path = "/home/tenki/stalled.sock";
    let tcp = guest.listen(&loopback(0)).await.unwrap();
    let to = Address::Tcp { port: tcp.port };
    let listener = guest.listen(&Bind::Unix { path: path.into() }).await.unwrap();
    let block = vec![1; 64 * 1024];
    let full = std::time::Duration::from_millis(500);
    let mut held = Vec::new();
    for (mut listener, address) in [(tcp, to), (listener, unix(path))] {
        let (mut stalled, nobody_reads, _) = meet(&*guest, &mut listener, &address).await;
        while tokio::time::timeout(full, stalled.write_all(&block)).await.is_ok() {}
        let (client, server, _) = meet(&*guest, &mut listener, &address).await;
        transfer(client, server, 64).await;
        held.push((stalled, nobody_reads));
    }
    assert_eq!(run(&*guest, command(&["echo", "well"])).await.text(), "well");
    driver.destroy(id).await.unwrap();
    Ok(())
}
