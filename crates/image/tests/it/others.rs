//! Programs of others: Debian's docker-registry and skopeo give us images, and umoci unpacks the same ones to compare with.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nagaya_image::{Config, ImageStore, Reference};
use serde_json::json;

use crate::images::{Made, Packed, Place, quick, quiet};
use crate::tar::{Entry, Tar};

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; scripts/install-packages test installs it"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Layers with everything that layers have, the lowest first.
fn layers() -> Vec<Vec<u8>> {
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let long = format!("usr/share/{}/{}", "d".repeat(150), "f".repeat(200));
    let lower = [
        Entry::directory("./"),
        Entry::directory("bin"),
        Entry::file("bin/tool", "tool 1").owned(0, 0, 0o4755),
        Entry::hard_link("bin/same", "bin/tool"),
        Entry::file("bin/ping", "ping").owned(0, 0, 0o755).attribute("SCHILY.xattr.security.capability", capability),
        Entry::directory("etc").owned(0, 0, 0o755),
        Entry::file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
        Entry::file("etc/gone", "gone"),
        Entry::directory("etc/dir.d"),
        Entry::file("etc/dir.d/old", "old"),
        Entry { time: 3, ..Entry::directory("tmp").owned(0, 0, 0o1777) },
        Entry::symlink("lib", "usr/lib"),
        Entry::directory("usr"),
        Entry::directory("usr/lib"),
        Entry::file("usr/lib/a.so", "a"),
        Entry::directory("usr/share"),
        Entry::directory(&long[..long.rfind('/').unwrap()]),
        Entry::file(&long, "long"),
        Entry::directory("home"),
        Entry::directory("home/app").owned(1000, 1000, 0o2750),
        Entry::file("home/app/note", "note").owned(1000, 65534, 0o640).attribute("SCHILY.xattr.user.note", b"\0\n"),
        Entry::new(b'6', "home/app/fifo").owned(1000, 1000, 0o600),
        Entry::directory("replaced"),
        Entry::file("replaced/inside", "inside"),
        Entry::file("becomes-dir", "file"),
        Entry::symlink("becomes-file", "bin/tool"),
    ];
    let middle = [
        Entry::directory("./"),
        Entry::directory("etc"),
        Entry::file("etc/.wh.gone", ""),
        Entry::file("etc/passwd", "root:x:0:0:root:/root:/bin/bash\n"),
        Entry::directory("etc/dir.d").owned(0, 5, 0o750),
        Entry::file("etc/dir.d/.wh..wh..opq", ""),
        Entry::file("etc/dir.d/new", "new"),
        Entry::file("replaced", "a file now"),
        Entry::directory("becomes-dir"),
        Entry::file("becomes-dir/inside", "inside"),
        Entry::file("becomes-file", "no link any more"),
        Entry::file(".wh.never-there", ""),
    ];
    let upper = [
        Entry::directory("./"),
        Entry::directory("bin"),
        Entry::file("bin/tool", "tool 2").owned(7, 7, 0o755),
        Entry::directory("usr"),
        Entry::directory("usr/lib"),
        Entry::file("usr/lib/.wh.a.so", ""),
        Entry::file("usr/lib/b.so", "b"),
        Entry::directory("home"),
        Entry::directory("home/app").owned(1000, 1000, 0o700),
        Entry { content: &[0; 100_000], ..Entry::new(b'0', "home/app/zeros") },
    ];
    vec![Tar::of(lower), Tar::of(middle), Tar::of(upper)]
}

/// One line for each thing in a directory: all that can be told of it.
const LIST: &str = r#"
import hashlib, os, stat, sys
for directory, directories, files in os.walk(sys.argv[1]):
    for path in [directory] + [os.path.join(directory, name) for name in directories + files]:
        if path == directory and path != sys.argv[1]:
            continue
        found = os.lstat(path)
        kind, content = stat.filemode(found.st_mode), ''
        if stat.S_ISREG(found.st_mode):
            content = f'{found.st_size} {hashlib.sha256(open(path, "rb").read()).hexdigest()}'
        if stat.S_ISLNK(found.st_mode):
            content = os.readlink(path)
        names = sorted(name for name in os.listxattr(path, follow_symlinks=False) if not name.startswith('trusted.'))
        attributes = [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names]
        print(os.path.relpath(path, sys.argv[1]), kind, found.st_uid, found.st_gid, found.st_mtime_ns, content, attributes)
