//! QMP, the control socket of QEMU: one question at a time, each within a bound.
//! Protocol: QEMU's docs/interop/qmp-spec. Events are ignored.

use serde_json::{Value, json};
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// QEMU answers these questions from its main loop: at once, unless the host is very busy.
const PATIENCE: Duration = Duration::from_secs(5);
/// No answer that we ask for comes near this.
const MAX_LINE: u64 = 1 << 20;

/// A connection. QEMU serves one at a time; others wait.
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
    next_id: u64,
}

impl Qmp {
    /// Connects and leaves the negotiation behind.
    pub(super) async fn connect(socket: &Path) -> io::Result<Self> {
        bounded(async {
            let mut qmp = Self {
                stream: BufReader::new(UnixStream::connect(socket).await?),
                next_id: 0,
            };
            while qmp.receive().await?.get("QMP").is_none() {}
            qmp.ask("qmp_capabilities", json!({})).await?;
            Ok(qmp)
        })
        .await
    }

    /// Runs a command and returns what it returns.
    pub(super) async fn execute(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        bounded(self.ask(command, arguments)).await
    }

    async fn ask(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        self.next_id += 1;
        let question =
            json!({ "execute": command, "arguments": arguments, "id": self.next_id }).to_string();
        self.stream.write_all(question.as_bytes()).await?;
        self.stream.write_all(b"\n").await?;
        loop {
            let mut answer = self.receive().await?;
            if answer["id"] != self.next_id {
                continue;
            }
            if let Some(error) = answer.get("error") {
                let words = error["desc"].as_str().unwrap_or("no reason given");
                return Err(io::Error::other(format!("QEMU refused {command}: {words}")));
            }
            return Ok(answer["return"].take());
        }
    }

    async fn receive(&mut self) -> io::Result<Value> {
        let mut line = Vec::new();
        (&mut self.stream)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .await?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_slice(&line)?)
    }
}

async fn bounded<T>(question: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(PATIENCE, question).await.unwrap_or_else(|_| {
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "QEMU does not answer",
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// A QEMU that plays a script: each line read is answered by the next entry.
    async fn scripted(answers: &'static [&'static str]) -> io::Result<Qmp> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path)?;
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            stream.write_all(b"{\"QMP\": {}}\n").await.unwrap();
            let capable = "{\"return\": {}, \"id\": 1}\n";
            for answer in std::iter::once(&capable).chain(answers) {
                let mut question = String::new();
                stream.read_line(&mut question).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        Qmp::connect(&path).await
    }

    #[tokio::test]
    async fn events_and_answers_to_others_are_passed_over() {
        let mut qmp = scripted(&[
            "{\"event\": \"RESUME\"}\n{\"return\": \"other\", \"id\": 1}\n{\"return\": {\"status\": \"running\"}, \"id\": 2}\n",
        ])
        .await
        .unwrap();
        let status = qmp.execute("query-status", json!({})).await.unwrap();
        assert_eq!(status["status"], "running");
    }

    #[tokio::test]
    async fn a_refusal_carries_the_words_of_qemu() {
        let mut qmp = scripted(&[
            "{\"error\": {\"class\": \"X\", \"desc\": \"no such thing\"}, \"id\": 2}\n",
        ])
        .await
        .unwrap();
        let error = qmp.execute("x", json!({})).await.unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused x: no such thing");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_has_an_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let _listener = UnixListener::bind(&path).unwrap();
        let error = Qmp::connect(&path).await.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
