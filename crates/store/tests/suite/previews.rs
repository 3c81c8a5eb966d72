//! Promises about previews.

use nagaya_api::ids::PreviewId;
use nagaya_engine::model::{Binding, Preview, PreviewKind, PreviewState};
use nagaya_engine::ports::{Change, PreviewQuery, Store};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::{Promise, key, session, workspace};

macro_rules! promises {
    ($($name:ident),* $(,)?) => {
        pub const PROMISES: &[(&str, Promise)] = &[$((stringify!($name), |store| Box::pin($name(store)))),*];
    };
}

promises![
    an_empty_store_has_no_previews,
    previews_come_back_as_they_were_written,
    a_forgotten_preview_is_gone_and_its_label_free,
    pages_cover_every_preview_once_newest_first,
];

const KINDS: [PreviewKind; 3] = [PreviewKind::Exposed, PreviewKind::Named, PreviewKind::Private];

pub fn preview(created_at: u64, number: u32) -> Preview {
    Preview {
        id: PreviewId::from_uuid(*session(created_at, number).id.as_uuid()),
        workspace_id: workspace(1).id,
        owner_id: key(1),
        kind: PreviewKind::Named,
        state: PreviewState::Live,
        label: format!("shop-{created_at}-{number}"),
        binding: Some(Binding { session_id: session(1, 1).id, port: 65_535 }),
        expires_at: Some(created_at + 1),
        ingress_port: 40_000,
        created_at,
        updated_at: created_at + 2,
        last_accessed_at: Some(created_at + 3),
    }
}

fn every_preview() -> PreviewQuery {
    PreviewQuery { limit: 1_000, ..PreviewQuery::default() }
}

async fn an_empty_store_has_no_previews(store: &dyn Store) {
    assert_eq!(store.previews(every_preview()).await.unwrap(), []);
    assert_eq!(store.all_previews().await.unwrap(), []);
    store.commit(vec![Change::ForgetPreview(preview(1, 1).id)]).await.unwrap();
}

async fn previews_come_back_as_they_were_written(store: &dyn Store) {
    let mut written: Vec<Preview> = (0..).zip(KINDS).map(|(n, kind)| Preview { kind, ..preview(5, n) }).collect();
    let state = PreviewState::Making;
    written.push(Preview { binding: None, expires_at: None, last_accessed_at: None, state, ..preview(6, 0) });
    let mut changes: Vec<Change> = written.iter().cloned().map(Change::Preview).collect();
    changes.push(Change::Workspace(workspace(1)));
    store.commit(changes).await.unwrap();
    assert_eq!(store.all_previews().await.unwrap(), written);

    let replaced = Preview { binding: None, ingress_port: 0, label: "other".into(), ..written[1].clone() };
    store.commit(vec![Change::Preview(replaced.clone())]).await.unwrap();
    assert_eq!(store.all_previews().await.unwrap()[1], replaced);
}

async fn a_forgotten_preview_is_gone_and_its_label_free(store: &dyn Store) {
    let [gone, stays] = [preview(1, 1), preview(1, 2)];
    let changes = vec![Change::Workspace(workspace(1)), Change::Preview(gone.clone()), Change::Preview(stays.clone())];
    store.commit(changes).await.unwrap();
    let next = Preview { label: gone.label.clone(), ..preview(2, 3) };
    store.commit(vec![Change::ForgetPreview(gone.id), Change::Preview(next.clone())]).await.unwrap();
    assert_eq!(store.all_previews().await.unwrap(), [stays, next]);
}

async fn pages_cover_every_preview_once_newest_first(store: &dyn Store) {
    // Several share one creation time, so that the id must decide.
    let all: Vec<Preview> = (0..25).map(|number| preview(1_000 + u64::from(number / 4), number)).collect();
    let mut changes: Vec<Change> = all.iter().cloned().map(Change::Preview).collect();
    changes.push(Change::Workspace(workspace(1)));
    store.commit(changes).await.unwrap();
    let (mut found, mut before) = (Vec::new(), None);
    loop {
        let page = store.previews(PreviewQuery { before, limit: 4, ..every_preview() }).await.unwrap();
        assert!(page.len() <= 4);
        let Some(last) = page.last() else { break };
        before = Some((last.created_at, last.id));
        found.extend(page);
    }
    assert_eq!(found, all.into_iter().rev().collect::<Vec<_>>());
}

pub fn queries_agree_with_a_naive_model<Keep>(
    runtime: &tokio::runtime::Runtime,
    fresh: &impl Fn() -> (Box<dyn Store>, Keep),
) {
    let any_preview =
        (0u64..6, 1u8..=2, 0usize..3, option::of(0u32..4)).prop_map(|(created_at, owner, kind, bound)| {
            let binding = bound.map(|number| Binding { session_id: session(1, number).id, port: 1 });
            Preview { workspace_id: workspace(owner).id, kind: KINDS[kind], binding, ..preview(created_at, 0) }
        });
    let before = option::of((0u64..7, 0u32..40));
    let any_query = (option::of(1u8..=3), option::of(0usize..3), option::of(0u32..5), before, 0u32..12).prop_map(
        |(owner, kind, bound, before, limit)| PreviewQuery {
            workspace_id: owner.map(|number| workspace(number).id),
            kind: kind.map(|kind| KINDS[kind]),
            session_id: bound.map(|number| session(1, number).id),
            before: before.map(|(created_at, number)| (created_at, preview(created_at, number).id)),
            limit,
        },
    );
    let config = ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let outcome = runner.run(&(vec(any_preview, 0..40), vec(any_query, 40)), |(mut previews, queries)| {
        let mut changes = vec![Change::Workspace(workspace(1)), Change::Workspace(workspace(2))];
        for (number, one) in (0..).zip(&mut previews) {
            let Preview { id, label, .. } = preview(one.created_at, number);
            (one.id, one.label) = (id, label);
            changes.push(Change::Preview(one.clone()));
        }
        let (store, _keep) = fresh();
        runtime.block_on(async {
            store.commit(changes).await.unwrap();
            for query in queries {
                let found = store.previews(query.clone()).await.unwrap();
                prop_assert_eq!(&found, &naive(&previews, &query), "{:?}", query);
            }
            Ok(())
        })
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

fn naive(previews: &[Preview], query: &PreviewQuery) -> Vec<Preview> {
    let bound_to = |of: &Preview, id| of.binding.is_some_and(|binding| binding.session_id == id);
    let mut found: Vec<Preview> = previews
        .iter()
        .filter(|of| query.workspace_id.is_none_or(|id| of.workspace_id == id))
        .filter(|of| query.kind.is_none_or(|kind| of.kind == kind))
        .filter(|of| query.session_id.is_none_or(|id| bound_to(of, id)))
        .filter(|of| query.before.is_none_or(|before| (of.created_at, of.id) < before))
        .cloned()
        .collect();
    found.sort_by_key(|of| std::cmp::Reverse((of.created_at, of.id)));
    found.truncate(query.limit as usize);
    found
}
