//! The reaper: compares what every provider shows with what is owned, and removes the rest. What there is of a desktop, such as a
//! machine, its folders, its computer account, Terraform's state of it and the lock on that, its provider shows and removes as one.
//!
//! # Guarantees
//! * Nothing is removed that is owned, nor what was seen once only, nor before its quarantine (`limits.quarantine_s`) is over, nor
//!   while an administrator has it kept.
//! * In one pass no more is removed from a provider than a mistake about who owns what may cost.
//! * It goes on where an earlier process was: finds are in the store ([`crate::store::strays`]). Several may look at the same provider.
//! * Where an older copy of the database was put in its place, no machine that it does not know is removed while somebody may use it.
//! * Everything that it does is an event of the log (`reaper.found` and so on), counted, and remembered for a week.

use crate::clock::{after, between, s};
use crate::control::Shared;
use crate::failpoints::around;
use crate::metrics::Reaped;
use crate::provider::{MachineState, Provider};
use crate::store::Restored;
use crate::store::strays::{Look, Outcome, Place, Stray, Turn};
use jiff::Timestamp;
use mayfly_api::DesktopName;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;
use tracing::{debug, error, info, warn};

/// Pause between two passes.
pub(crate) const PAUSE: Duration = Duration::from_secs(30);
/// So long after a first sighting another is a second one; a new process looks again after this.
const APART: Duration = Duration::from_secs(2);
/// Whoever began a removal and has not said how it went gets so long before another tries.
pub(crate) const PATIENCE: Duration = PAUSE;
/// Of what a provider shows, one in so many is removed in one pass, and so many in any case.
const SHARE: usize = 5;
const ALWAYS: usize = 3;
/// What is over is kept this long, for history and estimates.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// What one pass did at one provider.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The provider.
    pub provider: String,
    /// Why not all was looked at.
    pub error: Option<String>,
    /// How many desktops it shows.
    pub shown: usize,
    /// Seen for the first time.
    pub found: Vec<DesktopName>,
    /// Seen for the second time, and put into quarantine.
    pub quarantined: Vec<DesktopName>,
    /// Owned after all, or left to whoever may have it.
    pub released: Vec<DesktopName>,
    /// Not there any more, without our doing.
    pub vanished: Vec<DesktopName>,
    /// Removed.
    pub removed: Vec<DesktopName>,
    /// Not removed, and why.
    pub failed: Vec<(DesktopName, String)>,
    /// Could be removed, and is left for another pass: so many may be a mistake.
    pub held_back: Vec<DesktopName>,
    /// Kept by an administrator.
    pub kept: Vec<DesktopName>,
    /// In quarantine, with its end.
    pub waiting: Vec<(DesktopName, Timestamp)>,
    /// Left alone, since the database is an older copy.
    pub spared: Vec<DesktopName>,
}

/// Where this process looks: each of several for itself, since part of what a provider shows (folders, children) is on its own
/// machine. Two that remove the same do no harm.
fn place(shared: &Shared, provider: &dyn Provider) -> Place {
    let store = &shared.store;
    let host = store.is_shared().then(|| store.me().to_string());
    Place {
        provider: provider.kind().to_owned(),
        host: host.unwrap_or_default(),
    }
}

/// Looks from time to time until the orchestrator stops; forgets what was over long ago.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut pause = APART;
    loop {
        let reports = pass(&shared).await;
        forget(&shared).await;
        let now = shared.clock.now();
        let ends = reports.iter().flat_map(|r| &r.waiting).map(|(_, at)| *at);
        let next = ends.min().map_or(pause, |at| between(now, at));
        tokio::select! {
            () = shared.stopping.cancelled() => return,
            () = tokio::time::sleep(next.clamp(APART, pause)) => {}
        }
        pause = PAUSE;
    }
}

/// Looks once at every provider. One pass at a time: another waits.
pub async fn pass(shared: &Shared) -> Vec<Report> {
    let _alone = shared.reaping.lock().await;
    let mut reports = Vec::new();
    for provider in shared.providers.values() {
        let kind = provider.kind();
        let mut report = Report {
            provider: kind.to_owned(),
            ..Report::default()
        };
        if let Err(error) = reap(shared, &**provider, &mut report).await {
            let error = format!("{error:#}");
            shared.metrics.provider_failed(kind, "list");
            warn!(event = "reaper.not_looked", provider = kind, %error, "not looked for machines without owner");
            report.error = Some(error);
        }
        reports.push(report);
    }
    if let Some(report) = unreachable(shared).await {
        reports.push(report);
    }
    reports
}

/// What Terraform made can be removed only where its provider is configured.
async fn unreachable(shared: &Shared) -> Option<Report> {
    const TERRAFORM: &str = "terraform";
    if shared.provider(TERRAFORM).is_some() {
        return None;
    }
    let reserved = shared.store.reserved().await.ok()?;
    let owned = shared.store.desktops().await.ok()?;
    let names = reserved.into_iter().map(|machine| machine.name);
    let names: Vec<_> = names.filter(|name| !owned.contains(name)).collect();
    if names.is_empty() {
        return None;
    }
    let error = format!(
        "{} may exist, and no template has the provider {TERRAFORM}, which could remove it: add one",
        listed(&names)
    );
    warn!(event = "reaper.not_looked", provider = TERRAFORM, %error, "not looked for machines without owner");
    Some(Report {
        provider: TERRAFORM.to_owned(),
        error: Some(error),
        ..Report::default()
    })
}

