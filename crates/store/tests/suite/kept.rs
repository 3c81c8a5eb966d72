//! Promises about what outlives sandboxes: snapshots and volumes.

use std::collections::BTreeMap;

use nagaya_api::ids::{DiskImageId, SessionId, SnapshotId, VolumeId};
use nagaya_engine::model::{
    Durability, ImageDigest, Machine, Resources, Session, SessionState, Snapshot, SnapshotKind, SnapshotState, Volume,
    VolumeState,
};
use nagaya_engine::ports::{Change, SnapshotQuery, Store, VolumeQuery};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::{Promise, egress, session, workspace};

macro_rules! promises {
    ($($name:ident),* $(,)?) => {
        pub const PROMISES: &[(&str, Promise)] = &[$((stringify!($name), |store| Box::pin($name(store)))),*];
    };
}

promises![
    an_empty_store_has_neither_snapshots_nor_volumes,
    snapshots_and_volumes_come_back_as_they_were_written,
    a_second_write_replaces_the_whole_snapshot_and_volume,
    what_is_forgotten_is_gone_and_others_stay,
    a_snapshot_dangles_when_its_session_has_ended,
    pages_cover_every_snapshot_and_volume_once_newest_first,
];

pub fn snapshot(created_at: u64, number: u32) -> Snapshot {
    Snapshot {
        id: SnapshotId::from_uuid(*session(created_at, number).id.as_uuid()),
        workspace_id: workspace(1).id,
        session_id: session(1, 1).id,
        name: "before \"the\" upgrade, 長屋".into(),
        kind: SnapshotKind::User,
        state: SnapshotState::Ready,
        durability: Durability::Durable,
        tags: vec!["zebra".into(), "ant".into()],
        created_at,
        expires_at: Some(created_at + 1),
        local_ready_at: Some(created_at + 2),
        durable_at: Some(created_at + 3),
        machine: Machine {
            image: String::new(),
            resources: Resources::of(2, 4096, 5),
            root: ImageDigest::new("host:1"),
            outbound: true,
            egress: egress(),
        },
        env: BTreeMap::from([("EMPTY".into(), String::new()), ("LINES".into(), "a\nb".into())]),
        image_id: DiskImageId::new(created_at, [9; 10]),
        copied: true,
        source_stopped_us: 1_234,
        manifest: "00ff".repeat(16),
        size_bytes: 10 << 30,
        stored_bytes: 5 << 30,
        failure_reason: String::new(),
        propagation_error: "it's the network".into(),
    }
}

pub fn volume(created_at: u64, number: u32) -> Volume {
    Volume {
        id: VolumeId::from_uuid(*session(created_at, number).id.as_uuid()),
        workspace_id: workspace(1).id,
        name: "models 'n' \"more\"".into(),
        size_bytes: 100 << 30,
        growing_to_bytes: Some(101 << 30),
        state: VolumeState::Available,
        tags: vec!["zebra".into(), "ant".into()],
        created_at,
        updated_at: created_at + 1,
    }
}

fn every_snapshot() -> SnapshotQuery {
    SnapshotQuery { limit: 1_000, ..SnapshotQuery::default() }
}

fn every_volume() -> VolumeQuery {
    VolumeQuery { limit: 1_000, ..VolumeQuery::default() }
}

async fn an_empty_store_has_neither_snapshots_nor_volumes(store: &dyn Store) {
    assert_eq!(store.snapshot(snapshot(1, 1).id).await.unwrap(), None);
    assert_eq!(store.snapshots(every_snapshot()).await.unwrap(), []);
    assert_eq!(store.all_snapshots().await.unwrap(), []);
    assert_eq!(store.volume(volume(1, 1).id).await.unwrap(), None);
    assert_eq!(store.volumes(every_volume()).await.unwrap(), []);
    assert_eq!(store.all_volumes().await.unwrap(), []);
    store.commit(vec![Change::ForgetSnapshot(snapshot(1, 1).id), Change::ForgetVolume(volume(1, 1).id)]).await.unwrap();
}

