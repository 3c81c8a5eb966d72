//! What a new session may be given.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use nagaya_api::tenki::limits::{
    CPU_CORES, DEFAULT_CPU_CORES, DEFAULT_DISK_GB, DEFAULT_MEMORY_MB, DISK_GB, MEMORY_MB, NAME_CHARS_MAX,
    TAG_CHARS_MAX, TAGS_MAX, is_tag,
};
use nagaya_api::tenki::v1;

use crate::constants::{DEFAULT_CREATE_TIMEOUT, DEFAULT_TEMPLATE_SPEC_CREATE_TIMEOUT, DRIVER_KEY, WAKE_ON_VISIT_KEY};
use crate::settable::settable;
use crate::{EgressPolicy, Error, Result, wire};

/// When [`crate::Client::create`] returns.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wait {
    /// When the session is RUNNING.
    #[default]
    Ready,
    /// When its template's start command is ready as well.
    Runtime,
    /// At once.
    No,
}

/// A volume and where it is mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VolumeMount {
    pub volume_id: String,
    /// An absolute path in the sandbox.
    pub mount_path: String,
    pub read_only: bool,
}

/// Which visits from outside, to a preview or by SSH, resume a session that is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WakeOnVisit {
    /// None.
    Never,
    /// Those to a session that was paused because nobody used it.
    Idle,
    /// All.
    Always,
}

impl fmt::Display for WakeOnVisit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Never => "never",
            Self::Idle => "idle",
            Self::Always => "always",
        })
    }
}

settable! {
    /// A provider of models for OpenCode; it reaches the sandbox as environment.
    #[derive(Clone, Default)]
    pub struct OpenCodeProvider {
        pub api_key: String,
        pub base_url: String,
        pub npm: String,
    }
}

settable! {
    /// What a new session is given. The default is a sandbox of two cores, 4 GiB of memory and a disk of 5 GiB that
    /// reaches the outside, may be reached through previews, and is RUNNING when the call returns.
    #[derive(Clone)]
    pub struct CreateOptions {
        /// At most 64 characters.
        pub name: Option<String>,
        /// 1 to 16. Taken from the source when there is one, else 2.
        pub cpu_cores: Option<u32>,
        /// MiB, 128 to 65,536 and even. Taken from the source when there is one, else 4,096.
        pub memory_mb: Option<u32>,
        /// GiB, 5 to 100. Taken from the source when there is one, else 5.
        pub disk_size_gb: Option<u32>,
        /// The driver it runs on, by its name on the server; the server's choice by default.
        pub driver: Option<String>,
        /// Which visits from outside resume it while it is stopped; the server's choice by default.
        pub wake_on_visit: Option<WakeOnVisit>,
        /// Whether ports may be exposed; true by default.
        pub allow_inbound: bool,
        /// Whether it reaches the outside; true by default.
        pub allow_outbound: bool,
        /// The only destinations, when not all that the server allows.
        pub egress: Option<EgressPolicy>,
        /// How long it lives at most.
        pub max_duration: Option<Duration>,
        /// How long it may be idle until it is paused, in whole minutes; zero: for ever. The server's choice by default.
        pub idle_timeout: Option<Duration>,
        /// How long it is kept while it is paused.
        pub pause_retention: Option<Duration>,
        pub sticky: bool,
        pub metadata: BTreeMap<String, String>,
        /// At most 20 of at most 32 characters; sent trimmed and in lower case.
        pub tags: Vec<String>,
        /// Environment of every command.
        pub env: BTreeMap<String, String>,
        /// Environment while a template specification is built in the session.
        pub setup_env: BTreeMap<String, String>,
        /// The same, kept out of records and logs.
        pub setup_secrets: BTreeMap<String, String>,
        pub ssh_authorized_keys: Vec<String>,
        pub volumes: Vec<VolumeMount>,
        /// The snapshot to begin with. At most one of this, `image` and `template_spec_id`.
        pub snapshot_id: Option<String>,
        /// The registry image to begin with.
        pub image: Option<String>,
        /// The template whose specification is built in the session.
        pub template_spec_id: Option<String>,
        /// A repository that is cloned into the home directory.
        pub clone_repo_url: Option<String>,
        /// Becomes `GH_TOKEN` and `GIT_TOKEN` in the environment.
        pub github_token: Option<String>,
        pub enable_opencode: bool,
        pub opencode_provider: Option<OpenCodeProvider>,
        /// The caller's own workspace when there is none.
        pub workspace_id: Option<String>,
        pub wait: Wait,
        /// 180 s by default; two hours with a template specification.
        pub wait_timeout: Option<Duration>,
    }
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            name: None,
            cpu_cores: None,
            memory_mb: None,
            disk_size_gb: None,
            driver: None,
            wake_on_visit: None,
            allow_inbound: true,
            allow_outbound: true,
            egress: None,
            max_duration: None,
            idle_timeout: None,
            pause_retention: None,
            sticky: false,
            metadata: BTreeMap::new(),
            tags: Vec::new(),
            env: BTreeMap::new(),
            setup_env: BTreeMap::new(),
            setup_secrets: BTreeMap::new(),
            ssh_authorized_keys: Vec::new(),
            volumes: Vec::new(),
            snapshot_id: None,
            image: None,
            template_spec_id: None,
            clone_repo_url: None,
            github_token: None,
            enable_opencode: false,
            opencode_provider: None,
            workspace_id: None,
            wait: Wait::Ready,
            wait_timeout: None,
        }
    }
}

