//! Toxiproxy: each orchestrator's own way to the database, which can be cut and slowed down.

use crate::lab::{Lab, Process, until};
use anyhow::{Context, Result};
use reqwest::{Client, Method};
use serde_json::{Value, json};
use std::time::Duration;

const START: Duration = Duration::from_secs(60);
/// Of the one toxic that a way has at a time, in each direction.
const STREAMS: [&str; 2] = ["upstream", "downstream"];

/// A running Toxiproxy.
#[derive(Debug)]
pub(super) struct Toxics {
    api: String,
    http: Client,
    _process: Process,
}

impl Toxics {
    pub(super) async fn start(lab: &Lab, port: u16) -> Result<Self> {
        let program = std::env::var_os("MAYFLY_TOXIPROXY")
            .context("MAYFLY_TOXIPROXY is not set: run this by `cargo xtask`")?;
        let mut command = lab.command(program);
        command.args(["-host", "127.0.0.1", "-port", &port.to_string()]);
        let mut process = lab.start("toxiproxy", command)?;
        let (api, http) = (
            format!("http://127.0.0.1:{port}"),
            Client::builder()
                .no_proxy()
                .timeout(Duration::from_secs(10))
                .build()?,
        );
        until("Toxiproxy answers", START, async || {
            process.must_run()?;
            Ok(http.get(format!("{api}/version")).send().await.ok())
        })
        .await?;
        Ok(Self {
            api,
            http,
            _process: process,
        })
    }

    async fn ask(&self, method: Method, path: &str, body: &Value) -> Result<()> {
        let request = self.http.request(method, format!("{}{path}", self.api));
        let answer = request.json(body).send().await?;
        answer.error_for_status()?;
        Ok(())
    }

    /// A new way from one port to another.
    pub(super) async fn way(&self, name: &str, from: u16, to: u16) -> Result<()> {
        let (from, to) = (format!("127.0.0.1:{from}"), format!("127.0.0.1:{to}"));
        let body = json!({"name": name, "listen": from, "upstream": to, "enabled": true});
        self.ask(Method::POST, "/proxies", &body).await
    }

    /// Closes a way, with every connection on it, or opens it again.
    pub(super) async fn open(&self, name: &str, open: bool) -> Result<()> {
        let body = json!({"enabled": open});
        self.ask(Method::POST, &format!("/proxies/{name}"), &body)
            .await
    }

    /// From now on both directions of a way have this toxic.
    pub(super) async fn poison(&self, name: &str, kind: &str, attributes: &Value) -> Result<()> {
        for stream in STREAMS {
            let body =
                json!({"name": stream, "type": kind, "stream": stream, "attributes": attributes});
            self.ask(Method::POST, &format!("/proxies/{name}/toxics"), &body)
                .await?;
        }
        Ok(())
    }

    /// And now not any more.
    pub(super) async fn heal(&self, name: &str) -> Result<()> {
        for stream in STREAMS {
            let path = format!("/proxies/{name}/toxics/{stream}");
            self.ask(Method::DELETE, &path, &Value::Null).await?;
        }
        Ok(())
    }
}
