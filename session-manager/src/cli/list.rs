//! `mayfly list`.

use super::mine::Mine;
use super::{DONE, FAILED, print};
use clap::Args;
use mayfly_api::Session;
use mayfly_session_manager::record::Record;
use mayfly_session_manager::settings::Places;
use serde::Serialize;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// One JSON array, for scripts.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Line {
    #[serde(flatten)]
    record: Record,
    session: Option<Session>,
    error: Option<String>,
}

pub(crate) async fn run(options: &Options, places: &Places) -> anyhow::Result<i32> {
    let mine = Mine::new(places);
    let mut lines = Vec::new();
    for record in mine.records.all() {
        let (session, error) = match mine.session(&record).await {
            Ok(session) => (Some(session), None),
            Err(error) => (None, Some(error)),
        };
        lines.push(Line {
            record,
            session,
            error,
        });
    }
    if options.json {
        print(&serde_json::to_string_pretty(&lines)?);
    } else if lines.is_empty() {
        print("No sessions.");
    } else {
        print(&format!(
            "{:36}  {:15}  {:12}  {:22}  SINCE",
            "SESSION", "DESKTOP", "PHASE", "ADDRESS"
        ));
        for line in &lines {
            let id = line.record.id.to_string();
            let Some(session) = &line.session else {
                let error = line.error.as_deref().unwrap_or_default();
                print(&format!("{id:36}  {error}"));
                continue;
            };
            let name = session.desktop.map(|d| d.to_string()).unwrap_or_default();
            let address = session.rdp.as_ref().map(|rdp| rdp.address.to_string());
            let since = session
                .created_at
                .to_zoned_datetime(jiff::tz::TimeZone::system())
                .strftime("%Y-%m-%d %H:%M")
                .to_string();
            let phase = format!("{:?}", session.phase).to_lowercase();
            let address = address.unwrap_or_default();
            print(&format!(
                "{id:36}  {name:15}  {phase:12}  {address:22}  {since}"
            ));
        }
    }
    let failed = lines.iter().any(|line| line.error.is_some());
    Ok(if failed { FAILED } else { DONE })
}