/// Looks at one provider, and acts on what it sees.
async fn reap(shared: &Shared, provider: &dyn Provider, report: &mut Report) -> anyhow::Result<()> {
    let kind = provider.kind();
    // In this order: a machine that is made in between is in neither or in both.
    let there: BTreeSet<_> = around("list", provider.list()).await?.into_iter().collect();
    let seen = there.last().copied();
    let restored = shared.store.resume(seen, shared.clock.now()).await?;
    shared.has_shown(kind);
    report.shown = there.len();
    let place = place(shared, provider);
    // Of every provider: what one shows may be part of another's desktop, such as an account.
    let owned: BTreeSet<_> = shared.store.desktops().await?.into_iter().collect();
    let mut unowned = &there - &owned;
    if let Some(restored) = restored {
        report.spared = spared(shared, provider, &restored, &unowned).await;
        unowned.retain(|name| !report.spared.contains(name));
    }
    let at = shared.clock.now();
    let look = Look {
        at,
        others: &there - &unowned,
        unowned,
        apart: APART,
    };
    let turns = shared.store.sight(&place, look).await?;
    let open = taken_down(shared, report, turns);
    let due = divide(shared, report, open, at);
    let most = (there.len() / SHARE).max(ALWAYS);
    report.held_back = due.iter().skip(most).map(|stray| stray.desktop).collect();
    if !report.held_back.is_empty() {
        let held_back = report.held_back.len();
        shared.metrics.reaped(kind, Reaped::HeldBack, held_back);
        error!(
            event = "reaper.held_back",
            provider = kind,
            unowned = due.len(),
            all = there.len(),
            held_back,
            "so many machines without owner may be a mistake about who owns them: {most} of them are removed now, the others later"
        );
    }
    for stray in due.into_iter().take(most) {
        remove(shared, provider, report, stray).await?;
    }
    Ok(())
}

/// Says what a look led to; what is not over.
fn taken_down(shared: &Shared, report: &mut Report, turns: Vec<(Turn, Stray)>) -> Vec<Stray> {
    let mut open = Vec::new();
    for (turn, stray) in turns {
        let (desktop, provider) = (stray.desktop, &stray.place.provider);
        let (list, reaped) = match turn {
            Turn::Again => {
                open.push(stray);
                continue;
            }
            Turn::Found => {
                info!(event = "reaper.found", %desktop, provider, "nobody owns it; looking again");
                (&mut report.found, Reaped::Found)
            }
            Turn::Quarantined => {
                warn!(
                    event = "reaper.quarantined", %desktop, provider,
                    quarantine_s = shared.config.limits.quarantine_s,
                    "nobody owns it; in quarantine until it is removed"
                );
                (&mut report.quarantined, Reaped::Quarantined)
            }
            Turn::Over(Outcome::Released) => {
                warn!(event = "reaper.released", %desktop, provider, "it is owned after all, or left to whoever may have it");
                (&mut report.released, Reaped::Released)
            }
            Turn::Over(Outcome::Vanished) => {
                info!(event = "reaper.vanished", %desktop, provider, "nobody owned it, and it is not there any more");
                (&mut report.vanished, Reaped::Vanished)
            }
            Turn::Over(Outcome::Removed) => {
                warn!(event = "reaper.removed", %desktop, provider, "nobody owned it; an earlier process removed it");
                (&mut report.removed, Reaped::Removed)
            }
        };
        list.push(desktop);
        shared.metrics.reaped(provider, reaped, 1);
        if !matches!(turn, Turn::Over(_)) {
            open.push(stray);
        }
    }
    open
}

/// Those that may be removed now: first those that were not tried, and of these those that waited longest.
fn divide(shared: &Shared, report: &mut Report, open: Vec<Stray>, now: Timestamp) -> Vec<Stray> {
    let quarantine = s(shared.config.limits.quarantine_s);
    let mut due = Vec::new();
    for stray in open {
        match stray.due(quarantine, PATIENCE) {
            Some(at) if at <= now => due.push(stray),
            Some(at) => report.waiting.push((stray.desktop, at)),
            None if stray.kept_at.is_some() => report.kept.push(stray.desktop),
            None => {}
        }
    }
    due.sort_by_key(|stray| (stray.tried_at, stray.quarantined_at, stray.desktop));
    due
}

