//! Follows a task to its end, and says how it ended.
//!
//! A task succeeded only if it `stopped` with the exit status `OK`, or with `WARNINGS: n`; what the call that started it
//! answered says nothing about it.

use super::call;
use super::client::Client;
use super::error::{Cause, PveError, Retry};
use super::reply::{TaskState, TaskStatus};
use super::upid::Upid;
use crate::clock::{Clock, after, between};
use async_trait::async_trait;
use std::collections::VecDeque;
use std::time::Duration;

/// So many of a failed task's last lines are kept.
const LAST_LINES: usize = 10;
/// Lines of one answer, and the most answers that are read of a long log.
const PAGE: u32 = 1000;
const PAGES: u32 = 20;

/// A task that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// How many warnings are in its log.
    pub warnings: u32,
}

/// How long a task is waited for, and how often it is asked.
#[derive(Clone, Debug)]
pub struct Patience {
    /// Whose time it is.
    pub clock: Clock,
    /// The longest wait. The task goes on after it.
    pub limit: Duration,
    /// The first pause between two questions; each is twice the one before,
    pub first: Duration,
    /// and none longer than this.
    pub longest: Duration,
}

impl Patience {
    /// Up to `limit`, asking after 0.2 s, 0.4 s and so on, then every 2 s.
    #[must_use]
    pub fn of(clock: &Clock, limit: Duration) -> Self {
        Self {
            clock: clock.clone(),
            limit,
            first: Duration::from_millis(200),
            longest: Duration::from_secs(2),
        }
    }
}

/// Where tasks are asked about. [`Client`] is one; tests have another.
#[async_trait]
pub trait Tasks: Sync {
    /// Whether it runs, or how it ended.
    async fn status(&self, upid: &Upid) -> Result<TaskStatus, PveError>;
    /// The last lines of its log, ten at most.
    async fn last_lines(&self, upid: &Upid) -> Result<Vec<String>, PveError>;
}

#[async_trait]
impl Tasks for Client {
    async fn status(&self, upid: &Upid) -> Result<TaskStatus, PveError> {
        self.send(&call::task_status(upid)).await
    }

    async fn last_lines(&self, upid: &Upid) -> Result<Vec<String>, PveError> {
        let mut last = VecDeque::new();
        for page in 0..PAGES {
            let lines = self.send(&call::task_log(upid, page * PAGE, PAGE)).await?;
            let whole = lines.len() >= PAGE as usize;
            for line in lines {
                if last.len() == LAST_LINES {
                    last.pop_front();
                }
                last.push_back(line.text);
            }
            if !whole {
                break;
            }
        }
        Ok(last.into())
    }
}

/// Waits for a task's end. While its node cannot be reached it is asked again, until the time is up.
///
/// # Errors
/// [`PveError::TaskFailed`] with the end of its log, [`PveError::TaskRuns`] when the time is up, and whatever asking fails with
/// that asking again does not help.
pub async fn follow(
    tasks: &impl Tasks,
    upid: &Upid,
    patience: &Patience,
) -> Result<Finished, PveError> {
    let Patience {
        clock,
        limit,
        first,
        longest,
    } = patience;
    let end = after(clock.now(), *limit);
    let mut pause = *first;
    loop {
        let last = match tasks.status(upid).await {
            Ok(TaskStatus {
                status: TaskState::Stopped,
                exitstatus,
            }) => return ended(tasks, upid, exitstatus.as_deref()).await,
            Ok(_) => None,
            Err(error) if error.retry() == Retry::Again => Some(error.to_string()),
            Err(error) => return Err(error),
        };
        let left = between(clock.now(), end);
        if left.is_zero() {
            return Err(PveError::TaskRuns {
                upid: upid.clone(),
                limit: *limit,
                last,
            });
        }
        clock
            .sleep_until(Some(after(clock.now(), pause.min(left))))
            .await;
        pause = (pause * 2).min(*longest);
    }
}

async fn ended(tasks: &impl Tasks, upid: &Upid, exit: Option<&str>) -> Result<Finished, PveError> {
    let exit = exit.unwrap_or("ended without an exit status");
    if let Some(warnings) = success(exit) {
        return Ok(Finished { warnings });
    }
    // The exit status says it all if the log cannot be had.
    let log = tasks.last_lines(upid).await.unwrap_or_default();
    Err(PveError::TaskFailed {
        upid: upid.clone(),
        exit: exit.to_owned(),
        log,
        cause: Cause::of(exit),
    })
}

