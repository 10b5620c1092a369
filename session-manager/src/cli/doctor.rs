//! `mayfly doctor`: what Mayfly needs on this machine, and what to do where it is missing.

use super::{DONE, FAILED, print};
use clap::Args;
use mayfly_api::client::{Client, ClientError};
use mayfly_api::{ProblemCode, SessionId};
use mayfly_session_manager::api::ApiTrouble;
use mayfly_session_manager::rdp;
use mayfly_session_manager::secrets::{Keyring, Secrets};
use mayfly_session_manager::settings::{self, Places};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;

/// Longest wait for a service of the person's session.
#[cfg(target_os = "linux")]
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// One JSON array, for scripts.
    #[arg(long)]
    json: bool,
    /// Address of the orchestrator, instead of the settings'.
    #[arg(long)]
    orchestrator: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    /// Mayfly works without it, less well.
    Warning,
    Error,
}

#[derive(Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    detail: String,
}

/// A check that passes with words, or fails with words.
fn check(name: &'static str, failed: Verdict, result: Result<String, String>) -> Check {
    let (verdict, detail) = match result {
        Ok(detail) => (Verdict::Ok, detail),
        Err(detail) => (failed, detail),
    };
    Check {
        name,
        verdict,
        detail,
    }
}

pub(crate) async fn run(options: &Options, places: &Places) -> anyhow::Result<i32> {
    let file = places.settings_file();
    let loaded = settings::load(&file);
    let mut checks = vec![check(
        "settings",
        Verdict::Error,
        match &loaded {
            Ok(_) if file.exists() => Ok(file.display().to_string()),
            Ok(_) => Ok(format!("the defaults ({} does not exist)", file.display())),
            Err(error) => Err(error.to_string()),
        },
    )];
    let settings = loaded.unwrap_or_default();
    let address = options
        .orchestrator
        .as_deref()
        .unwrap_or(&settings.orchestrator);
    checks.push(check(
        "orchestrator",
        Verdict::Error,
        orchestrator(address).await,
    ));
    let found = rdp::find(settings.rdp.client.as_deref()).await;
    checks.push(check(
        "RDP client",
        Verdict::Error,
        found
            .map(|client| client.to_string())
            .map_err(|e| e.to_string()),
    ));
    checks.push(check("keyring", Verdict::Warning, keyring().await));
    #[cfg(target_os = "linux")]
    {
        checks.push(check(
            "notifications",
            Verdict::Warning,
            notifications().await,
        ));
        checks.push(check("tray", Verdict::Warning, tray().await));
    }
    if options.json {
        print(&serde_json::to_string_pretty(&checks)?);
    } else {
        for check in &checks {
            let mark = match check.verdict {
                Verdict::Ok => "ok     ",
                Verdict::Warning => "warning",
                Verdict::Error => "ERROR  ",
            };
            print(&format!("{mark}  {:14}  {}", check.name, check.detail));
        }
    }
    let failed = checks.iter().any(|c| c.verdict == Verdict::Error);
    Ok(if failed { FAILED } else { DONE })
}

/// A question about a session that does not exist: whoever answers it in the right words is an orchestrator.
async fn orchestrator(address: &str) -> Result<String, String> {
    let client = Client::new(address).map_err(|e| e.to_string())?;
    let nobody: SecretString = "nobody".into();
    match client.get(SessionId::new(), &nobody).await {
        Err(ClientError::Problem(problem))
            if matches!(
                problem.code,
                ProblemCode::NotFound | ProblemCode::Unauthorized
            ) =>
        {
            Ok(format!("answers at {address}"))
        }
        Err(error) => Err(format!(
            "{}; is it running, and is the address right?",
            ApiTrouble::from(error)
        )),
        Ok(_) => Err(format!("{address} knows a session that does not exist")),
    }
}

async fn keyring() -> Result<String, String> {
    let secrets = Secrets::new(Box::new(Keyring));
    let name = format!("doctor-{}", std::process::id());
    let secret = SessionId::new().to_string();
    let without =
        |e| format!("{e}; keys stay in memory, and a session cannot be taken back after a crash");
    secrets
        .set(name.clone(), secret.clone().into())
        .await
        .map_err(without)?;
    let back = secrets.get(name.clone()).await.map_err(without)?;
    secrets.remove(name).await.map_err(without)?;
    if back.is_some_and(|back| back.expose_secret() == secret) {
        Ok("keeps and gives back".to_owned())
    } else {
        Err(without("it does not give back what it keeps".to_owned()))
    }
}

#[cfg(target_os = "linux")]
async fn notifications() -> Result<String, String> {
    let asked = tokio::task::spawn_blocking(notify_rust::get_server_information);
    let answer = match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(Ok(server))) => Ok(format!("{} {}", server.name, server.version)),
        Ok(Ok(Err(error))) => Err(error.to_string()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the notification service does not answer".to_owned()),
    };
    answer.map_err(|e| format!("{e}; Mayfly's window tells everything too"))
}

#[cfg(target_os = "linux")]
async fn tray() -> Result<String, String> {
    let owned = async {
        let bus = zbus::Connection::session().await?;
        let bus = zbus::fdo::DBusProxy::new(&bus).await?;
        bus.name_has_owner("org.kde.StatusNotifierWatcher".try_into()?)
            .await
            .map_err(zbus::Error::from)
    };
    match tokio::time::timeout(PATIENCE, owned).await {
        Err(_) => Err("the session bus does not answer".to_owned()),
        Ok(Ok(true)) => Ok("shown".to_owned()),
        Ok(Ok(false)) => Err(
            "nothing shows tray icons here (GNOME needs the AppIndicator extension); \
             Mayfly opens its window instead"
                .to_owned(),
        ),
        Ok(Err(error)) => Err(format!("no session bus: {error}")),
    }
}
