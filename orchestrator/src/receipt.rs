//! The receipt of a desktop's end: what was looked for and not found, by whom, and when.
//!
//! # Guarantees
//! * It holds what was checked, not what should be so: what could not be asked is not in it.
//! * It is kept before the desktop is `gone`, so none is gone without one.
//! * It is forgotten with its session.

use crate::config::Config;
use crate::control::Shared;
use crate::provider::absent;
use crate::replica;
use crate::serve;
use crate::store::StoreError;
use crate::store::words::Whose;
use mayfly_api::{Absence, DesktopName, Removal, SessionId};
use secrecy::ExposeSecret;
use std::fmt::Write;
use tracing::error;

/// Keeps what the provider checked, and with it whether the database holds a secret of the session.
///
/// # Errors
/// See [`StoreError`].
pub async fn keep(
    shared: &Shared,
    session: SessionId,
    desktop: DesktopName,
    mut checked: Vec<Absence>,
) -> Result<(), StoreError> {
    if holds_a_secret(shared, session, desktop).await? {
        error!(%session, %desktop, "the database holds a secret of this session, which must never be: tell who makes Mayfly");
    } else {
        let place = "what the database keeps of the session";
        checked.push(absent("orchestrator", "secrets", place));
    }
    let removal = Removal {
        desktop,
        by: by(),
        checked,
    };
    shared.store.keep_receipt(session, &removal).await
}

async fn holds_a_secret(
    shared: &Shared,
    session: SessionId,
    desktop: DesktopName,
) -> Result<bool, StoreError> {
    let secrets = shared.secrets.of(session, desktop);
    let mut texts: Vec<String> = Vec::new();
    for event in shared.store.events_after(session, 0).await? {
        texts.push(serde_json::to_string(&event).unwrap_or_default());
    }
    let words = shared.store.kept(Whose::Session(session)).await?;
    texts.extend(words.into_iter().map(|kept| kept.text));
    let told = |text: &String| secrets.iter().any(|s| text.contains(s.expose_secret()));
    Ok(texts.iter().any(told))
}

/// This program and this machine.
fn by() -> String {
    let (version, host) = (env!("CARGO_PKG_VERSION"), replica::host_name());
    format!("mayfly-orchestrator {version} on {host}")
}

/// The receipts of a session or a desktop, for people. Reads the database that a service may be using.
///
/// # Errors
/// If the database cannot be read or there is no receipt.
pub async fn show(config: &Config, whose: Whose) -> anyhow::Result<String> {
    let receipts = serve::read_store(config, async |store| store.receipts(whose).await).await?;
    anyhow::ensure!(
        !receipts.is_empty(),
        "there is no receipt of {whose}; one is kept when a desktop is gone, and goes with its session, a week later"
    );
    let mut text = String::new();
    for (session, removal) in receipts {
        let Removal {
            desktop,
            by,
            checked,
        } = removal;
        writeln!(text, "{desktop} of session {session}, removed by {by}")?;
        for Absence {
            what,
            place,
            by,
            checked_at,
        } in checked
        {
            writeln!(text, "  {checked_at:.0}  no {what}: {place} ({by})")?;
        }
    }
    Ok(text)
}