impl CreateOptions {
    pub(crate) fn time_to_wait(&self) -> Duration {
        self.wait_timeout.unwrap_or(match self.template_spec_id {
            Some(_) => DEFAULT_TEMPLATE_SPEC_CREATE_TIMEOUT,
            None => DEFAULT_CREATE_TIMEOUT,
        })
    }

    /// The request, once everything that can be judged here is right.
    pub(crate) fn request(&self) -> Result<v1::CreateSessionRequest> {
        let sources = [&self.snapshot_id, &self.image, &self.template_spec_id].into_iter().flatten().count();
        if sources > 1 {
            let problem = "a session begins with a snapshot, an image or a template specification, with one of them";
            return Err(Error::InvalidOptions(problem.into()));
        }
        // With a source its values are inherited unless the caller has others in mind.
        let size = |given: Option<u32>, default: u32| given.or((sources == 0).then_some(default)).map(wire::unsigned);
        self.check_resources()?;
        if self.name.as_deref().is_some_and(|name| name.chars().count() > NAME_CHARS_MAX) {
            return Err(Error::InvalidOptions(format!("name: at most {NAME_CHARS_MAX} characters")));
        }
        let idle_timeout_minutes = self.idle_timeout.map(|span| wire::unsigned((span.as_secs() + 30) / 60));
        Ok(v1::CreateSessionRequest {
            // Placeholders of the contract; the server knows the owner by the credential.
            owner_type: "SERVICE".into(),
            owner_id: "self".into(),
            name: self.name.clone().unwrap_or_default(),
            cpu_cores: size(self.cpu_cores, DEFAULT_CPU_CORES),
            memory_mb: size(self.memory_mb, DEFAULT_MEMORY_MB),
            disk_size_gb: size(self.disk_size_gb, DEFAULT_DISK_GB),
            allow_inbound: Some(self.allow_inbound),
            allow_outbound: Some(self.allow_outbound),
            egress: self.egress.clone().map(EgressPolicy::into_wire).into(),
            max_duration: wire::duration(self.max_duration),
            idle_timeout_minutes,
            pause_retention: wire::duration(self.pause_retention),
            sticky: self.sticky,
            metadata: self.told_metadata(),
            tags: tags(&self.tags)?,
            env: self.environment(),
            setup_env: self.setup_env.clone(),
            setup_secrets: self.setup_secrets.clone(),
            ssh_authorized_keys: self.ssh_authorized_keys.clone(),
            volumes: self.volumes.iter().cloned().map(VolumeMount::into_wire).collect(),
            snapshot_id: self.snapshot_id.clone(),
            registry_ref: self.image.clone(),
            template_spec_id: self.template_spec_id.clone(),
            clone_repo_url: self.clone_repo_url.clone().unwrap_or_default(),
            enable_opencode: self.enable_opencode,
            workspace_id: self.workspace_id.clone(),
            wait_ready: self.wait == Wait::Runtime,
            wait_for_runtime: self.wait == Wait::Runtime,
            ..Default::default()
        })
    }

    /// The contract has no fields for the driver and for what visits do.
    fn told_metadata(&self) -> BTreeMap<String, String> {
        let driver = self.driver.iter().map(|name| (DRIVER_KEY.to_owned(), name.clone()));
        let visits = self.wake_on_visit.iter().map(|visits| (WAKE_ON_VISIT_KEY.to_owned(), visits.to_string()));
        self.metadata.clone().into_iter().chain(driver).chain(visits).collect()
    }

