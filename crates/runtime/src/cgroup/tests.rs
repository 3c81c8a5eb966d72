use super::*;

/// A cgroup v2 tree made of plain files.
fn unified() -> (tempfile::TempDir, String) {
    let root = tempfile::tempdir().expect("a directory");
    fs::write(root.path().join("cgroup.controllers"), "cpuset cpu io memory pids\n").expect("write");
    let mounts = format!("proc /proc proc rw 0 0\ncgroup2 {} cgroup2 rw,nosuid 0 0\n", root.path().display());
    (root, mounts)
}

fn split() -> (tempfile::TempDir, String) {
    let root = tempfile::tempdir().expect("a directory");
    let path = root.path().display();
    fs::create_dir(root.path().join("unified")).expect("make");
    fs::write(root.path().join("unified/cgroup.controllers"), "hugetlb\n").expect("write");
    let mounts = format!(
        "cgroup {path}/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n\
         cgroup {path}/memory cgroup rw,memory 0 0\n\
         cgroup {path}/pids cgroup rw,pids 0 0\n\
         cgroup {path}/freezer cgroup rw,freezer 0 0\n\
         cgroup {path}/systemd cgroup rw,name=systemd 0 0\n\
         cgroup2 {path}/unified cgroup2 rw 0 0\n"
    );
    (root, mounts)
}

const LIMITS: Limits = Limits { cpu_millis: 2_000, memory_bytes: 512 << 20, processes_max: 100 };

fn read(root: &tempfile::TempDir, path: &str) -> String {
    fs::read_to_string(root.path().join(path)).unwrap_or_else(|error| panic!("{path}: {error}")).trim().to_owned()
}

#[test]
fn on_v2_limits_are_on_the_commands_and_controllers_are_handed_down() {
    let (root, mounts) = unified();
    let cgroups = Cgroups::open_in(&mounts, "ab12").expect("open");
    let group = cgroups.make_group("slot-3").expect("a group");
    group.set_limits(LIMITS).expect("limits");
    let commands = "nagaya/ab12/slot-3/commands";
    assert_eq!(read(&root, &format!("{commands}/cpu.max")), "200000 100000");
    assert_eq!(read(&root, &format!("{commands}/memory.max")), (512 << 20).to_string());
    assert_eq!(read(&root, &format!("{commands}/memory.swap.max")), "0");
    assert_eq!(read(&root, &format!("{commands}/pids.max")), "100");
    for parent in ["", "nagaya/", "nagaya/ab12/", "nagaya/ab12/slot-3/"] {
        assert_eq!(read(&root, &format!("{parent}cgroup.subtree_control")), "+cpu +memory +pids", "{parent}");
    }
    assert!(!root.path().join("nagaya/ab12/slot-3/agent/memory.max").exists(), "nothing kills the agent");
    assert_eq!(read(&root, "nagaya/ab12/slot-3/agent/memory.high"), AGENT_MEMORY_BYTES.to_string());
    assert_eq!(read(&root, &format!("{commands}/cgroup.subtree_control")), "+cpu +pids");
    assert_eq!(cgroups.names(), ["slot-3"]);
}

#[test]
fn on_v1_each_limit_goes_to_its_hierarchy() {
    let (root, mounts) = split();
    // The kernel's files are there with the group.
    let parent = root.path().join("memory/nagaya/ab12");
    fs::create_dir_all(&parent).expect("make");
    fs::write(parent.join("memory.kmem.tcp.limit_in_bytes"), "").expect("write");
    let cgroups = Cgroups::open_in(&mounts, "ab12").expect("open");
    let group = cgroups.make_group("slot-0").expect("a group");
    group.set_limits(LIMITS).expect("limits");
    let commands = "nagaya/ab12/slot-0/commands";
    assert_eq!(read(&root, &format!("cpu,cpuacct/{commands}/cpu.cfs_quota_us")), "200000");
    assert_eq!(read(&root, &format!("memory/{commands}/memory.limit_in_bytes")), (512 << 20).to_string());
    assert_eq!(read(&root, &format!("memory/{commands}/memory.memsw.limit_in_bytes")), (512 << 20).to_string());
    assert_eq!(read(&root, &format!("memory/{commands}/memory.kmem.tcp.limit_in_bytes")), (64 << 20).to_string());
    assert_eq!(read(&root, "memory/nagaya/ab12/memory.kmem.tcp.limit_in_bytes"), "-1", "counting begins here");
    assert_eq!(read(&root, &format!("pids/{commands}/pids.max")), "100");
    let agent = "memory/nagaya/ab12/slot-0/agent/memory.limit_in_bytes";
    assert_eq!(read(&root, agent), ((512 << 20) + AGENT_MEMORY_BYTES).to_string());
    assert!(!root.path().join("systemd/nagaya").exists());
}