async fn snapshots_and_volumes_come_back_as_they_were_written(store: &dyn Store) {
    use Durability::{Durable, LocalReady, None as Nowhere, PropagationFailed};
    use SnapshotKind::{Pause, Template, User};
    let states = [SnapshotState::Creating, SnapshotState::Ready, SnapshotState::Failed, SnapshotState::Deleting];
    let mut snapshots = Vec::new();
    for (number, state) in (0..).zip(states) {
        let kind = [User, Pause, Template][number as usize % 3];
        let durability = [Nowhere, LocalReady, Durable, PropagationFailed][number as usize];
        snapshots.push(Snapshot { state, kind, durability, ..snapshot(5, number) });
    }
    snapshots.push(Snapshot {
        tags: Vec::new(),
        expires_at: None,
        local_ready_at: None,
        durable_at: None,
        env: BTreeMap::new(),
        copied: false,
        manifest: String::new(),
        failure_reason: "the server stopped before the disk was copied".into(),
        propagation_error: String::new(),
        machine: Machine {
            image: String::new(),
            resources: Resources::of(16, 65_536, 100),
            root: ImageDigest::new("host:1"),
            outbound: false,
            egress: None,
        },
        ..snapshot(100, 9)
    });
    let states = [VolumeState::Creating, VolumeState::Available, VolumeState::Deleting];
    let mut volumes: Vec<Volume> =
        (0..).zip(states).map(|(number, state)| Volume { state, ..volume(5, number) }).collect();
    volumes.push(Volume { growing_to_bytes: None, tags: Vec::new(), ..volume(6, 0) });

    let mut changes: Vec<Change> = snapshots.iter().cloned().map(Change::Snapshot).collect();
    changes.extend(volumes.iter().cloned().map(Change::Volume));
    changes.push(Change::Workspace(workspace(1)));
    store.commit(changes).await.unwrap();

    assert_eq!(store.all_snapshots().await.unwrap(), snapshots);
    for snapshot in &snapshots {
        assert_eq!(store.snapshot(snapshot.id).await.unwrap().as_ref(), Some(snapshot));
    }
    assert_eq!(store.all_volumes().await.unwrap(), volumes);
    for volume in &volumes {
        assert_eq!(store.volume(volume.id).await.unwrap().as_ref(), Some(volume));
    }
}

async fn a_second_write_replaces_the_whole_snapshot_and_volume(store: &dyn Store) {
    let (before, small) = (snapshot(1, 1), volume(1, 1));
    let after = Snapshot {
        workspace_id: workspace(2).id,
        session_id: session(2, 2).id,
        name: "renamed".into(),
        kind: SnapshotKind::Template,
        state: SnapshotState::Deleting,
        durability: Durability::PropagationFailed,
        tags: Vec::new(),
        created_at: 2,
        expires_at: None,
        local_ready_at: None,
        durable_at: Some(9),
        machine: Machine {
            image: String::new(),
            resources: Resources::of(1, 1, 1),
            root: ImageDigest::new("host:1"),
            outbound: false,
            egress: None,
        },
        env: BTreeMap::new(),
        image_id: DiskImageId::new(7, [7; 10]),
        copied: false,
        source_stopped_us: 0,
        manifest: "11".repeat(32),
        size_bytes: 1,
        stored_bytes: 2,
        failure_reason: "gone".into(),
        propagation_error: "unreachable".into(),
        id: before.id,
    };
    let large = Volume {
        workspace_id: workspace(2).id,
        name: "renamed".into(),
        size_bytes: 101 << 30,
        growing_to_bytes: None,
        state: VolumeState::Deleting,
        tags: vec!["one".into()],
        created_at: 3,
        updated_at: 4,
        id: small.id,
    };
    let workspaces = [1, 2].map(|number| Change::Workspace(workspace(number)));
    store.commit(workspaces.to_vec()).await.unwrap();
    store.commit(vec![Change::Snapshot(before), Change::Volume(small)]).await.unwrap();
    store.commit(vec![Change::Snapshot(after.clone()), Change::Volume(large.clone())]).await.unwrap();
    assert_eq!(store.snapshots(every_snapshot()).await.unwrap(), [after]);
    assert_eq!(store.volumes(every_volume()).await.unwrap(), [large]);
}

