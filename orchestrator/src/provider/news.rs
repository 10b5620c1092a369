//! What making a machine is at, from whoever makes it to whoever follows that.
//!
//! # Guarantees
//! * Telling never waits, and costs nothing where nobody follows.
//! * Who follows hears something at most once a second, and the latest then; what is told last is not lost.

use mayfly_api::{DesktopName, StageProgress};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Between two words: each is written down, and read by a person.
const PAUSE: Duration = Duration::from_secs(1);

type Sender = watch::Sender<Option<StageProgress>>;

/// What is told of machines that are being made. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct News(Arc<Mutex<HashMap<DesktopName, Sender>>>);

impl News {
    fn map(&self) -> MutexGuard<'_, HashMap<DesktopName, Sender>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Making it is at that; `None`: at nothing that can be told.
    pub fn tell(&self, name: DesktopName, progress: Option<StageProgress>) {
        if let Some(sender) = self.map().get(&name) {
            sender.send_if_modified(|before| {
                let new = *before != progress;
                *before = progress;
                new
            });
        }
    }

    /// Hears what is told of it from now on.
    #[must_use]
    pub fn follow(&self, name: DesktopName) -> Listener {
        let mut map = self.map();
        map.retain(|_, sender| sender.receiver_count() > 0);
        Listener {
            told: map.entry(name).or_default().subscribe(),
            not_before: Instant::now(),
        }
    }
}

/// Hears what is told of one machine; at first, of none.
#[derive(Debug)]
pub struct Listener {
    told: watch::Receiver<Option<StageProgress>>,
    not_before: Instant,
}

impl Default for Listener {
    fn default() -> Self {
        Self {
            told: watch::channel(None).1,
            not_before: Instant::now(),
        }
    }
}

impl Listener {
    /// The next word. Nothing is lost if this is dropped while it waits.
    pub async fn next(&mut self) -> Option<StageProgress> {
        tokio::time::sleep_until(self.not_before).await;
        if self.told.changed().await.is_err() {
            return std::future::pending().await;
        }
        self.not_before = Instant::now() + PAUSE;
        self.told.borrow_and_update().clone()
    }

    /// The last word, if it was not heard yet.
    pub fn unheard(&mut self) -> Option<StageProgress> {
        let new = self.told.has_changed().unwrap_or(false);
        self.told.borrow_and_update().clone().filter(|_| new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(number: u32) -> Option<StageProgress> {
        Some(StageProgress::Task {
            number,
            name: "x".to_owned(),
        })
    }

    #[tokio::test(start_paused = true)]
    async fn who_follows_hears_the_latest_once_a_second_and_the_last_of_all() {
        let (news, name) = (News::default(), DesktopName::from_number(1).unwrap());
        news.tell(name, task(1));
        let mut listener = news.follow(name);
        assert_eq!(listener.unheard(), None, "nobody followed");
        let begin = Instant::now();
        for number in 2..100 {
            news.tell(name, task(number));
        }
        assert_eq!(listener.next().await, task(99));
        assert_eq!(begin.elapsed(), Duration::ZERO);
        news.tell(name, task(100));
        // As in a `select!` that something else wins.
        let dropped = tokio::time::timeout(PAUSE / 2, listener.next()).await;
        assert!(dropped.is_err());
        news.tell(name, task(101));
        assert_eq!(listener.next().await, task(101));
        assert_eq!(begin.elapsed(), PAUSE);
        news.tell(name, task(102));
        assert_eq!(listener.unheard(), task(102));
        assert_eq!(listener.unheard(), None);
        news.tell(name, task(102));
        assert_eq!(listener.unheard(), None, "that is not new");
    }

    #[test]
    fn what_nobody_follows_any_more_is_forgotten() {
        let (news, name) = (News::default(), |n| DesktopName::from_number(n).unwrap());
        drop(news.follow(name(1)));
        let _second = news.follow(name(2));
        assert_eq!(news.map().len(), 1);
    }
}
