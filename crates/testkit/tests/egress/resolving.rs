//! The name server of sandboxes with lists, and names that lie.

use std::time::{Duration, Instant};

use nagaya_testkit::Outcome;

use super::world::{World, list, python, reaches, reaches_none_of, try_to_reach};

crate::cases!(
    aliases_and_names_of_all_kinds_are_followed,
    names_that_lead_inside_are_refused,
    answers_that_are_none_do_no_harm,
    long_answers_come_whole,
    questions_of_all_kinds_are_answered_or_refused,
    a_slow_name_server_is_waited_for_and_a_dead_one_is_not,
    a_flood_of_questions_stops_nobody_else,
);

async fn aliases_and_names_of_all_kinds_are_followed(world: &mut World) -> Outcome {
    let names = ["alias.example", "xn--bcher-kva.example", "v6.example", "*.sub.example"];
    let sandbox = world.sandbox(list(&names, &[])).await;
    for target in ["alias.example", "xn--bcher-kva.example", "XN--BCHER-KVA.example", "v6.example", "q.SUB.example"] {
        reaches(&sandbox, target).await;
    }
    // The names on the way are not allowed by themselves.
    reaches_none_of(&sandbox, &["y.cdn.example"]).await;
    let addresses = "import socket; print(*sorted({of[4][0] for of in socket.getaddrinfo('v6.example', 80)}))";
    assert_eq!(python(&sandbox, addresses, &[]).await, "11.22.33.6");
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn names_that_lead_inside_are_refused(world: &mut World) -> Outcome {
    let names = ["private.example", "loop.example", "metadata.example", "mixed.example", "host.example"];
    let sandbox = world.sandbox(list(&names, &[])).await;
    for name in names {
        reaches_none_of(&sandbox, &[name]).await;
        let resolve =
            "import socket, sys\ntry: print(socket.gethostbyname(sys.argv[1]))\nexcept OSError: print('none')";
        assert_eq!(python(&sandbox, resolve, &[name]).await, "none", "{name}");
        let logged = world.logged(&sandbox, |of| of.name == name).await;
        assert!(logged.reason.contains("private"), "{logged:?}");
    }
    // What was right in an answer that was not is not reachable either.
    reaches_none_of(&sandbox, &["11.22.33.4"]).await;
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn answers_that_are_none_do_no_harm(world: &mut World) -> Outcome {
    let names = ["garbage.example", "round.example", "strange.example", "missing.example", "one.example"];
    let sandbox = world.sandbox(list(&names, &[])).await;
    reaches_none_of(
        &sandbox,
        &["garbage.example", "round.example", "strange.example", "missing.example", "11.22.33.2"],
    )
    .await;
    reaches(&sandbox, "one.example").await;
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn long_answers_come_whole(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&["big.example"], &[])).await;
    let count = "import socket; print(len(socket.gethostbyname_ex('big.example')[2]))";
    assert_eq!(python(&sandbox, count, &[]).await, "200");
    reaches(&sandbox, "11.22.33.11").await;
    sandbox.terminate().await.unwrap();
    Ok(())
}

/// Sends bytes to the sandbox's own name server, over UDP and TCP; prints the answers' codes.
const ASK: &str = "
import socket, struct, sys
server = [line.split()[1] for line in open('/etc/resolv.conf') if line.startswith('nameserver')][0]
query = bytes.fromhex(sys.argv[1])
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(1)
s.sendto(query, (server, 53))
def told(answer): return '%d:%d' % (answer[3] & 15, struct.unpack('!H', answer[6:8])[0])
try: print(told(s.recv(4096)))
except OSError: print('silence')
t = socket.create_connection((server, 53), timeout=2)
t.sendall(struct.pack('!H', len(query)) + query)
length = t.recv(2)
print(told(t.recv(4096)) if length else 'silence')
";

async fn questions_of_all_kinds_are_answered_or_refused(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&["one.example"], &[])).await;
    let one = "036f6e65076578616d706c6500";
    let header = "000701000001000000000000";
    let with = |kind: &str| format!("{header}{one}{kind}0001");
    let cases = [
        // The code of the answer, and its records.
        (with("0001"), "0:1"),
        (with("0010"), "0:1"),
        (with("001c"), "0:0"),
        (with("0041"), "0:0"),
        (with("00ff"), "5:0"),
        (with("00fc"), "5:0"),
        (format!("{header}0374776f076578616d706c650000010001"), "5:0"),
        (format!("{header}{one}"), "1:0"),
        ("00070100ffff000000000000".to_owned(), "1:0"),
        ("000729000001000000000000".to_owned() + one + "00010001", "4:0"),
        (format!("{header}c00c00010001"), "1:0"),
        (with("0001").replace("00070100", "00078180"), "silence"),
        ("00".to_owned(), "silence"),
    ];
    for (query, expected) in cases {
        let told = python(&sandbox, ASK, &[&query]).await;
        assert_eq!(told, format!("{expected}\n{expected}"), "{query}");
    }
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn a_slow_name_server_is_waited_for_and_a_dead_one_is_not(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&["slow.example", "dead.example"], &[])).await;
    reaches(&sandbox, "slow.example").await;
    let started = Instant::now();
    let outcome = try_to_reach(&sandbox, "dead.example").await;
    assert!(outcome.starts_with("gaierror"), "{outcome}");
    assert!(started.elapsed() < Duration::from_secs(25), "{:?}", started.elapsed());
    sandbox.terminate().await.unwrap();
    Ok(())
}

const FLOOD: &str = "
import socket, time
server = [line.split()[1] for line in open('/etc/resolv.conf') if line.startswith('nameserver')][0]
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
streams = [socket.create_connection((server, 53), timeout=2) for _ in range(8)]
print('READY', flush=True)
end = time.time() + 4
n = 0
while time.time() < end:
    n += 1
    name = b'\\4dead\\7example\\0' if n % 2 else b'\\3two\\7example\\0'
    s.sendto(b'\\0\\7\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0' + name + b'\\0\\1\\0\\1', (server, 53))
print('SENT', n, flush=True)
";

async fn a_flood_of_questions_stops_nobody_else(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&["dead.example", "one.example"], &[])).await;
    let other = world.sandbox(list(&["one.example"], &[])).await;
    let before = world.packets_outside();
    let mut flood = sandbox.start(&["/usr/bin/python3", "-c", FLOOD], false).await.unwrap();
    flood.wait_for("READY").await;
    for _ in 0..5 {
        let started = Instant::now();
        reaches(&other, "one.example").await;
        assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    }
    let finished = flood.finish().await.unwrap();
    let sent: u64 = finished.text().rsplit(' ').next().unwrap().parse().unwrap();
    let outwards = world.packets_outside() - before;
    assert!(sent > 10_000 && outwards < 1_000, "{sent} questions became {outwards} packets");
    tokio::time::sleep(Duration::from_secs(5)).await;
    reaches(&sandbox, "one.example").await;
    for sandbox in [sandbox, other] {
        sandbox.terminate().await.unwrap();
    }
    Ok(())
}
