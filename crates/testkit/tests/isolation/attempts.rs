//! Attempts that a payload alone can make and judge.

use nagaya_testkit::{NotRun, Outcome, Suite};

use super::host::PORT;
use super::world::{Verdict, World, inside, on_host};

const KERNEL: &str = include_str!("payloads/kernel.py");
const NAMESPACES: &str = include_str!("payloads/namespaces.py");
const PROCESSES: &str = include_str!("payloads/processes.py");
const FILES: &str = include_str!("payloads/files.py");
const NETWORK: &str = include_str!("payloads/network.py");

/// Namespaces that keep what the control does away from the host.
const APART: &[&str] = &["unshare", "--mount", "--uts", "--ipc", "--"];

/// Where the same payload must get through.
enum Control {
    /// On the host, as root, behind this command.
    Host(&'static [&'static str]),
    /// In the attacking sandbox, aimed at something of its own.
    Own,
    /// In the sandbox that is being attacked.
    Victim,
}

struct Attempt {
    name: &'static str,
    module: &'static str,
    arguments: fn(&World) -> Vec<String>,
    control: Control,
    /// Arguments of the control, where they differ.
    control_arguments: Option<fn(&World) -> Vec<String>>,
    from: Source,
}

#[derive(Clone, Copy, PartialEq)]
enum Source {
    Attacker,
    /// The sandbox without outbound access.
    Isolated,
}

const fn attempt(name: &'static str, module: &'static str, control: Control) -> Attempt {
    Attempt { name, module, arguments: |_| Vec::new(), control, control_arguments: None, from: Source::Attacker }
}

impl Attempt {
    const fn with(mut self, arguments: fn(&World) -> Vec<String>) -> Self {
        self.arguments = arguments;
        self
    }

    const fn control_with(mut self, arguments: fn(&World) -> Vec<String>) -> Self {
        self.control_arguments = Some(arguments);
        self
    }

    const fn from(mut self, from: Source) -> Self {
        self.from = from;
        self
    }

    /// The payload's function: the name, up to a `__` that tells attempts with one payload apart.
    fn function(&self) -> &str {
        self.name.split("__").next().unwrap_or(self.name)
    }
}

fn own(_: &World) -> Vec<String> {
    vec!["own".into()]
}

/// The port, then addresses.
fn at(addresses: impl IntoIterator<Item = String>) -> Vec<String> {
    std::iter::once(PORT.to_owned()).chain(addresses).collect()
}

const HOST: Control = Control::Host(&["env"]);

