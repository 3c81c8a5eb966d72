use super::*;

const USER_KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti me@home";
const NOW: u64 = 1_800_000_000;

fn id(n: u64) -> SessionId {
    SessionId::new(n, [7; 10])
}

fn order<'a>(source_addresses: &'a [String]) -> Order<'a> {
    Order {
        session_id: id(1),
        holder: "a key",
        public_key: USER_KEY,
        ttl: Duration::from_secs(600),
        source_addresses,
        now_seconds: NOW,
        serial: 0xfeed,
        nonce: [1; 32],
    }
}

fn issued(authority: &Authority, order: &Order<'_>) -> Certificate {
    Certificate::from_openssh(&authority.issue(order).unwrap().certificate).unwrap()
}

fn peer(text: &str) -> Option<IpAddr> {
    Some(text.parse().unwrap())
}

#[test]
fn a_certificate_opens_its_session_while_it_is_good() {
    let authority = Authority::new(&[1; 32]);
    let certificate = issued(&authority, &order(&[]));
    let check = |session, now| authority.check(&certificate, session, None, now);
    assert_eq!(check(id(1), NOW), Ok(Permissions::ALL));
    assert_eq!(check(id(1), NOW + 599), Ok(Permissions::ALL));
    assert!(check(id(1), NOW + 600).is_err(), "expired");
    assert!(check(id(1), NOW - 61).is_err(), "not yet");
    assert!(check(id(2), NOW).is_err(), "another session");
    let other = Authority::new(&[2; 32]);
    assert!(other.check(&certificate, id(1), None, NOW).is_err(), "another authority");
    assert_eq!(certificate.serial(), 0xfeed);
    assert_eq!(certificate.key_id(), format!("session:{} for a key", id(1)));
}

#[test]
fn source_addresses_are_looked_at() {
    let authority = Authority::new(&[1; 32]);
    let addresses = ["10.1.0.0/16", "192.0.2.7", "2001:db8::/32"].map(String::from);
    let certificate = issued(&authority, &order(&addresses));
    let may = |from| authority.check(&certificate, id(1), from, NOW).is_ok();
    for inside in ["10.1.255.1", "192.0.2.7", "::ffff:10.1.0.1", "2001:db8:1::1"] {
        assert!(may(peer(inside)), "{inside}");
    }
    for outside in ["10.2.0.1", "192.0.2.8", "2001:db9::1", "::1"] {
        assert!(!may(peer(outside)), "{outside}");
    }
    assert!(!may(None), "an address that is not known is not among them");
    for bad in ["", "10.0.0.0/33", "10.0.0.0/-1", "example.org", "10.0.0.0/8/8", "::/129"] {
        let addresses = [bad.to_owned()];
        assert_eq!(authority.issue(&order(&addresses)).unwrap_err().code, Code::InvalidArgument, "{bad}");
    }
    assert!(Network::parse("0.0.0.0/0").unwrap().has("203.0.113.1".parse().unwrap()));
}

/// As our own authority would never make them.
fn signed(change: impl FnOnce(&mut Builder)) -> Certificate {
    let key = PublicKey::from_openssh(USER_KEY).unwrap();
    let mut builder = Builder::new([1; 16], key.key_data().clone(), NOW - 60, NOW + 600).unwrap();
    change(&mut builder);
    builder.sign(&key_of(&[1; 32])).unwrap()
}

#[test]
fn only_what_is_understood_is_accepted() {
    let authority = Authority::new(&[1; 32]);
    let check = |certificate: &Certificate| authority.check(certificate, id(1), None, NOW);
    let plain = signed(|builder| {
        builder.valid_principal(principal(id(1))).unwrap();
    });
    let nothing = Permissions {
        pty: false,
        agent_forwarding: false,
        port_forwarding_local: false,
        port_forwarding_remote: false,
    };
    assert_eq!(check(&plain), Ok(nothing), "what is not permitted is forbidden");
    let for_all = signed(|builder| {
        builder.all_principals_valid().unwrap();
    });
    assert!(check(&for_all).is_err(), "a certificate for every session");
    let of_host = signed(|builder| {
        builder.valid_principal(principal(id(1))).unwrap().cert_type(CertType::Host).unwrap();
    });
    assert!(check(&of_host).is_err(), "a host's certificate");
    for option in ["force-command", "verify-required", "unheard-of"] {
        let certificate = signed(|builder| {
            builder.valid_principal(principal(id(1))).unwrap().critical_option(option, "x").unwrap();
        });
        assert!(check(&certificate).is_err(), "{option}");
    }
}

#[test]
fn keys_that_cannot_be_used_or_trusted_are_refused() {
    let authority = Authority::new(&[1; 32]);
    let certificate = authority.issue(&order(&[])).unwrap().certificate;
    for bad in ["", "garbage", "ssh-ed25519 AAAA", &format!("from=\"*\" {USER_KEY}"), &certificate] {
        let wrong = Order { public_key: bad, ..order(&[]) };
        assert_eq!(authority.issue(&wrong).unwrap_err().code, Code::InvalidArgument, "{bad}");
    }
}

#[test]
fn the_same_secret_is_the_same_authority() {
    assert_eq!(Authority::new(&[1; 32]).public_key(), Authority::new(&[1; 32]).public_key());
    assert_ne!(Authority::new(&[1; 32]).public_key(), Authority::new(&[2; 32]).public_key());
}

#[test]
fn the_host_is_vouched_for_under_every_name() {
    let authority = Authority::new(&[1; 32]);
    let host_key = key_of(&[2; 32]);
    let certificate = authority.vouch(&host_key).unwrap();
    assert_eq!(certificate.cert_type(), CertType::Host);
    assert!(certificate.valid_principals().is_empty());
    assert_eq!(certificate.to_bytes().unwrap(), authority.vouch(&host_key).unwrap().to_bytes().unwrap());
    assert!(authority.check(&certificate, id(1), None, NOW).is_err(), "it opens nothing");
}
