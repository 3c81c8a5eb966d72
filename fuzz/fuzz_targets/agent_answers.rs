//! What a hostile sandbox answers to everything that the server asks of it. The first byte chooses the question, the
//! second how much is answered at once; the rest comes after a second question, if there is one.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use nagaya_api::ids::ExecutionId;
use nagaya_engine::ports::{Address, Bind, BoxStream, Command, Guest, WriteOptions};
use nagaya_guest::frame::{Decoder, Frame, Kind};
use nagaya_guest::messages::{self, Hello};
use nagaya_runtime::agent_client::Link;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// How long a second question is waited for.
const PATIENCE: Duration = Duration::from_millis(2);
const LISTEN: u8 = 2;

/// Asks one thing and takes all that is answered.
async fn ask(link: &Arc<Link>, which: u8) {
    let id = ExecutionId::new(0, [0; 10]);
    let options = WriteOptions { mode: 0, truncate: true, sync: false };
    let path = || "/home/tenki/x".to_owned();
    let command = || Command { argv: vec!["true".into()], ..Command::default() };
    match which {
        0 => read(link.connect(&Address::Unix { path: path() }).await.ok()).await,
        1 => read(link.connect(&Address::UnixWithin { path: path(), allowed: vec![path()] }).await.ok()).await,
        LISTEN => {
            if let Ok(mut listener) = link.listen(&Bind::Unix { path: path() }).await {
                while let Some(accepted) = listener.incoming.recv().await {
                    read(Some(accepted.stream)).await;
                }
            }
        }
        3 => {
            if let Ok(mut process) = link.run(command()).await {
                while process.events.recv().await.is_some() {}
            }
        }
        4 => {
            if let Ok(mut events) = link.follow(id).await {
                while events.recv().await.is_some() {}
            }
        }
        5 => {
            if let Ok(mut file) = link.read_file("/x", 0, 0, 0).await {
                while let Some(Ok(_)) = file.chunks.recv().await {}
            }
        }
        6 => {
            if let Ok(file) = link.write_file("/x", options).await {
                let _ = file.finish().await;
            }
        }
        7 => drop(link.stat("/x").await),
        8 => drop(link.list_directory("/x", true).await),
        9 => drop(link.remove("/x", true).await),
        10 => drop(link.run_detached(id, command()).await),
        11 => drop(link.await_power_off().await),
        _ => drop(link.make_directory("/x", 0o755, true).await),
    }
}

async fn read(stream: Option<BoxStream>) {
    if let Some(mut stream) = stream {
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    }
}

/// Reads until the next question; false when there is none.
async fn question(stream: &mut UnixStream, frames: &mut Decoder) -> bool {
    loop {
        match frames.next_frame() {
            Ok(Some(frame)) if frame.kind == Kind::Open => return true,
            Ok(Some(_)) => {}
            Ok(None) if stream.read_buf(frames.buffer()).await.is_ok_and(|read| read > 0) => {}
            Ok(None) => return false,
            Err(error) => panic!("the server says what is no frame: {error}"),
        }
    }
}

async fn answer(mut stream: UnixStream, first: &[u8], second: &[u8], asked_twice: bool) {
    let hello = Hello { version_min: 1, version_max: 1, ..Default::default() };
    let mut greeting = BytesMut::new();
    Frame { kind: Kind::Hello, stream: 0, payload: messages::encode(&hello) }.encode(&mut greeting);
    let mut frames = Decoder::default();
    let talk = async {
        stream.write_all(&greeting).await?;
        question(&mut stream, &mut frames).await;
        stream.write_all(first).await?;
        if asked_twice {
            let _ = tokio::time::timeout(PATIENCE, question(&mut stream, &mut frames)).await;
        }
        stream.write_all(second).await?;
        stream.shutdown().await?;
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
    };
    // The server may hang up whenever it likes.
    let _ = talk.await;
}

fuzz_target!(|input: &[u8]| {
    let [which, first, rest @ ..] = input else { return };
    let which = which % 13;
    let (first, second) = rest.split_at(usize::from(*first).min(rest.len()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let asking = async {
            let link = Link::from_stream(ours).await.expect("a greeting");
            ask(&link, which).await;
            link.close();
            link.closed().await;
        };
        tokio::join!(asking, answer(theirs, first, second, which == LISTEN));
    });
});