static ATTEMPTS: &[Attempt] = &[
    // Files.
    attempt("markers__files_of_the_host", FILES, Control::Own)
        .with(|world| vec![world.markers.name.clone()])
        .control_with(|world| vec![world.own_marker.clone()]),
    attempt("markers__files_of_another_sandbox", FILES, Control::Victim)
        .with(|world| vec![world.victim_secret.clone()]),
    attempt("paths__files_of_the_host_by_their_paths_and_through_proc", FILES, Control::Own)
        .with(|world| world.markers.texts())
        .control_with(|world| vec![format!("/srv/{}", world.own_marker)]),
    attempt("paths__identity_and_accounts_of_the_host", FILES, HOST).with(|_| {
        [
            "/etc/machine-id",
            "/etc/ssh/sshd_config",
            "/etc/ssh/ssh_host_ed25519_key",
            "/root/.bashrc",
            "/root/.profile",
            "/boot",
        ]
        .map(str::to_owned)
        .to_vec()
    }),
    attempt("writes_to_proc", FILES, HOST),
    attempt("writes_to_sys", FILES, HOST),
    attempt("secrets_of_the_kernel", FILES, HOST),
    attempt("facts_of_the_host", FILES, HOST)
        .with(|_| vec![std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned()]),
    attempt("control_groups__escape_by_release_agent_or_procs", FILES, HOST)
        .with(|_| vec!["/".into()])
        .control_with(|_| vec!["/sys/fs/cgroup".into()]),
    attempt("text_in_the_mount_table__names_of_the_host", FILES, Control::Own)
        .with(|world| vec![world.server.data_dir().display().to_string()])
        .control_with(|_| vec!["/proc".into()]),
    // Processes.
    attempt("memory_of_process_1", PROCESSES, Control::Own).control_with(own),
    attempt("secrets_of_process_1", PROCESSES, Control::Own).control_with(own),
    attempt("descriptors_of_process_1", PROCESSES, Control::Own).control_with(own),
    attempt("descriptor_taken_from_process_1", PROCESSES, Control::Own).control_with(own),
    attempt("trace_process_1", PROCESSES, Control::Own).control_with(own),
    attempt("read_process_1", PROCESSES, Control::Own).control_with(own),
    attempt("kill_process_1", PROCESSES, Control::Own).control_with(own),
    attempt("limits_of_process_1", PROCESSES, Control::Own).control_with(own),
    attempt("files_of_process_1_by_its_threads", PROCESSES, Control::Own).control_with(own),
    attempt("less_likely_to_be_killed", PROCESSES, Control::Own)
        .with(|_| vec!["-1".into()])
        .control_with(|_| vec!["900".into()]),
    attempt("descriptors_that_came_along", PROCESSES, Control::Own).control_with(own),
    attempt("processes_of_others__of_another_sandbox", PROCESSES, Control::Victim)
        .with(|world| vec![world.victim_secret.clone()]),
    attempt("processes_of_others__of_the_host", PROCESSES, HOST)
        .with(|world| vec![world.server.data_dir().display().to_string()]),
    attempt("terminal_input", PROCESSES, HOST),
    // Namespaces, mounts, devices.
    attempt("unshare", NAMESPACES, HOST),
    attempt("clone", NAMESPACES, HOST),
    attempt("clone3", NAMESPACES, HOST),
    attempt("setns", NAMESPACES, HOST),
    attempt("id_maps", NAMESPACES, HOST).control_with(own),
    attempt("mount_new_file_systems", NAMESPACES, Control::Host(APART)),
    attempt("mount_what_is_there_elsewhere", NAMESPACES, Control::Host(APART)),
    attempt("mount_with_the_new_calls", NAMESPACES, Control::Host(APART)),
    attempt("remount_for_writing", NAMESPACES, Control::Host(APART)),
    attempt("umount_what_covers", NAMESPACES, Control::Host(APART)),
    attempt("pivot_root", NAMESPACES, Control::Host(APART)),
    attempt("host_name", NAMESPACES, Control::Host(APART)),
    attempt("device_nodes", NAMESPACES, HOST),
    attempt("devices_that_are_there", NAMESPACES, HOST)
        .with(|_| vec!["/".into()])
        .control_with(|_| vec!["/dev".into()]),
    attempt("open_by_handle", NAMESPACES, HOST),
    attempt("chroot_twice__to_the_hosts_root", NAMESPACES, Control::Own)
        .with(|world| vec![world.markers.texts()[0].clone()])
        .control_with(|world| vec![format!("/srv/{}", world.own_marker)]),
    // The kernel.
    attempt("kernel_module_init_module", KERNEL, HOST),
    attempt("kernel_module_finit_module", KERNEL, HOST),
    attempt("kernel_module_delete_module", KERNEL, HOST),
    attempt("kexec_load", KERNEL, HOST),
    attempt("bpf_program", KERNEL, HOST),
    attempt("bpf_map", KERNEL, HOST),
    attempt("perf_event_open", KERNEL, HOST),
    attempt("userfaultfd", KERNEL, HOST),
    attempt("io_uring", KERNEL, HOST),
    attempt("keyring_add_key", KERNEL, HOST),
    attempt("keyring_of_the_user", KERNEL, HOST),
    attempt("keyring_request_key", KERNEL, HOST),
    attempt("reboot_of_the_host", KERNEL, HOST),
    attempt("clock_change", KERNEL, HOST),
    attempt("kernel_log", KERNEL, HOST),
    attempt("swap_and_quota", KERNEL, HOST),
    attempt("io_ports", KERNEL, HOST),
    attempt("calls_of_32_bit_programs", KERNEL, HOST),
    attempt("calls_of_the_x32_interface", KERNEL, HOST),
    attempt("real_time_priority", KERNEL, HOST),
    attempt("capabilities_of_the_host", KERNEL, HOST),
    // The network.
    attempt("reach__another_sandbox", NETWORK, Control::Victim).with(|world| at([world.victim_address.clone()])),
    attempt("reach__the_host_and_its_loopback", NETWORK, HOST).with(|world| at(world.host_addresses())),
    attempt("reach__metadata_and_private_networks", NETWORK, HOST).with(|world| at(world.outside.forbidden.clone())),
    attempt("reach__anything_without_outbound_access", NETWORK, HOST)
        .with(|world| {
            let all = world.outside.forbidden.iter().cloned().chain(world.host_addresses());
            at(all.chain([world.outside.public.clone(), world.victim_address.clone()]))
        })
        .from(Source::Isolated),
    attempt("reach_by_tcp__the_servers_own_port", NETWORK, HOST)
        .with(|world| {
            let port = world.server.endpoint().rsplit(':').next().unwrap_or_default().to_owned();
            std::iter::once(port).chain(world.host_addresses()).collect()
        })
        // The server does not speak first, so on the host it is enough to be connected.
        .control_with(|world| vec![PORT.into(), world.gateway.clone()]),
    attempt("ask_a_name_server__of_a_private_network", NETWORK, HOST).with(|world| world.outside.forbidden.clone()),
    attempt("raw_sockets", NETWORK, HOST),
    attempt("packet_sockets", NETWORK, HOST),
    attempt("vsock", NETWORK, HOST),
    attempt("kernel_crypto", NETWORK, HOST),
    attempt("own_address", NETWORK, Control::Host(&["unshare", "--net", "--"])),
    attempt("foreign_source_address", NETWORK, HOST)
        .with(|world| vec![PORT.into(), world.outside.public.clone(), "10.9.8.7".into()]),
    attempt("packet_filter", NETWORK, HOST),
    attempt("abstract_socket__of_the_host", NETWORK, HOST).with(|world| vec![world.abstract_name.clone()]),
    attempt("sockets_of_the_host", NETWORK, HOST).with(|world| vec![world.abstract_name.clone()]),
    attempt("take_a_descriptor__of_another_sandbox", NETWORK, Control::Victim)
        .with(|world| vec![world.victim_secret.clone()]),
    attempt("shared_memory_of_the_host", NETWORK, HOST).with(|world| vec![world.shared_memory_key.clone()]),
];

