//! Registries, good and bad: what is pulled, what is refused, and what is never sent.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};

use nagaya_image::{Config, Digest, ImageError, LayerState, PullPolicy, Reference};
use serde_json::json;

use crate::fake::{Answer, Fake, honest};
use crate::images::{Made, Packed, Place, quick, quiet, watched};
use crate::tar::{Entry, Tar};

fn archive(name: &str, bytes: usize) -> Vec<u8> {
    // Something that does not compress, so that it arrives in many pieces.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let content: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(bytes)
    .collect();
    Tar::of([Entry::directory("data"), Entry { content: &content, ..Entry::new(b'0', &format!("data/{name}")) }])
}

fn small() -> Made {
    Made::of(&[archive("one", 1000), archive("two", 2000)], Packed::Gzip, json!({"Cmd": ["/bin/sh"], "User": "7"}))
}

fn large() -> Made {
    Made::of(&[archive("large", 3 << 20)], Packed::Gzip, json!({}))
}

async fn pulled(fake: &Fake, config: Config) -> Result<(Place, nagaya_image::Image), ImageError> {
    let place = Place::new(config);
    let image = place.store.pull(&fake.reference("team/app:1"), quiet()).await?;
    Ok((place, image))
}

async fn refused(fake: &Fake, config: Config) -> ImageError {
    let place = Place::new(config);
    let error = place.store.pull(&fake.reference("team/app:1"), quiet()).await.expect_err("it was pulled");
    assert!(place.store.list().is_empty());
    assert_eq!(place.names("images"), Vec::<String>::new(), "{error}");
    assert_eq!(place.names("incoming"), Vec::<String>::new(), "something half done was left: {error}");
    // Other layers of it may have come, and are whole.
    place.store.gc(|_| false).await.unwrap();
    assert_eq!(place.names("layers"), Vec::<String>::new());
    error
}

#[tokio::test]
async fn an_image_is_pulled_and_described() {
    let made = small();
    let fake = Fake::of(&made, |_| None);
    let place = Place::new(fake.config());
    let (watcher, told) = watched();
    let image = place.store.pull(&fake.reference("team/app:1"), watcher).await.unwrap();
    assert_eq!(image.digest, made.digest());
    assert_eq!(image.names, [fake.reference("team/app:1")]);
    assert_eq!((image.config.cmd.clone(), image.config.user.as_str()), (vec!["/bin/sh".to_owned()], "7"));
    let layers: Vec<_> =
        image.layers.iter().map(|layer| (layer.diff_id, layer.blob, layer.bytes, layer.entries)).collect();
    let expected = [(made.diff_ids[0], made.layers[0], 1000, 2), (made.diff_ids[1], made.layers[1], 2000, 2)];
    assert_eq!(layers, expected);
    let paths = place.store.layers(&image.digest).unwrap();
    assert!(paths[0].join("data/two").exists() && paths[1].join("data/one").exists(), "the uppermost is the first");
    let user = place.store.user(&image.digest).await.unwrap();
    assert_eq!((user.uid, user.gid, user.home.as_str()), (7, 0, "/"));
    let told = told.lock().unwrap();
    for (position, blob) in made.layers.iter().enumerate() {
        let of: Vec<_> = told.iter().filter(|progress| progress.layer == *blob).collect();
        assert!(of.iter().all(|progress| progress.position == position && progress.layers == 2));
        let states: Vec<_> = of.iter().map(|progress| progress.state).collect();
        assert_eq!(states.first(), Some(&LayerState::Waiting));
        assert_eq!(states.last(), Some(&LayerState::Done));
        assert_eq!(of.last().unwrap().bytes, made.blobs[blob].len() as u64);
    }
}

