//! What providers showed and no desktop owns, as the reaper ([`crate::reaper`]) saw it, pass by pass.
//!
//! # Guarantees
//! * What is removed was in quarantine first, and was seen twice before that: the second time so long after the first as is asked for,
//!   by this process or another.
//! * What turns out to be owned, or is not shown any more, leaves. Seen again later, it begins anew.
//! * Of several that want to remove the same, one at a time may, and one is told that it did.

use super::StoreError;
use crate::clock::{after, between};
use async_trait::async_trait;
use jiff::Timestamp;
use mayfly_api::DesktopName;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Where somebody looked: the machines of different places do not know of each other.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The provider.
    pub provider: String,
    /// The orchestrator that looked ([`ReplicaId`](super::replicas::ReplicaId)); empty where there is one.
    pub host: String,
}

/// Something without owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stray {
    /// Where it was seen.
    #[serde(flatten)]
    pub place: Place,
    /// The name that it has.
    pub desktop: DesktopName,
    /// When it was first seen.
    pub first_seen: Timestamp,
    /// When it was last seen.
    pub last_seen: Timestamp,
    /// Since when it is in quarantine.
    pub quarantined_at: Option<Timestamp>,
    /// Since when an administrator has it kept.
    pub kept_at: Option<Timestamp>,
    /// When its removal was last begun.
    pub tried_at: Option<Timestamp>,
    /// Why that failed.
    pub why: Option<String>,
    /// When and how it was over.
    pub over: Option<(Timestamp, Outcome)>,
}

/// How it was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was removed, and that was checked.
    Removed,
    /// It is owned, or left to whoever may have it.
    Released,
    /// It was not there any more.
    Vanished,
}

/// What somebody saw at a place.
#[derive(Clone, Debug)]
pub struct Look {
    /// When.
    pub at: Timestamp,
    /// What nobody owns.
    pub unowned: BTreeSet<DesktopName>,
    /// What else was shown.
    pub others: BTreeSet<DesktopName>,
    /// So long after the first sighting, another is a second one.
    pub apart: Duration,
}

/// What a look changed about something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It was seen for the first time.
    Found,
    /// It was seen again, and nothing follows from that.
    Again,
    /// It was seen for the second time: it is in quarantine.
    Quarantined,
    /// It is over.
    Over(Outcome),
}

/// What follows from a look, in the order of names.
pub(super) fn seen(
    place: &Place,
    known: &BTreeMap<DesktopName, Stray>,
    look: &Look,
) -> Vec<(Turn, Stray)> {
    let open = |name: &DesktopName| known.get(name).filter(|stray| stray.over.is_none());
    let there = look.unowned.iter().map(|name| match open(name) {
        Some(stray) => stray.seen_again(look),
        None => (Turn::Found, Stray::found(place, *name, look.at)),
    });
    let elsewhere = known
        .keys()
        .filter(|name| !look.unowned.contains(name))
        .filter_map(open)
        .map(|stray| {
            let outcome = if look.others.contains(&stray.desktop) {
                Outcome::Released
            } else if stray.is_being_removed() {
                // Whoever did it could not say so any more.
                Outcome::Removed
            } else {
                Outcome::Vanished
            };
            let over = Some((look.at, outcome));
            let stray = stray.clone();
            (Turn::Over(outcome), Stray { over, ..stray })
        });
    let mut all: Vec<_> = there.chain(elsewhere).collect();
    all.sort_by_key(|(_, stray)| stray.desktop);
    all
}

impl Stray {
    fn found(place: &Place, desktop: DesktopName, at: Timestamp) -> Self {
        Self {
            place: place.clone(),
            desktop,
            first_seen: at,
            last_seen: at,
            quarantined_at: None,
            kept_at: None,
            tried_at: None,
            why: None,
            over: None,
        }
    }

    fn seen_again(&self, look: &Look) -> (Turn, Self) {
        // A clock that was set back must not make anything wait for it.
        let first_seen = self.first_seen.min(look.at);
        let second = between(first_seen, look.at) >= look.apart;
        let quarantined_at = match self.quarantined_at {
            Some(at) => Some(at.min(look.at)),
            None => second.then_some(look.at),
        };
        let turn = if quarantined_at.is_some() && self.quarantined_at.is_none() {
            Turn::Quarantined
        } else {
            Turn::Again
        };
        let again = Self {
            first_seen,
            last_seen: look.at,
            quarantined_at,
            ..self.clone()
        };
        (turn, again)
    }

    /// Its removal was begun, and nothing was heard of it since.
    fn is_being_removed(&self) -> bool {
        self.tried_at.is_some() && self.why.is_none()
    }

    /// When it may be removed: never, unless it is in quarantine and not kept. `patience`: whoever began that gets so long.
    #[must_use]
    pub fn due(&self, quarantine: Duration, patience: Duration) -> Option<Timestamp> {
        let at = self
            .quarantined_at
            .filter(|_| self.over.is_none() && self.kept_at.is_none())?;
        let free = self.tried_at.filter(|_| self.is_being_removed());
        let free = free.map(|at| after(at, patience));
        Some(after(at, quarantine).max(free.unwrap_or(Timestamp::MIN)))
    }
}

/// See the module.
#[async_trait]
pub trait Strays: Send + Sync + 'static {
    /// Takes down what somebody saw at a place, and says what follows.
    async fn sight(&self, place: &Place, look: Look) -> Result<Vec<(Turn, Stray)>, StoreError>;

    /// Its removal begins. `false`: somebody else began it since it was read, it is kept, or it is over.
    async fn begin_removal(&self, stray: &Stray, now: Timestamp) -> Result<bool, StoreError>;

    /// Its removal failed.
    async fn removal_failed(&self, stray: &Stray, why: &str) -> Result<(), StoreError>;

    /// It was removed. `false`: that was known.
    async fn removed(&self, stray: &Stray, now: Timestamp) -> Result<bool, StoreError>;

    /// It is kept from `at` on, or not any more; how many of that name there are that are not over.
    async fn keep_stray(
        &self,
        desktop: DesktopName,
        at: Option<Timestamp>,
    ) -> Result<u64, StoreError>;

    /// All that is remembered, in the order of places and names.
    async fn strays(&self) -> Result<Vec<Stray>, StoreError>;

    /// Forgets those that were over before then; how many.
    async fn forget_strays(&self, before: Timestamp) -> Result<u64, StoreError>;
}