#[test]
fn commands_are_spread_over_groups_none_of_which_may_have_all_processes() {
    let v1 = [("memory/X", false), ("freezer/X", false), ("cpu,cpuacct/X", true), ("pids/X", true)];
    for (tree, pids, places) in [(unified(), "X", &[("X", true)][..]), (split(), "pids/X", &v1[..])] {
        let (root, mounts) = tree;
        let place = |path: &str| root.path().join(path.replace('X', "nagaya/x/slot-0/commands"));
        let group = Cgroups::open_in(&mounts, "x").expect("open").make_group("slot-0").expect("a group");
        for (path, _) in places {
            fs::write(place(path).join("cgroup.procs"), "").expect("write");
        }
        for number in 0..COMMAND_GROUPS {
            for (path, spread) in places {
                assert_eq!(place(&format!("{path}/{number}")).exists(), *spread, "{path}");
                if *spread {
                    fs::write(place(&format!("{path}/{number}/cgroup.procs")), "").expect("write");
                }
            }
            fs::write(place(&format!("{pids}/{number}/pids.current")), "7\n").expect("write");
        }
        let files = group.command_files().expect("files");
        let joined = files.common.len() + files.groups[0].join.len();
        assert_eq!((files.groups.len(), joined), (COMMAND_GROUPS, places.len()), "each hierarchy is joined once");

        for (processes_max, of_one) in [(1_024, 960), (100, 92), (10, 5)] {
            group.set_limits(Limits { processes_max, ..LIMITS }).expect("limits");
            let limit = |path: String| fs::read_to_string(place(&path)).expect("a limit");
            assert_eq!(limit(format!("{pids}/pids.max")), processes_max.to_string());
            for number in 0..COMMAND_GROUPS {
                assert_eq!(limit(format!("{pids}/{number}/pids.max")), of_one.to_string());
            }
        }
    }
}

#[test]
fn out_of_memory_kills_are_read_from_both_versions() {
    for (tree, file) in [
        (unified(), "nagaya/x/slot-0/commands/memory.events"),
        (split(), "memory/nagaya/x/slot-0/commands/memory.oom_control"),
    ] {
        let (root, mounts) = tree;
        let group = Cgroups::open_in(&mounts, "x").expect("open").make_group("slot-0").expect("a group");
        assert_eq!(group.out_of_memory_kills(), 0);
        fs::write(root.path().join(file), "oom_kill_disable 0\nunder_oom 0\noom 9\noom_kill 4\n").expect("write");
        assert_eq!(group.out_of_memory_kills(), 4);
    }
}

#[test]
fn processes_are_listed_by_part() {
    let (root, mounts) = unified();
    let group = Cgroups::open_in(&mounts, "x").expect("open").make_group("slot-0").expect("a group");
    fs::write(root.path().join("nagaya/x/slot-0/agent/cgroup.procs"), "41\n").expect("write");
    fs::write(root.path().join("nagaya/x/slot-0/commands/0/cgroup.procs"), "42\n43\n").expect("write");
    fs::write(root.path().join("nagaya/x/slot-0/commands/3/cgroup.procs"), "44\n").expect("write");
    assert_eq!(group.processes(Part::Agent), [41]);
    assert_eq!(group.processes(Part::Commands), [42, 43, 44]);
}

#[test]
fn a_removed_group_is_gone_and_removing_it_again_is_no_error() {
    let (root, mounts) = split();
    let cgroups = Cgroups::open_in(&mounts, "x").expect("open");
    let group = cgroups.make_group("slot-0").expect("a group");
    group.remove().expect("remove");
    group.remove().expect("remove again");
    assert!(cgroups.names().is_empty());
    cgroups.remove();
    assert!(!root.path().join("memory/nagaya").exists());
}

#[test]
fn commands_are_frozen_and_thawed_on_both_versions_and_the_agent_is_not() {
    let cases = [
        (
            unified(),
            "",
            "cgroup.events",
            "cgroup.freeze",
            ["populated 1\nfrozen 1\n", "1", "populated 1\nfrozen 0\n", "0"],
        ),
        (split(), "freezer/", "freezer.state", "freezer.state", ["FROZEN", "FROZEN", "THAWED\n", "THAWED"]),
    ];
    for ((root, mounts), hierarchy, shown, asked, [frozen, freeze, thawed, thaw]) in cases {
        let group = Cgroups::open_in(&mounts, "x").expect("open").make_group("slot-0").expect("a group");
        let commands = format!("{hierarchy}nagaya/x/slot-0/commands");
        let shown = root.path().join(&commands).join(shown);
        fs::write(&shown, thawed).expect("write");
        assert!(!group.is_frozen().expect("look"));
        fs::write(&shown, frozen).expect("write");
        group.freeze().expect("freeze");
        assert!(group.is_frozen().expect("look"));
        assert_eq!(read(&root, &format!("{commands}/{asked}")), freeze);
        group.thaw().expect("thaw");
        assert_eq!(read(&root, &format!("{commands}/{asked}")), thaw);
        assert!(!root.path().join(format!("{hierarchy}nagaya/x/slot-0/agent")).join(asked).exists());
    }
}