pub fn names() -> impl Iterator<Item = &'static str> {
    ATTEMPTS.iter().map(|attempt| attempt.name)
}

pub async fn run(suite: &mut Suite, world: &World) {
    for attempt in ATTEMPTS {
        suite.case(attempt.name, make(attempt, world)).await;
    }
    suite.case("reach__the_public_internet_is_possible_with_outbound_access", reaches_the_public_internet(world)).await;
}

async fn make(attempt: &Attempt, world: &World) -> Outcome {
    let program = super::world::program(attempt.module, attempt.function());
    let arguments = (attempt.arguments)(world);
    let sandbox = if attempt.from == Source::Isolated { &world.isolated } else { &world.attacker };
    for privileged in [false, true] {
        let user = if privileged { "root" } else { "tenki" };
        match inside(sandbox, &program, &arguments, privileged).await {
            Verdict::Reached(what) => panic!("{user} got through: {what}"),
            Verdict::Broken(details) => panic!("the payload came to no verdict as {user}: {details}"),
            Verdict::Refused(_) | Verdict::Absent(_) => {}
        }
    }
    // Whatever was tried, the sandbox must be as usable as before.
    assert_eq!(sandbox.shell("echo alive", false).await, "alive");
    let arguments = attempt.control_arguments.map_or(arguments, |arguments| arguments(world));
    let control = match attempt.control {
        Control::Host(prefix) => on_host(prefix, &program, &arguments).await,
        // Own things obey tenki; but for what only root may even try.
        Control::Own => match inside(&world.attacker, &program, &arguments, false).await {
            Verdict::Refused(_) => inside(&world.attacker, &program, &arguments, true).await,
            verdict => verdict,
        },
        Control::Victim => inside(&world.victim, &program, &arguments, false).await,
    };
    match control {
        Verdict::Reached(_) => Ok(()),
        Verdict::Absent(why) => Err(NotRun(format!("this host's kernel has nothing of the kind ({why})"))),
        Verdict::Refused(why) => panic!("the control was refused too, so the payload proves nothing: {why}"),
        Verdict::Broken(details) => panic!("the control came to no verdict: {details}"),
    }
}

/// Without it, the refusals of the network would prove nothing: neither routes nor listeners.
async fn reaches_the_public_internet(world: &World) -> Outcome {
    let program = super::world::program(NETWORK, "reach");
    let arguments = at([world.outside.public.clone()]);
    let verdict = inside(&world.attacker, &program, &arguments, false).await;
    assert!(matches!(&verdict, Verdict::Reached(what) if what.contains("OUTSIDE")), "{verdict:?}");
    if world.outside.name_server.is_some() {
        let program = super::world::program(NETWORK, "ask_a_name_server");
        let verdict = inside(&world.attacker, &program, std::slice::from_ref(&world.gateway), false).await;
        assert!(
            matches!(&verdict, Verdict::Reached(what) if what.contains("OUTSIDE")),
            "the host's name server: {verdict:?}"
        );
    }
    Ok(())
}
