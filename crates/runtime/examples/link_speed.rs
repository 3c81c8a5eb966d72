use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::time::Instant;
use bytes::Bytes;
use nagaya_engine::ports::*;
use nagaya_runtime::link::Link;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let dir = tempfile::TempDir::new().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let mut agent = std::process::Command::new(std::env::args().nth(1).unwrap()).arg(format!("--listen-fd={}", listener.as_raw_fd())).arg("--home=/tmp").stdin(std::process::Stdio::null()).spawn().unwrap();
    let link = Link::connect(&dir.path().join("s")).await.unwrap();
    let mut times = Vec::new();
    for _ in 0..2000 {
        let begin = Instant::now();
        let mut p = link.run(Command { argv: vec!["/bin/true".into()], cwd: "/".into(), ..Default::default() }).await.unwrap();
        while p.events.recv().await.is_some() {}
        times.push(begin.elapsed().as_micros());
    }
    times.sort();
    println!("true: p50 {} p95 {} p99 {} us", times[1000], times[1900], times[1980]);
    let mut times = Vec::new();
    for _ in 0..2000 {
        let begin = Instant::now();
        std::process::Command::new("/bin/true").status().unwrap();
        times.push(begin.elapsed().as_micros());
    }
    times.sort();
    println!("posix_spawn true here: p50 {} p95 {} us", times[1000], times[1900]);
    let mut times = Vec::new();
    for _ in 0..5000 {
        let begin = Instant::now();
        link.stat("/etc").await.unwrap();
        times.push(begin.elapsed().as_micros());
    }
    times.sort();
    println!("stat: p50 {} p95 {} us", times[2500], times[4750]);
    let path = "/dev/shm/nagaya-speed";
    for _ in 0..3 {
        let size = 1usize << 30;
        let chunk = Bytes::from(vec![1u8; 65536]);
        let begin = Instant::now();
        let w = link.write_file(path, WriteOptions { mode: 0, truncate: true, sync: false }).await.unwrap();
        for _ in 0..size / 65536 { w.chunks.send(chunk.clone()).await.unwrap(); }
        w.finish().await.unwrap();
        let write = begin.elapsed();
        let begin = Instant::now();
        let mut r = link.read_file(path, 0, 0, 0).await.unwrap();
        let mut n = 0;
        while let Some(c) = r.chunks.recv().await { n += c.unwrap().len(); }
        assert_eq!(n, size);
        println!("write {:.0} MB/s read {:.0} MB/s", size as f64 / 1e6 / write.as_secs_f64(), size as f64 / 1e6 / begin.elapsed().as_secs_f64());
    }
    std::fs::remove_file(path).unwrap();
    let begin = Instant::now();
    let mut p = link.run(Command { argv: vec!["head".into(), "-c".into(), "1000000000".into(), "/dev/zero".into()], cwd: "/".into(), ..Default::default() }).await.unwrap();
    let mut n = 0;
    while let Some(e) = p.events.recv().await { if let ProcessEvent::Stdout(d) = e { n += d.len(); } }
    println!("stdout {n} {:.0} MB/s", 1e3 / begin.elapsed().as_secs_f64());
    let s = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", agent.id())).unwrap();
    println!("{s}");
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    let s = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", agent.id())).unwrap();
    println!("{}", s.lines().filter(|l| l.starts_with("Private") || l.starts_with("Rss")).collect::<Vec<_>>().join("\n"));
    agent.kill().unwrap();
}
