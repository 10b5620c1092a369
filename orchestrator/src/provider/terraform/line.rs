//! Who waits until the storage takes another clone, first come first.

use crate::provider::news::News;
use mayfly_api::{DesktopName, StageProgress};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The line.
#[derive(Debug, Default)]
pub(super) struct Line(Mutex<Vec<DesktopName>>);

/// Somebody's place in it, until dropped.
pub(super) struct InLine<'a>(&'a Line, DesktopName);

impl Line {
    fn names(&self) -> MutexGuard<'_, Vec<DesktopName>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last place.
    pub(super) fn join(&self, name: DesktopName) -> InLine<'_> {
        self.names().push(name);
        InLine(self, name)
    }

    /// Tells each its place.
    pub(super) fn tell(&self, news: &News) {
        for (place, name) in (1..).zip(self.names().iter()) {
            news.tell(*name, Some(StageProgress::WaitingForStorage { place }));
        }
    }
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        self.0.names().retain(|name| *name != self.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_leaves_moves_the_others_up() {
        let (line, news) = (Line::default(), News::default());
        let names = [1, 2, 3].map(|n| DesktopName::from_number(n).unwrap());
        let mut listeners = names.map(|name| news.follow(name));
        let mut places = || {
            line.tell(&news);
            let mut said = listeners.iter_mut();
            [(); 3].map(|()| match said.next().unwrap().unheard() {
                Some(StageProgress::WaitingForStorage { place }) => Some(place),
                _ => None,
            })
        };
        let [first, second, _third] = names.map(|name| line.join(name));
        assert_eq!(places(), [Some(1), Some(2), Some(3)]);
        assert_eq!(places(), [None; 3], "nobody moved");
        drop(second);
        assert_eq!(places(), [None, None, Some(2)]);
        drop(first);
        assert_eq!(places(), [None, None, Some(1)]);
    }
}