"#;

/// Of a directory, or of a stack of layers while it is mounted there.
fn listing(directory: &Path, stack: Option<&[std::path::PathBuf]>) -> Vec<String> {
    let mount = match stack {
        None => "true".to_owned(),
        Some(layers) => {
            let layers: Vec<_> = layers.iter().map(|layer| layer.display().to_string()).collect();
            format!("mount -t overlay overlay -o lowerdir={} '{}'", layers.join(":"), directory.display())
        }
    };
    let script = format!("{mount}; python3 -c \"$1\" '{}'", directory.display());
    let text = run("unshare", &["--mount", "sh", "-ec", &script, "sh", LIST]);
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[tokio::test]
async fn a_stack_of_our_layers_is_what_umoci_unpacks() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    // umoci 0.4.7 knows no zstd.
    let made = Made::of(&layers(), Packed::Gzip, json!({}));
    made.write_layout(&directory.path().join("layout"), "tag");
    run("umoci", &["unpack", "--image", &format!("{}:tag", at("layout")), &at("bundle")]);
    let place = Place::new(quick());
    let image = place.store.import(at("layout").as_ref(), None, quiet()).await.unwrap().remove(0);
    let stack = place.store.layers(&image.digest).unwrap();
    fs::create_dir(at("mounted")).unwrap();
    let theirs = listing(&directory.path().join("bundle/rootfs"), None);
    let ours = listing(&directory.path().join("mounted"), Some(&stack));
    assert!(theirs.len() >= 25, "{theirs:?}");
    for (our, their) in ours.iter().zip(&theirs) {
        assert_eq!(our, their);
    }
    assert_eq!(ours.len(), theirs.len());
}

/// Debian's registry on a port of its own; ended with the test.
struct Registry {
    child: Child,
    address: String,
    _files: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    async fn start() -> Self {
        let files = tempfile::tempdir().unwrap();
        // A port that was free a moment ago; who takes it meanwhile makes the test fail, not pass.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let config = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: \"{address}\", secret: x}}\n",
            files.path().join("data").display()
        );
        let path = files.path().join("config.yml");
        fs::write(&path, config).unwrap();
        let child =
            Command::new("docker-registry").arg("serve").arg(&path).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut child = child.expect("docker-registry; scripts/install-packages test installs it");
        while tokio::net::TcpStream::connect(&address).await.is_err() {
            assert!(child.try_wait().unwrap().is_none(), "docker-registry ended");
            tokio::task::yield_now().await;
        }
        Self { child, address, _files: files }
    }

    fn config(&self) -> Config {
        Config { registries_insecure: vec![self.address.clone()], silence_timeout_ms: 30_000, ..quick() }
    }
}

