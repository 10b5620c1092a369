//! `mayfly destroy`.

use super::mine::Mine;
use super::{DONE, FAILED, print};
use clap::Args;
use futures_util::StreamExt;
use mayfly_api::{ProblemCode, SessionId};
use mayfly_session_manager::api::ApiTrouble;
use mayfly_session_manager::record::Record;
use mayfly_session_manager::settings::Places;
use serde::Serialize;
use std::time::Duration;

/// A destruction that takes longer is reported as accepted.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The session, as `mayfly list` shows it.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    session: Option<SessionId>,
    /// All of yours.
    #[arg(long)]
    all: bool,
    /// One JSON array, for scripts.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Line {
    id: SessionId,
    /// `destroyed`, `accepted` or `failed`.
    outcome: &'static str,
    error: Option<String>,
}

pub(crate) async fn run(options: &Options, places: &Places) -> anyhow::Result<i32> {
    let mine = Mine::new(places);
    let mut records = mine.records.all();
    if let Some(id) = options.session {
        records.retain(|record| record.id == id);
        anyhow::ensure!(
            !records.is_empty(),
            "no session {id} was made by you on this machine; `mayfly list` shows yours"
        );
    }
    let mut lines = Vec::new();
    for record in records {
        let (outcome, error) = match destroy(&mine, &record).await {
            Ok(outcome) => (outcome, None),
            Err(error) => ("failed", Some(error)),
        };
        if !options.json {
            let detail = error
                .as_ref()
                .map_or_else(String::new, |e| format!(": {e}"));
            print(&format!("{} {outcome}{detail}", record.id));
        }
        lines.push(Line {
            id: record.id,
            outcome,
            error,
        });
    }
    if options.json {
        print(&serde_json::to_string_pretty(&lines)?);
    } else if lines.is_empty() {
        print("No sessions.");
    }
    let failed = lines.iter().any(|line| line.error.is_some());
    Ok(if failed { FAILED } else { DONE })
}

/// Destroys one and waits until it is gone.
async fn destroy(mine: &Mine, record: &Record) -> Result<&'static str, String> {
    let (client, secret) = mine.access(record).await?;
    match client.destroy(record.id, &secret).await {
        Ok(_) => {}
        Err(error) if error.code() == Some(ProblemCode::NotFound) => {
            mine.forget(record.id).await;
            return Ok("destroyed");
        }
        Err(error) => return Err(ApiTrouble::from(error).to_string()),
    }
    let gone = async {
        let mut events = client.events(record.id, &secret);
        while let Some(event) = events.next().await {
            if event.is_ok_and(|event| event.session.phase.is_final()) {
                return true;
            }
        }
        false
    };
    if tokio::time::timeout(PATIENCE, gone).await.unwrap_or(false) {
        mine.forget(record.id).await;
        Ok("destroyed")
    } else {
        Ok("accepted")
    }
}