#[tokio::test]
async fn an_index_leads_to_the_image_for_this_platform_and_pins_are_kept_to() {
    let made = small();
    let fake = Fake::of(&made, |_| None);
    let place = Place::new(fake.config());
    let by_index = place.store.pull(&fake.reference("app:index"), quiet()).await.unwrap();
    assert_eq!(by_index.digest, made.digest());
    let pinned = fake.reference(&format!("app@{}", Digest::of(&made.index())));
    let image = place.store.pull(&pinned, quiet()).await.unwrap();
    assert_eq!(image.digest, made.digest());
    assert_eq!(place.store.find(&pinned.to_string()).unwrap().digest, made.digest());
    // The layers came once.
    assert_eq!(fake.asked(&made.layers[0].to_string()).len(), 1);
    // Another manifest than the one that was named.
    let liar = Fake::start({
        let made = made.clone();
        move |request| match request.path.contains("/manifests/") {
            true => Answer::ok(&made.manifest),
            false => honest(&made, request),
        }
    });
    let place = Place::new(liar.config());
    let pinned = liar.reference(&format!("app@{}", Digest::of(b"other")));
    let error = place.store.pull(&pinned, quiet()).await.unwrap_err();
    assert_eq!(error.kind(), "digest_mismatch", "{error}");
}

#[tokio::test]
async fn a_broken_connection_goes_on_where_it_broke() {
    let made = large();
    let blob = made.layers[0];
    let total = made.blobs[&blob].len();
    let fake = Fake::of(&made, {
        let (made, count) = (made.clone(), AtomicUsize::new(0));
        move |request| {
            let breaks = request.path.ends_with(&blob.to_string()) && count.fetch_add(1, Ordering::SeqCst) < 4;
            breaks.then(|| {
                let answer = honest(&made, request);
                Answer { breaks_after: Some(answer.body.len() / 2), ..answer }
            })
        }
    });
    // More breaks than attempts: each brought something.
    pulled(&fake, Config { retries_max: 1, ..fake.config() }).await.unwrap();
    let asked: Vec<_> = fake.asked(&blob.to_string()).iter().map(|request| request.from()).collect();
    assert_eq!(asked.len(), 5);
    assert!(asked.windows(2).all(|pair| pair[0] < pair[1]), "it began anew: {asked:?}");
    assert!(asked[4] > total * 9 / 10, "{asked:?} of {total}");
}

#[tokio::test]
async fn a_registry_without_ranges_sends_all_again_and_what_is_here_is_skipped() {
    let made = large();
    let blob = made.layers[0];
    let fake = Fake::of(&made, {
        let (made, count) = (made.clone(), AtomicUsize::new(0));
        move |request| {
            request.path.ends_with(&blob.to_string()).then(|| {
                let bytes = &made.blobs[&blob];
                let breaks_after = (count.fetch_add(1, Ordering::SeqCst) == 0).then_some(bytes.len() / 2);
                Answer { breaks_after, ..Answer::ok(bytes) }
            })
        }
    });
    pulled(&fake, fake.config()).await.unwrap();
    let wrong = Fake::of(&made, {
        let (made, count) = (made.clone(), AtomicUsize::new(0));
        move |request| {
            request.path.ends_with(&blob.to_string()).then(|| {
                let bytes = &made.blobs[&blob];
                match count.fetch_add(1, Ordering::SeqCst) {
                    0 => Answer { breaks_after: Some(bytes.len() / 2), ..Answer::ok(bytes) },
                    _ => Answer { status: 206, ..Answer::ok(bytes) }.header("Content-Range", "bytes 0-1/2"),
                }
            })
        }
    });
    assert_eq!(refused(&wrong, wrong.config()).await.kind(), "invalid_answer");
}

#[tokio::test]
async fn too_many_requests_are_waited_for_as_long_as_asked() {
    let made = small();
    let busy = |times: usize, after: &'static str| {
        let count = AtomicUsize::new(0);
        Fake::of(&made, move |_| {
            let busy = count.fetch_add(1, Ordering::SeqCst) < times;
            busy.then(|| Answer::status(429).header("Retry-After", after))
        })
    };
    let passing = busy(2, "0");
    pulled(&passing, passing.config()).await.unwrap();
    let lasting = busy(1000, "0");
    let error = refused(&lasting, lasting.config()).await;
    assert_eq!(error.kind(), "rate_limited");
    assert_eq!(lasting.requests().len(), 3, "one attempt and two more");
    let long = busy(1000, "7000");
    let error = refused(&long, long.config()).await;
    assert!(error.to_string().contains("in 7000 s"), "{error}");
    assert_eq!(long.requests().len(), 1, "nobody waits for two hours");
    let count = AtomicUsize::new(0);
    let ill = Fake::of(&made, move |_| (count.fetch_add(1, Ordering::SeqCst) % 3 != 2).then(|| Answer::status(503)));
    pulled(&ill, Config { layers_at_once: 1, ..ill.config() }).await.unwrap();
}