async fn remove(
    shared: &Shared,
    provider: &dyn Provider,
    report: &mut Report,
    stray: Stray,
) -> anyhow::Result<()> {
    let (kind, desktop) = (provider.kind(), stray.desktop);
    let begun = shared.store.begin_removal(&stray, shared.clock.now());
    if !begun.await? {
        debug!(%desktop, "somebody else removes it, or it is kept");
        return Ok(());
    }
    match around("reap", provider.destroy(desktop)).await {
        Ok(_) => {
            let removed = shared.store.removed(&stray, shared.clock.now());
            if removed.await? {
                warn!(event = "reaper.removed", %desktop, provider = kind, "nobody owned it; it is removed");
                shared.metrics.reaped(kind, Reaped::Removed, 1);
                report.removed.push(desktop);
            }
        }
        Err(error) => {
            let why = error.to_string();
            shared.metrics.provider_failed(kind, "destroy");
            shared.metrics.reaped(kind, Reaped::Failed, 1);
            error!(event = "reaper.failed", %desktop, provider = kind, error = why, "a machine that nobody owns could not be removed");
            shared.store.removal_failed(&stray, &why).await?;
            report.failed.push((desktop, why));
        }
    }
    Ok(())
}

/// Machines that are left alone: the database may have owned them before an older copy was put in its place, they run, and a
/// session that has one may go on. Nobody works for them: a person can use theirs to its end; then its agent switches it off.
async fn spared(
    shared: &Shared,
    provider: &dyn Provider,
    restored: &Restored,
    unowned: &BTreeSet<DesktopName>,
) -> Vec<DesktopName> {
    let until = shared.spared_until(restored);
    if shared.clock.now() >= until {
        return Vec::new();
    }
    let mut spared = Vec::new();
    for name in unowned.iter().copied().filter(|n| restored.left_out(*n)) {
        // One that nobody can tell about is spared as well.
        if !matches!(
            provider.state(name).await,
            Ok(MachineState::Dead { .. } | MachineState::Absent)
        ) {
            spared.push(name);
        }
    }
    if !spared.is_empty() {
        warn!(
            event = "reaper.spared",
            provider = provider.kind(),
            machines = listed(&spared),
            %until,
            "the database is an older copy that does not know these machines; they are left alone while they run"
        );
    }
    spared
}

async fn forget(shared: &Shared) {
    let Ok(before) = shared.clock.now().checked_sub(KEPT) else {
        return;
    };
    let forgotten = async {
        let sessions = shared.store.forget(before).await?;
        shared.store.forget_strays(before).await?;
        Ok::<_, crate::store::StoreError>(sessions)
    };
    match forgotten.await {
        Ok(0) => {}
        Ok(sessions) => debug!(sessions, "forgotten"),
        Err(error) => warn!(%error, "what was over long ago was not forgotten"),
    }
}

fn listed(names: &[DesktopName]) -> String {
    let names: Vec<_> = names.iter().map(ToString::to_string).collect();
    names.join(" ")
}

/// Reports for people.
#[must_use]
pub fn told(reports: &[Report]) -> String {
    let mut text = String::new();
    for report in reports {
        let _ = writeln!(text, "{}: {} shown", report.provider, report.shown);
        let mut tell = |what: &str, names: &[DesktopName]| {
            if !names.is_empty() {
                let _ = writeln!(text, "  {what}: {}", listed(names));
            }
        };
        tell("found, without owner", &report.found);
        tell("put into quarantine", &report.quarantined);
        tell("removed", &report.removed);
        tell("held back, for another pass", &report.held_back);
        tell("kept", &report.kept);
        tell("released", &report.released);
        tell("not there any more", &report.vanished);
        tell(
            "left alone, the database being an older copy",
            &report.spared,
        );
        for (name, until) in &report.waiting {
            let _ = writeln!(text, "  in quarantine until {until:.0}: {name}");
        }
        for (name, why) in &report.failed {
            let _ = writeln!(text, "  not removed: {name}: {why}");
        }
        if let Some(error) = &report.error {
            let _ = writeln!(text, "  not done: {error}");
        }
    }
    text
}

/// One line for each that is remembered, for an administrator: of those that are over if all are asked for.
#[must_use]
pub fn lines(strays: &[Stray], all: bool, quarantine: Duration) -> Vec<String> {
    let wanted = strays.iter().filter(|stray| all || stray.over.is_none());
    wanted.map(|stray| line(stray, quarantine)).collect()
}

fn line(stray: &Stray, quarantine: Duration) -> String {
    let (what, until) = match (stray.over, stray.kept_at, stray.quarantined_at) {
        (Some((at, outcome)), ..) => (crate::metrics::word(&outcome), format!("  at {at:.0}")),
        (None, Some(at), _) => ("kept".to_owned(), format!("  from {at:.0} on")),
        (None, None, Some(at)) => (
            "quarantined".to_owned(),
            format!("  removed from {:.0} on", after(at, quarantine)),
        ),
        (None, None, None) => ("found".to_owned(), String::new()),
    };
    let mut line = format!("{}  {what:<12}  {}", stray.desktop, stray.place.provider);
    if !stray.place.host.is_empty() {
        line += &format!(" on {}", stray.place.host);
    }
    line += &format!(
        "  seen {:.0} to {:.0}{until}",
        stray.first_seen, stray.last_seen
    );
    if let Some(why) = &stray.why {
        line += &format!(": {why}");
    }
    line
}
