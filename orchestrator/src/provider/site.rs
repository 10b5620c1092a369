//! Pretended machines of another process, for several orchestrators: what a Proxmox site is to real ones. Part of the tests, not of
//! the service.
//!
//! # Guarantees
//! * A call that was received is done to its end, whoever made it and whatever became of them.
//! * Each caller's calls come over a socket, so whoever serves several knows which orchestrator calls.

use super::{
    AgentChannel, Check, CheckStatus, DesktopSpec, MachineState, Provider, ProviderError, Section,
    channel,
};
use async_trait::async_trait;
use mayfly_api::agent::Bootstrap;
use mayfly_api::{Absence, DesktopName};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt::Display;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

/// One JSON line on a connection of its own, answered by another. After the answer to `Agent` the connection is the agent's.
#[derive(Serialize, Deserialize)]
enum Call {
    Create(DesktopSpec),
    State(DesktopName),
    Bootstrap(DesktopName, Box<Bootstrap>),
    Agent(DesktopName),
    Address(DesktopName),
    Words(DesktopName),
    Destroy(DesktopName),
    List,
}

/// The machines that are served at a socket.
#[derive(Debug)]
pub struct Site(PathBuf);

fn failed(what: impl Display) -> ProviderError {
    ProviderError::Failed(format!("the site of pretended machines: {what}"))
}

impl Site {
    /// Those at that socket.
    #[must_use]
    pub fn at(socket: PathBuf) -> Self {
        Self(socket)
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        call: &Call,
    ) -> Result<(T, BufReader<UnixStream>), ProviderError> {
        let asked = async {
            let mut stream = BufReader::new(UnixStream::connect(&self.0).await?);
            stream.write_all(&line(call)?).await?;
            let mut answer = String::new();
            stream.read_line(&mut answer).await?;
            let answer: Result<Value, ProviderError> = serde_json::from_str(&answer)?;
            io::Result::Ok((answer, stream))
        };
        let (answer, stream) = asked.await.map_err(failed)?;
        Ok((serde_json::from_value(answer?).map_err(failed)?, stream))
    }

    async fn call<T: DeserializeOwned>(&self, call: &Call) -> Result<T, ProviderError> {
        Ok(self.ask(call).await?.0)
    }
}

#[async_trait]
impl Provider for Site {
    fn kind(&self) -> &'static str {
        "simulated"
    }

    async fn preflight(&self) -> Vec<Check> {
        let (status, detail) = match UnixStream::connect(&self.0).await {
            Ok(_) => (
                CheckStatus::Warning,
                "desktops are only pretended".to_owned(),
            ),
            Err(error) => (CheckStatus::Error, format!("{}: {error}", self.0.display())),
        };
        vec![Check {
            name: "simulated".to_owned(),
            status,
            detail,
        }]
    }

    async fn create(&self, spec: &DesktopSpec) -> Result<(), ProviderError> {
        self.call(&Call::Create(spec.clone())).await
    }

    async fn state(&self, name: DesktopName) -> Result<MachineState, ProviderError> {
        self.call(&Call::State(name)).await
    }

    async fn bootstrap(
        &self,
        name: DesktopName,
        bootstrap: &Bootstrap,
    ) -> Result<(), ProviderError> {
        self.call(&Call::Bootstrap(name, Box::new(bootstrap.clone()))).await
    }

    async fn agent(&self, name: DesktopName) -> Result<AgentChannel, ProviderError> {
        let ((), stream) = self.ask(&Call::Agent(name)).await?;
        Ok(channel::over(stream, CancellationToken::new()))
    }

    async fn rdp_address(&self, name: DesktopName) -> Result<SocketAddr, ProviderError> {
        self.call(&Call::Address(name)).await
    }

    async fn last_words(&self, name: DesktopName) -> Vec<Section> {
        let texts: Vec<String> = self.call(&Call::Words(name)).await.unwrap_or_default();
        let section = |text| Section {
            title: "console",
            text,
        };
        texts.into_iter().map(section).collect()
    }

    async fn destroy(&self, name: DesktopName) -> Result<Vec<Absence>, ProviderError> {
        self.call(&Call::Destroy(name)).await
    }

    async fn list(&self) -> Result<Vec<DesktopName>, ProviderError> {
        self.call(&Call::List).await
    }
}

/// Answers calls on `listener` with what `machines` says, for as long as this is polled; the calls themselves go on.
pub async fn serve(machines: Arc<dyn Provider>, listener: UnixListener) {
    while let Ok((stream, _)) = listener.accept().await {
        // A caller that is gone is its own affair.
        tokio::spawn(answer(machines.clone(), stream));
    }
}

async fn answer(machines: Arc<dyn Provider>, stream: UnixStream) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut asked = String::new();
    stream.read_line(&mut asked).await?;
    let mut agent = None;
    let answer = match serde_json::from_str(&asked)? {
        Call::Create(spec) => told(machines.create(&spec).await),
        Call::State(name) => told(machines.state(name).await),
        Call::Bootstrap(name, bootstrap) => told(machines.bootstrap(name, &bootstrap).await),
        Call::Agent(name) => told(machines.agent(name).await.map(|a| agent = Some(a))),
        Call::Address(name) => told(machines.rdp_address(name).await),
        Call::Words(name) => {
            let words = machines.last_words(name).await;
            told(Ok(words.into_iter().map(|w| w.text).collect::<Vec<_>>()))
        }
        Call::Destroy(name) => told(machines.destroy(name).await),
        Call::List => told(machines.list().await),
    };
    stream.write_all(&line(&answer)?).await?;
    match agent {
        Some(agent) => pass(stream, agent).await,
        None => Ok(()),
    }
}

fn told(done: Result<impl Serialize, ProviderError>) -> Result<Value, ProviderError> {
    serde_json::to_value(done?).map_err(failed)
}

fn line(what: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    Ok(line)
}

/// What an agent says and hears, until one side has enough.
async fn pass(stream: BufReader<UnixStream>, mut agent: AgentChannel) -> io::Result<()> {
    let (reader, mut writer) = tokio::io::split(stream);
    let mut heard = BufReader::new(reader).lines();
    loop {
        tokio::select! {
            said = agent.from_agent.recv() => {
                let Some(said) = said else { return Ok(()) };
                writer.write_all(&line(&said)?).await?;
            }
            heard = heard.next_line() => {
                let Some(heard) = heard? else { return Ok(()) };
                if agent.to_agent.send(serde_json::from_str(&heard)?).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}