    fn check_resources(&self) -> Result<()> {
        let given = [
            ("cpu_cores", self.cpu_cores, CPU_CORES),
            ("memory_mb", self.memory_mb, MEMORY_MB),
            ("disk_size_gb", self.disk_size_gb, DISK_GB),
        ];
        for (name, value, range) in given {
            if value.is_some_and(|value| !range.contains(&value)) {
                let problem = format!("{name} must be {} to {}", range.start(), range.end());
                return Err(Error::InvalidResources(problem));
            }
        }
        match self.memory_mb.is_some_and(|memory| memory % 2 != 0) {
            true => Err(Error::InvalidResources("memory_mb must be an even number".into())),
            false => Ok(()),
        }
    }

    fn environment(&self) -> BTreeMap<String, String> {
        let mut env = self.env.clone();
        if let Some(token) = &self.github_token {
            env.insert("GH_TOKEN".into(), token.clone());
            env.insert("GIT_TOKEN".into(), token.clone());
        }
        if let Some(provider) = &self.opencode_provider {
            env.insert("OPENCODE_API_KEY".into(), provider.api_key.clone());
            env.insert("OPENCODE_PROVIDER_BASE_URL".into(), provider.base_url.clone());
            env.insert("OPENCODE_PROVIDER_NPM".into(), provider.npm.clone());
        }
        env
    }
}

/// Tags as the server keeps them.
pub(crate) fn tags(given: &[String]) -> Result<Vec<String>> {
    let tags: Vec<String> = given.iter().map(|tag| tag.trim().to_lowercase()).collect();
    if tags.len() > TAGS_MAX {
        return Err(Error::InvalidOptions(format!("tags: at most {TAGS_MAX}")));
    }
    match tags.iter().find(|tag| !is_tag(tag)) {
        Some(bad) => Err(Error::InvalidOptions(format!(
            "tag {bad:?}: 1 to {TAG_CHARS_MAX} letters, digits and `_:.-`, beginning with a letter or digit"
        ))),
        None => Ok(tags),
    }
}

impl VolumeMount {
    pub(crate) fn into_wire(self) -> v1::VolumeMount {
        v1::VolumeMount { volume_id: self.volume_id, mount_path: self.mount_path, readonly: self.read_only }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_sent_without_a_source_and_inherited_with_one() {
        let plain = CreateOptions::default().request().expect("valid");
        assert_eq!((plain.cpu_cores, plain.memory_mb, plain.disk_size_gb), (Some(2), Some(4096), Some(5)));
        assert_eq!((plain.allow_inbound, plain.allow_outbound), (Some(true), Some(true)));
        let options = CreateOptions { snapshot_id: Some("s".into()), cpu_cores: Some(4), ..Default::default() };
        let from_snapshot = options.request().expect("valid");
        assert_eq!((from_snapshot.cpu_cores, from_snapshot.memory_mb), (Some(4), None));
    }

    #[test]
    fn what_cannot_be_is_refused_before_anything_is_sent() {
        let of = |change: fn(&mut CreateOptions)| {
            let mut options = CreateOptions::default();
            change(&mut options);
            options.request()
        };
        for change in [
            (|options| options.cpu_cores = Some(17)) as fn(&mut CreateOptions),
            |options| options.cpu_cores = Some(0),
            |options| options.memory_mb = Some(129),
            |options| options.memory_mb = Some(126),
            |options| options.disk_size_gb = Some(4),
        ] {
            assert!(matches!(of(change), Err(Error::InvalidResources(_))));
        }
        for change in [
            (|options| (options.snapshot_id, options.image) = (Some("a".into()), Some("b".into())))
                as fn(&mut CreateOptions),
            |options| options.tags = vec!["-x".into()],
            |options| options.tags = vec!["a".into(); 21],
            |options| options.name = Some("n".repeat(65)),
        ] {
            assert!(matches!(of(change), Err(Error::InvalidOptions(_))));
        }
    }

    #[test]
    fn conveniences_become_what_the_server_knows() {
        let options = CreateOptions {
            tags: vec![" Team:A ".into()],
            github_token: Some("t".into()),
            idle_timeout: Some(Duration::from_secs(100)),
            wake_on_visit: Some(WakeOnVisit::Always),
            ..Default::default()
        };
        let request = options.request().expect("valid");
        assert_eq!(request.tags, ["team:a"]);
        assert_eq!(request.env["GH_TOKEN"], "t");
        assert_eq!(request.metadata["nagaya_wake_on_visit"], "always");
        assert_eq!(request.idle_timeout_minutes, Some(2));
        let never = CreateOptions { idle_timeout: Some(Duration::ZERO), ..Default::default() };
        assert_eq!(never.request().expect("valid").idle_timeout_minutes, Some(0));
    }
}
