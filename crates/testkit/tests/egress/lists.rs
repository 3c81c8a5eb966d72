//! What lists allow, and changes of them.

use connectrpc::ErrorCode;
use nagaya_testkit::{Outcome, Running, Sandbox};

use super::world::{World, list, python, reaches, reaches_none_of};

crate::cases!(
    without_a_list_all_that_is_public_is_reached,
    only_what_is_on_the_list_is_reached,
    a_list_opens_nothing_that_is_closed_to_all,
    an_empty_list_lets_nothing_out,
    without_outbound_access_no_packet_leaves,
    lists_that_are_none_are_refused,
    a_narrower_list_cuts_what_is_not_on_it,
    a_wider_list_cuts_nothing,
    a_list_can_be_lifted_and_set_again,
    connections_are_written_down,
    a_scan_hides_nothing_and_is_written_down_in_part,
);

async fn without_a_list_all_that_is_public_is_reached(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(None).await;
    for target in ["11.22.33.1", "one.example", "two.example", "alias.example"] {
        reaches(&sandbox, target).await;
    }
    reaches_none_of(&sandbox, &["10.77.0.5"]).await;
    assert!(world.client.session(&sandbox.id).await.unwrap().egress.as_option().is_none());
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn only_what_is_on_the_list_is_reached(world: &mut World) -> Outcome {
    let wanted = list(&["One.Example.", "*.sub.example"], &["11.22.33.10/32"]);
    let sandbox = world.sandbox(wanted).await;
    // By its address before its name was asked for, it is as unknown as any.
    reaches_none_of(
        &sandbox,
        &["11.22.33.1", "two.example", "11.22.33.2", "sub.example", "11.22.33.53", "a.sub.example.evil"],
    )
    .await;
    for target in ["one.example", "11.22.33.1", "ONE.eXample.", "a.sub.example", "a.b.sub.example", "11.22.33.10"] {
        reaches(&sandbox, target).await;
    }
    let session = world.client.session(&sandbox.id).await.unwrap();
    let egress = session.egress.as_option().unwrap();
    assert_eq!(egress.allow_domains, ["one.example", "*.sub.example"]);
    assert_eq!(egress.allow_cidrs, ["11.22.33.10/32"]);
    // Another name server than the sandbox's own is a destination like any other.
    let ask = "import socket; s=socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(1)\n\
               s.sendto(b'\\0\\7\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\3two\\7example\\0\\0\\1\\0\\1', ('11.22.33.53', 53))\n\
               try: print(len(s.recv(512)))\n\
               except OSError: print('silence')";
    assert_eq!(python(&sandbox, ask, &[]).await, "silence");
    let other = world.sandbox(None).await;
    assert_ne!(python(&other, ask, &[]).await, "silence", "the control");
    for sandbox in [sandbox, other] {
        sandbox.terminate().await.unwrap();
    }
    Ok(())
}

async fn a_list_opens_nothing_that_is_closed_to_all(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&[], &["0.0.0.0/0"])).await;
    let other = world.sandbox(list(&[], &["0.0.0.0/0"])).await;
    let address = "import socket,fcntl,struct; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); \
                   print(socket.inet_ntoa(fcntl.ioctl(s,0x8915,struct.pack('256s',b'eth0'))[20:24]))";
    let other_address = python(&other, address, &[]).await;
    reaches(&sandbox, "11.22.33.1").await;
    reaches_none_of(
        &sandbox,
        &["10.77.0.5", "198.51.100.1", "198.51.100.2", "11.99.0.1", "10.200.0.1", "169.254.169.254", &other_address],
    )
    .await;
    for sandbox in [sandbox, other] {
        sandbox.terminate().await.unwrap();
    }
    Ok(())
}

