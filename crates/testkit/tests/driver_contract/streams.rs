//! Connections into sandboxes and out of them, as every driver has them.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use nagaya_api::error::Code;
use nagaya_engine::ports::{Address, Bind, BoxStream, Guest, Listener};
use nagaya_testkit::Outcome;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::place::*;

pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn loopback(port: u16) -> Bind {
    Bind::Tcp { ip: IpAddr::V4(Ipv4Addr::LOCALHOST), port }
}

pub fn unix(path: &str) -> Address {
    Address::Unix { path: path.into() }
}

pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("happens soon")
}

/// A connection and what the listener made of it.
pub async fn meet(guest: &dyn Guest, listener: &mut Listener, address: &Address) -> (BoxStream, BoxStream, String) {
    let (connected, accepted) = soon(async { tokio::join!(guest.connect(address), listener.incoming.recv()) }).await;
    let accepted = accepted.expect("a peer");
    (connected.unwrap(), accepted.stream, accepted.source)
}

pub async fn read_all(stream: &mut BoxStream) -> Vec<u8> {
    let mut content = Vec::new();
    soon(stream.read_to_end(&mut content)).await.unwrap();
    content
}

/// Each end says something, ends its side, and hears the other to its end.
async fn converse(mut client: BoxStream, mut server: BoxStream) {
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut server).await, b"question");
    // Half closed is not closed.
    server.write_all(b"answer").await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut client).await, b"answer");
}

pub async fn connections_meet_listeners_and_end_one_side_after_the_other(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let mut tcp = guest.listen(&loopback(0)).await.unwrap();
    assert_ne!(tcp.port, 0);
    let to = Address::Tcp { port: tcp.port };
    for _ in 0..3 {
        let (client, server, source) = meet(&*guest, &mut tcp, &to).await;
        assert!(source.starts_with("127.0.0.1:"), "{source}");
        converse(client, server).await;
    }
    let path = "/home/tenki/meeting.sock";
    let mut listener = guest.listen(&Bind::Unix { path: path.into() }).await.unwrap();
    for _ in 0..3 {
        let (client, server, source) = meet(&*guest, &mut listener, &unix(path)).await;
        assert_eq!((source.as_str(), listener.port), ("", 0));
        converse(client, server).await;
    }
    driver.destroy(id).await.unwrap();
    Ok(())
}

pub async fn where_nobody_listens_connections_are_refused(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let refused = guest.connect(&Address::Tcp { port: 4_321 }).await.map(drop).unwrap_err();
    assert_eq!((refused.code, refused.errno), (Code::ConnectionRefused, 111), "{refused:?}");
    let listener = guest.listen(&loopback(4_321)).await.unwrap();
    let taken = guest.listen(&loopback(4_321)).await.map(drop).unwrap_err();
    assert_eq!((taken.code, taken.errno), (Code::BindFailed, 98), "{taken:?}");
    drop(listener);
    // The end of a listener takes a moment to get there.
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while guest.connect(&Address::Tcp { port: 4_321 }).await.is_ok() {
        assert!(tokio::time::Instant::now() < deadline, "a dropped listener still listens");
        tokio::task::yield_now().await;
    }
    driver.destroy(id).await.unwrap();
    Ok(())
}

/// Sends this much through a pair of streams and compares what arrives.
pub async fn transfer(mut from: BoxStream, mut to: BoxStream, blocks: usize) {
    let block: Vec<u8> = (0..64 * 1024).map(|index: usize| (index * 31 % 251) as u8).collect();
    let sent = block.clone();
    let sending = async move {
        for _ in 0..blocks {
            from.write_all(&sent).await.unwrap();
        }
        from.shutdown().await.unwrap();
        from
    };
    let receiving = async move {
        let mut received = vec![0; block.len()];
        for number in 0..blocks {
            to.read_exact(&mut received).await.unwrap();
            assert!(received == block, "block {number} arrived changed");
        }
        assert_eq!(to.read(&mut received).await.unwrap(), 0, "more arrived than was sent");
        to
    };
    tokio::time::timeout(4 * PATIENCE, async { tokio::join!(sending, receiving) }).await.expect("arrives soon");
}

pub async fn a_hundred_megabytes_arrive_unchanged_either_way(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let mut tcp = guest.listen(&loopback(0)).await.unwrap();
    let to = Address::Tcp { port: tcp.port };
    let (client, server, _) = meet(&*guest, &mut tcp, &to).await;
    transfer(client, server, 1_600).await;
    let (client, server, _) = meet(&*guest, &mut tcp, &to).await;
    transfer(server, client, 1_600).await;
    let path = "/home/tenki/large.sock";
    let mut listener = guest.listen(&Bind::Unix { path: path.into() }).await.unwrap();
    let (client, server, _) = meet(&*guest, &mut listener, &unix(path)).await;
    transfer(client, server, 400).await;
    driver.destroy(id).await.unwrap();
    Ok(())
}

pub async fn connections_and_listeners_end_with_their_sandbox(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let mut tcp = guest.listen(&loopback(0)).await.unwrap();
    let to = Address::Tcp { port: tcp.port };
    let path = "/home/tenki/ending.sock";
    let mut listener = guest.listen(&Bind::Unix { path: path.into() }).await.unwrap();
    let (mut first, _first, _) = meet(&*guest, &mut tcp, &to).await;
    let (mut second, _second, _) = meet(&*guest, &mut listener, &unix(path)).await;
    driver.destroy(id).await.unwrap();
    for stream in [&mut first, &mut second] {
        // An end or an error, but no waiting.
        let _ = soon(stream.read(&mut [0; 16])).await;
    }
    assert!(soon(tcp.incoming.recv()).await.is_none());
    assert!(soon(listener.incoming.recv()).await.is_none());
    assert!(soon(guest.connect(&to)).await.is_err());
    place.settled().await;
    Ok(())
}

pub async fn the_next_driver_listens_where_the_last_one_did(place: &mut Place) -> Outcome {
    let id = fresh_id();
    let guest = place.driver().start(id, &place.fresh()).await.unwrap();
    let path = "/home/tenki/again.sock";
    let tcp = guest.listen(&loopback(5_432)).await.unwrap();
    let listener = guest.listen(&Bind::Unix { path: path.into() }).await.unwrap();
    drop((tcp, listener, guest));
    place.restart().await;
    let driver = place.driver();
    let guest = adopt_running(&*driver, id).await;
    for bind in [loopback(5_432), Bind::Unix { path: path.into() }] {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while let Err(error) = guest.listen(&bind).await {
            assert!(tokio::time::Instant::now() < deadline, "{bind:?}: {error:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    driver.destroy(id).await.unwrap();
    Ok(())
}
