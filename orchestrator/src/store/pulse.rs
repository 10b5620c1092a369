//! Whether the store takes a change, and how much it holds.

use super::StoreError;
use async_trait::async_trait;
use jiff::Timestamp;
use std::collections::BTreeMap;

/// How many there are, by phase; a phase that nothing is in may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Of all sessions that are kept.
    pub sessions: BTreeMap<String, u64>,
    /// Of desktops of which something may exist.
    pub desktops: BTreeMap<String, u64>,
}

impl Tally {
    /// Sessions in that phase.
    #[must_use]
    pub fn sessions_in(&self, phase: &str) -> u64 {
        self.sessions.get(phase).copied().unwrap_or(0)
    }

    /// Desktops in that phase.
    #[must_use]
    pub fn desktops_in(&self, phase: &str) -> u64 {
        self.desktops.get(phase).copied().unwrap_or(0)
    }
}

/// See the module.
#[async_trait]
pub trait Pulse: Send + Sync + 'static {
    /// Makes a change, durably: a database that is full or read-only refuses.
    async fn beat(&self, now: Timestamp) -> Result<(), StoreError>;

    /// Counts.
    async fn tally(&self) -> Result<Tally, StoreError>;
}