#[tokio::test]
async fn content_that_is_not_what_was_announced_is_not_kept() {
    let made = small();
    let blob = made.layers[0];
    let good = made.blobs[&blob].clone();
    let other = crate::images::gzip(&archive("evil", 1000));
    let padded = {
        let mut padded = other.clone();
        padded.truncate(good.len());
        padded
    };
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let config = made.blobs.keys().find(|digest| !made.layers.contains(digest)).copied().unwrap();
    let of = |path: Digest, answer: Answer| {
        Fake::of(&made, move |request| request.path.ends_with(&path.to_string()).then(|| answer.clone()))
    };
    for (fake, kinds) in [
        (of(blob, Answer::ok(&other)), &["invalid_answer"][..]),
        (of(blob, Answer::ok(&padded)), &["invalid_layer", "digest_mismatch"]),
        (of(blob, Answer::ok(&flipped)), &["invalid_layer", "digest_mismatch"]),
        (
            of(blob, Answer { breaks_after: Some(100), ..Answer::ok(&good) }),
            &["invalid_layer", "digest_mismatch", "unreachable"],
        ),
        (of(blob, Answer::ok(&[&good[..], b"more"].concat())), &["invalid_answer"]),
        (of(blob, Answer::ok(&good[..good.len() - 1])), &["invalid_answer"]),
        (of(blob, Answer::status(404)), &["not_at_registry"]),
        (of(blob, Answer::status(418)), &["invalid_answer"]),
        (of(config, Answer::ok(b"{}")), &["digest_mismatch"]),
    ] {
        let error = refused(&fake, fake.config()).await;
        assert!(kinds.contains(&error.kind()), "{kinds:?}: {error}");
    }
    // Both digests are right, but the content is not what the configuration says.
    let swapped = Made::with(&[archive("one", 1000)], Packed::Gzip, json!({}), |_| {});
    let liar = Made::with(&[archive("two", 1000)], Packed::Gzip, json!({}), |manifest| {
        let honest: serde_json::Value = serde_json::from_slice(&swapped.manifest).unwrap();
        manifest["config"] = honest["config"].clone();
    });
    let liar = Made { blobs: liar.blobs.into_iter().chain(swapped.blobs).collect(), ..liar };
    let fake = Fake::of(&liar, |_| None);
    let error = refused(&fake, fake.config()).await;
    assert_eq!(error.kind(), "digest_mismatch");
    assert!(error.to_string().contains("content of the layer"), "{error}");
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_before_anything_is_fetched() {
    let with = |change: fn(&mut serde_json::Value)| Made::with(&[archive("x", 10)], Packed::Gzip, json!({}), change);
    for (made, kind) in [
        (with(|manifest| manifest["layers"][0]["mediaType"] = json!("application/x-lzma")), "unsupported"),
        (
            with(|manifest| manifest["config"]["mediaType"] = json!("application/vnd.cncf.helm.config.v1+json")),
            "unsupported",
        ),
        (with(|manifest| manifest["config"]["size"] = json!(u64::MAX)), "invalid_image"),
        (with(|manifest| manifest["layers"] = json!([])), "invalid_image"),
        (with(|manifest| manifest["layers"][0]["size"] = json!(1u64 << 40)), "too_large"),
        (with(|manifest| manifest["layers"][0]["size"] = json!(u64::MAX)), "too_large"),
        (
            with(|manifest| {
                let layer = manifest["layers"][0].clone();
                manifest["layers"] = json!(vec![layer; 10_000]);
            }),
            "invalid_image",
        ),
    ] {
        let fake = Fake::of(&made, |_| None);
        let error = refused(&fake, fake.config()).await;
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(fake.asked(&made.layers[0].to_string()).len(), 0);
    }
    let index = json!({"schemaVersion": 2, "manifests": [
        {"mediaType": crate::images::OCI_MANIFEST, "digest": Digest::of(b"x"), "size": 1, "platform": {"os": "linux", "architecture": "s390x"}}]});
    let foreign = Fake::start(move |_| Answer::ok(index.to_string().as_bytes()));
    let error = refused(&foreign, foreign.config()).await;
    assert!(error.to_string().contains("has nothing for linux/amd64; it has linux/s390x"), "{error}");
    let huge = Fake::start(|_| Answer::ok(&vec![b' '; 5 << 20]));
    assert_eq!(refused(&huge, huge.config()).await.kind(), "invalid_answer");
}

#[tokio::test]
async fn silence_has_an_end() {
    let made = small();
    let blob = made.layers[0];
    let mute = Fake::of(&made, |_| Some(Answer { hangs: true, ..Answer::default() }));
    let error = refused(&mute, mute.config()).await;
    assert_eq!(error.kind(), "unreachable");
    assert!(error.to_string().contains("silence for 0.3 s") && error.to_string().contains("3 attempts"), "{error}");
    // In the middle of a layer: more is announced than comes.
    let stops = Fake::of(&made, {
        let made = made.clone();
        move |request| {
            request.path.ends_with(&blob.to_string()).then(|| {
                let bytes = &made.blobs[&blob];
                Answer { announced: Some(bytes.len()), ..Answer::ok(&bytes[..0]) }
            })
        }
    });
    let error = refused(&stops, stops.config()).await;
    assert_eq!(error.kind(), "unreachable", "{error}");
    let gone = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let place = Place::new(Config { registries_insecure: vec![gone.clone()], ..quick() });
    let reference: Reference = format!("{gone}/app").parse().unwrap();
    let error = place.store.pull(&reference, quiet()).await.unwrap_err();
    assert_eq!(error.kind(), "unreachable", "{error}");
}

#[tokio::test]
async fn tokens_are_fetched_once_and_again_when_they_expire() {
    let made = small();
    let tokens = Arc::new(AtomicUsize::new(0));
    // A token is good for three requests.
    let used = AtomicUsize::new(0);
    let fake = Arc::new(std::sync::OnceLock::<String>::new());
    let (name, given) = (fake.clone(), tokens.clone());
    let server = Fake::of(&made, move |request| {
        if request.path.starts_with("/token") {
            let number = given.fetch_add(1, Ordering::SeqCst) + 1;
            used.store(0, Ordering::SeqCst);
            return Some(Answer::ok(json!({"token": format!("token-{number}")}).to_string().as_bytes()));
        }
        let current = format!("Bearer token-{}", given.load(Ordering::SeqCst));
        if request.header("authorization") == current && used.fetch_add(1, Ordering::SeqCst) < 3 {
            return None;
        }
        let challenge = format!(
            "Bearer realm=\"http://{}/token?a=b\",service=\"the service\",scope=\"repository:team/app:pull\"",
            name.get().unwrap()
        );
        Some(Answer::status(401).header("WWW-Authenticate", challenge))
    });
    fake.set(server.name()).unwrap();
    pulled(&server, Config { layers_at_once: 1, ..server.config() }).await.unwrap();
    assert_eq!(tokens.load(Ordering::SeqCst), 2);
    let asked = &server.asked("/token")[0];
    assert_eq!(asked.path, "/token?a=b&scope=repository%3Ateam%2Fapp%3Apull&service=the%20service");
    assert_eq!(asked.header("authorization"), "", "nobody is logged in");
    // One that never accepts what it gave itself.
    let fake = Arc::new(std::sync::OnceLock::<String>::new());
    let name = fake.clone();
    let never = Fake::start(move |request| match request.path.starts_with("/token") {
        true => Answer::ok(b"{\"access_token\":\"x\"}"),
        false => {
            let realm = format!("Bearer realm=\"http://{}/token\"", name.get().unwrap());
            Answer::status(401).header("WWW-Authenticate", realm)
        }
    });
    fake.set(never.name()).unwrap();
    let error = refused(&never, never.config()).await;
    assert_eq!(error.kind(), "unauthorized");
    assert!(error.to_string().contains("docker login"), "{error}");
    assert_eq!(never.requests().len(), 3);
}

#[tokio::test]
async fn logins_of_docker_are_used_for_their_registry_alone() {
    let made = small();
    let guarded = Fake::of(&made, |request| {
        let known = request.header("authorization") == "Basic YW5uOnNlY3JldA==";
        (!known).then(|| Answer::status(401).header("WWW-Authenticate", "Basic realm=\"x\""))
    });
    let files = tempfile::tempdir().unwrap();
    let write = |text: String| {
        let path = files.path().join("config.json");
        fs::write(&path, text).unwrap();
        Config { docker_config: Some(path), ..guarded.config() }
    };
    let name = guarded.name();
    for auths in [
        json!({&name: {"auth": "YW5uOnNlY3JldA=="}}),
        json!({format!("http://{name}/v1/"): {"username": "ann", "password": "secret"}}),
    ] {
        pulled(&guarded, write(json!({"auths": auths}).to_string())).await.unwrap();
    }
    for (text, kind) in [
        (json!({"auths": {"other.example": {"auth": "YW5uOnNlY3JldA=="}}}).to_string(), "unauthorized"),
        (json!({"auths": {&name: {"auth": "YW5uOndyb25n"}}}).to_string(), "unauthorized"),
        (json!({"auths": {&name: {"auth": "%%%"}}}).to_string(), "credentials"),
        (json!({"credHelpers": {&name: "../../bin/sh"}}).to_string(), "credentials"),
        (json!({"credHelpers": {&name: "that-is-not-there"}}).to_string(), "credentials"),
        ("{\"auths\": \"secret".into(), "credentials"),
    ] {
        let error = refused(&guarded, write(text.clone())).await;
        assert_eq!(error.kind(), kind, "{text}: {error}");
        assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
    }
}

#[tokio::test]
async fn redirects_are_followed_within_bounds_and_tell_nobody_who_asks() {
    let made = small();
    let content = Fake::of(&made, |_| None);
    let to = content.name();
    let sends_on = {
        let to = to.clone();
        Fake::of(&made, move |request| {
            if request.header("authorization").is_empty() {
                return Some(Answer::status(401).header("WWW-Authenticate", "Basic realm=\"x\""));
            }
            request
                .path
                .contains("/blobs/")
                .then(|| Answer::redirect(format!("http://{to}{}?signature=x", request.path)))
        })
    };
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("config.json");
    fs::write(&path, json!({"auths": {sends_on.name(): {"auth": "YW5uOnNlY3JldA=="}}}).to_string()).unwrap();
    let config = Config { docker_config: Some(path), ..sends_on.config() };
    // The other host has an inner address, and nobody said that it may.
    let error = refused(&sends_on, config.clone()).await;
    assert_eq!(error.kind(), "refused_address");
    assert!(error.to_string().contains(&to) && error.to_string().contains("private_hosts"), "{error}");
    assert_eq!(content.requests().len(), 0, "it was connected to");
    let content = {
        let made = made.clone();
        Fake::start(move |request| {
            let mut request = request.clone();
            request.path = request.path.split('?').next().unwrap().to_owned();
            honest(&made, &request)
        })
    };
    let to = content.name();
    let sends_on = {
        let (to, made) = (to.clone(), made.clone());
        Fake::start(move |request| match request.header("authorization").is_empty() {
            true => Answer::status(401).header("WWW-Authenticate", "Basic realm=\"x\""),
            false if request.path.contains("/blobs/") => {
                Answer::redirect(format!("http://{to}{}?signature=x", request.path))
            }
            false => honest(&made, request),
        })
    };
    let path = files.path().join("config.json");
    fs::write(&path, json!({"auths": {sends_on.name(): {"auth": "YW5uOnNlY3JldA=="}}}).to_string()).unwrap();
    let config = Config { docker_config: Some(path), private_hosts: vec![to], ..sends_on.config() };
    pulled(&sends_on, config).await.unwrap();
    assert_eq!(content.requests().len(), 3);
    assert!(
        content.requests().iter().all(|request| request.header("authorization").is_empty()),
        "it was told who asks"
    );
}

#[tokio::test]
async fn redirects_that_give_something_away_are_refused() {
    let made = small();
    let leads = |to: &'static str| {
        Fake::of(&made, move |request| request.path.contains("/blobs/").then(|| Answer::redirect(to)))
    };
    for (to, kind) in [
        ("http://169.254.169.254/latest/meta-data", "refused_address"),
        ("http://[::ffff:169.254.169.254]/", "refused_address"),
        ("http://10.0.0.1/", "refused_address"),
        ("http://localhost:1/", "refused_address"),
        ("http://[::1]:1/", "refused_address"),
        ("http://0/", "refused_address"),
        ("http://2130706433/", "refused_address"),
        ("file:///etc/passwd", "refused_redirect"),
        ("http://user:password@10.0.0.1/", "refused_redirect"),
        ("", "refused_redirect"),
    ] {
        let fake = leads(to);
        let error = refused(&fake, fake.config()).await;
        assert_eq!(error.kind(), kind, "{to}: {error}");
    }
    let circle = Fake::start(|request| Answer::redirect(format!("{}x", request.path)));
    let error = refused(&circle, circle.config()).await;
    assert_eq!(error.kind(), "refused_redirect");
    assert_eq!(circle.requests().len(), 6, "the request and five redirects");
    // A registry that was not named has no business at an inner address either.
    let place = Place::new(quick());
    for inner in ["169.254.169.254", "localhost:5000", "127.0.0.1:1", "[::1]:1"] {
        let reference: Reference = format!("{inner}/app").parse().unwrap();
        let error = place.store.pull(&reference, quiet()).await.unwrap_err();
        assert_eq!(error.kind(), "refused_address", "{inner}: {error}");
    }
}

