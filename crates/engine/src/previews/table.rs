//! The previews of the server in memory.

use std::collections::BTreeMap;
use std::sync::Mutex;

use nagaya_api::ids::{PreviewId, SessionId};

use crate::model::{Preview, UnixMs};

/// All previews of the server.
#[derive(Default)]
pub(super) struct PreviewTable(Mutex<Table>);

#[derive(Default)]
struct Table {
    known: BTreeMap<PreviewId, Known>,
    by_label: BTreeMap<String, PreviewId>,
}

#[derive(Clone)]
pub(super) struct Known {
    /// As last committed.
    preview: Preview,
    /// Empty until the ingress has published it.
    url: String,
    /// The last visit that somebody saw to being written down.
    noted_at: UnixMs,
}

impl PreviewTable {
    /// What was recorded before the start.
    pub(super) fn load(previews: &[Preview]) -> Self {
        let table = Self::default();
        previews.iter().for_each(|preview| table.put(preview.clone()));
        table
    }

    fn with<T>(&self, action: impl FnOnce(&mut Table) -> T) -> T {
        action(&mut self.0.lock().expect("no holder of this lock panics"))
    }

    pub(super) fn get(&self, id: PreviewId) -> Option<Preview> {
        self.with(|table| table.known.get(&id).map(|known| known.preview.clone()))
    }

    pub(super) fn labelled(&self, label: &str) -> Option<Preview> {
        self.with(|table| table.by_label.get(label).and_then(|id| table.known.get(id)).map(|of| of.preview.clone()))
    }

    pub(super) fn url(&self, id: PreviewId) -> String {
        self.with(|table| table.known.get(&id).map(|known| known.url.clone()).unwrap_or_default())
    }

    pub(super) fn filter(&self, wanted: impl Fn(&Preview) -> bool) -> Vec<Preview> {
        self.with(|table| table.known.values().map(|of| &of.preview).filter(|of| wanted(of)).cloned().collect())
    }

    pub(super) fn bound_to(&self, session_id: SessionId) -> Vec<Preview> {
        self.filter(|of| of.binding.is_some_and(|binding| binding.session_id == session_id))
    }

    pub(super) fn put(&self, preview: Preview) {
        self.with(|table| {
            table.by_label.insert(preview.label.clone(), preview.id);
            let accessed_at = preview.last_accessed_at.unwrap_or_default();
            let (url, noted_at) = match table.known.get(&preview.id) {
                Some(known) => (known.url.clone(), known.noted_at.max(accessed_at)),
                None => (String::new(), accessed_at),
            };
            table.known.insert(preview.id, Known { preview, url, noted_at });
        });
    }

    /// Whether a visit now is to be written down, because the last one that was is this long ago. True once for each.
    pub(super) fn note_visit(&self, id: PreviewId, now: UnixMs, every_ms: u64) -> bool {
        self.with(|table| {
            let known = table.known.get_mut(&id).filter(|known| now.saturating_sub(known.noted_at) >= every_ms);
            known.map(|known| known.noted_at = now).is_some()
        })
    }

    pub(super) fn set_url(&self, id: PreviewId, url: String) {
        self.with(|table| table.known.get_mut(&id).map(|known| known.url = url));
    }

    pub(super) fn remove(&self, preview: &Preview) {
        self.with(|table| {
            table.known.remove(&preview.id);
            table.by_label.remove(&preview.label);
        });
    }
}