/// The number of warnings of a success: `OK` has none, `WARNINGS: 2` two.
fn success(exit: &str) -> Option<u32> {
    match exit.strip_prefix("WARNINGS: ") {
        Some(number) => number.trim().parse().ok(),
        None => (exit == "OK").then_some(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pve::Effect;
    use std::sync::Mutex;
    use tokio::time::Instant;

    /// Answers what it is told to, then that the task runs.
    struct Script(Mutex<VecDeque<Result<TaskStatus, PveError>>>);

    #[async_trait]
    impl Tasks for Script {
        async fn status(&self, _: &Upid) -> Result<TaskStatus, PveError> {
            let next = self.0.lock().unwrap().pop_front();
            next.unwrap_or_else(|| Ok(running()))
        }

        async fn last_lines(&self, _: &Upid) -> Result<Vec<String>, PveError> {
            Ok(vec!["the end".to_owned()])
        }
    }

    fn running() -> TaskStatus {
        TaskStatus {
            status: TaskState::Running,
            exitstatus: None,
        }
    }

    fn stopped(exit: Option<&str>) -> TaskStatus {
        TaskStatus {
            status: TaskState::Stopped,
            exitstatus: exit.map(str::to_owned),
        }
    }

    async fn followed(
        answers: impl IntoIterator<Item = Result<TaskStatus, PveError>>,
    ) -> Result<Finished, PveError> {
        let upid = "UPID:pve1:0003C9E2:0A1B2C3D:675F0A11:qmclone:9000:a@pve!b:"
            .parse()
            .unwrap();
        let patience = Patience::of(&Clock::default(), Duration::from_secs(60));
        let script = Script(Mutex::new(answers.into_iter().collect()));
        follow(&script, &upid, &patience).await
    }

    fn unreachable(status: u16) -> PveError {
        PveError::NodeUnreachable {
            call: "GET /x".to_owned(),
            effect: Effect::Reads,
            status,
            reason: "No route to host".to_owned(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_succeeds_with_ok_or_warnings_and_nothing_else() {
        let warnings = |exit: &'static str| async move {
            followed([Ok(running()), Ok(stopped(Some(exit)))])
                .await
                .map(|finished| finished.warnings)
        };
        assert_eq!(warnings("OK").await.unwrap(), 0);
        assert_eq!(warnings("WARNINGS: 2").await.unwrap(), 2);
        for exit in ["WARNINGS", "ok", "unexpected status", "OK, almost", ""] {
            let error = warnings(exit).await.unwrap_err();
            assert!(matches!(error, PveError::TaskFailed { .. }), "{error}");
        }
        let error = followed([Ok(stopped(None))]).await.unwrap_err().to_string();
        assert!(error.contains("ended without an exit status"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_task_says_why_with_the_end_of_its_log() {
        let exit = "clone failed: unable to write to storage 'a': No space left on device";
        let error = followed([Ok(stopped(Some(exit)))]).await.unwrap_err();
        assert_eq!(
            (error.cause(), error.retry()),
            (Cause::NoSpace, Retry::Never)
        );
        let said = error.to_string();
        assert!(
            said.contains(exit) && said.ends_with("its log ends with: the end"),
            "{said}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_is_gone_for_a_while_is_asked_again() {
        let answers = [
            Ok(running()),
            Err(unreachable(595)),
            Err(unreachable(596)),
            Ok(stopped(Some("OK"))),
        ];
        assert_eq!(followed(answers).await.unwrap(), Finished { warnings: 0 });
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_has_an_end_and_the_pauses_grow() {
        let start = Instant::now();
        let error = followed([]).await.unwrap_err();
        assert_eq!(error.retry(), Retry::Look);
        assert!(
            error.to_string().contains("did not end within 60 s"),
            "{error}"
        );
        let waited = start.elapsed();
        assert!((60..62).contains(&waited.as_secs()), "{waited:?}");

        let start = Instant::now();
        let answers = (0..5)
            .map(|_| Ok(running()))
            .chain([Ok(stopped(Some("OK")))]);
        followed(answers).await.unwrap();
        // 0.2 + 0.4 + 0.8 + 1.6 + 2
        let waited = start.elapsed().as_millis();
        assert!((5000..5100).contains(&waited), "{waited}");
    }
}
