//! The channel to a desktop's agent: JSON lines over whatever carries bytes. A virtio-serial port, which QEMU shows as a unix
//! socket; or the line that an agent opened over the network.

use super::AgentChannel;
use mayfly_api::agent::{FromAgent, ToAgent};
use std::io;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// The guest is not trusted: a line may not grow without end.
const MAX_LINE: u64 = 64 << 10;
/// Messages that wait for their reader; after that the guest waits.
const QUEUE: usize = 32;

/// A channel over `stream`. It closes when either end of the returned pair is dropped, with the stream, or when `cut` is cancelled.
pub(crate) fn over(
    stream: impl AsyncRead + AsyncWrite + Send + 'static,
    cut: CancellationToken,
) -> AgentChannel {
    let (reader, writer) = tokio::io::split(stream);
    let (to_control, from_agent) = mpsc::channel(QUEUE);
    let (to_agent, from_control) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let closed = to_control.clone();
        tokio::select! {
            _ = receive(reader, to_control) => {}
            _ = send(writer, from_control) => {}
            () = closed.closed() => {}
            () = cut.cancelled() => {}
        }
    });
    AgentChannel {
        from_agent,
        to_agent,
    }
}

async fn receive(
    reader: impl AsyncRead + Unpin,
    to_control: mpsc::Sender<FromAgent>,
) -> io::Result<()> {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    // The first piece may be the end of a line whose beginning an earlier connection took.
    loop {
        line.clear();
        if (&mut reader)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .await?
            == 0
        {
            return Ok(());
        }
        if let Ok(message) = serde_json::from_slice(&line)
            && to_control.send(message).await.is_err()
        {
            return Ok(());
        }
    }
}

async fn send(
    mut writer: impl AsyncWrite + Unpin,
    mut from_control: mpsc::Receiver<ToAgent>,
) -> io::Result<()> {
    while let Some(message) = from_control.recv().await {
        let mut line = serde_json::to_vec(&message)?;
        line.push(b'\n');
        writer.write_all(&line).await?;
        writer.flush().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixStream;

    #[tokio::test]
    async fn messages_go_both_ways_and_noise_is_passed_over() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut channel = over(ours, CancellationToken::new());
        let mut guest = BufReader::new(theirs);
        guest
            .write_all(b"ctions\":0}\n{\"type\":\"from_the_future\"}\n{\"type\":\"evidence\",\"connections\":1}\n")
            .await
            .unwrap();
        let message = channel.from_agent.recv().await;
        assert!(matches!(
            message,
            Some(FromAgent::Evidence { connections: 1, .. })
        ));
        channel.to_agent.send(ToAgent::Ack).await.unwrap();
        let mut line = String::new();
        guest.read_line(&mut line).await.unwrap();
        assert_eq!(line, "{\"type\":\"ack\"}\n");
    }

    #[tokio::test]
    async fn a_dropped_channel_closes_the_connection() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        drop(over(ours, CancellationToken::new()));
        assert_eq!(theirs.read(&mut [0; 8]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn the_messages_end_with_the_machine() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut channel = over(ours, CancellationToken::new());
        drop(theirs);
        assert!(channel.from_agent.recv().await.is_none());
    }
}
