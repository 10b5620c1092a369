//! What the service counts and measures, as Prometheus reads it.
//!
//! # Guarantees
//! * What is counted of sessions and desktops is read from the store when it is asked for: after a restart it is right at once.
//!   Counters and histograms are of this process.
//! * No label holds what a person or a caller chose: not a name, an id, an address or a path.

use crate::decide::Op;
use crate::drain::Rest;
use crate::session::Record;
use crate::store::pulse::Tally;
use mayfly_api::{SessionPhase, Stage, StageName};
use prometheus_client::encoding::prometheus_text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use serde::Serialize;
use std::time::Duration;

/// What [`Metrics::show`] returns.
pub const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
const SESSION_PHASES: [SessionPhase; 8] = [
    SessionPhase::Queued,
    SessionPhase::Preparing,
    SessionPhase::Ready,
    SessionPhase::Connected,
    SessionPhase::Disconnected,
    SessionPhase::Ending,
    SessionPhase::Ended,
    SessionPhase::Failed,
];
/// Those of desktops of which something may exist.
const DESKTOP_PHASES: [&str; 8] = [
    "planned",
    "creating",
    "booting",
    "configuring",
    "ready",
    "claimed",
    "destroying",
    "stuck",
];
const OPERATIONS: [&str; 5] = ["create", "bootstrap", "probe", "destroy", "list"];
const STORE_OPERATIONS: [&str; 3] = ["accept", "update", "plan"];