async fn what_is_forgotten_is_gone_and_others_stay(store: &dyn Store) {
    let mut changes = vec![Change::Workspace(workspace(1))];
    changes.extend((1..=3).map(|number| Change::Snapshot(snapshot(number.into(), number))));
    changes.extend((1..=3).map(|number| Change::Volume(volume(number.into(), number))));
    store.commit(changes).await.unwrap();
    for _ in 0..2 {
        store
            .commit(vec![Change::ForgetSnapshot(snapshot(2, 2).id), Change::ForgetVolume(volume(3, 3).id)])
            .await
            .unwrap();
        assert_eq!(store.all_snapshots().await.unwrap(), [snapshot(1, 1), snapshot(3, 3)]);
        assert_eq!(store.all_volumes().await.unwrap(), [volume(1, 1), volume(2, 2)]);
    }
    // What one commit first writes and then forgets was never there.
    store.commit(vec![Change::Snapshot(snapshot(2, 2)), Change::ForgetSnapshot(snapshot(2, 2).id)]).await.unwrap();
    assert_eq!(store.snapshot(snapshot(2, 2).id).await.unwrap(), None);
}

async fn a_snapshot_dangles_when_its_session_has_ended(store: &dyn Store) {
    let mut changes = vec![Change::Workspace(workspace(1))];
    for (number, state) in (0u32..).zip(SessionState::ALL) {
        let session = Session { state, ..session(1, number) };
        changes.push(Change::Snapshot(Snapshot { session_id: session.id, ..snapshot(1, number) }));
        changes.push(Change::Session(session));
    }
    let orphan = Snapshot { session_id: SessionId::new(9, [9; 10]), ..snapshot(1, 99) };
    changes.push(Change::Snapshot(orphan.clone()));
    store.commit(changes).await.unwrap();
    let dangling = store.snapshots(SnapshotQuery { dangling: true, ..every_snapshot() }).await.unwrap();
    let position = SessionState::ALL.iter().position(|state| *state == SessionState::Terminated).unwrap() as u32;
    assert_eq!(
        dangling.iter().map(|snapshot| snapshot.id).collect::<Vec<_>>(),
        [orphan.id, snapshot(1, position).id],
        "a session that is still ending has not ended"
    );
}

async fn pages_cover_every_snapshot_and_volume_once_newest_first(store: &dyn Store) {
    let mut changes = vec![Change::Workspace(workspace(1))];
    // Several share one creation time, so that the id must decide.
    for number in 0..25 {
        changes.push(Change::Snapshot(snapshot(1_000 + u64::from(number / 4), number)));
        changes.push(Change::Volume(volume(1_000 + u64::from(number / 4), number)));
    }
    store.commit(changes).await.unwrap();
    let (mut snapshots, mut before) = (Vec::new(), None);
    loop {
        let page = store.snapshots(SnapshotQuery { before, limit: 4, ..every_snapshot() }).await.unwrap();
        assert!(page.len() <= 4);
        let Some(last) = page.last() else { break };
        before = Some((last.created_at, last.id));
        snapshots.extend(page);
    }
    let (mut volumes, mut before) = (Vec::new(), None);
    loop {
        let page = store.volumes(VolumeQuery { before, limit: 4, ..every_volume() }).await.unwrap();
        assert!(page.len() <= 4);
        let Some(last) = page.last() else { break };
        before = Some((last.created_at, last.id));
        volumes.extend(page);
    }
    let newest_first = (0..25).rev();
    assert_eq!(
        snapshots,
        newest_first.clone().map(|number| snapshot(1_000 + u64::from(number / 4), number)).collect::<Vec<_>>()
    );
    assert_eq!(volumes, newest_first.map(|number| volume(1_000 + u64::from(number / 4), number)).collect::<Vec<_>>());
}

