//! What the server counts about itself, in the Prometheus text form.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use nagaya_engine::Engine;
use nagaya_gateway::Traffic;
use nagaya_gateway::preview::Proxy;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// One number that a part below the daemon reports when it is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Level {
    /// Which of them, e.g. `network_slots` or `RUNNING`.
    pub name: String,
    pub value: i64,
}

/// Asked at every scrape; must answer at once.
pub type Levels = Arc<dyn Fn() -> Vec<Level> + Send + Sync>;

/// What is asked for at every scrape.
#[derive(Default)]
pub(crate) struct Sources {
    pub(crate) sessions: Option<Levels>,
    pub(crate) pools: Option<Levels>,
    /// How long snapshots stopped their sources since it was asked last, microseconds.
    pub(crate) source_stops_us: Option<Box<dyn Fn() -> Vec<u64> + Send + Sync>>,
    pub(crate) previews: Option<Arc<Proxy<Engine>>>,
    pub(crate) ssh: Option<Arc<Traffic>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    rpc: &'static str,
    code: &'static str,
}

/// All metrics of the server.
pub(crate) struct Metrics {
    registry: Registry,
    calls: Family<CallLabels, Counter>,
    connections: Gauge,
    connections_refused: Counter,
    create_seconds: Histogram,
    run_start_seconds: Histogram,
    source_stopped_seconds: Histogram,
    source_stops_us: Option<Box<dyn Fn() -> Vec<u64> + Send + Sync>>,
}

/// Counts a connection as open until it is dropped.
pub(crate) struct OpenConnection(Gauge);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    pub(crate) const CONTENT_TYPE: &'static str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

    pub(crate) fn new(sources: Sources) -> Self {
        /// 0.5 ms to about 16 s.
        fn seconds() -> Histogram {
            Histogram::new((0..16).map(|step| 0.0005 * f64::from(1 << step)))
        }
        let metrics = Self {
            registry: Registry::default(),
            calls: Family::default(),
            connections: Gauge::default(),
            connections_refused: Counter::default(),
            create_seconds: seconds(),
            run_start_seconds: seconds(),
            // 0.05 ms to about 1.6 s.
            source_stopped_seconds: Histogram::new((0..16).map(|step| 0.00005 * f64::from(1 << step))),
            source_stops_us: sources.source_stops_us,
        };
        let mut registry = Registry::with_prefix("nagaya");
        registry.register("rpc_calls", "Calls that ended, by rpc and gRPC code", metrics.calls.clone());
        registry.register("connections", "Connections open now", metrics.connections.clone());
        registry.register(
            "connections_refused",
            "Connections closed because they gave way to others or showed no key in time",
            metrics.connections_refused.clone(),
        );
        registry.register(
            "session_create_seconds",
            "From a CreateSession request to RUNNING, where it got there within the call",
            metrics.create_seconds.clone(),
        );
        registry.register(
            "run_start_seconds",
            "From the start frame of a Run to its started frame",
            metrics.run_start_seconds.clone(),
        );
        registry.register(
            "snapshot_source_stopped_seconds",
            "How long writes to the disk of a snapshot's source were frozen",
            metrics.source_stopped_seconds.clone(),
        );
        for (name, label, help, levels) in [
            ("sessions", "state", "Sessions by state", sources.sessions),
            ("pool_ready", "pool", "Pre-created resources that are not used yet", sources.pools),
        ] {
            if let Some(levels) = levels {
                registry.register_collector(Box::new(LevelCollector { name, label, help, levels }));
            }
        }
        if let Some(previews) = sources.previews {
            let traffic = Arc::clone(previews.traffic());
            registry.register_collector(Box::new(TrafficCollector { of: "preview", whom: "services", traffic }));
            registry.register_collector(Box::new(AnswersCollector(previews)));
        }
        if let Some(traffic) = sources.ssh {
            registry.register_collector(Box::new(TrafficCollector { of: "ssh", whom: "clients of SSH", traffic }));
        }
        Self { registry, ..metrics }
    }

    pub(crate) fn encode(&self) -> String {
        for microseconds in self.source_stops_us.iter().flat_map(|stops| stops()) {
            self.source_stopped_seconds.observe(Duration::from_micros(microseconds).as_secs_f64());
        }
        let mut text = String::new();
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            tracing::error!(%error, "failed to encode metrics");
        }
        text
    }

    pub(crate) fn call_ended(&self, rpc: &'static str, code: &'static str) {
        self.calls.get_or_create(&CallLabels { rpc, code }).inc();
    }

    pub(crate) fn connection_opened(&self) -> OpenConnection {
        self.connections.inc();
        OpenConnection(self.connections.clone())
    }

    pub(crate) fn connection_refused(&self) {
        self.connections_refused.inc();
    }

    pub(crate) fn session_created(&self, took: Duration) {
        self.create_seconds.observe(took.as_secs_f64());
    }

    pub(crate) fn run_started(&self, took: Duration) {
        self.run_start_seconds.observe(took.as_secs_f64());
    }
}