type Labels<const N: usize> = [(&'static str, String); N];
type Counters<const N: usize> = Family<Labels<N>, Counter>;
type Histograms<const N: usize> = Family<Labels<N>, Histogram, fn() -> Histogram>;

/// What the reaper did about machines without owner.
#[derive(Clone, Copy, Debug)]
pub enum Reaped {
    /// Seen for the first time.
    Found,
    /// Seen for the second time: in quarantine.
    Quarantined,
    /// Owned after all, or left to whoever may have it.
    Released,
    /// Not there any more, without our doing.
    Vanished,
    /// Removed.
    Removed,
    /// Not removed, though that was tried.
    Failed,
    /// Left for another pass: so many may be a mistake.
    HeldBack,
}

/// How each of these is called, and in words.
const REAPED: [(&str, &str); 7] = [
    ("reaper_found", "first seen"),
    ("reaper_quarantined", "put into quarantine"),
    ("reaper_released", "owned after all"),
    ("reaper_vanished", "not there any more"),
    ("reaper_removed", "removed"),
    ("reaper_failed", "that could not be removed"),
    ("reaper_held_back", "left for another pass"),
];

/// See the module.
pub struct Metrics {
    registry: Registry,
    sessions: Family<Labels<1>, Gauge>,
    desktops: Family<Labels<1>, Gauge>,
    queued: Gauge,
    stuck: Gauge,
    draining: Gauge,
    stages: Histograms<2>,
    ready: Histograms<1>,
    ended: Counters<1>,
    provider_errors: Counters<2>,
    reaper: [Counters<1>; REAPED.len()],
    takeovers: Counter,
    http: Counters<3>,
    store: Histograms<1>,
}

/// From a simulated machine's tenths of a second to a plain template's playbook.
fn of_stages() -> Histogram {
    Histogram::new([
        0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1_800.0,
    ])
}

fn of_the_store() -> Histogram {
    Histogram::new([
        0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 10.0,
    ])
}

/// An enum as the wire writes it.
pub(crate) fn word<T: Serialize>(value: &T) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

impl Metrics {
    /// Nothing counted yet. What is known beforehand begins at zero, so that its first event is seen as a rise.
    #[must_use]
    pub fn new(providers: &[&'static str]) -> Self {
        let mut registry = Registry::with_prefix("mayfly");
        let metrics = Self {
            sessions: Family::default(),
            desktops: Family::default(),
            queued: Gauge::default(),
            stuck: Gauge::default(),
            draining: Gauge::default(),
            stages: Family::new_with_constructor(of_stages),
            ready: Family::new_with_constructor(of_stages),
            ended: Family::default(),
            provider_errors: Family::default(),
            reaper: Default::default(),
            takeovers: Counter::default(),
            http: Family::default(),
            store: Family::new_with_constructor(of_the_store),
            registry: Registry::default(),
        };
        let m = &metrics;
        let of = "Sessions by phase; those that are over for a week";
        registry.register("sessions", of, m.sessions.clone());
        let of = "Desktops of which something may exist, by phase";
        registry.register("desktops", of, m.desktops.clone());
        let of = "Sessions that wait for a desktop";
        registry.register("queue_depth", of, m.queued.clone());
        let of = "Desktops that could not be removed: an administrator must look";
        registry.register("desktops_stuck", of, m.stuck.clone());
        let of = "1 while no new sessions are taken";
        registry.register("draining", of, m.draining.clone());
        let of = "How long a stage of a desktop that became ready took, and of its removal";
        registry.register("stage_seconds", of, m.stages.clone());
        let of = "From the request to a desktop that is ready";
        registry.register("ready_seconds", of, m.ready.clone());
        let of = "Sessions that ended, by reason";
        registry.register("sessions_ended", of, m.ended.clone());
        let of = "Operations that a provider could not do";
        registry.register("provider_errors", of, m.provider_errors.clone());
        for ((name, of), family) in REAPED.into_iter().zip(&m.reaper) {
            let of = format!("Machines without owner, {of}");
            registry.register(name, of, family.clone());
        }
        let of = "Sessions taken over from orchestrators that did not answer";
        registry.register("lease_takeovers", of, m.takeovers.clone());
        let of = "Answered requests, by method, route and status";
        registry.register("http_requests", of, m.http.clone());
        let of = "How long an operation of the store took";
        registry.register("store_seconds", of, m.store.clone());
        for provider in providers {
            let provider = ("provider", (*provider).to_owned());
            let stages = StageName::CREATE.into_iter();
            for stage in stages.chain([StageName::Destroying]) {
                let labels = [provider.clone(), ("stage", word(&stage))];
                let _ = m.stages.get_or_create_owned(&labels);
            }
            for operation in OPERATIONS {
                let labels = [provider.clone(), ("operation", operation.to_owned())];
                let _ = m.provider_errors.get_or_create_owned(&labels);
            }
            let labels = [provider];
            for family in &m.reaper {
                let _ = family.get_or_create_owned(&labels);
            }
            let _ = m.ready.get_or_create_owned(&labels);
        }
        for operation in STORE_OPERATIONS {
            let labels = [("operation", operation.to_owned())];
            let _ = m.store.get_or_create_owned(&labels);
        }
        Self {
            registry,
            ..metrics
        }
    }

    /// A session has just come into its phase.
    pub fn entered(&self, record: &Record) {
        let provider = ("provider", record.wish.provider.clone());
        let took = |stage: &Stage| {
            if let Some(took) = stage.duration_ms {
                let labels = [provider.clone(), ("stage", word(&stage.name))];
                let took = Duration::from_millis(took).as_secs_f64();
                self.stages.get_or_create(&labels).observe(took);
            }
        };
        if let (SessionPhase::Ready, Some(at)) = (record.phase, record.ready_at) {
            record.stages.iter().for_each(took);
            let took = crate::clock::between(record.created_at, at).as_secs_f64();
            self.ready.get_or_create(&[provider]).observe(took);
        } else if record.phase.is_final() {
            let destroying = |s: &&Stage| s.name == StageName::Destroying;
            record.stages.iter().filter(destroying).for_each(took);
            if let Some(reason) = &record.end_reason {
                self.ended.get_or_create(&[("reason", word(reason))]).inc();
            }
        }
    }

    /// A provider could not do something.
    pub fn provider_failed(&self, provider: &str, operation: &str) {
        let labels = [
            ("provider", provider.to_owned()),
            ("operation", operation.to_owned()),
        ];
        self.provider_errors.get_or_create(&labels).inc();
    }

    /// What a provider could not do, as a worker asked it.
    pub fn operation_failed(&self, provider: &str, op: Op) {
        self.provider_failed(provider, op.as_str());
    }

    /// So many sessions of orchestrators that died.
    pub fn taken_over(&self, sessions: usize) {
        self.takeovers
            .inc_by(u64::try_from(sessions).unwrap_or(u64::MAX));
    }

    /// So many machines without owner.
    pub fn reaped(&self, provider: &str, what: Reaped, machines: usize) {
        let machines = u64::try_from(machines).unwrap_or(u64::MAX);
        self.reaper[what as usize]
            .get_or_create(&[("provider", provider.to_owned())])
            .inc_by(machines);
    }

    /// A request was answered. The route is a pattern, never a path that a caller chose.
    pub fn answered(&self, method: &str, route: &str, status: u16) {
        let labels = [
            ("method", method.to_owned()),
            ("route", route.to_owned()),
            ("status", status.to_string()),
        ];
        self.http.get_or_create(&labels).inc();
    }

    /// The store did something.
    pub fn stored(&self, operation: &str, took: Duration) {
        let labels = [("operation", operation.to_owned())];
        let histogram = self.store.get_or_create(&labels);
        histogram.observe(took.as_secs_f64());
    }

    /// All of it, with what the store counted.
    ///
    /// # Errors
    /// Never, in fact: writing to a string does not fail.
    pub fn show(&self, tally: &Tally, drain: Option<Rest>) -> Result<String, std::fmt::Error> {
        let count = |gauge: &Gauge, number: u64| {
            gauge.set(i64::try_from(number).unwrap_or(i64::MAX));
        };
        for phase in SESSION_PHASES.map(|phase| word(&phase)) {
            let number = tally.sessions_in(&phase);
            count(&self.sessions.get_or_create(&[("phase", phase)]), number);
        }
        for phase in DESKTOP_PHASES {
            let labels = [("phase", phase.to_owned())];
            let number = tally.desktops_in(phase);
            count(&self.desktops.get_or_create(&labels), number);
        }
        count(&self.queued, tally.sessions_in("queued"));
        count(&self.stuck, tally.desktops_in("stuck"));
        count(&self.draining, drain.is_some().into());
        let mut text = String::new();
        prometheus_text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
