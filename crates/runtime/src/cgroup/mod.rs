//! Control groups of sandboxes, on cgroup v1, v2 and hybrid hosts.
//!
//! Every slot has one group with two below it: `agent`, limited in cached files only, for the first process, and
//! `commands`, with the sandbox's limits, for everything else. So a sandbox that uses up its memory
//! or its processes never takes its agent with it.
//!
//! Commands are spread over a few groups below `commands`. These share the sandbox's processor time as
//! equals, and none may have all of its processes: so one command that runs wild leaves room for the
//! next, with which it is ended.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::MountAttrFlags;
use rustix::process::{Pid, Signal};

#[cfg(test)]
mod tests;

/// Microseconds; the period over which processor time is shared out.
const CPU_PERIOD_US: u64 = 100_000;
/// The kernel takes no less.
const CPU_QUOTA_MIN_US: u64 = 1_000;
/// Groups over which a sandbox's commands are spread. Each costs some 0.1 ms when a slot is made.
const COMMAND_GROUPS: usize = 4;
/// What one group may not have of a sandbox's processes: this part of them, and at least that many.
const RESERVE_PART: u64 = 16;
const RESERVE_MIN: u64 = 8;
/// Memory of the agent and of what it has the kernel keep for the sandbox, such as cached files, beyond which that is
/// taken back.
const AGENT_MEMORY_BYTES: u64 = 256 << 20;
/// What the buffers of a sandbox's TCP and UDP sockets may take on cgroup v1, beside its memory. On v2 they are a part
/// of its memory.
const SOCKETS_PART_OF_MEMORY: u64 = 8;
const SOCKET_BUFFERS: &str = "memory.kmem.tcp.limit_in_bytes";
/// How long processes may take to be frozen: one that waits for a disk does not before it has got what it
/// waits for.
const FREEZE_MAX: Duration = Duration::from_secs(20);
const FREEZE_POLL: Duration = Duration::from_micros(50);

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("find the cgroup hierarchies: {0}")]
    Unusable(String),
    #[error("halt the sandbox's processes: one was not frozen within {} s", FREEZE_MAX.as_secs())]
    Restless,
    #[error("{step} {path}")]
    System { step: &'static str, path: String, source: io::Error },
}

fn at<T>(step: &'static str, path: &Path, result: io::Result<T>) -> Result<T, CgroupError> {
    result.map_err(|source| CgroupError::System { step, path: path.display().to_string(), source })
}

/// What a sandbox may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub cpu_millis: u32,
    pub memory_bytes: u64,
    pub processes_max: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Layout {
    /// One hierarchy; the parent group of ours.
    Unified(PathBuf),
    /// One parent group in each of the hierarchies of `cpu`, `memory`, `pids` and `freezer`.
    Split { cpu: PathBuf, memory: PathBuf, pids: PathBuf, freezer: PathBuf },
}

/// The groups of one server, all below one parent named after it.
#[derive(Debug, Clone)]
pub struct Cgroups {
    layout: Layout,
}

impl Cgroups {
    /// Finds the hierarchies in the mount table and makes the parent group `nagaya/<instance>`.
    pub fn open(instance: &str) -> Result<Self, CgroupError> {
        let table = Path::new("/proc/self/mounts");
        let mounts = at("read", table, fs::read_to_string(table))?;
        Self::open_in(&mounts, instance)
    }

    /// As [`Cgroups::open`], from the text of a mount table.
    fn open_in(mounts: &str, instance: &str) -> Result<Self, CgroupError> {
        let below = |root: &Path| root.join("nagaya").join(instance);
        let layout = match find(mounts)? {
            Layout::Unified(root) => {
                enable_controllers_at_the_top(&root)?;
                enable_controllers_in(&root.join("nagaya"))?;
                enable_controllers_in(&below(&root))?;
                Layout::Unified(below(&root))
            }
            Layout::Split { cpu, memory, pids, freezer } => {
                let make = |root: PathBuf| {
                    let group = below(&root);
                    at("create", &group, fs::create_dir_all(&group)).map(|()| group)
                };
                let memory = make(memory)?;
                // The kernel begins to count for sockets with the first group that has a limit for them, and rewrites its
                // own code for that: some 8 ms, which no sandbox shall wait for.
                let counted = OpenOptions::new().write(true).open(memory.join(SOCKET_BUFFERS));
                let _ = counted.and_then(|mut file| io::Write::write_all(&mut file, b"-1"));
                Layout::Split { cpu: make(cpu)?, memory, pids: make(pids)?, freezer: make(freezer)? }
            }
        };
        Ok(Self { layout })
    }

