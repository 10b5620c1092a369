//! `doctor`: what is missing before desktops can be made, and what to do about it.

use crate::ansible;
use crate::clock::between;
use crate::config::{Config, ProviderKind};
use crate::domain;
use crate::provider::terraform;
use crate::provider::{Check, CheckStatus};
use crate::serve::{open_local_providers, open_store};
use crate::store::replicas::Replica;
use jiff::Timestamp;
use std::net::TcpListener;
use std::time::Duration;

/// Looks at everything that can be looked at without starting.
pub async fn examine(config: &Config) -> Vec<Check> {
    let mut checks = vec![listen(config), state(config)];
    if config.store.is_postgres() {
        checks.push(store(config).await);
    }
    if config.telemetry.is_on() {
        checks.push(config.telemetry.check().await);
    }
    if config.uses(ProviderKind::Terraform) {
        checks.extend(terraform::checks(&config.provider.terraform, config.rest()).await);
    }
    checks.extend(ansible::examine(&config.ansible, &config.playbooks()).await);
    if config.uses_domain() {
        checks.extend(domain::checks(&config.domain).await);
    }
    match open_local_providers(config) {
        Ok(providers) => {
            for provider in providers {
                checks.extend(provider.preflight().await);
            }
        }
        Err(error) => checks.push(check("providers", CheckStatus::Error, format!("{error:#}"))),
    }
    checks
}

/// Whether desktops can be made.
#[must_use]
pub fn verdict(checks: &[Check]) -> CheckStatus {
    let is = |status| checks.iter().any(|c| c.status == status);
    if is(CheckStatus::Error) {
        CheckStatus::Error
    } else if is(CheckStatus::Warning) {
        CheckStatus::Warning
    } else {
        CheckStatus::Ok
    }
}

/// A report for people.
#[must_use]
pub fn report(checks: &[Check]) -> String {
    use std::fmt::Write;
    let width = checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for Check {
        name,
        status,
        detail,
    } in checks
    {
        let word = match status {
            CheckStatus::Ok => "ok     ",
            CheckStatus::Warning => "warning",
            CheckStatus::Error => "ERROR  ",
        };
        let _ = writeln!(text, "{word}  {name:width$}  {detail}");
    }
    text
}

fn check(name: &str, status: CheckStatus, detail: String) -> Check {
    Check {
        name: name.to_owned(),
        status,
        detail,
    }
}

/// Orchestrators whose clocks differ by more end each other's sessions at the wrong time.
const SKEW: Duration = Duration::from_secs(5);

async fn store(config: &Config) -> Check {
    let found = async {
        let store = open_store(config).await?;
        let (living, clock) = (store.living().await?, store.clock().await?);
        store.close().await;
        anyhow::Ok((living, clock))
    };
    let (living, clock) = match found.await {
        Ok(found) => found,
        Err(error) => return check("store", CheckStatus::Error, format!("{error:#}")),
    };
    let now = Timestamp::now();
    let skew = clock.map_or(Duration::ZERO, |clock| {
        between(clock, now).max(between(now, clock))
    });
    if skew > SKEW {
        let detail = format!(
            "the clock of the database differs by {} s from this machine's; have both set by NTP",
            skew.as_secs()
        );
        return check("store", CheckStatus::Warning, detail);
    }
    let mut detail = "PostgreSQL answers, and its schema is not older than this program".to_owned();
    if !living.is_empty() {
        let name = |one: Replica| one.name + if one.draining { ", which drains" } else { "" };
        let names: Vec<_> = living.into_iter().map(name).collect();
        detail += &format!("; in use by {}", names.join("; "));
    }
    check("store", CheckStatus::Ok, detail)
}

fn listen(config: &Config) -> Check {
    let address = config.listen;
    match TcpListener::bind(address) {
        Ok(_) => check("listen", CheckStatus::Ok, format!("{address} is free")),
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => check(
            "listen",
            CheckStatus::Warning,
            format!("{address} is in use: an orchestrator runs already, or set another `listen`"),
        ),
        Err(e) => check(
            "listen",
            CheckStatus::Error,
            format!("{address}: {e}; set another `listen`"),
        ),
    }
}

fn state(config: &Config) -> Check {
    let dir = &config.state_dir;
    let shown = dir.display();
    let usable = std::fs::create_dir_all(dir).and_then(|()| tempfile::tempfile_in(dir));
    match usable {
        Ok(_) => check("state", CheckStatus::Ok, format!("{shown} can be written")),
        Err(e) => check(
            "state",
            CheckStatus::Error,
            format!("{shown} cannot be written ({e}); set state_dir, or change who owns it"),
        ),
    }
}
