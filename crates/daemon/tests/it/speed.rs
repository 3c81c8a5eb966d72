//! Temporary measurements.
use std::time::Instant;
use bytes::Bytes;
use connectrpc::stream_iter;
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::write_file_stream_request::Payload;
use crate::support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore]
async fn speed() {
    let world = World::with(|config| config.limits.connections_max = 100).await;
    let (id, client) = world.session().await;
    let control = world.control();
    for _ in 0..50 { control.who_am_i(Default::default()).await.unwrap(); }
    let n = 500;
    let t = Instant::now();
    for _ in 0..n { control.who_am_i(Default::default()).await.unwrap(); }
    println!("whoami {:?}", t.elapsed() / n);
    let t = Instant::now();
    for _ in 0..n {
        let mut run = client.run().await.unwrap();
        let start = wire::RunStart { session_id: id.clone(), cmd: vec!["true".into()], stream_stdin: true, ..Default::default() };
        let frame = |p| wire::SandboxSessionDataPlaneServiceRunRequest { frame: wire::RunRequest { payload: Some(p) }.into() };
        run.send(frame(wire::run_request::Payload::from(start))).await.unwrap();
        run.send(frame(wire::run_request::Payload::StdinClose(true))).await.unwrap();
        while run.message().await.unwrap().is_some() {}
    }
    println!("run true {:?}", t.elapsed() / n);
    let t = Instant::now();
    for _ in 0..200 { control.create_session(create()).await.unwrap(); }
    println!("create {:?}", t.elapsed() / 200);

    for chunk in [64 << 10, 256 << 10, 1 << 20] {
        let block = Bytes::from(vec![7u8; chunk]);
        let total = 512 << 20;
        let frame = |p| wire::SandboxSessionDataPlaneServiceWriteFileStreamRequest { frame: wire::WriteFileStreamRequest { payload: Some(p) }.into() };
        let start = Payload::from(wire::WriteFileStreamStart { session_id: id.clone(), path: "big".into(), truncate: true, ..Default::default() });
        let frames: Vec<_> = std::iter::once(frame(start)).chain((0..total / chunk).map(|_| frame(Payload::Data(block.clone())))).collect();
        let t = Instant::now();
        client.write_file_stream(stream_iter(frames)).await.unwrap();
        println!("write stream chunk {chunk}: {:.0} MB/s", total as f64 / 1e6 / t.elapsed().as_secs_f64());
    }
    for chunk_bytes in [0, 65536] {
        let request = wire::ReadFileStreamRequest { session_id: id.clone(), path: "big".into(), chunk_bytes, ..Default::default() };
        let request = wire::SandboxSessionDataPlaneServiceReadFileStreamRequest { request: request.into() };
        let t = Instant::now();
        let mut stream = client.read_file_stream(request).await.unwrap();
        let (mut bytes, mut messages) = (0, 0);
        while let Some(m) = stream.message().await.unwrap() { bytes += m.response.data.len(); messages += 1; }
        println!("read stream chunk {chunk_bytes}: {:.0} MB/s in {messages} messages", bytes as f64 / 1e6 / t.elapsed().as_secs_f64());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore]
async fn serve() {
    let world = World::new().await;
    std::fs::write("/tmp/daemon-helper.env", format!("export TENKI_API_ENDPOINT={}\nexport TENKI_API_KEY={}\n", world.url(), world.secret)).unwrap();
    while std::path::Path::new("/tmp/daemon-helper.env").exists() { tokio::time::sleep(std::time::Duration::from_millis(200)).await; }
    world.daemon.shut_down().await;
}