    /// Which hierarchy would be used, `v1` or `v2`; makes nothing.
    pub fn detect() -> Result<&'static str, CgroupError> {
        let table = Path::new("/proc/self/mounts");
        let mounts = at("read", table, fs::read_to_string(table))?;
        Ok(match find(&mounts)? {
            Layout::Unified(_) => "v2",
            Layout::Split { .. } => "v1",
        })
    }

    /// Parents in the hierarchies in which commands are told apart.
    fn spreading_parents(&self) -> Vec<&PathBuf> {
        match &self.layout {
            Layout::Unified(parent) => vec![parent],
            Layout::Split { cpu, pids, .. } => vec![cpu, pids],
        }
    }

    fn parents(&self) -> Vec<&PathBuf> {
        match &self.layout {
            Layout::Unified(parent) => vec![parent],
            Layout::Split { cpu, memory, pids, freezer } => vec![cpu, memory, pids, freezer],
        }
    }

    /// Switches the host to fast moves of processes between groups (`favordynmods`, Linux 6.0).
    /// Otherwise a move waits for a grace period of the kernel, some 8 ms, for each command. The
    /// option belongs to the whole host and makes forks a little slower; it stays on.
    pub fn favor_moves() -> io::Result<()> {
        const FAVOR: &str = "favordynmods";
        let mut options = unified_options(&fs::read_to_string("/proc/self/mountinfo")?);
        if options.iter().any(|option| option == FAVOR) {
            return Ok(());
        }
        // Options of any mount of the hierarchy are the hierarchy's, and those that a mount does not
        // name it switches off: the host's own are named again. The mount is never attached.
        options.push(FAVOR.to_owned());
        let flags: Vec<_> = options.iter().map(|option| (option.as_str(), None)).collect();
        nagaya_guest::mount::new_filesystem("cgroup2", &flags, MountAttrFlags::empty()).map(drop).map_err(Into::into)
    }

    /// The group of a slot, whether it exists or not.
    pub fn group(&self, name: &str) -> Group {
        Group { cgroups: self.clone(), name: name.to_owned() }
    }

    /// Makes the group of a slot, unless it exists.
    pub fn make_group(&self, name: &str) -> Result<Group, CgroupError> {
        for parent in self.parents() {
            let group = parent.join(name);
            if let Layout::Unified(_) = self.layout {
                enable_controllers_in(&group)?;
            }
            for part in ["agent", "commands"] {
                let path = group.join(part);
                at("create", &path, fs::create_dir_all(&path))?;
            }
        }
        for parent in self.spreading_parents() {
            let commands = parent.join(name).join(Part::Commands.name());
            if let Layout::Unified(_) = self.layout {
                enable(&commands, &["cpu", "pids"])?;
            }
            for number in 0..COMMAND_GROUPS {
                let path = commands.join(number.to_string());
                at("create", &path, fs::create_dir_all(&path))?;
            }
        }
        Ok(self.group(name))
    }

    /// Names of all groups that exist.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .parents()
            .into_iter()
            .filter_map(|parent| fs::read_dir(parent).ok())
            .flatten()
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// Removes the parent groups, once the last group is gone.
    pub fn remove(&self) {
        for parent in self.parents() {
            let _ = fs::remove_dir(parent);
            // The shared parent goes with the last server.
            let _ = parent.parent().map(fs::remove_dir);
        }
    }
}

/// The options of the v2 hierarchy, in which systemd and container engines trust.
fn unified_options(mount_information: &str) -> Vec<String> {
    let hierarchy = mount_information.lines().find_map(|line| line.split_once(" - cgroup2 ")?.1.split(' ').nth(1));
    let options = hierarchy.into_iter().flat_map(|options| options.split(','));
    options.filter(|option| !["rw", "ro", "seclabel"].contains(option)).map(str::to_owned).collect()
}

