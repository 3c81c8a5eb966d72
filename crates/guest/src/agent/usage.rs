//! What the sandbox uses, of what it may, for a server that cannot see it from outside.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::failure::Failure;
use super::processes::Count;
use super::{Agent, blocking, groups, memory};
use crate::messages::Usage;
use crate::processor_times::{ProcessorTimes, between};

/// How long processor times are compared: some of the scheduler's periods.
const WINDOW: Duration = Duration::from_millis(250);

pub async fn measure(agent: &Arc<Agent>) -> Result<Usage, Failure> {
    let before = blocking(|| Ok(processor_times())).await?;
    let begun = Instant::now();
    tokio::time::sleep(WINDOW).await;
    let measured = agent.clone();
    let (after, usage) = blocking(move || Ok((processor_times(), read(&measured)?))).await?;
    let (cpu_used_us, cpu_waited_us) = between(&before, &after);
    Ok(Usage { cpu_used_us, cpu_waited_us, cpu_window_us: begun.elapsed().as_micros() as u64, ..usage })
}

fn read(agent: &Agent) -> Result<Usage, Failure> {
    let settings = &agent.settings;
    let (memory_bytes, memory_limit_bytes) = memory::in_use(settings);
    let disk = rustix::fs::statvfs("/")?;
    let disk_size_bytes = disk.f_blocks.saturating_mul(disk.f_frsize);
    Ok(Usage {
        memory_bytes,
        memory_limit_bytes,
        memory_kills: memory::kills(settings),
        processes: groups::sum(settings).unwrap_or_else(|| Count::take().threads),
        processes_max: groups::most(settings),
        disk_used_bytes: disk_size_bytes.saturating_sub(disk.f_bavail.saturating_mul(disk.f_frsize)),
        disk_size_bytes,
        kept_output_bytes: agent.executions.kept(),
        ..Usage::default()
    })
}

/// Of all threads but the agent's own. Of those that have ended nothing is known.
fn processor_times() -> ProcessorTimes {
    let numbers = |directory: &str| {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).collect::<Vec<_>>()
    };
    let processes = numbers("/proc").into_iter().filter(|process| *process != std::process::id());
    let times = processes.flat_map(|process| {
        let threads = numbers(&format!("/proc/{process}/task"));
        threads.into_iter().filter_map(move |thread| {
            let text = fs::read_to_string(format!("/proc/{process}/task/{thread}/schedstat")).ok()?;
            let mut figures = text.split_whitespace().map_while(|figure| figure.parse::<u64>().ok());
            Some((thread, (figures.next()? / 1_000, figures.next()? / 1_000)))
        })
    });
    times.collect()
}