async fn an_empty_list_lets_nothing_out(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&[], &[])).await;
    let before = world.packets_outside();
    reaches_none_of(&sandbox, &["11.22.33.1", "one.example", "11.22.33.53"]).await;
    assert_eq!(world.packets_outside(), before, "packets left");
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn without_outbound_access_no_packet_leaves(world: &mut World) -> Outcome {
    let sandbox = world.create(false, list(&["one.example"], &["0.0.0.0/0"])).await.unwrap();
    let before = world.packets_outside();
    reaches_none_of(&sandbox, &["11.22.33.1", "one.example", "11.22.33.53", "10.200.0.1"]).await;
    let links = sandbox.shell("ls /proc/sys/net/ipv4/conf", false).await;
    assert_eq!(links.split_whitespace().collect::<Vec<_>>(), ["all", "default", "lo"]);
    world.set(&sandbox, list(&["two.example"], &[])).await.unwrap();
    reaches_none_of(&sandbox, &["two.example"]).await;
    assert_eq!(world.packets_outside(), before, "packets left");
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn lists_that_are_none_are_refused(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&["one.example"], &[])).await;
    let many: Vec<String> = (0..513).map(|n| format!("a{n}.example")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let bad = [
        list(&["*"], &[]),
        list(&["http://one.example"], &[]),
        list(&["bücher.example"], &[]),
        list(&["11.22.33.1"], &[]),
        list(&[""], &[]),
        list(&[&"a".repeat(254)], &[]),
        list(&many, &[]),
        list(&[], &["11.22.33.1/33"]),
        list(&[], &["::/0"]),
        list(&[], &["one.example"]),
        list(&[], &["1.1.1.1/32"; 257]),
    ];
    for bad in bad {
        let refused = world.set(&sandbox, bad.clone()).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::InvalidArgument, "{bad:?}");
        let refused = world.create(true, bad.clone()).await.err().unwrap();
        assert_eq!(refused.code, ErrorCode::InvalidArgument, "{bad:?}");
    }
    reaches(&sandbox, "one.example").await;
    reaches_none_of(&sandbox, &["two.example"]).await;
    sandbox.terminate().await.unwrap();
    assert_eq!(world.set(&sandbox, None).await.unwrap_err().code, ErrorCode::FailedPrecondition);
    Ok(())
}

/// Sends a line to a peer whenever it gets one, and says what came back.
const TALKER: &str = "
import socket, sys
stream = socket.create_connection((sys.argv[1], 80), timeout=3)
stream.settimeout(2)
print('READY', flush=True)
for line in sys.stdin:
    try:
        stream.sendall(line.encode())
        print('HEARD ' + line.strip() if stream.recv(64).decode() == line else 'ODD', flush=True)
    except OSError:
        print('CUT ' + line.strip(), flush=True)
";

async fn talk(sandbox: &Sandbox, target: &str) -> Running {
    super::kept::talk(sandbox, TALKER, target).await
}

