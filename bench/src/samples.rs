//! Samples, what is said about them, and where they are kept.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

/// Everything one run found out.
pub struct Report {
    directory: PathBuf,
    /// Milliseconds, in the order they were taken.
    timings: BTreeMap<String, Vec<f64>>,
    /// Single numbers: name, value, unit.
    figures: Vec<(String, f64, &'static str)>,
    not_run: Vec<(String, String)>,
}

impl Report {
    /// Everything reported is written to this directory at once: a run that is cut keeps what it had.
    pub fn new(directory: PathBuf) -> Self {
        fs::create_dir_all(&directory).expect("the results' directory can be made");
        Self { directory, timings: BTreeMap::new(), figures: Vec::new(), not_run: Vec::new() }
    }

    /// Where the raw samples are.
    pub fn path(&self) -> PathBuf {
        self.directory.join("samples.json")
    }

    pub fn timing(&mut self, name: &str, samples: Vec<f64>) {
        let line = summary(&samples);
        println!("{name:46} {line}");
        self.timings.insert(name.to_owned(), samples);
        self.write();
    }

    pub fn figure(&mut self, name: &str, value: f64, unit: &'static str) {
        println!("{name:46} {value:9.2} {unit}");
        self.figures.push((name.to_owned(), value, unit));
        self.write();
    }

    pub fn not_run(&mut self, name: &str, reason: &str) {
        println!("{name:46} not run: {reason}");
        self.not_run.push((name.to_owned(), reason.to_owned()));
        self.write();
    }

    /// The median of a timing, or a figure.
    pub fn value(&self, name: &str) -> Option<f64> {
        let timing = self.timings.get(name).map(|samples| percentile(samples, 50.0));
        timing.or_else(|| self.figures.iter().find(|(each, ..)| each == name).map(|(_, value, _)| *value))
    }

    /// Prints how ours compares with peers that do the same work.
    pub fn ratios(&self, ours: &str, peers: &[&str]) {
        let Some(own) = self.value(ours) else { return };
        for peer in peers {
            if let Some(other) = self.value(peer) {
                println!("{peer:46} {:9.2} x of {ours}", other / own);
            }
        }
    }

    fn write(&self) {
        let timings: BTreeMap<&String, Value> = self
            .timings
            .iter()
            .map(|(name, samples)| {
                let at = |part| round(percentile(samples, part));
                let all: Vec<f64> = samples.iter().map(|sample| round(*sample)).collect();
                (name, json!({ "p50_ms": at(50.0), "p95_ms": at(95.0), "p99_ms": at(99.0), "samples_ms": all }))
            })
            .collect();
        let figures: BTreeMap<&String, Value> = self
            .figures
            .iter()
            .map(|(name, value, unit)| (name, json!({ "value": round(*value), "unit": unit })))
            .collect();
        let not_run: BTreeMap<&String, &String> = self.not_run.iter().map(|(name, reason)| (name, reason)).collect();
        // One line for each measurement, so that a later run's difference can be read.
        let lines = |map: Value| {
            let entries = map.as_object().into_iter().flatten();
            entries.map(|(name, value)| format!("    {}: {value}", json!(name))).collect::<Vec<_>>().join(",\n")
        };
        let text = format!(
            "{{\n  \"machine\": {},\n  \"timings\": {{\n{}\n  }},\n  \"figures\": {{\n{}\n  }},\n  \"not_run\": {{\n{}\n  }}\n}}\n",
            machine(),
            lines(json!(timings)),
            lines(json!(figures)),
            lines(json!(not_run)),
        );
        fs::write(self.path(), text).expect("the results can be written");
    }
}

/// Microseconds are as fine as these clocks are worth.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn machine() -> Value {
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = memory.lines().next().unwrap_or_default().to_owned();
    json!({ "processors": processors, "kernel": kernel.trim(), "memory": memory })
}

pub fn percentile(samples: &[f64], part: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = ((sorted.len() as f64 * part / 100.0).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

fn summary(samples: &[f64]) -> String {
    let at = |part| percentile(samples, part);
    format!("{:9.2} ms p50 {:9.2} p95 {:9.2} p99   n={}", at(50.0), at(95.0), at(99.0), samples.len())
}

pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::percentile;

    #[test]
    fn percentiles_are_samples_that_were_taken() {
        let samples: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&samples, 50.0), 50.0);
        assert_eq!(percentile(&samples, 99.0), 99.0);
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
        assert!(percentile(&[], 50.0).is_nan());
    }
}