#[tokio::test]
async fn a_real_registry_gives_what_skopeo_put_there() {
    let registry = Registry::start().await;
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let made = Made::of(&layers(), Packed::Gzip, json!({"User": "1000:1000", "Env": ["A=b"]}));
    made.write_layout(&directory.path().join("layout"), "tag");
    let copy = |more: &[&str], name: &str| {
        let (from, to) = (format!("oci:{}:tag", at("layout")), format!("docker://{}/{name}", registry.address));
        let fixed = ["copy", "--insecure-policy", "--quiet", "--dest-tls-verify=false"];
        run("skopeo", &[&fixed[..], more, &[&from, &to]].concat());
    };
    copy(&[], "team/oci:1");
    copy(&["--format", "v2s2"], "team/docker:1");
    copy(&["--dest-compress-format", "zstd", "--dest-compress"], "team/zstd:1");
    let place = Place::new(registry.config());
    let pull = async |name: &str| {
        let reference: Reference = format!("{}/{name}", registry.address).parse().unwrap();
        place.store.pull(&reference, quiet()).await.unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    let image = pull("team/oci:1").await;
    assert_eq!(image.digest, made.digest());
    assert_eq!(image.config.env, [("A".to_owned(), "b".to_owned())]);
    let docker = pull("team/docker:1").await;
    assert_ne!(docker.digest, made.digest(), "another form of manifest");
    let zstd = pull("team/zstd:1").await;
    for other in [&docker, &zstd] {
        let diff_ids: Vec<_> = other.layers.iter().map(|layer| layer.diff_id).collect();
        assert_eq!(diff_ids, made.diff_ids);
    }
    assert_eq!(place.names("layers").len(), 3, "each layer is there once");
    let pinned = pull(&format!("team/oci@{}", made.digest())).await;
    assert_eq!(pinned.digest, made.digest());
    for missing in ["team/oci:2", "team/none:1"] {
        let reference: Reference = format!("{}/{missing}", registry.address).parse().unwrap();
        assert_eq!(place.store.pull(&reference, quiet()).await.unwrap_err().kind(), "not_at_registry", "{missing}");
    }
    // What a fresh store fetches of the zstd form is the same.
    let fresh = Place::new(registry.config());
    let reference: Reference = format!("{}/team/zstd:1", registry.address).parse().unwrap();
    let image = fresh.store.pull(&reference, quiet()).await.unwrap();
    fs::create_dir_all(at("one")).unwrap();
    fs::create_dir_all(at("two")).unwrap();
    let ours = listing(at("one").as_ref(), Some(&fresh.store.layers(&image.digest).unwrap()));
    assert_eq!(ours, listing(at("two").as_ref(), Some(&place.store.layers(&docker.digest).unwrap())));
}

/// Runs in a process of its own, which has a PATH with a helper in it.
#[tokio::test]
async fn child_with_a_credential_helper() {
    let Ok(told) = std::env::var("NAGAYA_IMAGE_TEST_HELPER") else { return };
    let (directory, name) = told.split_once('|').unwrap();
    let name: Reference = name.parse().unwrap();
    let config = Config {
        registries_insecure: vec![name.registry().to_owned()],
        docker_config: Some(Path::new(directory).join("config.json")),
        ..quick()
    };
    let store = ImageStore::open(&Path::new(directory).join("images"), config).unwrap();
    store.pull(&name, quiet()).await.unwrap();
}

#[tokio::test]
async fn a_credential_helper_is_asked() {
    use std::os::unix::fs::PermissionsExt;
    let made = Made::of(&[Tar::of([Entry::file("f", "")])], Packed::Gzip, json!({}));
    let fake = crate::fake::Fake::of(&made, |request| {
        let known = request.header("authorization") == "Basic YW5uOnNlY3JldA==";
        (!known).then(|| crate::fake::Answer::status(401).header("WWW-Authenticate", "Basic realm=\"x\""))
    });
    let directory = tempfile::tempdir().unwrap();
    let helper = directory.path().join("docker-credential-test");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = get ] && [ \"$(cat)\" = {} ] && echo '{{\"Username\":\"ann\",\"Secret\":\"secret\"}}'\n",
        fake.name()
    );
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, PermissionsExt::from_mode(0o755)).unwrap();
    let config = json!({"credHelpers": {fake.name(): "test"}}).to_string();
    fs::write(directory.path().join("config.json"), config).unwrap();
    let path = format!("{}:{}", directory.path().display(), std::env::var("PATH").unwrap());
    let told = format!("{}|{}", directory.path().display(), fake.reference("app"));
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "others::child_with_a_credential_helper"])
        .env("PATH", path)
        .env("NAGAYA_IMAGE_TEST_HELPER", told)
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    assert!(fake.requests().iter().any(|request| !request.header("authorization").is_empty()));
}
