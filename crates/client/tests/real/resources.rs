use std::time::Duration;

use nagaya_client::constants::MIB;
use nagaya_client::{
    Change, Code, CreateOptions, CreateSnapshotOptions, CreateVolumeOptions, DetachOptions, Error, RefusalKind,
    SnapshotDurability, SnapshotState, UpdateSnapshotOptions, UpdateVolumeOptions, VolumeMount, VolumeState,
};

use crate::world::{World, say, small};

crate::cases!(volumes_outlive_sessions, snapshots_start_sessions);

const WAIT: Duration = Duration::from_secs(60);

async fn volumes_outlive_sessions(world: &World) {
    let client = &world.client;
    let options = CreateVolumeOptions::default().name("data".into()).size_bytes(16 * MIB).workspace_id(None);
    let volume = client.create_volume(options).await.unwrap();
    let volume = client.wait_volume_ready(&volume.id, WAIT).await.unwrap();
    assert_eq!((volume.name.as_str(), volume.size_bytes, volume.state), ("data", 16 * MIB, VolumeState::Available));
    assert!(volume.is_deletable() && volume.created_at.ends_with('Z'));
    let mount = |read_only| VolumeMount { volume_id: volume.id.clone(), mount_path: "/mnt/data".into(), read_only };

    let first = client.create(small().volumes(vec![mount(false)])).await.unwrap();
    assert_eq!(first.info().unwrap().volumes[0].mount_path, "/mnt/data");
    say(&first, "echo kept > /mnt/data/file").await;
    let in_use = client.delete_volume(&volume.id).await.unwrap_err();
    assert!(matches!(in_use, Error::Refused { kind: RefusalKind::VolumeInUse, .. }), "{in_use:?}");
    assert_eq!(client.get_volume(&volume.id).await.unwrap().attachments.len(), 1);
    first.detach_volume(&volume.id, DetachOptions::default()).await.unwrap();
    assert!(first.info().unwrap().volumes.is_empty());
    first.close().await.unwrap();

    let grown = client.resize_volume(&volume.id, 32 * MIB).await.unwrap();
    assert_eq!(grown.size_bytes, 32 * MIB);
    let second = client.create(small()).await.unwrap();
    let attached = second.attach_volume(mount(true)).await.unwrap();
    assert!(attached.read_only && attached.session_id == second.id());
    assert_eq!(say(&second, "cat /mnt/data/file").await, "kept");
    second.close().await.unwrap();

    let tags = Some(vec!["a".into()]);
    let update = UpdateVolumeOptions::default().name(Some("renamed".into())).tags(tags);
    let updated = client.update_volume(&volume.id, update).await.unwrap();
    assert_eq!((updated.name.as_str(), updated.tags.len()), ("renamed", 1));
    assert!(client.list_volumes("").await.unwrap().iter().any(|each| each.id == volume.id));
    client.delete_volume(&volume.id).await.unwrap();
    let gone = client.get_volume(&volume.id).await.unwrap_err();
    assert!(matches!(gone, Error::Refused { kind: RefusalKind::VolumeNotFound, .. }), "{gone:?}");
}

async fn snapshots_start_sessions(world: &World) {
    let client = &world.client;
    let source = client.create(small()).await.unwrap();
    source.files().write("note", "in the snapshot").await.unwrap();
    let named = CreateSnapshotOptions::default().name(Some("state".into()));
    let snapshot = source.create_snapshot_and_wait(named, WAIT).await.unwrap();
    assert_eq!((snapshot.state, snapshot.name.as_deref()), (SnapshotState::Ready, Some("state")));
    let durable = client.wait_snapshot_durable(&snapshot.id, WAIT).await.unwrap();
    assert_eq!(durable.durability, SnapshotDurability::Durable);
    let second = source.create_snapshot(CreateSnapshotOptions::default()).await.unwrap();
    assert_eq!(second.state, SnapshotState::Ready);
    assert_eq!(source.snapshots().await.unwrap().len(), 2);
    assert!(client.list_snapshots("").await.unwrap().len() >= 2);
    source.close().await.unwrap();
    assert!(client.list_dangling_snapshots().await.unwrap().iter().any(|each| each.id == snapshot.id));

    let from = CreateOptions::default().snapshot_id(Some(snapshot.id.clone()));
    let restored = client.create(from).await.unwrap();
    assert_eq!(&restored.files().read("note").await.unwrap()[..], b"in the snapshot");
    let info = restored.info().unwrap();
    assert_eq!((info.source_snapshot_id.as_ref(), info.cpu_cores), (Some(&snapshot.id), 1));
    let in_use = client.delete_snapshot(&snapshot.id).await.unwrap_err();
    assert_eq!(in_use.code(), Some(Code::SnapshotInUse), "{in_use:?}");
    restored.close().await.unwrap();

    let later = std::time::SystemTime::now() + Duration::from_secs(3600);
    let update = UpdateSnapshotOptions::default().expires_at(Change::Set(later));
    assert!(client.update_snapshot(&snapshot.id, update).await.unwrap().expires_at.is_some());
    let update = UpdateSnapshotOptions::default().expires_at(Change::Clear).tags(Some(vec!["x".into()]));
    let updated = client.update_snapshot(&snapshot.id, update).await.unwrap();
    assert_eq!((updated.expires_at, updated.tags.len()), (None, 1));
    for id in [&snapshot.id, &second.id] {
        client.delete_snapshot(id).await.unwrap();
    }
    let gone = client.wait_snapshot_ready(&snapshot.id, WAIT).await.unwrap_err();
    assert!(matches!(gone, Error::Refused { kind: RefusalKind::SnapshotNotFound, .. }), "{gone:?}");
}
