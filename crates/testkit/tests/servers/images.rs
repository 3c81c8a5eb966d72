//! Images from elsewhere on a real server: a registry of others, what other programs made, and everything that lives on one.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nagaya_api::nagaya::v1 as own;
use nagaya_api::nagaya::v1::pull_image_response::Event;
use nagaya_api::tenki::v1::{self, SessionState, SnapshotState};
use nagaya_testkit::{Client, Sandbox, Server, leftovers, settle};

const POOLS: &str = "[pools]\nslots_ready = 1\nisolated_slots_ready = 0\n";

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A registry that others wrote. Its port is one that was free a moment ago.
struct Registry {
    process: Child,
    address: String,
}

impl Registry {
    fn start(directory: &Path) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap().to_string();
        drop(free);
        let files = directory.join("registry");
        let settings = directory.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
            files.display()
        );
        fs::write(&settings, text).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&settings).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().expect("docker-registry is installed");
        settle("the registry listens", || std::net::TcpStream::connect(&address).is_ok());
        Self { process, address }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An image of another C library than the host's, or none: one static program under many names, a user, a directory to start
/// in, an environment, and nothing else. As an OCI layout, of two layers.
fn make_image(directory: &Path) -> String {
    let root = directory.join("rootfs");
    for made in ["bin", "etc", "srv/app", "home/app", "usr/bin"] {
        fs::create_dir_all(root.join(made)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
    for applet in ["sh", "cat", "id", "env", "ls", "sleep", "stat", "wc"] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\napp:x:7:9:App:/home/app:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nwheel:x:9:\n").unwrap();
    fs::write(root.join("etc/removed"), "by the second layer").unwrap();
    for ours in ["srv/app", "home/app"] {
        chown(root.join(ours), Some(7), Some(9)).unwrap();
    }
    let suid = root.join("usr/bin/as-root");
    let source = directory.join("as-root.c");
    fs::write(
        &source,
        "#include <stdio.h>\n#include <unistd.h>\nint main(void) { return !printf(\"%d\", geteuid()); }\n",
    )
    .unwrap();
    run("cc", &["-static", "-o", suid.to_str().unwrap(), source.to_str().unwrap()]);
    fs::set_permissions(&suid, fs::Permissions::from_mode(0o4755)).unwrap();
    let layout = directory.join("layout");
    let image = format!("{}:v1", layout.display());
    run("umoci", &["init", "--layout", layout.to_str().unwrap()]);
    run("umoci", &["new", "--image", &image]);
    run("umoci", &["insert", "--image", &image, root.to_str().unwrap(), "/"]);
    run("umoci", &["insert", "--image", &image, "--whiteout", "/etc/removed"]);
    let settings = [
        ["--config.user", "app"],
        ["--config.workingdir", "/srv/app"],
        ["--config.env", "PATH=/bin:/usr/bin"],
        ["--config.env", "GREETING=hello world"],
    ];
    run("umoci", &[&["config", "--image", image.as_str()][..], &settings.concat()].concat());
    format!("oci:{image}")
}

async fn create(client: &Client, image: &str) -> Sandbox {
    let request = v1::CreateSessionRequest {
        owner_id: "self".into(),
        owner_type: "USER".into(),
        registry_ref: Some(image.into()),
        wait_ready: true,
        ..Default::default()
    };
    let session = client.control.create_session(request).await.unwrap().session.clone();
    assert_eq!(session.source_registry_ref.as_deref(), Some(image));
    client.attach(&session.id).await.unwrap()
}

async fn names(client: &Client) -> Vec<Vec<String>> {
    let images = client.own.list_images(own::ListImagesRequest::default()).await.unwrap();
    images.images.iter().map(|image| image.names.clone()).collect()
}

async fn text(sandbox: &Sandbox, argv: &[&str]) -> String {
    sandbox.run(argv).await.unwrap().text()
}

#[test]
fn sandboxes_of_an_image_live_through_everything_that_others_live_through() {
    if !rustix::process::geteuid().is_root() {
        println!("images: not run: only root can start the namespace driver");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path());
    let name = format!("{}/team/app:v1", registry.address);
    let image = make_image(directory.path());
    run("skopeo", &["copy", "--quiet", "--dest-tls-verify=false", &image, &format!("docker://{name}")]);
    let settings =
        format!("{POOLS}[images]\nregistries_insecure = [{:?}]\naliases = {{ app = {name:?} }}\n", registry.address);
    let mut server = Server::start_with(&settings);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();

    let (kept, fork) = runtime.block_on(async {
        let client = Client::of(&server);
        let mut pulling = client.own.pull_image(own::PullImageRequest { name: "app".into() }).await.unwrap();
        let (mut states, mut pulled) = (Vec::new(), None);
        while let Some(message) = pulling.message().await.unwrap() {
            match message.event.clone() {
                Some(Event::Layer(layer)) => states.push(layer.state.clone()),
                Some(Event::Image(image)) => pulled = Some(*image),
                None => {}
            }
        }
        let pulled = pulled.expect("the stream ends with the image");
        assert_eq!((pulled.names.as_slice(), pulled.layers.len()), ([name.clone()].as_slice(), 2));
        assert_eq!(states.iter().filter(|state| *state == "done").count(), 2, "{states:?}");

        let sandbox = create(&client, "app").await;
        assert_eq!(text(&sandbox, &["id"]).await.trim(), "uid=7(app) gid=9(wheel) groups=9(wheel)");
        assert_eq!(
            text(&sandbox, &["sh", "-c", "pwd; echo $GREETING $PATH $HOME"]).await.trim(),
            "/srv/app\nhello world /bin:/usr/bin /home/app"
        );
        assert_eq!(text(&sandbox, &["ls", "/etc"]).await.trim(), "group\nhostname\nhosts\npasswd\nresolv.conf");
        assert_eq!(text(&sandbox, &["as-root"]).await.trim(), "0", "set-user-id works inside");
        sandbox.write("note", "kept").await.unwrap();
        assert_eq!(text(&sandbox, &["stat", "-c", "%U %n", "/srv/app/note"]).await.trim(), "app /srv/app/note");

        // Without a name the image stays, for a sandbox needs it.
        let freed = client.own.remove_image(own::RemoveImageRequest { name: "app".into() }).await.unwrap();
        assert_eq!(freed.freed.images, 0);
        assert_eq!(names(&client).await, [Vec::<String>::new()]);
        client.control.pause_session(v1::PauseSessionRequest { session_id: sandbox.id.clone() }).await.unwrap();
        let fork = own::ForkSessionRequest { session_id: sandbox.id.clone(), count: 1, ..Default::default() };
        let fork = client.own.fork_session(fork).await.unwrap().sessions[0].id.clone();
        client.wait_running(&fork).await.unwrap();
        let fork = client.attach(&fork).await.unwrap();
        assert_eq!(text(&fork, &["cat", "note"]).await, "kept");
        (sandbox.id.clone(), fork.id.clone())
    });

    server.kill();
    server.restart();
    runtime.block_on(async {
        let client = Client::of(&server);
        assert_eq!(text(&client.attach(&fork).await.unwrap(), &["cat", "note"]).await, "kept", "its processes went on");
        client.control.resume_session(v1::ResumeSessionRequest { session_id: kept.clone() }).await.unwrap();
        client.wait_running(&kept).await.unwrap();
        assert_eq!(text(&client.attach(&kept).await.unwrap(), &["cat", "note"]).await, "kept");

        let request = v1::CreateSnapshotRequest { session_id: kept.clone(), ..Default::default() };
        let snapshot = client.control.create_snapshot(request).await.unwrap().snapshot.id.clone();
        loop {
            let request = v1::GetSnapshotRequest { snapshot_id: snapshot.clone() };
            let state = client.control.get_snapshot(request).await.unwrap().snapshot.state.as_known();
            match state {
                Some(SnapshotState::SNAPSHOT_STATE_READY) => break,
                Some(SnapshotState::SNAPSHOT_STATE_FAILED) => panic!("the snapshot failed"),
                _ => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
            }
        }
        client.terminate(&kept).await.unwrap();
        client.terminate(&fork).await.unwrap();
        let prune = || client.own.prune_images(own::PruneImagesRequest::default());
        assert_eq!(prune().await.unwrap().freed.images, 0, "the snapshot needs it");
        let request = v1::CreateSessionRequest {
            owner_id: "self".into(),
            owner_type: "USER".into(),
            snapshot_id: Some(snapshot.clone()),
            wait_ready: true,
            ..Default::default()
        };
        let restored = client.control.create_session(request).await.unwrap().session.id.clone();
        assert_eq!(text(&client.attach(&restored).await.unwrap(), &["cat", "note"]).await, "kept");
        client.terminate(&restored).await.unwrap();
        client.control.delete_snapshot(v1::DeleteSnapshotRequest { snapshot_id: snapshot }).await.unwrap();
        assert_eq!(prune().await.unwrap().freed.images, 1, "now nothing needs it");

        // A creation fetches what is not there, and says what is nowhere.
        let again = create(&client, &name).await;
        assert_eq!(text(&again, &["id", "-un"]).await.trim(), "app");
        client.terminate(&again.id).await.unwrap();
        let state = client.session(&again.id).await.unwrap().state.as_known();
        assert_eq!(state, Some(SessionState::Terminated));
        for (image, word) in [
            (format!("{}/team/none:1", registry.address), "registry_image_not_found"),
            ("not a name".into(), "invalid_argument"),
            ("UPPER".into(), "invalid_argument"),
        ] {
            let request = v1::CreateSessionRequest {
                owner_id: "self".into(),
                owner_type: "USER".into(),
                registry_ref: Some(image.clone()),
                ..Default::default()
            };
            let refused = client.control.create_session(request).await.unwrap_err().message.unwrap_or_default();
            assert!(refused.contains(word), "{image}: {refused}");
        }
    });

    // What other programs write down is imported as it is; a half archive is not.
    let archive = directory.path().join("save.tar");
    let target = format!("docker-archive:{}:shop/cart:2", archive.display());
    run("skopeo", &["copy", "--quiet", &image, &target]);
    let (endpoint, key) = (server.endpoint().to_owned(), server.api_key());
    let command_line = |arguments: &[&str]| {
        let mut command = Command::new(nagaya_testkit::binary());
        command.args(arguments).env("TENKI_API_KEY", &key).env("TENKI_API_ENDPOINT", &endpoint);
        command.env("NAGAYA_DATA_DIR", server.data_dir()).env("HOME", directory.path());
        command.output().unwrap()
    };
    let imported = command_line(&["image", "import", archive.to_str().unwrap(), "--json"]);
    let told = String::from_utf8_lossy(&imported.stdout).into_owned();
    assert!(imported.status.success() && told.contains("docker.io/shop/cart:2"), "{told} {imported:?}");
    let half = directory.path().join("half.tar");
    fs::write(&half, &fs::read(&archive).unwrap()[..100_000]).unwrap();
    let refused = command_line(&["image", "import", half.to_str().unwrap()]);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && told.contains("[image_invalid]"), "{told}");
    runtime.block_on(async {
        let client = Client::of(&server);
        let sandbox = create(&client, "shop/cart:2").await;
        assert_eq!(text(&sandbox, &["id", "-un"]).await.trim(), "app");
        client.terminate(&sandbox.id).await.unwrap();
    });
    assert!(server.terminate().success(), "{}", server.log());
    server.purge();
    let left = leftovers(server.data_dir());
    assert!(left.is_empty(), "{left:?}");
}
