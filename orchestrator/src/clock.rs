//! The one clock of the control plane, and arithmetic on its times.
//!
//! It shows the wall time at its start plus the monotonic time since: a jump of the wall clock ends nobody's session,
//! and a suspended machine does not age. Tests push it forward with [`Clock::advance`].

use jiff::Timestamp;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// A clock. Clones show the same time.
#[derive(Clone, Debug)]
pub struct Clock {
    base: Timestamp,
    started: Instant,
    pushed: watch::Sender<Duration>,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            base: Timestamp::now(),
            started: Instant::now(),
            pushed: watch::Sender::new(Duration::ZERO),
        }
    }
}

impl Clock {
    /// Now, to the microsecond (what the store keeps).
    #[must_use]
    pub fn now(&self) -> Timestamp {
        let now = after(self.base, self.started.elapsed() + *self.pushed.borrow());
        Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now)
    }

    /// Pushes every clone forward, and wakes who sleeps on them. For tests of time limits.
    pub fn advance(&self, by: Duration) {
        self.pushed.send_modify(|pushed| *pushed += by);
    }

    /// Sleeps until `at`; forever without one.
    pub async fn sleep_until(&self, at: Option<Timestamp>) {
        let Some(at) = at else {
            return std::future::pending().await;
        };
        let mut pushed = self.pushed.subscribe();
        loop {
            let left = between(self.now(), at);
            if left.is_zero() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(left) => {}
                _ = pushed.changed() => {}
            }
        }
    }
}

/// `at` plus `by`; the end of time if it is later than that.
#[must_use]
pub fn after(at: Timestamp, by: Duration) -> Timestamp {
    at.checked_add(by).unwrap_or(Timestamp::MAX)
}

/// From `from` to `to`; zero if `to` is not later.
#[must_use]
pub fn between(from: Timestamp, to: Timestamp) -> Duration {
    Duration::try_from(to.duration_since(from)).unwrap_or(Duration::ZERO)
}

/// From `from` to `to` in milliseconds.
#[must_use]
pub fn ms_between(from: Timestamp, to: Timestamp) -> u64 {
    u64::try_from(between(from, to).as_millis()).unwrap_or(u64::MAX)
}

/// `seconds` as a duration.
#[must_use]
pub fn s(seconds: u32) -> Duration {
    Duration::from_secs(seconds.into())
}