#[tokio::test]
async fn over_tls_nothing_leads_back_to_plain_http() {
    let rcgen::CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(["localhost".into()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(signing_key.serialize_der().into());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let tls = Arc::new(tls);
    let made = small();
    let plain = Fake::of(&made, |_| None);
    let to = plain.name();
    let good = {
        let made = made.clone();
        Fake::over(Some(tls.clone()), move |request| honest(&made, request))
    };
    let downgrades = {
        let made = made.clone();
        Fake::over(Some(tls), move |request| match request.path.contains("/blobs/") {
            true => Answer::redirect(format!("http://{to}{}", request.path)),
            false => honest(&made, request),
        })
    };
    let files = tempfile::tempdir().unwrap();
    let ca = files.path().join("ca.pem");
    fs::write(&ca, cert.pem()).unwrap();
    let config = |fake: &Fake| Config {
        private_hosts: vec![format!("localhost:{}", fake.address.port()), plain.name()],
        ca_file: Some(ca.clone()),
        ..quick()
    };
    let reference = |fake: &Fake| format!("localhost:{}/app", fake.address.port()).parse::<Reference>().unwrap();
    let place = Place::new(config(&good));
    place.store.pull(&reference(&good), quiet()).await.unwrap();
    let place = Place::new(config(&downgrades));
    let error = place.store.pull(&reference(&downgrades), quiet()).await.unwrap_err();
    assert_eq!(error.kind(), "refused_redirect");
    assert!(error.to_string().contains("from https to http"), "{error}");
    assert_eq!(plain.requests().len(), 0);
    // A certificate that nobody vouches for.
    let place = Place::new(Config { ca_file: None, ..config(&good) });
    let error = place.store.pull(&reference(&good), quiet()).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
}

#[tokio::test]
async fn settings_say_what_uses_of_an_image_ask_for() {
    let made = small();
    let fake = Fake::of(&made, |_| None);
    let reference = fake.reference("app:1");
    let never = Place::new(Config { pull: PullPolicy::Never, ..fake.config() });
    assert_eq!(never.store.meaning(&reference).await.unwrap_err().kind(), "pull_forbidden");
    let pulled = never.store.pull(&reference, quiet()).await.unwrap().digest;
    assert_eq!(never.store.meaning(&reference).await.unwrap(), pulled);
    let before = fake.requests().len();
    let missing = Place::new(fake.config());
    let located = missing.store.meaning(&reference).await.unwrap();
    assert_eq!(located, pulled);
    assert_eq!(fake.requests().len() - before, 2, "manifest and configuration");
    assert!(missing.store.list().is_empty(), "nothing is kept of what was only asked");
    let image = missing.store.pull_located(&reference, located, quiet()).await.unwrap();
    assert_eq!((image.digest, image.names), (pulled, vec![reference.clone()]));
    let after = fake.requests().len();
    assert_eq!(after - before, 6, "manifest, configuration, two layers");
    missing.store.meaning(&reference).await.unwrap();
    assert_eq!(fake.requests().len(), after);
    let always = Place::new(Config { pull: PullPolicy::Always, ..fake.config() });
    always.store.pull(&reference, quiet()).await.unwrap();
    let after = fake.requests().len();
    always.store.meaning(&reference).await.unwrap();
    assert_eq!(fake.requests().len(), after + 2, "manifest and configuration");
    let elsewhere = Place::new(Config { registries_allowed: vec!["ghcr.io".into()], ..fake.config() });
    let error = elsewhere.store.meaning(&reference).await.unwrap_err();
    assert_eq!(error.kind(), "registry_not_allowed");
    assert_eq!(fake.requests().len(), after + 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_at_the_same_time_share_layers() {
    let shared = archive("shared", 1 << 20);
    let one = Made::of(&[shared.clone(), archive("one", 100)], Packed::Gzip, json!({}));
    let two = Made::of(&[shared.clone(), archive("two", 100)], Packed::Gzip, json!({}));
    let both = Barrier::new(2);
    let fake = {
        let (one, two) = (one.clone(), two.clone());
        Fake::start(move |request| {
            if request.path.contains("/manifests/") {
                both.wait();
            }
            match request.path.contains("/one/") {
                true => honest(&one, request),
                false => honest(&two, request),
            }
        })
    };
    let place = Place::new(fake.config());
    let pull = |name: &str| {
        let (store, reference) = (place.store.clone(), fake.reference(name));
        tokio::spawn(async move { store.pull(&reference, quiet()).await })
    };
    let (first, second) = (pull("one"), pull("two"));
    let (first, second) = (first.await.unwrap().unwrap(), second.await.unwrap().unwrap());
    assert_eq!((first.digest, second.digest), (one.digest(), two.digest()));
    assert_eq!(fake.asked(&one.layers[0].to_string()).len(), 1, "the shared layer was fetched twice");
    assert_eq!(place.names("layers").len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_dropped_leaves_nothing_half_done() {
    let made = large();
    let blob = made.layers[0];
    let begun = Arc::new(tokio::sync::Notify::new());
    let fake = Fake::of(&made, {
        let (made, begun) = (made.clone(), begun.clone());
        let first = AtomicUsize::new(0);
        move |request| {
            let stalls = request.path.ends_with(&blob.to_string()) && first.fetch_add(1, Ordering::SeqCst) == 0;
            stalls.then(|| {
                begun.notify_one();
                let bytes = &made.blobs[&blob];
                Answer { announced: Some(bytes.len()), ..Answer::ok(&bytes[..bytes.len() / 2]) }
            })
        }
    });
    let place = Place::new(Config { silence_timeout_ms: 60_000, ..fake.config() });
    let reference = fake.reference("app");
    {
        let pull = place.store.pull(&reference, quiet());
        tokio::select! {
            outcome = pull => panic!("{outcome:?}"),
            () = begun.notified() => {}
        }
    }
    // The same layer again: whoever still works on it is waited for or goes his own way.
    let image = place.store.pull(&reference, quiet()).await.unwrap();
    assert_eq!(image.digest, made.digest());
    while !place.names("incoming").is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(place.names("layers").len(), 1);
}
