//! Points at which a test has the service killed: before and after every call that leaves it, and every commit.
//!
//! # Guarantees
//! * A release build has none of them. In a debug build they do nothing unless `MAYFLY_DIE_AT` or `MAYFLY_POINTS` is set.
//! * The death is a SIGKILL, as of a machine that fails: nothing is tidied up, no buffer is written.
//!
//! `MAYFLY_POINTS` is a file to which each point is written, one in a line, whenever it is reached: `before commit preparing, booting`.
//! `MAYFLY_DIE_AT` is such a line, and, after a `#`, the how many-th time counts: `after list#3`.

use crate::provider::Steps;
use nix::sys::signal::{Signal, raise};
use std::collections::HashMap;
use std::io::Write;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

/// What this process was told.
#[derive(Default)]
struct Orders {
    /// Where points are written that are reached.
    points: Option<Mutex<std::fs::File>>,
    /// Where it dies, and at the how many-th time.
    die_at: Option<(String, u32)>,
    reached: Mutex<HashMap<String, u32>>,
}

static ORDERS: LazyLock<Option<Orders>> = LazyLock::new(|| {
    if !cfg!(debug_assertions) {
        return None;
    }
    let points = std::env::var_os("MAYFLY_POINTS").and_then(|path| {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(path);
        file.ok().map(Mutex::new)
    });
    let die_at = std::env::var("MAYFLY_DIE_AT").ok().map(|told| {
        let (point, count) = told.rsplit_once('#').unwrap_or((&told, "1"));
        (point.to_owned(), count.parse().unwrap_or(1))
    });
    (points.is_some() || die_at.is_some()).then(|| Orders {
        points,
        die_at,
        reached: Mutex::default(),
    })
});

/// A point was reached.
fn reached(orders: &Orders, point: &str) {
    if let Some(file) = &orders.points {
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        // One write a line: whoever reads it sees whole ones.
        let _ = file.write_all(format!("{point}\n").as_bytes());
    }
    let Some((_, count)) = orders.die_at.as_ref().filter(|(at, _)| at == point) else {
        return;
    };
    let mut times = orders
        .reached
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let times = times.entry(point.to_owned()).or_default();
    *times += 1;
    if times == count {
        let _ = raise(Signal::SIGKILL);
    }
}

/// A point before what `what` names.
pub(crate) fn before(what: impl FnOnce() -> String) {
    if let Some(orders) = ORDERS.as_ref() {
        reached(orders, &format!("before {}", what()));
    }
}

/// A point after what `what` names.
pub(crate) fn after(what: impl FnOnce() -> String) {
    if let Some(orders) = ORDERS.as_ref() {
        reached(orders, &format!("after {}", what()));
    }
}

/// Awaits a call, between the points `before` and `after` it.
pub(crate) async fn around<T>(call: &str, outcome: impl Future<Output = T>) -> T {
    before(|| call.to_owned());
    let outcome = outcome.await;
    after(|| call.to_owned());
    outcome
}

/// Makes a call that waits for nobody, between the points `before` and `after` it.
pub(crate) fn between<T>(call: impl Fn() -> String, make: impl FnOnce() -> T) -> T {
    before(&call);
    let outcome = make();
    after(&call);
    outcome
}

/// Has each step of a provider's create or destroy be a point.
pub(crate) fn steps() -> Steps {
    Arc::new(|step| {
        after(|| step.to_owned());
        Ok(())
    })
}
