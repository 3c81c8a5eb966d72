use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;

use super::Faults;
use crate::ports::{Ingress, Published};

/// The first port that is given away.
const FIRST_PORT: u16 = 40_000;

/// An ingress that only remembers what is published. That goes with the process that asked for it.
pub struct FakeIngress {
    faults: Arc<Faults>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    published: BTreeMap<String, u16>,
    /// Ports that somebody else has.
    taken: Vec<u16>,
    /// Why nothing can be published; empty when it can.
    refusal: String,
    violations: Vec<String>,
}

impl State {
    fn free_port(&self, wanted: u16) -> u16 {
        let free = |port: &u16| !self.taken.contains(port) && !self.published.values().any(|of| of == port);
        let wanted = Some(wanted).filter(|port| *port != 0 && free(port));
        wanted.or_else(|| (FIRST_PORT..).find(free)).expect("no test publishes this much")
    }
}

impl FakeIngress {
    pub(super) fn new(faults: Arc<Faults>) -> Self {
        Self { faults, state: Mutex::default() }
    }

    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.state.lock().expect("no holder of this lock panics"))
    }

    pub(super) fn disconnect(&self) {
        self.with(|state| state.published.clear());
    }

    /// What can be reached now, each label with its port.
    pub fn published(&self) -> BTreeMap<String, u16> {
        self.with(|state| state.published.clone())
    }

    /// Somebody else takes a port, as soon as it is free.
    pub fn take_port(&self, port: u16) {
        self.with(|state| state.taken.push(port));
    }

    /// While this is not empty, nothing can be published.
    pub fn refuse(&self, reason: &str) {
        self.with(|state| state.refusal = reason.to_owned());
    }

    /// Misuse of the port so far.
    pub fn violations(&self) -> Vec<String> {
        self.with(|state| state.violations.clone())
    }

    fn publish_once(&self, label: &str, port: u16) -> Result<u16, String> {
        self.with(|state| {
            if !state.refusal.is_empty() {
                return Err(state.refusal.clone());
            }
            let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
            if !(1..=63).contains(&label.len()) || !label.bytes().all(plain) {
                state.violations.push(format!("{label:?} is no DNS label"));
            }
            let given = match state.published.get(label) {
                Some(port) => *port,
                None => state.free_port(port),
            };
            state.published.insert(label.to_owned(), given);
            Ok(given)
        })
    }
}

#[async_trait]
impl Ingress for FakeIngress {
    async fn publish(&self, label: &str, port: u16) -> Result<Published, String> {
        if self.faults.effect().await {
            return Err("publishing failed, as this test asked for".to_owned());
        }
        let times = if self.faults.repeats() { 2 } else { 1 };
        let mut given = 0;
        for _ in 0..times {
            given = self.publish_once(label, port)?;
        }
        self.faults.effect().await;
        Ok(Published { url: format!("http://127.0.0.1:{given}"), port: given })
    }

    async fn withdraw(&self, label: &str) {
        self.faults.effect().await;
        self.with(|state| state.published.remove(label));
    }
}
