//! What a sandbox is made with.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Egress;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What a sandbox may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Thousandths of a processor.
    pub cpu_millis: u32,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
}

/// What a sandbox gets of which nobody says anything.
impl Default for Resources {
    fn default() -> Self {
        Self::of(2, 4_096, 5)
    }
}

impl Resources {
    /// Processors, mebibytes and gibibytes: what client families count in.
    pub const fn of(cpus: u32, memory_mib: u32, disk_gib: u32) -> Self {
        Self { cpu_millis: cpus * 1_000, memory_bytes: memory_mib as u64 * MIB, disk_bytes: disk_gib as u64 * GIB }
    }

    /// Whole processors, the last one begun.
    pub const fn cpus(&self) -> u32 {
        self.cpu_millis.div_ceil(1_000)
    }

    pub const fn memory_mib(&self) -> u64 {
        self.memory_bytes.div_ceil(MIB)
    }

    pub const fn disk_gib(&self) -> u64 {
        self.disk_bytes.div_ceil(GIB)
    }
}

/// What a sandbox is made with, and what those that are made from it inherit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "RecordedMachine")]
pub struct Machine {
    pub resources: Resources,
    /// The image under its disk. What was written to a disk means nothing over another one.
    pub root: ImageDigest,
    /// What the image was called when it was asked for; empty where nobody asked for one.
    #[serde(default)]
    pub image: String,
    /// False: no packet leaves the sandbox.
    pub outbound: bool,
    /// The only destinations outside that it reaches; `None` is all that the server lets sandboxes reach.
    pub egress: Option<Egress>,
}

/// As records have it: those of servers that knew one image and whole units, too.
#[derive(Deserialize)]
struct RecordedMachine {
    resources: Option<Resources>,
    #[serde(default)]
    root: ImageDigest,
    #[serde(default)]
    image: String,
    cpu_cores: Option<u32>,
    memory_mb: Option<u32>,
    disk_gb: Option<u32>,
    outbound: bool,
    #[serde(default)]
    egress: Option<Egress>,
}

impl From<RecordedMachine> for Machine {
    fn from(recorded: RecordedMachine) -> Self {
        let RecordedMachine { resources, root, image, cpu_cores, memory_mb, disk_gb, outbound, egress } = recorded;
        let units =
            || Resources::of(cpu_cores.unwrap_or_default(), memory_mb.unwrap_or_default(), disk_gb.unwrap_or_default());
        Self { resources: resources.unwrap_or_else(units), root, image, outbound, egress }
    }
}

/// Names the content of a root file system: `sha256:…` of an OCI image, `host:…` of what this host's own programs make.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ImageDigest(String);

impl ImageDigest {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// In records of servers that knew one image only. The engine's start fills it in.
    pub fn is_unknown(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Display for ImageDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A root file system that sandboxes can stand on, as this host has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootImage {
    pub digest: ImageDigest,
    /// What lies over each other, the uppermost first. Layers of one place are one stack; see [`Layer::place`].
    pub layers: Vec<Layer>,
    pub user: ImageUser,
    /// Where commands start that do not say where; absolute. `None`: in the user's home.
    pub workdir: Option<String>,
    /// What commands have in their environment unless they or their session say otherwise.
    pub env: BTreeMap<String, String>,
}

/// Who commands run as that say nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageUser {
    pub name: String,
    /// As the sandbox counts them, below 65,536.
    pub uid: u32,
    pub gid: u32,
    /// Absolute.
    pub home: String,
}

impl Default for ImageUser {
    /// Of an image that names nobody.
    fn default() -> Self {
        Self { name: "root".to_owned(), uid: 0, gid: 0, home: "/root".to_owned() }
    }
}

/// A directory of the host that a root file system is made of. Only ever read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub source: PathBuf,
    /// The directory of the root that it is the content of, such as `usr`; empty is the root itself. Images have layers
    /// of the whole root; only the host's own programs are directories below it.
    pub place: String,
}

/// Where a new sandbox's disk comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOrigin {
    /// An empty one.
    Fresh,
    /// This image becomes its disk, and is grown to the size that is asked for.
    Image(nagaya_api::ids::DiskImageId),
    /// The disk that the stopped sandbox has.
    Kept,
}

/// All that a driver is told of a sandbox that it is to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxSpec {
    pub resources: Resources,
    pub root: RootImage,
    pub disk: DiskOrigin,
    /// Processes and memory to go on with, as `checkpoint` wrote them; `None` starts anew.
    pub memory: Option<PathBuf>,
    pub outbound: bool,
    pub egress: Option<Egress>,
}

/// What a driver promises of its sandboxes, and what it can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    pub isolation: Isolation,
    /// Processes and memory can be written down, and go on from that.
    pub memory_checkpoint: bool,
    /// Resources can be changed while the sandbox runs.
    pub live_resize: bool,
    /// Container engines run inside.
    pub nested_containers: bool,
}

/// What stands between a sandbox and the host's kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    SharedKernel,
    UserSpaceKernel,
    HardwareVirtualisation,
}

impl Isolation {
    pub const fn name(self) -> &'static str {
        match self {
            Self::SharedKernel => "shared kernel",
            Self::UserSpaceKernel => "user-space kernel",
            Self::HardwareVirtualisation => "hardware virtualisation",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_of_earlier_records_are_read() {
        let old = r#"{"cpu_cores":2,"memory_mb":4096,"disk_gb":5,"outbound":true}"#;
        let machine: Machine = serde_json::from_str(old).expect("an old record");
        assert_eq!(machine.resources, Resources { cpu_millis: 2_000, memory_bytes: 4 << 30, disk_bytes: 5 << 30 });
        assert!(machine.root.is_unknown() && machine.outbound && machine.egress.is_none());
        let again: Machine = serde_json::from_str(&serde_json::to_string(&machine).unwrap()).unwrap();
        assert_eq!(again, machine);
    }

    #[test]
    fn a_unit_that_was_begun_counts() {
        let some = Resources { cpu_millis: 500, memory_bytes: (1 << 20) + 1, disk_bytes: 1 };
        assert_eq!((some.cpus(), some.memory_mib(), some.disk_gib()), (1, 2, 1));
        assert_eq!(Resources::of(2, 128, 5).disk_bytes, 5 << 30);
    }
}
