//! The sessions that are not over, and their desktops, and what no desktop owns, for an administrator. Reads the database that a service may be using.

use crate::config::Config;
use crate::desktop::{Desktop, DesktopPhase};
use crate::drain;
use crate::reaper;
use crate::serve;
use crate::session::Record;
use crate::store::replicas::ReplicaId;

/// Which are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Every one.
    All,
    /// Those whose desktop could not be removed.
    Stuck,
}

/// One line for each, the oldest first.
///
/// # Errors
/// If the database cannot be read.
pub async fn lines(config: &Config, which: Which) -> anyhow::Result<Vec<String>> {
    let live = serve::read_store(config, async |store| store.live().await).await?;
    let wanted = |record: &&Record| {
        which == Which::All || record.desktop_phase() == Some(DesktopPhase::Stuck)
    };
    Ok(live.iter().filter(wanted).map(line).collect())
}

/// One line for each that a draining orchestrator waits for, the oldest first.
///
/// # Errors
/// If the database cannot be read.
pub async fn left(config: &Config) -> anyhow::Result<Vec<String>> {
    let left = serve::read_store(config, async |store| drain::left(store).await).await?;
    Ok(left.iter().map(line).collect())
}

/// One line for everything that no desktop owns; what is over as well, if all is asked for.
///
/// # Errors
/// If the database cannot be read.
pub async fn strays(config: &Config, all: bool) -> anyhow::Result<Vec<String>> {
    let strays = serve::read_store(config, async |store| {
        let mut strays = store.strays().await?;
        for host in strays.iter_mut().map(|stray| &mut stray.place.host) {
            if let Some(name) = store.called(&ReplicaId(host.clone())).await? {
                *host = name;
            }
        }
        Ok(strays)
    });
    let strays = strays.await?;
    let quarantine = crate::clock::s(config.limits.quarantine_s);
    Ok(reaper::lines(&strays, all, quarantine))
}

fn line(record: &Record) -> String {
    let phase = format!("{:?}", record.phase).to_lowercase();
    let mut line = format!(
        "{}  {:<12}  {:<16}  since {:.0}",
        record.id,
        phase,
        record.wish.user,
        record.stage_since()
    );
    if let Some(desktop) = record.live_desktop() {
        let phase = format!("{:?}", desktop.phase()).to_lowercase();
        line += &format!("  {} {phase}", desktop.name());
    }
    if let Some(reason) = record.live_desktop().and_then(Desktop::stuck_reason) {
        line += &format!(": {reason}");
    }
    line
}
