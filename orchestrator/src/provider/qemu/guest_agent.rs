//! The QEMU guest agent: how a file gets into a machine, and the words of a program out of it, without any network.
//! Protocol: QEMU's docs/interop/qemu-ga-ref.
//!
//! # Guarantees
//! * A stream that still holds half an old answer is brought in step first (`guest-sync-delimited`).
//! * Everything together has a bound, [`PATIENCE`].

use data_encoding::BASE64;
use serde_json::{Value, json};
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// An agent under software emulation on a busy host needs a moment; a dead one must not hold anybody up.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two questions whether a program has ended.
const LOOK: Duration = Duration::from_millis(100);
/// Before an answer to `guest-sync-delimited`.
const SENTINEL: u8 = 0xff;
/// The agent itself refuses larger messages.
const MAX_LINE: u64 = 1 << 20;

/// Why nothing got in or out.
#[derive(Debug, thiserror::Error)]
pub(super) enum GuestAgentError {
    /// The agent answered and refused.
    #[error("the guest agent refused {command}: {words}")]
    Refused {
        /// What was asked.
        command: String,
        /// Its words.
        words: String,
    },
    /// It did not answer, or not sensibly.
    #[error("the guest agent cannot be talked to: {0}")]
    Io(#[from] io::Error),
}

/// Writes a file in the machine: opened for writing, written whole, closed. Not atomic.
pub(super) async fn write_file(
    socket: &Path,
    path: &str,
    content: &[u8],
) -> Result<(), GuestAgentError> {
    let write = async {
        let mut agent = GuestAgent::connect(socket).await?;
        let handle = agent
            .execute("guest-file-open", json!({ "path": path, "mode": "w" }))
            .await?;
        let mut rest = content;
        while !rest.is_empty() {
            let arguments = json!({ "handle": handle, "buf-b64": BASE64.encode(rest) });
            let written = agent.execute("guest-file-write", arguments).await?;
            let count = written["count"]
                .as_u64()
                .and_then(|n| usize::try_from(n).ok());
            rest = match count {
                Some(count @ 1..) if count <= rest.len() => &rest[count..],
                _ => return Err(io::Error::other("it wrote nothing").into()),
            };
        }
        agent
            .execute("guest-file-close", json!({ "handle": handle }))
            .await?;
        Ok(())
    };
    bounded(write).await
}

/// Runs a program in the machine, as root, and returns its standard output whatever its exit code: less than [`MAX_LINE`] once it
/// is encoded, or an error.
pub(super) async fn run(socket: &Path, command: &[&str]) -> Result<String, GuestAgentError> {
    let run = async {
        let [path, arguments @ ..] = command else {
            return Err(io::Error::other("there is no command").into());
        };
        let mut agent = GuestAgent::connect(socket).await?;
        let order = json!({ "path": path, "arg": arguments, "capture-output": true });
        let started = agent.execute("guest-exec", order).await?;
        loop {
            let ask = json!({ "pid": started["pid"] });
            let status = agent.execute("guest-exec-status", ask).await?;
            if status["exited"] == true {
                let output = status["out-data"].as_str().unwrap_or_default();
                let output = BASE64.decode(output.as_bytes()).map_err(io::Error::other)?;
                return Ok(String::from_utf8_lossy(&output).into_owned());
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    bounded(run).await
}

async fn bounded<T>(
    talk: impl Future<Output = Result<T, GuestAgentError>>,
) -> Result<T, GuestAgentError> {
    timeout(PATIENCE, talk).await.unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer").into())
    })
}

struct GuestAgent {
    stream: BufReader<UnixStream>,
}

impl GuestAgent {
    /// Connects, and throws away whatever an earlier connection left in the stream.
    async fn connect(socket: &Path) -> Result<Self, GuestAgentError> {
        let mut agent = Self {
            stream: BufReader::new(UnixStream::connect(socket).await?),
        };
        let id = getrandom::u32().map_err(io::Error::other)?;
        // The sentinel makes the agent forget half a question.
        agent.stream.write_all(&[SENTINEL]).await?;
        agent
            .send("guest-sync-delimited", json!({ "id": id }))
            .await?;
        loop {
            let mut skipped = Vec::new();
            agent.stream.read_until(SENTINEL, &mut skipped).await?;
            if skipped.last() != Some(&SENTINEL) {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            // An older sync that nobody waited for may be answered first.
            if agent.receive().await?["return"] == id {
                return Ok(agent);
            }
        }
    }

    async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, GuestAgentError> {
        self.send(command, arguments).await?;
        let mut answer = self.receive().await?;
        if let Some(error) = answer.get("error") {
            return Err(GuestAgentError::Refused {
                command: command.to_owned(),
                words: error["desc"].as_str().unwrap_or("no reason").to_owned(),
            });
        }
        Ok(answer["return"].take())
    }

    async fn send(&mut self, command: &str, arguments: Value) -> io::Result<()> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        self.stream.write_all(line.as_bytes()).await?;
        self.stream.write_all(b"\n").await
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tokio::net::UnixListener;

    /// An agent with one file, which takes at most five bytes a write, and one program, which ends at the third question;
    /// `greeting` lies in the stream already.
    async fn agent(listener: UnixListener, greeting: &'static [u8], file: Arc<Mutex<Vec<u8>>>) {
        let (stream, _) = listener.accept().await.unwrap();
        let mut questions = 0;
        let mut stream = BufReader::new(stream);
        stream.write_all(greeting).await.unwrap();
        loop {
            let mut line = Vec::new();
            if stream.read_until(b'\n', &mut line).await.unwrap() == 0 {
                return;
            }
            let text = line.strip_prefix(&[SENTINEL]).unwrap_or(&line);
            let question: Value = serde_json::from_slice(text).unwrap();
            let arguments = &question["arguments"];
            let answer = match question["execute"].as_str().unwrap() {
                "guest-sync-delimited" => {
                    stream.write_all(&[SENTINEL]).await.unwrap();
                    json!({ "return": arguments["id"] })
                }
                "guest-file-open" if arguments["path"] == "/missing" => {
                    json!({ "error": { "class": "GenericError", "desc": "No such file" } })
                }
                "guest-file-open" => json!({ "return": 7 }),
                "guest-file-write" => {
                    let bytes = BASE64
                        .decode(arguments["buf-b64"].as_str().unwrap().as_bytes())
                        .unwrap();
                    let count = bytes.len().min(5);
                    file.lock().unwrap().extend_from_slice(&bytes[..count]);
                    json!({ "return": { "count": count, "eof": false } })
                }
                "guest-exec" if arguments["path"] == "/missing" => {
                    json!({ "error": { "class": "GenericError", "desc": "No such file" } })
                }
                "guest-exec" => {
                    assert_eq!(arguments["arg"], json!(["-c", "x"]));
                    json!({ "return": { "pid": 5 } })
                }
                "guest-exec-status" => {
                    questions += 1;
                    let output = BASE64.encode(b"said \xff");
                    json!({ "return": { "exited": questions > 2, "exitcode": 3, "out-data": output } })
                }
                _ => json!({ "return": {} }),
            };
            stream
                .write_all(format!("{answer}\n").as_bytes())
                .await
                .unwrap();
        }
    }

    async fn write_through(
        greeting: &'static [u8],
        content: &[u8],
    ) -> (Result<(), GuestAgentError>, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qga");
        let listener = UnixListener::bind(&path).unwrap();
        let file = Arc::default();
        let agent = tokio::spawn(agent(listener, greeting, Arc::clone(&file)));
        let target = if content.is_empty() {
            "/missing"
        } else {
            "/file"
        };
        let result = write_file(&path, target, content).await;
        agent.abort();
        let written = file.lock().unwrap().clone();
        (result, written)
    }

    #[tokio::test]
    async fn a_file_arrives_whole_through_short_writes() {
        let (result, written) = write_through(b"", b"one two three").await;
        result.unwrap();
        assert_eq!(written, b"one two three");
    }

    #[tokio::test]
    async fn a_stale_stream_is_brought_in_step() {
        let stale = b"{\"return\": {\"half\": tru\xff{\"return\": 99}\n{\"return\": {}}\n";
        let (result, written) = write_through(stale, b"abc").await;
        result.unwrap();
        assert_eq!(written, b"abc");
    }

    #[tokio::test]
    async fn a_refusal_is_told_apart_from_silence() {
        let (result, _) = write_through(b"", b"").await;
        assert!(matches!(result, Err(GuestAgentError::Refused { .. })));
    }

    #[tokio::test]
    async fn a_program_s_words_are_returned_when_it_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qga");
        for (command, said) in [("/bin/sh", Some("said \u{fffd}")), ("/missing", None)] {
            let _ = std::fs::remove_file(&path);
            let listener = UnixListener::bind(&path).unwrap();
            tokio::spawn(agent(listener, b"", Arc::default()));
            let result = run(&path, &[command, "-c", "x"]).await;
            assert_eq!(result.ok().as_deref(), said);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_has_an_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qga");
        let _listener = UnixListener::bind(&path).unwrap();
        let result = write_file(&path, "/file", b"x").await;
        assert!(
            matches!(result, Err(GuestAgentError::Io(e)) if e.kind() == io::ErrorKind::TimedOut)
        );
    }
}