/// Chooses v2 when it offers the controllers, else v1.
fn find(mounts: &str) -> Result<Layout, CgroupError> {
    let mut split: [Option<PathBuf>; 4] = [const { None }; 4];
    let mut unified = None;
    for line in mounts.lines() {
        let mut fields = line.split(' ');
        let (Some(_), Some(path), Some(kind), Some(options)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        match kind {
            "cgroup2" => unified = Some(PathBuf::from(path)),
            "cgroup" => {
                for (controller, place) in ["cpu", "memory", "pids", "freezer"].into_iter().zip(&mut split) {
                    if options.split(',').any(|option| option == controller) {
                        *place = Some(PathBuf::from(path));
                    }
                }
            }
            _ => {}
        }
    }
    if let Some(root) = unified {
        let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        if ["cpu", "memory", "pids"].iter().all(|wanted| controllers.split_whitespace().any(|found| found == *wanted)) {
            return Ok(Layout::Unified(root));
        }
    }
    match split {
        [Some(cpu), Some(memory), Some(pids), Some(freezer)] => Ok(Layout::Split { cpu, memory, pids, freezer }),
        [Some(_), Some(_), Some(_), None] => {
            Err(CgroupError::Unusable("cgroup v1 lacks the freezer controller, with which sandboxes are paused".into()))
        }
        _ => Err(CgroupError::Unusable(
            "neither cgroup v2 nor cgroup v1 offers the cpu, memory and pids controllers".into(),
        )),
    }
}

/// As [`enable_controllers_in`]. In a container the group at the top holds the container's processes, and
/// a group with processes hands no controllers down: they move into a group of their own.
fn enable_controllers_at_the_top(top: &Path) -> Result<(), CgroupError> {
    // Whatever they start meanwhile stays behind, and is moved the next time.
    const ATTEMPTS: usize = 10;
    for _ in 0..ATTEMPTS {
        match enable_controllers(top) {
            Err(CgroupError::System { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy => {
                move_processes(top, &top.join("init"))?;
            }
            other => return other,
        }
    }
    enable_controllers(top)
}

fn move_processes(from: &Path, to: &Path) -> Result<(), CgroupError> {
    at("create", to, fs::create_dir_all(to))?;
    let list = from.join("cgroup.procs");
    for process in at("read", &list, fs::read_to_string(&list))?.lines() {
        // One that has ended meanwhile is in nobody's way.
        let _ = fs::write(to.join("cgroup.procs"), process);
    }
    Ok(())
}

fn enable_controllers_in(group: &Path) -> Result<(), CgroupError> {
    at("create", group, fs::create_dir_all(group))?;
    enable_controllers(group)
}

fn enable_controllers(group: &Path) -> Result<(), CgroupError> {
    enable(group, &["cpu", "memory", "pids"])
}

/// Hands controllers down to the groups below one.
fn enable(group: &Path, controllers: &[&str]) -> Result<(), CgroupError> {
    let control = group.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&control).unwrap_or_default();
    if controllers.iter().all(|wanted| enabled.split_whitespace().any(|found| found == *wanted)) {
        return Ok(());
    }
    at("write", &control, fs::write(&control, format!("+{}", controllers.join(" +"))))
}

/// The group of one slot.
#[derive(Debug, Clone)]
pub struct Group {
    cgroups: Cgroups,
    name: String,
}

impl Group {
    fn path(&self, parent: &Path, part: &str) -> PathBuf {
        parent.join(&self.name).join(part)
    }

    fn write(&self, parent: &Path, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path(parent, "commands").join(file);
        at("write", &path, fs::write(&path, value))
    }

    /// Sets the limits of everything but the agent.
    pub fn set_limits(&self, limits: Limits) -> Result<(), CgroupError> {
        let quota = (u64::from(limits.cpu_millis) * CPU_PERIOD_US / 1_000).max(CPU_QUOTA_MIN_US);
        let memory_bytes = limits.memory_bytes.to_string();
        let processes = limits.processes_max.to_string();
        let reserve = (limits.processes_max / RESERVE_PART).max(RESERVE_MIN).min(limits.processes_max / 2);
        let of_one = (limits.processes_max - reserve).to_string();
        match &self.cgroups.layout {
            Layout::Unified(parent) => {
                self.write(parent, "cpu.max", &format!("{quota} {CPU_PERIOD_US}"))?;
                self.write(parent, "memory.max", &memory_bytes)?;
                self.write(parent, "pids.max", &processes)?;
                // Absent where the kernel has no swap accounting; then there is nothing to limit.
                let _ = self.write(parent, "memory.swap.max", "0");
                // Beyond it the agent becomes slow and nothing is killed.
                let high = self.path(parent, "agent").join("memory.high");
                at("write", &high, fs::write(&high, AGENT_MEMORY_BYTES.to_string()))?;
                self.write_to_each(parent, "pids.max", &of_one)
            }
            Layout::Split { cpu, memory, pids, .. } => {
                self.write(cpu, "cpu.cfs_period_us", &CPU_PERIOD_US.to_string())?;
                self.write(cpu, "cpu.cfs_quota_us", &quota.to_string())?;
                // Memory and swap together may never be below memory alone, on the way either.
                let _ = self.write(memory, "memory.memsw.limit_in_bytes", "-1");
                self.write(memory, "memory.limit_in_bytes", &memory_bytes)?;
                let _ = self.write(memory, "memory.memsw.limit_in_bytes", &memory_bytes);
                // This version knows only a limit at which it kills in the end: well beyond what the agent needs.
                let limit = self.path(memory, "agent").join("memory.limit_in_bytes");
                let bytes = limits.memory_bytes.saturating_add(AGENT_MEMORY_BYTES);
                at("write", &limit, fs::write(&limit, bytes.to_string()))?;
                // What sockets hold is not counted as memory here, and not at all for sockets that are older than this
                // limit. Absent where the host was started with `cgroup.memory=nosocket`.
                let buffers = limits.memory_bytes / SOCKETS_PART_OF_MEMORY;
                let _ = self.write(memory, SOCKET_BUFFERS, &buffers.to_string());
                self.write(pids, "pids.max", &processes)?;
                self.write_to_each(pids, "pids.max", &of_one)
            }
        }
    }

    /// Writes to a file of each of the groups over which commands are spread.
    fn write_to_each(&self, parent: &Path, file: &str, value: &str) -> Result<(), CgroupError> {
        (0..COMMAND_GROUPS).try_for_each(|number| self.write(parent, &format!("{number}/{file}"), value))
    }

    /// Files through which a process puts itself into the agent's group.
    pub fn agent_files(&self) -> Result<Vec<File>, CgroupError> {
        self.cgroups.parents().into_iter().map(|parent| join_file(&self.path(parent, "agent"))).collect()
    }

    /// Files through which a process puts itself into the commands' groups.
    pub fn command_files(&self) -> Result<CommandFiles, CgroupError> {
        let (common, pids) = match &self.cgroups.layout {
            Layout::Unified(parent) => (vec![], parent),
            Layout::Split { memory, pids, freezer, .. } => (vec![memory, freezer], pids),
        };
        let spreading = self.cgroups.spreading_parents();
        let group = |number: usize| {
            let part = format!("commands/{number}");
            let join = spreading.iter().map(|parent| join_file(&self.path(parent, &part)));
            let count = self.path(pids, &part).join("pids.current");
            Ok(CommandGroup {
                join: join.collect::<Result<_, _>>()?,
                processes: at("open", &count, File::open(&count))?,
            })
        };
        Ok(CommandFiles {
            common: common
                .into_iter()
                .map(|parent| join_file(&self.path(parent, "commands")))
                .collect::<Result<_, _>>()?,
            groups: (0..COMMAND_GROUPS).map(group).collect::<Result<_, _>>()?,
        })
    }

    fn memory_parent(&self) -> &Path {
        match &self.cgroups.layout {
            Layout::Unified(parent) => parent,
            Layout::Split { memory, .. } => memory,
        }
    }

    /// A file that tells the bytes of memory in use.
    pub fn memory_usage_file(&self) -> Result<File, CgroupError> {
        self.memory_file("memory.current", "memory.usage_in_bytes")
    }

    /// A file that tells the bytes of memory that may be used.
    pub fn memory_limit_file(&self) -> Result<File, CgroupError> {
        self.memory_file("memory.max", "memory.limit_in_bytes")
    }

    /// A file with the kernel's statistics of the memory in use.
    pub fn memory_statistics_file(&self) -> Result<File, CgroupError> {
        self.memory_file("memory.stat", "memory.stat")
    }

    /// A file that tells how many processes were killed because the memory limit was reached, in a line `oom_kill NUMBER`.
    pub fn memory_events_file(&self) -> Result<File, CgroupError> {
        self.memory_file("memory.events", "memory.oom_control")
    }

    /// A file that tells the number of processes that there may be.
    pub fn processes_limit_file(&self) -> Result<File, CgroupError> {
        let (Layout::Unified(parent) | Layout::Split { pids: parent, .. }) = &self.cgroups.layout;
        let path = self.path(parent, "commands").join("pids.max");
        at("open", &path, File::open(&path))
    }

    fn memory_file(&self, unified: &str, split: &str) -> Result<File, CgroupError> {
        let name = match self.cgroups.layout {
            Layout::Unified(_) => unified,
            Layout::Split { .. } => split,
        };
        let path = self.path(self.memory_parent(), "commands").join(name);
        at("open", &path, File::open(&path))
    }

    /// How many processes the kernel has killed because the memory limit was reached.
    pub fn out_of_memory_kills(&self) -> u64 {
        let name = match self.cgroups.layout {
            Layout::Unified(_) => "memory.events",
            Layout::Split { .. } => "memory.oom_control",
        };
        fs::read_to_string(self.path(self.memory_parent(), "commands").join(name))
            .unwrap_or_default()
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
            .unwrap_or(0)
    }

    /// What everything but the agent uses, of what it may. Figures that the kernel does not give are 0.
    pub fn load(&self) -> GroupLoad {
        let mut load = GroupLoad { out_of_memory_kills: self.out_of_memory_kills(), ..GroupLoad::default() };
        let (cpu, pids) = match &self.cgroups.layout {
            Layout::Unified(parent) => (parent, parent),
            Layout::Split { cpu, pids, .. } => (cpu, pids),
        };
        let memory = self.memory_parent();
        let (used, limit, cached) = match self.cgroups.layout {
            Layout::Unified(_) => ("memory.current", "memory.max", ["inactive_file ", "active_file "]),
            Layout::Split { .. } => {
                ("memory.usage_in_bytes", "memory.limit_in_bytes", ["total_inactive_file ", "total_active_file "])
            }
        };
        let statistics = self.read(memory, "memory.stat");
        let cached: u64 = cached.iter().map(|name| figure(&statistics, name)).sum();
        load.memory_bytes = figure(&self.read(memory, used), "").saturating_sub(cached);
        load.memory_limit_bytes = figure(&self.read(memory, limit), "");
        let statistics = self.read(cpu, "cpu.stat");
        load.cpu_periods = figure(&statistics, "nr_periods ");
        load.cpu_periods_throttled = figure(&statistics, "nr_throttled ");
        load.cpu_throttled_us = match self.cgroups.layout {
            Layout::Unified(_) => figure(&statistics, "throttled_usec "),
            Layout::Split { .. } => figure(&statistics, "throttled_time ") / 1_000,
        };
        load.processes = figure(&self.read(pids, "pids.current"), "");
        load.processes_max = figure(&self.read(pids, "pids.max"), "");
        load
    }

    /// Time that each thread but the agent's has had on processors, and waited for one, microseconds; by the host's
    /// number of the thread. Of threads that have ended nothing is known.
    pub fn processor_times(&self) -> BTreeMap<u32, (u64, u64)> {
        let threads = match &self.cgroups.layout {
            Layout::Unified(parent) => self.read_all(parent, "cgroup.threads"),
            Layout::Split { memory, .. } => self.read(memory, "tasks"),
        };
        threads.lines().filter_map(processor_times).collect()
    }

    /// The contents of a file of the commands' group and of those below it. In a sandbox that an earlier server made
    /// all commands are in the former.
    fn read_all(&self, parent: &Path, file: &str) -> String {
        let each = (0..COMMAND_GROUPS).map(|number| self.read(parent, &format!("{number}/{file}")));
        each.chain([self.read(parent, file)]).collect()
    }

    /// The content of a file of the commands' group; empty where there is none.
    fn read(&self, parent: &Path, file: &str) -> String {
        fs::read_to_string(self.path(parent, "commands").join(file)).unwrap_or_default()
    }

    /// Host pids of the processes in a part.
    pub fn processes(&self, part: Part) -> Vec<i32> {
        // Every hierarchy holds the same ones; the memory controller's is always there.
        let list = match (&self.cgroups.layout, part) {
            (Layout::Unified(parent), Part::Commands) => self.read_all(parent, "cgroup.procs"),
            _ => {
                let path = self.path(self.memory_parent(), part.name()).join("cgroup.procs");
                fs::read_to_string(path).unwrap_or_default()
            }
        };
        list.lines().filter_map(|line| line.trim().parse().ok()).collect()
    }

    /// Kills whatever is in it.
    pub fn kill_all(&self) {
        self.kill(Part::Agent);
        self.kill(Part::Commands);
        // What is frozen would not end.
        let _ = self.thaw();
    }

    pub fn kill(&self, part: Part) {
        for pid in self.processes(part).into_iter().filter_map(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }

    /// Halts everything but the agent where it is, and waits until it is frozen. Blocks.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + FREEZE_MAX;
        loop {
            // Asked again each time: version 1 tells every process once, and one that is about to wait for its
            // child of `vfork` then sleeps on, while the child it waits for is frozen already.
            match &self.cgroups.layout {
                Layout::Unified(parent) => self.write(parent, "cgroup.freeze", "1")?,
                Layout::Split { freezer, .. } => self.write(freezer, "freezer.state", "FROZEN")?,
            }
            if self.is_frozen()? {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let _ = self.thaw();
                return Err(CgroupError::Restless);
            }
            std::thread::sleep(FREEZE_POLL);
        }
    }

    /// Undoes [`Group::freeze`]. Thawing a group that is not frozen changes nothing.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        match &self.cgroups.layout {
            Layout::Unified(parent) => self.write(parent, "cgroup.freeze", "0"),
            Layout::Split { freezer, .. } => self.write(freezer, "freezer.state", "THAWED"),
        }
    }

    /// Whether everything but the agent is frozen, or is about to: what counts for whoever did not ask.
    pub fn is_to_be_frozen(&self) -> Result<bool, CgroupError> {
        let (parent, file) = match &self.cgroups.layout {
            Layout::Unified(parent) => (parent, "cgroup.freeze"),
            Layout::Split { freezer, .. } => (freezer, "freezer.self_freezing"),
        };
        let path = self.path(parent, "commands").join(file);
        Ok(at("read", &path, fs::read_to_string(&path))?.trim() == "1")
    }

    /// Whether everything but the agent is frozen.
    fn is_frozen(&self) -> Result<bool, CgroupError> {
        let (parent, file, frozen) = match &self.cgroups.layout {
            Layout::Unified(parent) => (parent, "cgroup.events", "frozen 1"),
            Layout::Split { freezer, .. } => (freezer, "freezer.state", "FROZEN"),
        };
        let path = self.path(parent, "commands").join(file);
        Ok(at("read", &path, fs::read_to_string(&path))?.lines().any(|line| line == frozen))
    }

    /// Removes the group; fails with EBUSY while a process is in it.
    pub fn remove(&self) -> Result<(), CgroupError> {
        for parent in self.cgroups.parents() {
            let group = parent.join(&self.name);
            let commands = group.join("commands");
            let each = (0..COMMAND_GROUPS).map(|number| commands.join(number.to_string()));
            for path in each.chain([group.join("agent"), commands.clone(), group.clone()]) {
                match fs::remove_dir(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return at("remove", &path, Err(error)),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

fn join_file(group: &Path) -> Result<File, CgroupError> {
    let path = group.join("cgroup.procs");
    at("open", &path, OpenOptions::new().write(true).open(&path))
}

/// Files in which a process writes `0` to become a command of a sandbox.
#[derive(Debug)]
pub struct CommandFiles {
    /// For every command.
    pub common: Vec<File>,
    /// Each command goes into one of these.
    pub groups: Vec<CommandGroup>,
}

#[derive(Debug)]
pub struct CommandGroup {
    pub join: Vec<File>,
    /// Reads as the number of its processes.
    pub processes: File,
}

/// What the processes of a group use; see [`Group::load`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupLoad {
    /// Without cached files, which the kernel takes back when it needs to.
    pub memory_bytes: u64,
    pub memory_limit_bytes: u64,
    pub out_of_memory_kills: u64,
    /// Periods in which processors were used, and those in which the share was used up.
    pub cpu_periods: u64,
    pub cpu_periods_throttled: u64,
    pub cpu_throttled_us: u64,
    pub processes: u64,
    pub processes_max: u64,
}

/// The number behind a name at the beginning of a line; 0 where there is none, as behind `max`.
fn figure(text: &str, name: &str) -> u64 {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0)
}

/// Of one thread of the host.
fn processor_times(thread: &str) -> Option<(u32, (u64, u64))> {
    let id: u32 = thread.trim().parse().ok()?;
    let times = fs::read_to_string(format!("/proc/{id}/task/{id}/schedstat")).ok()?;
    let mut figures = times.split_whitespace().map_while(|figure| figure.parse::<u64>().ok());
    Some((id, (figures.next()? / 1_000, figures.next()? / 1_000)))
}

#[derive(Debug, Clone, Copy)]
pub enum Part {
    Agent,
    Commands,
}

impl Part {
    const fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Commands => "commands",
        }
    }
}
