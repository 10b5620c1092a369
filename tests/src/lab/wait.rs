//! Waits for a state, never for a time.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(50);

/// Looks until there is something to see, and returns it.
///
/// # Errors
/// The probe's own error at once; after `bound`, an error that says what was waited for.
pub async fn until<T>(
    what: &str,
    bound: Duration,
    mut probe: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + bound;
    loop {
        if let Some(found) = probe().await? {
            return Ok(found);
        }
        if Instant::now() > end {
            bail!("waited {} s in vain until {what}", bound.as_secs());
        }
        tokio::time::sleep(PAUSE).await;
    }
}