pub fn queries_agree_with_a_naive_model<Keep>(
    runtime: &tokio::runtime::Runtime,
    fresh: &impl Fn() -> (Box<dyn Store>, Keep),
) {
    let any_snapshot = (0u64..6, 1u8..=2, 0u32..4).prop_map(|(created_at, workspace_number, session_number)| {
        let session_id = session(1, session_number).id;
        Snapshot { workspace_id: workspace(workspace_number).id, session_id, ..snapshot(created_at, 0) }
    });
    let any_before = || option::of((0u64..7, 0u32..40));
    let any_query = (option::of(1u8..=3), option::of(0u32..5), any::<bool>(), any_before(), 0u32..12).prop_map(
        |(workspace_number, session_number, dangling, before, limit)| SnapshotQuery {
            workspace_id: workspace_number.map(|number| workspace(number).id),
            session_id: session_number.map(|number| session(1, number).id),
            dangling,
            before: before.map(|(created_at, number)| (created_at, snapshot(created_at, number).id)),
            limit,
        },
    );
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let outcome = runner.run(&(vec(any_snapshot, 0..40), vec(any_query, 40)), |(mut snapshots, queries)| {
        let mut changes = vec![Change::Workspace(workspace(1)), Change::Workspace(workspace(2))];
        for (number, snapshot) in (0..).zip(&mut snapshots) {
            snapshot.id = self::snapshot(snapshot.created_at, number).id;
            let volume = volume(snapshot.created_at, number);
            changes.push(Change::Snapshot(snapshot.clone()));
            changes.push(Change::Volume(Volume { workspace_id: snapshot.workspace_id, ..volume }));
        }
        // The third of four sessions is not on record at all.
        for (number, state) in [(0, SessionState::Paused), (1, SessionState::Terminated), (3, SessionState::Running)] {
            changes.push(Change::Session(Session { state, ..session(1, number) }));
        }
        let (store, _keep) = fresh();
        runtime.block_on(async {
            store.commit(changes).await.unwrap();
            for query in queries {
                let found = store.snapshots(query.clone()).await.unwrap();
                let expected = naive(&snapshots, &query);
                prop_assert_eq!(&found, &expected, "{:?}", query);
                if query.session_id.is_none() && !query.dangling {
                    let before = query.before.map(|(at, id)| (at, VolumeId::from_uuid(*id.as_uuid())));
                    let query = VolumeQuery { workspace_id: query.workspace_id, before, limit: query.limit };
                    let volumes = store.volumes(query).await.unwrap();
                    let ids: Vec<_> = volumes.iter().map(|volume| *volume.id.as_uuid()).collect();
                    prop_assert_eq!(ids, expected.iter().map(|one| *one.id.as_uuid()).collect::<Vec<_>>());
                }
            }
            Ok(())
        })
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

fn naive(snapshots: &[Snapshot], query: &SnapshotQuery) -> Vec<Snapshot> {
    let alive = [session(1, 0).id, session(1, 3).id];
    let mut found: Vec<Snapshot> = snapshots
        .iter()
        .filter(|snapshot| query.workspace_id.is_none_or(|id| snapshot.workspace_id == id))
        .filter(|snapshot| query.session_id.is_none_or(|id| snapshot.session_id == id))
        .filter(|snapshot| !query.dangling || !alive.contains(&snapshot.session_id))
        .filter(|snapshot| query.before.is_none_or(|before| (snapshot.created_at, snapshot.id) < before))
        .cloned()
        .collect();
    found.sort_by_key(|snapshot| std::cmp::Reverse((snapshot.created_at, snapshot.id)));
    found.truncate(query.limit as usize);
    found
}