#[test]
fn a_group_that_is_being_frozen_is_not_frozen_but_is_to_be() {
    for ((root, mounts), hierarchy, shown, asked, state) in [
        (unified(), "", "cgroup.events", "cgroup.freeze", "populated 1\nfrozen 0\n"),
        (split(), "freezer/", "freezer.state", "freezer.self_freezing", "FREEZING\n"),
    ] {
        let group = Cgroups::open_in(&mounts, "x").expect("open").make_group("slot-0").expect("a group");
        let commands = root.path().join(hierarchy).join("nagaya/x/slot-0/commands");
        fs::write(commands.join(shown), state).expect("write");
        fs::write(commands.join(asked), "0\n").expect("write");
        assert!(!group.is_to_be_frozen().expect("look"));
        fs::write(commands.join(asked), "1\n").expect("write");
        assert!(group.is_to_be_frozen().expect("look"));
        assert!(!group.is_frozen().expect("look"));
    }
}

#[test]
fn a_v1_host_without_the_freezer_is_refused_with_its_name() {
    let (_root, mounts) = split();
    let without = mounts.replace("freezer", "hugetlb");
    let error = Cgroups::open_in(&without, "x").expect_err("nothing to freeze with").to_string();
    assert!(error.contains("freezer"), "{error}");
}

#[test]
fn a_host_without_the_controllers_is_refused_with_their_names() {
    let error = Cgroups::open_in("proc /proc proc rw 0 0\n", "x").expect_err("nothing to open").to_string();
    assert!(error.contains("cpu, memory and pids"), "{error}");
}

#[test]
fn options_of_the_hierarchy_are_told_from_those_of_a_mount() {
    let mounts = "24 1 0:22 / /proc rw,nosuid - proc proc rw\n\
                  35 24 0:30 / /sys/fs/cgroup rw,nosuid,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n";
    assert_eq!(unified_options(mounts), ["nsdelegate", "memory_recursiveprot"]);
    assert!(unified_options("24 1 0:22 / /proc rw - proc proc rw\n").is_empty());
}

#[test]
fn what_a_group_uses_is_read_from_both_versions() {
    let expected = GroupLoad {
        memory_bytes: 700,
        memory_limit_bytes: 1_000,
        out_of_memory_kills: 2,
        cpu_periods: 40,
        cpu_periods_throttled: 4,
        cpu_throttled_us: 1_500,
        processes: 7,
        processes_max: 100,
    };
    let v2 = [
        ("memory.current", "1000\n"),
        ("memory.max", "1000\n"),
        ("memory.stat", "anon 5\ninactive_anon 9\nactive_file 100\ninactive_file 200\n"),
        ("memory.events", "oom 3\noom_kill 2\noom_group_kill 1\n"),
        ("cpu.stat", "usage_usec 9\nnr_periods 40\nnr_throttled 4\nthrottled_usec 1500\n"),
        ("pids.current", "7\n"),
        ("pids.max", "100\n"),
    ];
    let v1 = [
        ("memory/X/memory.usage_in_bytes", "1000\n"),
        ("memory/X/memory.limit_in_bytes", "1000\n"),
        ("memory/X/memory.stat", "active_file 1\ntotal_active_file 100\ntotal_inactive_file 200\n"),
        ("memory/X/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
        ("cpu,cpuacct/X/cpu.stat", "nr_periods 40\nnr_throttled 4\nthrottled_time 1500000\n"),
        ("pids/X/pids.current", "7\n"),
        ("pids/X/pids.max", "100\n"),
    ];
    let v2 = v2.map(|(file, text)| (format!("X/{file}"), text));
    let v1 = v1.map(|(file, text)| (file.to_owned(), text));
    for (tree, files) in [(unified(), v2), (split(), v1)] {
        let (root, mounts) = tree;
        let group = Cgroups::open_in(&mounts, "x").expect("open").make_group("slot-0").expect("a group");
        assert_eq!(group.load(), GroupLoad::default(), "nothing is known yet");
        for (file, text) in files {
            fs::write(root.path().join(file.replace('X', "nagaya/x/slot-0/commands")), text).expect("write");
        }
        assert_eq!(group.load(), expected);
    }
}

#[test]
fn processor_times_are_those_of_the_threads_in_the_group() {
    let (root, mounts) = unified();
    let group = Cgroups::open_in(&mounts, "x").expect("open").make_group("slot-0").expect("a group");
    assert!(group.processor_times().is_empty());
    let list = root.path().join("nagaya/x/slot-0/commands/1/cgroup.threads");
    fs::write(&list, format!("{}\n0\n../1\n", std::process::id())).expect("write");
    let times = group.processor_times();
    let (thread, (ran, _)) = times.first_key_value().expect("the first thread of this process");
    assert!(times.len() == 1 && *thread == std::process::id() && *ran > 0, "{times:?}");
}
