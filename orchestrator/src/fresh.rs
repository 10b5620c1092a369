//! What was found out a moment ago, so that a thousand who ask for the same at once have it found out once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// By a name. What is older than its age is found out again; meanwhile others who want to know wait for that.
#[derive(Debug)]
pub(crate) struct Fresh<T> {
    age: Duration,
    known: Mutex<HashMap<String, Slot<T>>>,
}

type Slot<T> = Arc<tokio::sync::Mutex<Option<(Instant, T)>>>;

impl<T: Clone> Fresh<T> {
    pub(crate) fn new(age: Duration) -> Self {
        Self {
            age,
            known: Mutex::default(),
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Slot<T>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of `name`, or else what `find` finds. A failure is nobody else's.
    pub(crate) async fn get<E>(
        &self,
        name: &str,
        find: impl AsyncFnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let slot = {
            let mut known = self.known();
            match known.get(name) {
                Some(slot) => slot.clone(),
                None => known.entry(name.to_owned()).or_default().clone(),
            }
        };
        let mut slot = slot.lock().await;
        if let Some((at, value)) = &*slot
            && at.elapsed() < self.age
        {
            return Ok(value.clone());
        }
        let (at, value) = (Instant::now(), find().await?);
        *slot = Some((at, value.clone()));
        Ok(value)
    }

    /// All of it may be otherwise now.
    pub(crate) fn forget(&self) {
        self.known().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test]
    async fn it_is_found_once_for_all_and_again_when_it_is_old_or_failed() {
        let found = AtomicU32::new(0);
        let find = async || Ok::<_, ()>(found.fetch_add(1, Ordering::Relaxed));
        let fresh = Fresh::new(Duration::from_secs(3600));
        let (a, b) = tokio::join!(fresh.get("a", find), fresh.get("a", find));
        assert_eq!((a, b), (Ok(0), Ok(0)));
        assert_eq!(fresh.get("b", find).await, Ok(1));
        fresh.forget();
        assert_eq!(fresh.get("a", async || Err(7)).await, Err(7));
        assert_eq!(fresh.get("a", find).await, Ok(2));
        let old = Fresh::new(Duration::ZERO);
        assert_eq!(old.get("a", find).await, Ok(3));
        assert_eq!(old.get("a", find).await, Ok(4));
    }
}
