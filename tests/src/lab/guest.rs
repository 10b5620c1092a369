//! Looks into a desktop from outside, through the QEMU guest agent: the witness that Mayfly cannot fool.

use anyhow::{Context, Result, bail, ensure};
use data_encoding::BASE64;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::until;

/// One answer of the guest agent; an emulated machine under load is slow.
const ANSWER: Duration = Duration::from_secs(20);

/// A desktop's inside, by its guest agent's socket on the host.
#[derive(Clone, Debug)]
pub struct Guest {
    socket: PathBuf,
}

/// What a program in the desktop said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit code; -1 if a signal ended it.
    pub code: i64,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Guest {
    /// The desktop behind this socket.
    #[must_use]
    pub fn at(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Runs a program in the desktop, as root, and waits for its end.
    ///
    /// # Errors
    /// When the agent does not answer, refuses, or the program runs longer than `bound`.
    pub async fn run(&self, argv: &[&str], bound: Duration) -> Result<Output> {
        let (program, args) = argv.split_first().context("no program")?;
        let started = self
            .call(&json!({"execute": "guest-exec",
                "arguments": {"path": program, "arg": args, "capture-output": true}}))
            .await?;
        let pid = started["pid"].clone();
        let what = format!("{argv:?} ends in the desktop");
        let ended = until(&what, bound, async || {
            let status = self
                .call(&json!({"execute": "guest-exec-status", "arguments": {"pid": pid}}))
                .await?;
            Ok((status["exited"] == true).then_some(status))
        })
        .await?;
        let text = |name: &str| -> Result<String> {
            let bytes = BASE64.decode(ended[name].as_str().unwrap_or_default().as_bytes())?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        Ok(Output {
            code: ended["exitcode"].as_i64().unwrap_or(-1),
            out: text("out-data")?,
            err: text("err-data")?,
        })
    }

    /// Runs a line of shell in the desktop, as root; its standard output.
    ///
    /// # Errors
    /// As [`Self::run`], and when it fails.
    pub async fn shell(&self, line: &str, bound: Duration) -> Result<String> {
        let output = self.run(&["/bin/sh", "-c", line], bound).await?;
        ensure!(
            output.code == 0,
            "`{line}` failed in the desktop ({}): {}",
            output.code,
            output.err
        );
        Ok(output.out)
    }

    /// A file of the desktop; `None` if it is not there.
    ///
    /// # Errors
    /// When the agent does not answer or the file cannot be read.
    pub async fn read_file(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let test = self
            .run(&["/bin/sh", "-c", "test -e \"$0\"", path], ANSWER)
            .await?;
        if test.code != 0 {
            return Ok(None);
        }
        let open = json!({"execute": "guest-file-open", "arguments": {"path": path, "mode": "r"}});
        let handle = self.call(&open).await?;
        let mut bytes = Vec::new();
        loop {
            let read = json!({"execute": "guest-file-read", "arguments": {"handle": handle}});
            let part = self.call(&read).await?;
            let text = part["buf-b64"].as_str().unwrap_or_default();
            bytes.extend(BASE64.decode(text.as_bytes())?);
            if part["eof"] == true {
                break;
            }
        }
        let close = json!({"execute": "guest-file-close", "arguments": {"handle": handle}});
        self.call(&close).await?;
        Ok(Some(bytes))
    }

    /// One command on a connection of its own: the socket takes one client at a time, and the orchestrator needs it too.
    async fn call(&self, command: &Value) -> Result<Value> {
        let answer = tokio::time::timeout(ANSWER, self.call_unbounded(command)).await;
        let socket = self.socket.display();
        answer
            .with_context(|| format!("the guest agent behind {socket} is silent for {ANSWER:?}"))?
            .with_context(|| format!("asking the guest agent behind {socket}"))
    }

    async fn call_unbounded(&self, command: &Value) -> Result<Value> {
        let mut stream = BufReader::new(UnixStream::connect(&self.socket).await?);
        // What an earlier client left unread is skipped up to the delimiter (QGA reference, guest-sync-delimited).
        let token = std::process::id();
        let sync = json!({"execute": "guest-sync-delimited", "arguments": {"id": token}});
        stream.write_all(b"\xff").await?;
        stream.write_all(format!("{sync}\n").as_bytes()).await?;
        let mut skipped = Vec::new();
        loop {
            skipped.clear();
            ensure!(
                stream.read_until(0xff, &mut skipped).await? > 0,
                "the connection closed"
            );
            let mut line = String::new();
            stream.read_line(&mut line).await?;
            let answer: Value = serde_json::from_str(&line).unwrap_or_default();
            if answer["return"] == token {
                break;
            }
        }
        stream.write_all(format!("{command}\n").as_bytes()).await?;
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let mut answer: Value = serde_json::from_str(&line)
            .with_context(|| format!("the answer is not JSON: {line:?}"))?;
        if !answer["error"].is_null() {
            bail!("{}", answer["error"]);
        }
        Ok(answer["return"].take())
    }
}