struct LevelCollector {
    name: &'static str,
    label: &'static str,
    help: &'static str,
    levels: Levels,
}

impl fmt::Debug for LevelCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LevelCollector").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Collector for LevelCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let gauge = ConstGauge::new(0i64);
        let mut family = encoder.encode_descriptor(self.name, self.help, None, gauge.metric_type())?;
        for Level { name, value } in (self.levels)() {
            let labels = [(self.label, name)];
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// What passes to and from sandboxes in one way.
#[derive(Debug)]
struct TrafficCollector {
    of: &'static str,
    whom: &'static str,
    traffic: Arc<Traffic>,
}

impl Collector for TrafficCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Self { of, whom, traffic } = self;
        let open = ConstGauge::new(i64::try_from(traffic.connections_open()).unwrap_or(i64::MAX));
        let help = format!("Connections with {whom} open now");
        open.encode(encoder.encode_descriptor(&format!("{of}_connections_open"), &help, None, open.metric_type())?)?;
        let help = format!("Connections with {whom} that were opened");
        let opened = ConstCounter::new(traffic.connections());
        opened.encode(encoder.encode_descriptor(&format!("{of}_connections"), &help, None, opened.metric_type())?)?;
        let (name, help) = (format!("{of}_bytes"), format!("Bytes on connections with {whom}, by where they go"));
        let mut family = encoder.encode_descriptor(&name, &help, None, opened.metric_type())?;
        for (direction, bytes) in
            [("to_sandbox", traffic.bytes_to_sandboxes()), ("from_sandbox", traffic.bytes_from_sandboxes())]
        {
            ConstCounter::new(bytes).encode(family.encode_family(&[("direction", direction)])?)?;
        }
        Ok(())
    }
}

struct AnswersCollector(Arc<Proxy<Engine>>);

impl fmt::Debug for AnswersCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AnswersCollector").field(self.0.answers()).finish()
    }
}

impl Collector for AnswersCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let answers = self.0.answers();
        let counter = ConstCounter::new(0u64);
        let help = "Requests to previews that were answered, by whom";
        let mut family = encoder.encode_descriptor("preview_requests", help, None, counter.metric_type())?;
        for (by, count) in [("service", answers.of_services()), ("server", answers.of_its_own())] {
            ConstCounter::new(count).encode(family.encode_family(&[("answered_by", by)])?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_in_the_text() {
        let pools: Levels = Arc::new(|| vec![Level { name: "disks".into(), value: 3 }]);
        let metrics = Metrics::new(Sources {
            pools: Some(pools),
            source_stops_us: Some(Box::new(|| vec![1_500, 500])),
            ..Sources::default()
        });
        metrics.call_ended("GetSession", "not_found");
        let open = metrics.connection_opened();
        metrics.session_created(Duration::from_millis(3));
        let text = metrics.encode();
        for line in [
            "nagaya_rpc_calls_total{rpc=\"GetSession\",code=\"not_found\"} 1",
            "nagaya_connections 1",
            "nagaya_session_create_seconds_count 1",
            "nagaya_pool_ready{pool=\"disks\"} 3",
            "nagaya_snapshot_source_stopped_seconds_sum 0.002",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        drop(open);
        assert!(metrics.encode().contains("nagaya_connections 0"));
    }
}