async fn a_narrower_list_cuts_what_is_not_on_it(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(None).await;
    let mut plain = talk(&sandbox, "11.22.33.2").await;
    world.set(&sandbox, list(&["one.example", "alias.example"], &["11.22.33.10", "11.22.33.4"])).await.unwrap();
    plain.write("a\n").await.unwrap();
    plain.wait_for("CUT a").await;
    let mut one = talk(&sandbox, "one.example").await;
    let mut alias = talk(&sandbox, "alias.example").await;
    let mut ten = talk(&sandbox, "11.22.33.10").await;
    let mut four = talk(&sandbox, "11.22.33.4").await;
    world.set(&sandbox, list(&["alias.example"], &["11.22.33.4"])).await.unwrap();
    for kept in [&mut alias, &mut four] {
        kept.write("b\n").await.unwrap();
        kept.wait_for("HEARD b").await;
    }
    for cut in [&mut one, &mut ten] {
        cut.write("b\n").await.unwrap();
        cut.wait_for("CUT b").await;
    }
    reaches_none_of(&sandbox, &["one.example", "11.22.33.1", "11.22.33.10"]).await;
    drop((plain, one, alias, ten, four));
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn a_wider_list_cuts_nothing(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&["one.example"], &["11.22.33.10"])).await;
    let mut one = talk(&sandbox, "one.example").await;
    let mut ten = talk(&sandbox, "11.22.33.10").await;
    let policy = list(&["two.example", "one.example"], &["11.22.33.0/28"]);
    world.set(&sandbox, policy).await.unwrap();
    world.set(&sandbox, None).await.unwrap();
    for kept in [&mut one, &mut ten] {
        kept.write("a\n").await.unwrap();
        kept.wait_for("HEARD a").await;
    }
    drop((one, ten));
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn a_list_can_be_lifted_and_set_again(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&["one.example"], &[])).await;
    for _ in 0..5 {
        reaches_none_of(&sandbox, &["11.22.33.2"]).await;
        let session = world.set(&sandbox, None).await.unwrap();
        assert!(session.egress.as_option().is_none());
        reaches(&sandbox, "two.example").await;
        world.set(&sandbox, list(&["one.example"], &["11.22.33.4"])).await.unwrap();
        world.set(&sandbox, list(&["one.example"], &["11.22.33.4"])).await.unwrap();
        reaches(&sandbox, "one.example").await;
        reaches(&sandbox, "11.22.33.4").await;
    }
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn connections_are_written_down(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&["one.example", "private.example"], &["11.22.33.10"])).await;
    reaches(&sandbox, "one.example").await;
    reaches(&sandbox, "11.22.33.10").await;
    reaches_none_of(&sandbox, &["11.22.33.2", "two.example", "private.example", "10.77.0.5", "10.200.0.1"]).await;
    let named = world.logged(&sandbox, |of| of.name == "one.example" && of.bytes_received > 0).await;
    assert_eq!((named.destination.as_str(), named.protocol.as_str(), named.allowed), ("11.22.33.1:80", "tcp", true));
    assert!(named.bytes_sent > 5 && named.started_at.seconds > 1_700_000_000, "{named:?}");
    let plain = world.logged(&sandbox, |of| of.destination == "11.22.33.10:80").await;
    assert!(plain.allowed && plain.name.is_empty() && plain.reason.is_empty(), "{plain:?}");
    for (destination, name) in [
        ("11.22.33.2:80", ""),
        ("", "two.example"),
        ("", "private.example"),
        ("10.77.0.5:80", ""),
        ("10.200.0.1:80", ""),
    ] {
        let denied = world.logged(&sandbox, |of| of.destination == destination && of.name == name).await;
        assert!(!denied.allowed && !denied.reason.is_empty(), "{denied:?}");
    }
    let other = world.sandbox(None).await;
    reaches(&other, "11.22.33.1").await;
    world.logged(&other, |of| of.destination == "11.22.33.1:80" && of.bytes_received > 0).await;
    assert!(world.connections(&other).await.iter().all(|of| of.destination == "11.22.33.1:80"), "another's are seen");
    for sandbox in [sandbox, other] {
        sandbox.terminate().await.unwrap();
    }
    Ok(())
}

const SCAN: &str = "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for n in range(20000):
    try: s.sendto(b'x', ('11.22.%d.%d' % (50 + n % 100, n % 250), 1 + n % 65000))
    except OSError: pass
print('done')
";

async fn a_scan_hides_nothing_and_is_written_down_in_part(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&["one.example"], &[])).await;
    let other = world.sandbox(list(&["one.example"], &[])).await;
    reaches(&sandbox, "one.example").await;
    assert_eq!(python(&sandbox, SCAN, &[]).await, "done");
    reaches(&other, "one.example").await;
    world.logged(&other, |of| of.name == "one.example").await;
    world.logged(&sandbox, |of| of.name == "one.example" && of.allowed).await;
    let denied = world.connections(&sandbox).await.iter().filter(|of| !of.allowed).count();
    assert!((50..=512).contains(&denied), "{denied}");
    for sandbox in [sandbox, other] {
        sandbox.terminate().await.unwrap();
    }
    Ok(())
}
