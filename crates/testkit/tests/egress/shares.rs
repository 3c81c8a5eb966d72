//! What a sandbox's connections take of what the host has for all: its table of connections, its table of neighbours.

use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use nagaya_api::nagaya::v1::{ExplainSessionRequest, ListSessionEventsRequest};
use nagaya_testkit::{Client, Outcome, Server, Wanted};

use super::world::{World, python, reaches, ready};

crate::cases!(
    a_flood_of_connections_stays_within_its_sandboxs_share,
    connections_that_are_open_are_counted_and_those_that_are_over_are_not,
    connections_end_with_their_sandbox,
    links_take_no_place_in_the_hosts_table_of_neighbours,
    the_servers_own_port_takes_no_place_in_the_table_of_connections,
    sockets_hold_no_more_than_a_part_of_their_sandboxs_memory,
);

const FLOOD: &str = "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for n in range(40000):
    try: s.sendto(b'x', ('11.22.33.%d' % (1 + n % 11), 1 + n // 11))
    except OSError: pass
print('done')
";

/// The program in a sandbox holds as many connections as it is let, and says how many.
const HOLD: &str = "
import socket, sys, time
def one():
    stream = socket.create_connection(('11.22.33.1', 80), timeout=2)
    stream.sendall(b'x')
    return stream if stream.recv(1) else None
held = []
def fill(most):
    before = len(held)
    for n in range(most):
        try: held.append(one())
        except OSError as error: break
    return len(held) - before
";

fn table() -> String {
    std::fs::read_to_string("/proc/net/nf_conntrack").unwrap()
}

fn places_taken() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").unwrap();
    text.trim().parse().unwrap()
}

async fn a_flood_of_connections_stays_within_its_sandboxs_share(world: &mut World) -> Outcome {
    let (sandbox, neighbour) = (world.sandbox(None).await, world.sandbox(None).await);
    let (before, begun) = (places_taken(), Instant::now());
    assert_eq!(python(&sandbox, FLOOD, &[]).await, "done");
    let (taken, seconds) = (places_taken() - before, begun.elapsed().as_secs() + 1);
    assert!(taken > 1_000, "the control: it begins {taken} connections");
    assert!(taken <= 4_096 + 205 * seconds + 100, "{taken} places of the host's table in {seconds} s");
    reaches(&neighbour, "11.22.33.1").await;
    world.logged(&sandbox, |of| of.reason.contains("as many connections as it may have")).await;

    let request = || ListSessionEventsRequest { session_id: sandbox.id.clone(), after: 0, page_size: 100 };
    let deadline = Instant::now() + Duration::from_secs(10);
    let refused = loop {
        let events = world.client.own.list_session_events(request()).await.unwrap().events.clone();
        if let Some(event) = events.iter().find(|event| event.kind == "refused") {
            break event.clone();
        }
        assert!(Instant::now() < deadline, "no event: {events:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(refused.details["limit"], "network.connections_max is 4096");
    let request = ExplainSessionRequest { session_id: sandbox.id.clone() };
    let findings = world.client.own.explain_session(request).await.unwrap().findings.clone();
    let codes: Vec<&str> = findings.iter().map(|finding| finding.code.as_str()).collect();
    assert_eq!(codes, ["limit_reached"], "{findings:?}");
    assert!(findings[0].detail.contains("network.connections_max is 4096"), "{findings:?}");
    for sandbox in [sandbox, neighbour] {
        sandbox.terminate().await.unwrap();
    }
    Ok(())
}

async fn connections_that_are_open_are_counted_and_those_that_are_over_are_not(_: &mut World) -> Outcome {
    let server = Server::start_with(
        "[pools]\nslots_ready = 1\nisolated_slots_ready = 0\n[network]\ncidr = \"10.201.0.0/16\"\nconnections_max = 40\n",
    );
    let client = Client::of(&server);
    let sandbox = client.create(&Wanted { outbound: true, ..Wanted::default() }).await.unwrap();
    // Two connections a second are let begin; the count is what refuses after some seconds. Those that are over make room.
    let program = format!(
        "{HOLD}
print(fill(60))
time.sleep(4)
print(fill(1))
for stream in held: stream.close()
time.sleep(1)
print(fill(1))
"
    );
    assert_eq!(python(&sandbox, &program, &[]).await, "40\n0\n1");
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn connections_end_with_their_sandbox(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(None).await;
    let address = "import socket,fcntl,struct; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); \
                   print(socket.inet_ntoa(fcntl.ioctl(s,0x8915,struct.pack('256s',b'eth0'))[20:24]))";
    let source = format!("src={} ", python(&sandbox, address, &[]).await);
    let program = format!("{HOLD}\nfill(20)\nprint('READY', flush=True)\nsys.stdin.read()\n");
    let _held = ready(&sandbox, &["/usr/bin/python3", "-c", &program]).await;
    assert!(table().contains(&source), "the control: its connections are in the table");
    sandbox.terminate().await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while table().contains(&source) {
        assert!(Instant::now() < deadline, "connections of a sandbox that is gone stay:\n{}", table());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

async fn links_take_no_place_in_the_hosts_table_of_neighbours(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(None).await;
    reaches(&sandbox, "11.22.33.1").await;
    // Address, type, flags, hardware address, mask, device; 6 is complete and permanent.
    let flags = |text: &str, device: &str| -> Vec<String> {
        let rows = text.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.filter(|row| row[5].starts_with(device)).map(|row| row[2].to_owned()).collect()
    };
    let inside = python(&sandbox, "print(open('/proc/net/arp').read())", &[]).await;
    assert_eq!(flags(&inside, "eth0"), ["0x6"], "{inside}");
    let here = std::fs::read_to_string("/proc/net/arp").unwrap();
    let links = flags(&here, "ngy");
    assert!(!links.is_empty() && links.iter().all(|flags| flags == "0x6"), "{here}");
    sandbox.terminate().await.unwrap();
    Ok(())
}

/// Fills the buffers of sockets that nobody reads, and says how many MiB went in: by TCP, by UDP.
const FILL: &str = "
import socket
kept, tcp, udp = [], 0, 0
server = socket.create_server(('127.0.0.1', 0), backlog=512)
for n in range(150):
    stream = socket.create_connection(server.getsockname())
    kept += [stream, server.accept()[0]]
    stream.setblocking(False)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
    try:
        while True: tcp += stream.send(b'x' * 65536)
    except BlockingIOError: pass
kept.clear()
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.setblocking(False)
for n in range(400):
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    receiver.bind(('127.0.0.1', 0))
    receiver.setblocking(False)
    kept.append(receiver)
    for m in range(150):
        try: sender.sendto(b'x' * 60000, receiver.getsockname())
        except OSError: pass
for receiver in kept:
    try:
        while True: udp += len(receiver.recv(65536))
    except BlockingIOError: pass
print(tcp >> 20, udp >> 20)
";

async fn sockets_hold_no_more_than_a_part_of_their_sandboxs_memory(world: &mut World) -> Outcome {
    let sandbox = world.client.create(&Wanted { memory_mb: 256, ..Wanted::default() }).await.unwrap();
    let told = python(&sandbox, FILL, &[]).await;
    let held: Vec<u64> = told.split(' ').map(|word| word.parse().unwrap()).collect();
    // On cgroup v1 an eighth, beside the memory. On v2 it is a part of the memory.
    let most = if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() { 256 } else { 40 };
    for (held, of) in held.iter().zip(["TCP", "UDP"]) {
        assert!((1..=most).contains(held), "{held} MiB of {of} in a sandbox of 256 MiB");
    }
    // Sockets work as ever afterwards.
    let echo = "import socket; s=socket.create_server(('127.0.0.1',0)); c=socket.create_connection(s.getsockname()); \
                a=s.accept()[0]; c.sendall(b'x'*100000); n=0\nwhile n<100000: n+=len(a.recv(65536))\nprint(n)";
    assert_eq!(python(&sandbox, echo, &[]).await, "100000");
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn the_servers_own_port_takes_no_place_in_the_table_of_connections(world: &mut World) -> Outcome {
    let port = |endpoint: &str| endpoint.rsplit(':').next().unwrap().to_owned();
    let _open = TcpStream::connect(world.server.endpoint().trim_start_matches("http://")).unwrap();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let _control = TcpStream::connect(other.local_addr().unwrap()).unwrap();
    let table = table();
    let is_in = |port: &str| table.contains(&format!("dport={port} "));
    assert!(is_in(&other.local_addr().unwrap().port().to_string()), "the control");
    assert!(!is_in(&port(world.server.endpoint())), "{table}");
    Ok(())
}
