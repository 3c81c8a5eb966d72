//! A whole connection of either side, after a proper greeting, on any bytes. The first byte chooses
//! the side; a host also opens a stream, so that answers have something to belong to.
#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use nagaya_guest::frame::{Frame, Kind};
use nagaya_guest::handshake::Handshake;
use nagaya_guest::messages::{self, Hello};
use nagaya_guest::mux::{Mux, Role};
use tokio::io::AsyncWriteExt;

fuzz_target!(|input: &[u8]| {
    let Some((side, hostile)) = input.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let hello = Hello { version_min: 1, version_max: 1, ..Default::default() };
        let mut greeting = BytesMut::new();
        Frame { kind: Kind::Hello, stream: 0, payload: messages::encode(&hello) }.encode(&mut greeting);
        theirs.write_all(&greeting).await.expect("room");

        let role = if side & 1 == 0 { Role::Agent } else { Role::Host };
        let (reader, writer) = tokio::io::split(ours);
        let (mux, mut requests) = Mux::start(reader, writer, role, Handshake::default()).await.expect("a greeting");
        let mut opened = match role {
            Role::Host => mux.open(Bytes::from_static(b"x")).await.ok(),
            Role::Agent => None,
        };
        // No more than the pipe holds: nobody reads at its other end yet.
        let _ = theirs.write_all(&hostile[..hostile.len().min(1 << 19)]).await;
        drop(theirs);
        while let Some(mut request) = requests.recv().await {
            while request.receiver.next().await.is_some() {}
        }
        if let Some((_, receiver)) = &mut opened {
            while receiver.next().await.is_some() {}
        }
        mux.closed().await;
    });
});
